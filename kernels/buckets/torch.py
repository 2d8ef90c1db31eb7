"""The torch backend of :func:`attnbench.kernels.buckets`: gather, batched products, and a scatter back.

Buckets of equal size are a batch of small dense attentions. Ragged ones have no shape that eager PyTorch
could know without waiting for the device, and are one masked attention over the sorted entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.kernels.buckets.layout import Buckets


def buckets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Buckets,
    *,
    causal: bool,
    self_score: float | None,
    combine: str,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse for any dtype; autograd gives every gradient.

    Holds the scores of every pair of entries in fp32 (fp64 for fp64 inputs): B·H·Lq·(look_back + 1)·c·4
    bytes for chunks of c keys, B·H·Lq·Lk·4 bytes for ragged buckets.
    """
    b, h, n, _ = q.shape
    m = k.shape[2]
    queries, keys = (_per_head(x, b, h) for x in (lists.queries, lists.keys))
    rows = _Rows(queries, n)
    q_entries = _chunked(_gather(q, queries), lists, lists.query_chunk)
    group = h // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    k_entries, v_entries = (_looking_back(_gather(x, keys), lists) for x in (k, v))
    scores = (scale * q_entries) @ k_entries.mT
    scores = scores if scores.dtype is torch.float64 else scores.float()
    i = _chunked(queries.unsqueeze(-1), lists, lists.query_chunk)
    j = _looking_back(keys.unsqueeze(-1), lists).mT
    if self_score is not None:
        scores = scores.masked_fill(i == j, self_score)
    if key_bias is not None:
        per_key = _gather(key_bias.expand(b, h, m).unsqueeze(-1), keys)
        scores = scores + _looking_back(per_key, lists).mT.to(scores.dtype)
    hidden = (i < 0) | (j < 0) | _other_bucket(lists, b, h)
    if causal:
        hidden = hidden | (j > i + (m - n))
    scores = scores.masked_fill(hidden, -math.inf)
    o, lse = _softmax(scores, v_entries)
    o, lse = o.flatten(2, 3), lse.flatten(2, 3)
    if lists.distinct:
        return rows.placed(o), rows.placed(lse.unsqueeze(-1), -math.inf).squeeze(-1)
    return _combine(o, lse, rows, combine, q.dtype)


def _combine(o: Tensor, lse: Tensor, rows: _Rows, combine: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The merge of all entries of each query by their lse, or the mean of their outputs."""
    peak = rows.largest(lse.detach())
    peak = peak.masked_fill(torch.isneginf(peak), 0.0)
    mass = torch.exp(lse - rows.spread(peak.unsqueeze(-1)).squeeze(-1))
    total = rows.summed(mass.unsqueeze(-1))
    blind = total == 0
    total = total.masked_fill(blind, 1.0)
    total_lse = (peak.unsqueeze(-1) + total.log()).masked_fill(blind, -math.inf).squeeze(-1)
    if combine == "mean":
        count = rows.summed(torch.ones_like(mass).unsqueeze(-1)).clamp(min=1.0)
        return (rows.summed(o.to(mass.dtype)) / count).to(dtype), total_lse
    return (rows.summed(mass.unsqueeze(-1) * o) / total).to(dtype), total_lse


@dataclass(frozen=True)
class _Rows:
    """Where the entries (B, H, L) of a list belong among ``tokens``; empty ones go to a row to drop."""

    entries: Tensor
    tokens: int

    def _at(self, width: int) -> Tensor:
        at = torch.where(self.entries < 0, self.tokens, self.entries).long()
        return at.unsqueeze(-1).expand(-1, -1, -1, width)

    def _new(self, x: Tensor, value: float) -> Tensor:
        return x.new_full((*x.shape[:2], self.tokens + 1, x.shape[3]), value)

    def placed(self, x: Tensor, value: float = 0.0) -> Tensor:
        return self._new(x, value).scatter(2, self._at(x.shape[3]), x)[:, :, :-1]

    def summed(self, x: Tensor) -> Tensor:
        return self._new(x, 0.0).scatter_add(2, self._at(x.shape[3]), x)[:, :, :-1]

    def largest(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-1)
        largest = self._new(x, -math.inf).scatter_reduce(2, self._at(1), x, "amax")
        return largest[:, :, :-1].squeeze(-1)

    def spread(self, x: Tensor) -> Tensor:
        return _gather(x, self.entries)


def _per_head(x: Tensor, b: int, h: int) -> Tensor:
    return x.repeat_interleave(h // x.shape[1], 1).expand(b, -1, -1)


def _gather(x: Tensor, entries: Tensor) -> Tensor:
    """Rows of (B, H, N, D) by entry; an empty entry reads row 0, which is masked later."""
    return x.gather(2, entries.clamp(min=0).long().unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))


def _chunked(x: Tensor, lists: Buckets, chunk: int) -> Tensor:
    """(B, H, L, D) as (B, H, buckets, chunk, D); ragged lists are one bucket."""
    return x.unflatten(2, (lists.count, chunk)) if chunk else x.unsqueeze(2)


def _looking_back(x: Tensor, lists: Buckets) -> Tensor:
    """The entries that each bucket sees: (B, H, buckets, (look_back + 1)·chunk, D)."""
    x = _chunked(x, lists, lists.key_chunk)
    if not lists.key_chunk or not lists.look_back:
        return x
    return torch.cat([x.roll(back, 2) for back in range(lists.look_back + 1)], 3)


def _other_bucket(lists: Buckets, b: int, h: int) -> Tensor:
    """Pairs in the batched scores that are not seen: by their labels, or by their bucket where ragged."""
    hidden = torch.zeros((), dtype=torch.bool, device=lists.queries.device)
    if not lists.query_chunk:
        back = lists.query_buckets().unsqueeze(-1) - lists.key_buckets().unsqueeze(-2)
        hidden = _per_head((back % lists.count > lists.look_back).flatten(2), b, h).view(
            b, h, 1, lists.queries.shape[-1], lists.keys.shape[-1]
        )
    if lists.query_labels is not None and lists.key_labels is not None:
        ours, theirs = (_per_head(x, b, h).unsqueeze(-1) for x in (lists.query_labels, lists.key_labels))
        hidden = hidden | (_chunked(ours, lists, lists.query_chunk) != _looking_back(theirs, lists).mT)
    return hidden


def _softmax(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scores) v and its lse; a row of −inf gives 0, −inf and zero gradients."""
    blind = torch.isneginf(scores).all(-1)
    scores = scores.masked_fill(blind.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(scores, -1)
    # not exp(scores − lse): beside a lse of −5·10⁴, the only score of a token with itself, fp32 is too coarse
    weights = scores.softmax(-1).masked_fill(blind.unsqueeze(-1), 0.0)
    return weights.to(v.dtype) @ v, lse.masked_fill(blind, -math.inf)
