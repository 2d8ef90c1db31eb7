"""Sorted lists of tokens cut into buckets: what hashing and clustering hand to the kernel that attends.

A selector writes each token into one list entry per round (or cluster) that holds it; the kernel knows
neither hashes nor centroids, only which entries see each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Visits:
    """The inverse of a list: entries (B, Hs, L) int32 ordered by token, starts (B, Hs, tokens + 1) int32.

    The entries that hold token i are ``entries[starts[i] : starts[i + 1]]``, in ascending order.
    """

    entries: Tensor
    starts: Tensor


@dataclass(frozen=True, eq=False)
class Buckets:
    """Query and key lists cut into the same number of buckets; a bucket sees itself and those before it.

    An entry of query bucket g sees the key entries of the buckets g, g − 1, …, g − look_back, cyclically
    (bucket 0 looks back at the last one), where both labels, if given, are equal. A token may stand in many
    entries (rounds of hashing, overlapping clusters), and a pair of tokens may then be seen many times.
    Build one with :meth:`chunks` or :meth:`by_id`.

    Attributes:
        queries: (B, Hs, Lq) int32, the query token of each entry; −1 is an empty entry. B or Hs may be 1,
            Hs divides the heads of the call. Not checked, for that would wait for the device: all below n.
        keys: (B, Hs, Lk) int32, the same for keys.
        n, m: queries and keys of the call.
        count: buckets.
        look_back: preceding buckets that a bucket sees besides itself, less than count.
        query_chunk, key_chunk: entries of every bucket; 0 where offsets say it.
        query_offsets, key_offsets: (B, Hs, count + 1) int32, first entry of each bucket and the end, or None.
        query_labels, key_labels: (B, Hs, Lq) and (B, Hs, Lk) integers, or None.
        distinct: no token stands in two entries of a list, which saves the kernels a merge. Not checked.
    """

    queries: Tensor
    keys: Tensor
    n: int
    m: int
    count: int
    look_back: int = 0
    query_chunk: int = 0
    key_chunk: int = 0
    query_offsets: Tensor | None = None
    key_offsets: Tensor | None = None
    query_labels: Tensor | None = None
    key_labels: Tensor | None = None
    distinct: bool = False

    @classmethod
    def chunks(
        cls,
        queries: Tensor,
        chunk: int,
        n: int,
        *,
        keys: Tensor | None = None,
        key_chunk: int | None = None,
        m: int | None = None,
        look_back: int = 0,
        labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        distinct: bool = False,
    ) -> Buckets:
        """Buckets of equal size: ``chunk`` entries of ``queries`` (B, Hs, Lq) and ``key_chunk`` of ``keys``.

        Without ``keys`` the lists, chunks, labels and tokens of the keys are the queries'. The length of a
        list must be a multiple of its chunk: fill up with −1. Raises ValueError where it is not, where the
        lists make different numbers of chunks, or where look_back reaches a bucket twice.
        """
        shared = keys is None
        queries = queries.to(torch.int32)
        keys = queries if keys is None else keys.to(torch.int32)
        key_chunk = chunk if key_chunk is None else key_chunk
        for name, entries, size in (("queries", queries, chunk), ("keys", keys, key_chunk)):
            if size < 1 or entries.shape[-1] % size:
                raise ValueError(
                    f"{name}: observed {entries.shape[-1]} entries, expected a multiple of {size}"
                )
        count = queries.shape[-1] // chunk
        if keys.shape[-1] // key_chunk != count:
            raise ValueError(
                f"keys: observed {keys.shape[-1] // key_chunk} chunks, expected {count} as of queries"
            )
        if not 0 <= look_back < max(count, 1):
            raise ValueError(f"look_back: observed {look_back}, expected 0 to {count - 1} for {count} chunks")
        if shared and key_labels is None:
            key_labels = labels
        if (labels is None) != (key_labels is None):
            raise ValueError("labels: observed those of one list, expected both or none")
        return cls(
            queries,
            keys,
            n,
            n if m is None else m,
            count,
            look_back,
            chunk,
            key_chunk,
            query_labels=labels,
            key_labels=key_labels,
            distinct=distinct,
        )

    @classmethod
    def by_id(cls, query_ids: Tensor, key_ids: Tensor, count: int) -> Buckets:
        """Buckets of any size: query i sees key j iff their ids are equal.

        ``query_ids`` (B, Hs, N) and ``key_ids`` (B, Hs, M) are integers in 0..count−1. Entries of a bucket
        stand in the order of their tokens.
        """
        queries, query_offsets = _sorted(query_ids, count)
        keys, key_offsets = (queries, query_offsets) if key_ids is query_ids else _sorted(key_ids, count)
        return cls(
            queries,
            keys,
            query_ids.shape[-1],
            key_ids.shape[-1],
            count,
            query_offsets=query_offsets,
            key_offsets=key_offsets,
            distinct=True,
        )

    @cached_property
    def query_visits(self) -> Visits:
        """The entries of every query token, found by a stable sort on the first use."""
        return _inverse(self.queries, self.n)

    @cached_property
    def key_visits(self) -> Visits:
        """The entries of every key token."""
        if self.keys is self.queries and self.m == self.n:
            return self.query_visits
        return _inverse(self.keys, self.m)

    @cached_property
    def _tables(self) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        return {}

    def tiles(self, side: Literal["query", "key"], block: int) -> tuple[Tensor, Tensor]:
        """Ragged buckets cut into tiles of ``block`` entries: the bucket and the first entry of each tile.

        Both (B, Hs, ⌈L/block⌉ + count) int32: no more tiles can be needed. A tile without work belongs to
        the last bucket and starts at the end of the list. Kept, for every pass of a call asks again.
        """
        if (side, block) not in self._tables:
            offsets = self.query_offsets if side == "query" else self.key_offsets
            if offsets is None:
                raise ValueError(f"tiles of {side} buckets: observed equal chunks, expected ragged buckets")
            length = (self.queries if side == "query" else self.keys).shape[-1]
            self._tables[side, block] = _cut(offsets, length, block)
        return self._tables[side, block]

    def query_buckets(self) -> Tensor:
        """The bucket of every query entry, broadcastable to (B, Hs, Lq)."""
        return _bucket_of(self.queries, self.query_chunk, self.query_offsets)

    def key_buckets(self) -> Tensor:
        """The bucket of every key entry, broadcastable to (B, Hs, Lk)."""
        return _bucket_of(self.keys, self.key_chunk, self.key_offsets)

    def visible_entries(self) -> Tensor:
        """Which key entry each query entry sees: bool (B, Hs, Lq, Lk), for tests and definitions."""
        back = (self.query_buckets().unsqueeze(-1) - self.key_buckets().unsqueeze(-2)) % max(self.count, 1)
        seen = (back <= self.look_back) & (self.queries >= 0).unsqueeze(-1) & (self.keys >= 0).unsqueeze(-2)
        if self.query_labels is not None and self.key_labels is not None:
            seen = seen & (self.query_labels.unsqueeze(-1) == self.key_labels.unsqueeze(-2))
        return seen

    def to_multiplicity(self) -> Tensor:
        """How many times query i sees key j: int64 (B, Hs, N, M), before causality and biases."""
        seen = self.visible_entries().double()
        counts = one_hot(self.queries, self.n).mT @ seen @ one_hot(self.keys, self.m)
        return counts.round().long()


def one_hot(entries: Tensor, tokens: int) -> Tensor:
    """1 where an entry holds a token: fp64 (B, Hs, L, tokens); an empty entry holds none."""
    return (entries.unsqueeze(-1) == torch.arange(tokens, device=entries.device)).double()


def _sorted(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens ordered by (id, token), and the first entry of each id and the end."""
    ids, order = torch.sort(ids, dim=-1, stable=True)
    bounds = torch.arange(count + 1, device=ids.device, dtype=ids.dtype).expand(*ids.shape[:-1], -1)
    return order.to(torch.int32), torch.searchsorted(ids, bounds.contiguous(), out_int32=True)


