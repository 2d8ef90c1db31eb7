"""Visibility by integers per token: one test, ``low_i ≤ code_j ≤ high_i``, its unions and intersections.

Segments, blocks, frames, positions, windows, dilation and global tokens are all such tests, so that the
kernels know one predicate, need no N×M mask, and find from the extremes of a tile whether it is seen wholly,
in part or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# by name: importing the backend module flash.torch rebinds the name `torch` in this package
from torch import Size, Tensor, broadcast_shapes, int32, long, ones, where, zeros
from torch import bool as boolean

NONE = -(2**31)
"""The code of a key that no query sees."""

LOWEST, HIGHEST = NONE + 1, 2**31 - 1
"""The bounds of a query that sees every key, but those without a code."""


@dataclass(frozen=True, eq=False)
class Interval:
    """A test: query i sees the keys j with ``low_i ≤ code_j ≤ high_i``.

    code broadcasts to (B, H, M), low and high to (B, H, N); int32. low > high sees nothing.
    """

    code: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query sees: those that pass every test of a clause, for any of the clauses.

    Build it from the functions below, which copy what they are given, and combine with ``&`` and ``|``::

        Mask.upto(position) | Mask.same(frame)  # causal, but whole frames
        Mask.upto(position) & (Mask.same(doc) | Mask.keys(first))  # causal in documents, shared prefix
        Mask.window(position, left=w, right=w) | Mask.keys(g) | Mask.queries(g)  # global tokens
        Mask.same(row) & Mask.same(column)  # the windows of a grid

    Tensors per token broadcast to (B, H, N) or (B, H, M), so that masks may differ by batch element and head;
    a tensor of the keys is by default that of the queries.

    Cost: a pair in a tile that is seen in part takes two comparisons a test; a tile that is seen wholly none;
    a tile of which some test of each clause shows by its extremes that nothing is seen is neither loaded nor
    computed. So keep codes monotone or grouped along the sequence; residues (``position % d``) skip nothing.
    """

    clauses: tuple[tuple[Interval, ...], ...]
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What the backends derive from the mask once: lists of tiles, dense masks, block masks."""

    @staticmethod
    def between(low: Tensor, high: Tensor, code: Tensor) -> Mask:
        """Query i sees the keys with ``low_i ≤ code_j ≤ high_i``: the test of which the others are made."""
        return Mask(((Interval(_codes(code), _codes(low), _codes(high)),),))

    @staticmethod
    def same(q: Tensor, k: Tensor | None = None) -> Mask:
        """Equal ids: segments, frames, windows, residues. A negative id is that of nothing."""
        q, k = _codes(q), _codes(q if k is None else k)
        low, high = where(q < 0, HIGHEST, q), where(q < 0, LOWEST, q)
        return Mask.between(low, high, where(k < 0, NONE, k))

    @staticmethod
    def upto(q: Tensor, k: Tensor | None = None, *, strict: bool = False) -> Mask:
        """Keys at or, if ``strict``, only before the query, in the order of positions, blocks or frames."""
        return Mask.between(_codes(q).new_full((1,), LOWEST), _codes(q) - int(strict), q if k is None else k)

    @staticmethod
    def window(q: Tensor, k: Tensor | None = None, *, left: int = -1, right: int = -1) -> Mask:
        """``q_i − left ≤ k_j ≤ q_i + right``, a side of −1 unbounded: windows, neighbouring blocks."""
        centre = _codes(q)
        low = centre - left if left >= 0 else centre.new_full((1,), LOWEST)
        high = centre + right if right >= 0 else centre.new_full((1,), HIGHEST)
        return Mask.between(low, high, q if k is None else k)

    @staticmethod
    def keys(flags: Tensor) -> Mask:
        """The flagged keys, for every query: sinks, global tokens, keys that are no padding."""
        one = _codes(flags).new_ones(1)
        return Mask.between(one, one, flags != 0)

    @staticmethod
    def queries(flags: Tensor) -> Mask:
        """Every key, for the flagged queries: global tokens, queries that are no padding."""
        flags = flags != 0
        any_code = zeros(1, dtype=int32, device=flags.device)
        return Mask.between(where(flags, LOWEST, HIGHEST), where(flags, HIGHEST, LOWEST), any_code)

    def __or__(self, other: Mask) -> Mask:
        """Keys that either mask shows."""
        return Mask(self.clauses + other.clauses)

    def __and__(self, other: Mask) -> Mask:
        """Keys that both masks show."""
        return Mask(tuple(tuple(dict.fromkeys(a + b)) for a in self.clauses for b in other.clauses))

    @property
    def tests(self) -> tuple[Interval, ...]:
        """The tests of all clauses, each once."""
        return tuple(dict.fromkeys(test for clause in self.clauses for test in clause))

    @property
    def indices(self) -> tuple[tuple[int, ...], ...]:
        """The clauses as indices into ``tests``."""
        place = {test: index for index, test in enumerate(self.tests)}
        return tuple(tuple(place[test] for test in clause) for clause in self.clauses)

    def dense(self, n: int, m: int) -> Tensor:
        """The mask for n queries and m keys as bool (B or 1, H or 1, n, m), True where the key is seen.

        Raises ValueError where the metadata is not of n queries and m keys.
        """
        shape, device = self.shape(n, m), self.tests[0].code.device
        seen = zeros(*shape, n, m, dtype=boolean, device=device)
        for clause in self.clauses:
            inside = ones(*shape, n, m, dtype=boolean, device=device)
            for test in clause:
                code = test.code.unsqueeze(-2)
                inside &= (code >= test.low.unsqueeze(-1)) & (code <= test.high.unsqueeze(-1))
            seen |= inside
        return seen

    def shape(self, n: int, m: int) -> tuple[int, int]:
        """(B or 1, H or 1) of the metadata; ValueError where it is not of n queries and m keys."""
        rows, columns = Size((1, 1, 1)), Size((1, 1, 1))
        for test in self.tests:
            rows = broadcast_shapes(rows, test.low.shape, test.high.shape)
            columns = broadcast_shapes(columns, test.code.shape)
        batch, heads = broadcast_shapes(rows[:-1], columns[:-1])
        if rows[-1] not in (1, n) or columns[-1] not in (1, m):
            raise ValueError(f"mask: observed {rows[-1]} queries, {columns[-1]} keys, expected {n}, {m} or 1")
        return batch, heads


def _codes(x: Tensor) -> Tensor:
    """A copy in int32, that nobody else writes to."""
    if x.is_floating_point():
        raise ValueError(f"mask metadata: observed {x.dtype}, expected integers or flags")
    return x.detach().to(int32, copy=True)


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A bias by relative position: ``table[h, q_code_i − k_code_j]`` is added to the score of a pair.

    table (H, R), or (1, R) shared by the heads, receives a gradient; q_code (N,), k_code (M,) int32.
    Positions in several dimensions are one code, since an index Σ_a (x_a − y_a + offset_a)·stride_a is a
    difference of two sums: :meth:`grid` builds them. A pair whose index is outside the table has no bias.
    """

    table: Tensor
    q_code: Tensor
    k_code: Tensor

    @staticmethod
    def grid(table: Tensor, q: Tensor, k: Tensor | None = None, *, offsets: tuple[int, ...]) -> RelativeBias:
        """Read table (H, R_1, …, R_r) at ``q_i − k_j + offsets`` for coordinates q (N, r) and k (M, r).

        Each axis of every pair must be in its R_a, which is not checked: it would alias another axis.
        offsets (R_a − 1)/2 centre the table.
        """
        sizes = table.shape[1:]
        k = q if k is None else k
        strides = [sizes[axis + 1 :].numel() for axis in range(len(sizes))]
        if len(offsets) != len(sizes) or q.shape[-1] != len(sizes) or k.shape[-1] != len(sizes):
            raise ValueError(
                f"coordinates: observed {q.shape[-1]} and {k.shape[-1]} axes with {len(offsets)} offsets, "
                f"expected {len(sizes)}, the axes of a table {tuple(table.shape)}"
            )
        weights = q.new_tensor(strides, dtype=long)
        start = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
        q_code, k_code = (q.long() * weights).sum(-1) + start, (k.long() * weights).sum(-1)
        return RelativeBias(table.flatten(1), q_code.to(int32), k_code.to(int32))

    def dense(self) -> Tensor:
        """The bias as (H or 1, N, M), differentiable in the table."""
        index = self.q_code.long()[:, None] - self.k_code.long()[None, :]
        outside = (index < 0) | (index >= self.table.shape[1])
        return self.table[:, index.masked_fill(outside, 0)].masked_fill(outside, 0.0)
