"""Which keys each single query attends to: lists of key blocks, of key tokens, or one list for all queries.

The counterpart of :class:`attnbench.kernels.selection.Selection` without blocks of queries. Nothing here
waits for the device: no size depends on the contents of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tiles(NamedTuple):
    """Work items of at most E entries of one key block each: T of them, those past the last one empty.

    ``block`` (B, Hs, T) int32 is the key block of an item, ``start`` and ``stop`` (B, Hs, T) int32 its range
    in :attr:`TokenBlocks.by_block`; ``first`` (B, Hs, Tk + 1) int32 is the first item of a block.
    """

    block: Tensor
    start: Tensor
    stop: Tensor
    first: Tensor


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Lists of key blocks, one list per query token, for N queries and M = ``m`` keys.

    Block J holds the keys J·block_k .. min((J + 1)·block_k, M) − 1; there are Tk = ⌈M / block_k⌉. Treat the
    tensors as immutable: results are cached.

    Args:
        counts: (B, Hs, N) int32, the lengths of the lists. B may be 1 (every batch element), Hs divides the
            number of query heads: query head h uses the lists of head ⌊h·Hs/H⌋.
        indices: (B, Hs, N, K) int32: the block numbers of a list, ascending and unique, then −1.
        block_k: keys of a block.
        m: number of keys.
    """

    counts: Tensor
    indices: Tensor
    block_k: int
    m: int

    def __post_init__(self) -> None:
        if min(self.block_k, self.m) < 1:
            raise ValueError(f"block_k, m: observed {(self.block_k, self.m)}, expected positive numbers")
        _check_lists(self.counts, self.indices, 4, "(B, Hs, N) and (B, Hs, N, K)")

    @property
    def n(self) -> int:
        """N, the number of queries."""
        return self.counts.shape[2]

    @property
    def key_blocks(self) -> int:
        """Tk, the number of blocks of keys."""
        return -(-self.m // self.block_k)

    @classmethod
    def from_indices(cls, indices: Tensor, block_k: int, m: int) -> TokenBlocks:
        """Lists from unique block numbers (B, Hs, N, K) in any order, such as those of ``torch.topk``.

        A negative number is no entry. Cost: one sort along the last axis.
        """
        counts, ordered = _sorted(indices, -(-m // block_k))
        return cls(counts, ordered, block_k, m)

    @classmethod
    def from_block_mask(cls, mask: Tensor, block_k: int, m: int, *, k_max: int | None = None) -> TokenBlocks:
        """Lists from a mask (B, Hs, N, Tk), True = selected, by a prefix sum and a scatter.

        ``k_max`` is what the caller knows to be the longest list, by default Tk; on a GPU a longer list fails
        asynchronously, as a device assertion.
        """
        key_blocks = -(-m // block_k)
        if mask.dim() != 4 or mask.shape[3] != key_blocks:
            raise ValueError(f"block mask: observed {tuple(mask.shape)}, expected (B, Hs, N, {key_blocks})")
        return cls(*_listed(mask, k_max), block_k, m)

    @cached_property
    def block_mask(self) -> Tensor:
        """(B, Hs, N, Tk) bool, True where a block is selected."""
        return _marked(self.indices, self.live, self.key_blocks)

    @property
    def live(self) -> Tensor:
        """(B, Hs, N, K) bool, True for an entry of a list, False for its padding."""
        return _live(self.indices, self.counts)

    def to_dense_mask(self) -> Tensor:
        """(B, Hs, N, M) bool, True where key j is in a block that query i selects."""
        keys = self.block_mask.repeat_interleave(self.block_k, 3, output_size=self.key_blocks * self.block_k)
        return keys[..., : self.m]

    @cached_property
    def by_block(self) -> tuple[Tensor, Tensor]:
        """The transposed lists: who selects a block.

        ``order`` (B, Hs, N·K) int32 holds the entries sorted by block, then by query, as i·K + place in the
        list of query i; the entries of block J are at ``starts[J]`` .. ``starts[J + 1]``. ``starts`` is
        (B, Hs, Tk + 1) int32. Cost: one stable sort.
        """
        blocks = torch.where(self.live, self.indices, self.key_blocks).flatten(2)
        ordered, order = blocks.sort(stable=True, dim=-1)
        bounds = torch.arange(self.key_blocks + 1, device=blocks.device, dtype=torch.int32)
        bounds = bounds.expand(*blocks.shape[:2], -1).contiguous()
        return order.int(), torch.searchsorted(ordered, bounds, out_int32=True)

    def tiles(self, entries: int) -> Tiles:
        """Cut the transposed lists into items of at most E = ``entries``; T = ⌊(N·K + Tk·(E − 1)) / E⌋.

        That bound holds for every selection, so a kernel can be launched without knowing the lists.
        """
        starts = self.by_block[1]
        n, width = self.indices.shape[2:]
        items = (n * width + self.key_blocks * (entries - 1)) // entries
        per_block = (starts.diff(dim=-1) + (entries - 1)) // entries
        first = F.pad(per_block.cumsum(-1, dtype=torch.int32), (1, 0))
        numbers = torch.arange(items, device=starts.device, dtype=torch.int32)
        block = torch.searchsorted(
            first[..., 1:].contiguous(), numbers.expand(*starts.shape[:2], -1).contiguous(), right=True
        )
        start = starts.gather(-1, block) + (numbers - first.gather(-1, block)) * entries
        end = starts.gather(-1, (block + 1).clamp(max=self.key_blocks))
        stop = torch.where(block < self.key_blocks, (start + entries).minimum(end), start)
        return Tiles(block.int(), start.int(), stop.int(), first)

    def density(self, causal: bool) -> Tensor:
        """Pairs of tokens kept / pairs allowed, a fp64 scalar; causal: j ≤ i + M − N."""
        start = self.indices * self.block_k
        keys = (self.m - start).clamp(max=self.block_k)
        if causal:
            keys = keys.minimum((_seen(self.n, self.m, keys.device)[:, None] - start).clamp(min=0))
        kept = (keys * self.live).sum()
        return kept.double() / _allowed(self.n, self.m, causal, self.counts)

    def block_density(self, causal: bool) -> Tensor:
        """Selected blocks / blocks with at least one allowed key, a fp64 scalar."""
        device = self.counts.device
        seen = _seen(self.n, self.m, device) if causal else torch.full((self.n,), self.m, device=device)
        allowed = ((seen + self.block_k - 1) // self.block_k).sum() * self.counts[..., 0].numel()
        return self.counts.sum().double() / allowed


@dataclass(frozen=True, eq=False)
class TokenKeys:
    """Lists of keys, one list per query token, for N queries and M = ``m`` keys.

    Args:
        counts: (B, Hs, N) int32, the lengths of the lists; B and Hs as in :class:`TokenBlocks`.
        indices: (B, Hs, N, K) int32: the keys of a list, ascending and unique, then −1.
        m: number of keys.
    """

    counts: Tensor
    indices: Tensor
    m: int

    def __post_init__(self) -> None:
        if self.m < 1:
            raise ValueError(f"m: observed {self.m}, expected a positive number")
        _check_lists(self.counts, self.indices, 4, "(B, Hs, N) and (B, Hs, N, K)")

    @property
    def n(self) -> int:
        """N, the number of queries."""
        return self.counts.shape[2]

    @classmethod
    def from_indices(cls, indices: Tensor, m: int) -> TokenKeys:
        """Lists from unique keys (B, Hs, N, K) in any order; a negative number is no entry."""
        return cls(*_sorted(indices, m), m)

    @classmethod
    def from_mask(cls, mask: Tensor, *, k_max: int | None = None) -> TokenKeys:
        """Lists from a mask (B, Hs, N, M), True = kept; ``k_max`` as in ``TokenBlocks.from_block_mask``."""
        if mask.dim() != 4:
            raise ValueError(f"mask: observed {tuple(mask.shape)}, expected (B, Hs, N, M)")
        return cls(*_listed(mask, k_max), mask.shape[3])

    @cached_property
    def blocks(self) -> TokenBlocks:
        """The same lists as blocks of one key."""
        return TokenBlocks(self.counts, self.indices, 1, self.m)

    def to_dense_mask(self) -> Tensor:
        """(B, Hs, N, M) bool, True where query i keeps key j."""
        return self.blocks.block_mask

    def density(self, causal: bool) -> Tensor:
        """Pairs kept / pairs allowed, a fp64 scalar; causal: j ≤ i + M − N."""
        return self.blocks.density(causal)


@dataclass(frozen=True, eq=False)
class SharedKeys:
    """One list of keys for all N = ``n`` queries of a head, out of M = ``m`` keys.

    Args:
        counts: (B, Hs) int32, the lengths of the lists, or None: all have K entries. B and Hs as in
            :class:`TokenBlocks`.
        indices: (B, Hs, K) int32: the keys of a list, ascending and unique, then −1.
        n: number of queries.
        m: number of keys.
    """

    counts: Tensor | None
    indices: Tensor
    n: int
    m: int

    def __post_init__(self) -> None:
        if min(self.n, self.m) < 1:
            raise ValueError(f"n, m: observed {(self.n, self.m)}, expected positive numbers")
        counts = self.indices.new_zeros(self.indices.shape[:-1]) if self.counts is None else self.counts
        _check_lists(counts, self.indices, 3, "(B, Hs) and (B, Hs, K)")

    @classmethod
    def from_indices(cls, indices: Tensor, n: int, m: int, *, complete: bool = False) -> SharedKeys:
        """Lists from unique keys (B, Hs, K) in any order; a negative number is no entry.

        ``complete`` promises that there is none, which saves the kernel a mask.
        """
        counts, ordered = _sorted(indices, m)
        return cls(None if complete else counts, ordered, n, m)

    @classmethod
    def from_mask(cls, mask: Tensor, n: int, *, k_max: int | None = None) -> SharedKeys:
        """Lists from a mask (B, Hs, M), True = kept; ``k_max`` as in ``TokenBlocks.from_block_mask``."""
        if mask.dim() != 3:
            raise ValueError(f"mask: observed {tuple(mask.shape)}, expected (B, Hs, M)")
        return cls(*_listed(mask, k_max), n, mask.shape[2])

    @property
    def live(self) -> Tensor:
        """(B, Hs, K) bool, True for an entry of a list, False for its padding."""
        if self.counts is None:
            return torch.ones_like(self.indices, dtype=torch.bool)
        return _live(self.indices, self.counts)

    @cached_property
    def key_mask(self) -> Tensor:
        """(B, Hs, M) bool, True where a key is kept."""
        return _marked(self.indices, self.live, self.m)

    def to_dense_mask(self) -> Tensor:
        """(B, Hs, N, M) bool, an expanded view: True where key j is kept."""
        return self.key_mask.unsqueeze(2).expand(-1, -1, self.n, -1)

    def density(self, causal: bool) -> Tensor:
        """Pairs kept / pairs allowed, a fp64 scalar; causal: j ≤ i + M − N."""
        queries = torch.full_like(self.indices, self.n)
        if causal:
            queries = (self.m - self.indices).clamp(max=self.n)
        kept = (queries * self.live).sum()
        return kept.double() / _allowed(self.n, self.m, causal, self.indices)


def _check_lists(counts: Tensor, indices: Tensor, dims: int, expected: str) -> None:
    for name, x in (("counts", counts), ("indices", indices)):
        if x.dtype is not torch.int32:
            raise ValueError(f"{name}: observed {x.dtype}, expected torch.int32")
    if indices.dim() != dims or indices.shape[:-1] != counts.shape or 0 in indices.shape:
        observed = f"{tuple(counts.shape)} and {tuple(indices.shape)}"
        raise ValueError(f"counts and indices: observed {observed}, expected {expected}, none 0")


def _live(indices: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)


def _sorted(indices: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Counts and lists, ascending and padded with −1, from numbers below ``end``; negative: no entry."""
    counts = (indices >= 0).sum(-1, dtype=torch.int32)
    ordered = torch.where(indices >= 0, indices, end).int().sort(-1).values
    return counts, ordered.masked_fill(ordered == end, -1)


def _listed(mask: Tensor, k_max: int | None) -> tuple[Tensor, Tensor]:
    """Counts and lists of the True elements along the last axis."""
    width = mask.shape[-1] if k_max is None else k_max
    counts = mask.sum(-1, dtype=torch.int32)
    if k_max is not None:
        torch._assert_async((counts <= width).all(), f"a query selects more than k_max = {k_max}")
    # the place beyond the list takes what is not selected
    place = torch.where(mask, mask.cumsum(-1) - 1, width)
    numbers = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int32).expand(mask.shape)
    lists = mask.new_full((*mask.shape[:-1], width + 1), -1, dtype=torch.int32)
    return counts, lists.scatter_(-1, place, numbers)[..., :width].contiguous()


def _marked(indices: Tensor, live: Tensor, width: int) -> Tensor:
    """Masks of ``width`` elements with the entries of the lists True."""
    place = torch.where(live, indices, width).long()
    marks = live.new_zeros((*indices.shape[:-1], width + 1))
    return marks.scatter_(-1, place, True)[..., :width]


def _seen(n: int, m: int, device: torch.device) -> Tensor:
    """(N,) int64: how many keys causality leaves to each query."""
    return (torch.arange(n, device=device) + (m - n + 1)).clamp(0, m)


def _allowed(n: int, m: int, causal: bool, lists: Tensor) -> Tensor:
    """Pairs that the pattern allows in all heads of the lists (B, Hs, ...)."""
    pairs = _seen(n, m, lists.device).sum() if causal else torch.full((), n * m, device=lists.device)
    return pairs * lists.shape[0] * lists.shape[1]