def _inverse(entries: Tensor, tokens: int) -> Visits:
    held, order = torch.sort(entries, dim=-1, stable=True)
    bounds = torch.arange(tokens + 1, device=entries.device, dtype=entries.dtype)
    bounds = bounds.expand(*entries.shape[:-1], -1).contiguous()
    return Visits(order.to(torch.int32), torch.searchsorted(held, bounds, out_int32=True))


def _cut(offsets: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
    count = offsets.shape[-1] - 1
    tiles = (offsets.diff(dim=-1) + (block - 1)) // block
    ends = tiles.cumsum(-1, dtype=torch.int32)
    tile = torch.arange(-(-length // block) + count, device=offsets.device, dtype=torch.int32)
    tile = tile.expand(*ends.shape[:-1], -1).contiguous()
    found = torch.searchsorted(ends, tile, right=True)
    bucket = found.clamp(max=count - 1)
    first = offsets.gather(-1, bucket) + (tile - (ends - tiles).gather(-1, bucket)) * block
    return bucket.to(torch.int32), torch.where(found < count, first, length).to(torch.int32)


def _bucket_of(entries: Tensor, chunk: int, offsets: Tensor | None) -> Tensor:
    slots = torch.arange(entries.shape[-1], device=entries.device, dtype=torch.int32)
    if offsets is None:
        return (slots // chunk).expand(*entries.shape[:-1], -1)
    slots = slots.expand(*offsets.shape[:-1], -1).contiguous()
    return torch.searchsorted(offsets[..., 1:].contiguous(), slots, right=True)
