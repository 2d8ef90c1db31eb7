"""Which key blocks each block of queries attends to: the value that selectors make and kernels consume.

A selector knows nothing of kernels and a kernel nothing of mechanisms; both know :class:`Selection`. Nothing
here waits for the device: no size depends on the contents of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """Lists of key blocks, one list per block of queries, for N = ``n`` queries and M = ``m`` keys.

    Block I holds the queries I·block_q .. min((I + 1)·block_q, N) − 1, block J the keys likewise; there are
    Tq = ⌈N / block_q⌉ and Tk = ⌈M / block_k⌉ of them. Treat the tensors as immutable: results are cached.

    Args:
        counts: (B, Hs, Tq) int32, the lengths of the lists. B may be 1 (every batch element), Hs divides the
            number of query heads: query head h uses the lists of head ⌊h·Hs/H⌋.
        indices: (B, Hs, Tq, Kmax) int32: the block numbers of a list, ascending and unique, then −1.
        full: (B, Hs, Tq, Kmax) bool or None. True promises that causality hides no pair of that block; it
            saves the test where the caller gives positions, and says nothing new where he does not.
    """

    counts: Tensor
    indices: Tensor
    block_q: int
    block_k: int
    n: int
    m: int
    full: Tensor | None = None

    def __post_init__(self) -> None:
        if min(self.block_q, self.block_k, self.n, self.m) < 1:
            sizes = (self.block_q, self.block_k, self.n, self.m)
            raise ValueError(f"block_q, block_k, n, m: observed {sizes}, expected positive numbers")
        for name, x in (("counts", self.counts), ("indices", self.indices)):
            if x.dtype is not torch.int32:
                raise ValueError(f"{name}: observed {x.dtype}, expected torch.int32")
        shape = self.indices.shape
        if self.indices.dim() != 4 or shape[:3] != self.counts.shape or shape[2] != self.query_blocks:
            raise ValueError(
                f"counts and indices: observed {tuple(self.counts.shape)} and {tuple(shape)}, expected "
                f"(B, Hs, {self.query_blocks}) and (B, Hs, {self.query_blocks}, Kmax)"
            )
        if self.full is not None and (self.full.shape != shape or self.full.dtype is not torch.bool):
            raise ValueError(
                f"full: observed {tuple(self.full.shape)} {self.full.dtype}, expected {tuple(shape)} bool"
            )

    @property
    def query_blocks(self) -> int:
        """Tq, the number of blocks of queries."""
        return -(-self.n // self.block_q)

    @property
    def key_blocks(self) -> int:
        """Tk, the number of blocks of keys."""
        return -(-self.m // self.block_k)

    @classmethod
    def from_block_mask(
        cls,
        mask: Tensor,
        block_q: int,
        block_k: int,
        n: int,
        m: int,
        *,
        full: Tensor | None = None,
        k_max: int | None = None,
    ) -> Selection:
        """Lists from a block mask (B, Hs, Tq, Tk), True = selected, by a prefix sum and a scatter.

        ``full`` is a mask of the same shape. ``k_max`` is what the caller knows to be the longest list, by
        default Tk; on a GPU a longer list fails asynchronously, as a device assertion.
        """
        key_blocks = -(-m // block_k)
        if mask.dim() != 4 or mask.shape[2:] != (-(-n // block_q), key_blocks):
            expected = f"(B, Hs, {-(-n // block_q)}, {key_blocks})"
            raise ValueError(f"block mask: observed {tuple(mask.shape)}, expected {expected}")
        width = key_blocks if k_max is None else k_max
        counts = mask.sum(-1)
        if k_max is not None:
            torch._assert_async((counts <= width).all(), f"a query block selects more than k_max = {k_max}")
        slot = torch.where(
            mask, mask.cumsum(-1) - 1, width
        )  # the slot beyond the list takes what is not selected
        blocks = torch.arange(key_blocks, device=mask.device, dtype=torch.int32).expand(mask.shape)
        indices = mask.new_full((*mask.shape[:3], width + 1), -1, dtype=torch.int32)
        indices = indices.scatter_(-1, slot, blocks)[..., :width].contiguous()
        flags = None
        if full is not None:
            flags = full.expand(mask.shape).gather(-1, indices.clamp(min=0).long()) & (indices >= 0)
        return cls(counts.int(), indices, block_q, block_k, n, m, flags)

    @cached_property
    def block_mask(self) -> Tensor:
        """(B, Hs, Tq, Tk) bool, True where a block is selected."""
        return self._scattered(torch.ones_like(self.indices, dtype=torch.bool))

    def _scattered(self, flags: Tensor) -> Tensor:
        """Flags of the entries as a map of blocks, False where there is no entry."""
        slot = torch.where(self.live, self.indices, self.key_blocks).long()
        grid = flags.new_zeros((*self.counts.shape, self.key_blocks + 1))
        return grid.scatter_(-1, slot, flags)[..., : self.key_blocks]

    @property
    def live(self) -> Tensor:
        """(B, Hs, Tq, Kmax) bool, True for an entry of a list, False for its padding."""
        entry = torch.arange(self.indices.shape[-1], device=self.indices.device)
        return entry < self.counts.unsqueeze(-1)

    def to_dense_mask(self) -> Tensor:
        """(B, Hs, N, M) bool, True where key j is in a block that the block of query i selects."""
        rows = self.block_mask.repeat_interleave(
            self.block_q, 2, output_size=self.query_blocks * self.block_q
        )
        pairs = rows.repeat_interleave(self.block_k, 3, output_size=self.key_blocks * self.block_k)
        return pairs[:, :, : self.n, : self.m]

    def transpose(self) -> Selection:
        """The lists of query blocks that select each key block, as a Selection with the roles exchanged."""
        return self._transposed

    @cached_property
    def _transposed(self) -> Selection:
        full = None if self.full is None else self._scattered(self.full).transpose(2, 3)
        mask = self.block_mask.transpose(2, 3)
        return Selection.from_block_mask(mask, self.block_k, self.block_q, self.m, self.n, full=full)

    def _pairs(self, causal: bool) -> Tensor:
        """(Tq, Tk) int64: pairs of tokens in each block that the pattern allows."""
        device = self.counts.device
        rows = torch.arange(self.query_blocks, device=device)[:, None] * self.block_q
        start = torch.arange(self.key_blocks, device=device)[None, :] * self.block_k
        keys = (self.m - start).clamp(max=self.block_k)
        queries = (self.n - rows).clamp(max=self.block_q)
        if not causal:
            return queries * keys
        seen = rows + (self.m - self.n) + 1 - start  # keys of the block up to the first query, if unbounded
        return _triangle(seen + queries - 1, keys) - _triangle(seen - 1, keys)

    def density(self, causal: bool) -> Tensor:
        """Pairs of tokens kept / pairs allowed, a fp64 scalar; causal: j ≤ i + M − N."""
        pairs = self._pairs(causal)
        kept = (self.block_mask * pairs).sum()
        return kept.double() / (pairs.sum() * self.counts[..., 0].numel())

    def block_density(self, causal: bool) -> Tensor:
        """Selected blocks / blocks with at least one allowed pair, a fp64 scalar."""
        allowed = visible(self.n, self.m, self.block_q, self.block_k, causal, self.counts.device).sum()
        return self.counts.sum().double() / (allowed * self.counts[..., 0].numel())

    def executed_density(self, causal: bool, tile_q: int, tile_k: int) -> Tensor:
        """Pairs that a kernel with tiles of tile_q × tile_k computes / pairs allowed, a fp64 scalar.

        Every selected block is tiled by itself, and tiles are computed whole.
        """
        per_block = -(-self.block_q // tile_q) * tile_q * -(-self.block_k // tile_k) * tile_k
        allowed = self._pairs(causal).sum() * self.counts[..., 0].numel()
        return (self.counts.sum() * per_block).double() / allowed


def _triangle(x: Tensor, width: Tensor) -> Tensor:
    """Σ over a ≤ x of min(max(a, 0), width), for integers."""
    rising = x.clamp(min=0).minimum(width)
    return rising * (rising + 1) // 2 + (x - width).clamp(min=0) * width


def pool(x: Tensor, block: int, reduce: str = "mean") -> Tensor:
    """Reduce blocks of tokens, (B, H, N, D) to (B, H, ⌈N / block⌉, D), by ``mean``, ``max`` or ``min``.

    The last block may have fewer tokens and is reduced over those. Sums in fp32 for fp16 and bf16.
    """
    fill = {"mean": 0.0, "max": -torch.inf, "min": torch.inf}.get(reduce)
    if fill is None:
        raise ValueError(f"reduce: observed {reduce!r}, expected 'mean', 'max' or 'min'")
    n = x.shape[2]
    padded = F.pad(x, (0, 0, 0, -n % block), value=fill).unflatten(2, (-1, block))
    if reduce == "max":
        return padded.amax(3)
    if reduce == "min":
        return padded.amin(3)
    first = torch.arange(0, n, block, device=x.device)
    tokens = (n - first).clamp(max=block).unsqueeze(-1)
    total = padded.sum(3, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / tokens).to(x.dtype)


def visible(n: int, m: int, block_q: int, block_k: int, causal: bool, device: torch.device) -> Tensor:
    """(Tq, Tk) bool: key blocks of which some query of the block may see a key; causal: j ≤ i + M − N."""
    last = _last_query(n, block_q, device) + (m - n)
    start = torch.arange(0, m, block_k, device=device)
    if not causal:
        last = last.clamp(min=m)
    return start[None, :] <= last[:, None]


def diagonal(n: int, m: int, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """(Tq, Tk) bool: key blocks that hold the position i + M − N of a query i of the block.

    A causal selector forces them: without them the first rows of a block may see no key at all.
    """
    first = torch.arange(0, n, block_q, device=device) + (m - n)
    last = _last_query(n, block_q, device) + (m - n)
    start = torch.arange(0, m, block_k, device=device)
    return (start[None, :] <= last[:, None]) & (start[None, :] + block_k > first[:, None])


def _last_query(n: int, block_q: int, device: torch.device) -> Tensor:
    return (torch.arange(0, n, block_q, device=device) + (block_q - 1)).clamp(max=n - 1)


def first_blocks(seen: Tensor, count: int) -> Tensor:
    """The first ``count`` visible key blocks of each row of ``seen`` (..., Tk): attention sinks."""
    return seen & (seen.cumsum(-1) <= count)


def last_blocks(seen: Tensor, count: int) -> Tensor:
    """The last ``count`` visible key blocks of each row of ``seen`` (..., Tk): the recent keys."""
    return seen & (seen.flip(-1).cumsum(-1).flip(-1) <= count)


def blocks_holding(tokens: Tensor, block: int) -> Tensor:
    """(..., ⌈N / block⌉) bool: the blocks that hold one of the tokens marked in (..., N): text in a video."""
    return F.pad(tokens, (0, -tokens.shape[-1] % block)).unflatten(-1, (-1, block)).any(-1)


def topk(
    score: Tensor,
    k: int | Tensor,
    seen: Tensor,
    forced: Tensor | None = None,
    *,
    count_forced: bool = True,
) -> Tensor:
    """Mask of the k highest scores of each row, (..., Tk) bool; equal scores go to the lower index.

    Args:
        score: (..., Tk), no NaN.
        k: a number, or a tensor of them that broadcasts against ``score``.
        seen: broadcastable bool, True where a block is visible; no other is selected.
        forced: broadcastable bool, blocks selected whatever their score, as far as they are visible.
        count_forced: whether forced blocks count among the k. More than k forced blocks are all selected.
    """
    limits = torch.finfo(score.dtype)
    key = score.clamp(limits.min, limits.max)  # ±inf is for what is forced and for what is not visible
    kept = torch.zeros_like(seen) if forced is None else forced & seen
    candidates = seen
    if forced is not None and count_forced:
        key = key.masked_fill(kept, torch.inf)
    elif forced is not None:
        candidates = seen & ~forced
    order = key.masked_fill(~candidates, -torch.inf).sort(stable=True, dim=-1, descending=True).indices
    return candidates & (_rank(order) < k) | kept


def topp(
    probability: Tensor,
    gamma: float | Tensor,
    seen: Tensor,
    forced: Tensor | None = None,
    *,
    policy: str = "first",
) -> Tensor:
    """Mask of the shortest descending prefix of each row whose mass reaches gamma, (..., Tk) bool.

    The element that reaches gamma is part of it; all visible blocks are, where rounding keeps the sum below.
    ``probability`` (..., Tk), not negative, is renormalised over ``seen``; equal ones go to the lower index.
    ``policy``: with ``first`` the forced blocks lead the order and their mass counts, with ``after`` they are
    united with the result.
    """
    if policy not in ("first", "after"):
        raise ValueError(f"policy: observed {policy!r}, expected 'first' or 'after'")
    mass = probability.to(torch.promote_types(probability.dtype, torch.float32)).masked_fill(~seen, 0.0)
    total = mass.sum(-1, keepdim=True)
    mass = mass / total.masked_fill(total == 0, 1.0)
    kept = torch.zeros_like(seen) if forced is None else forced & seen
    key = mass.masked_fill(~seen, -1.0)
    if policy == "first":
        key = key.masked_fill(kept, torch.inf)
    order = key.sort(stable=True, dim=-1, descending=True).indices
    before = F.pad(mass.gather(-1, order).cumsum(-1)[..., :-1], (1, 0))
    chosen = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before < gamma)
    return chosen & seen | kept


def thr(probability: Tensor, tau: float | Tensor, seen: Tensor, forced: Tensor | None = None) -> Tensor:
    """Mask of the visible blocks with probability > tau, united with the forced ones, (..., Tk) bool."""
    chosen = probability > tau
    return seen & (chosen if forced is None else chosen | forced)


def _rank(order: Tensor) -> Tensor:
    """The inverse of the permutations along the last axis."""
    places = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, places)
