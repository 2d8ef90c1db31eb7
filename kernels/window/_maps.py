"""Interval maps: the one form in which every window and neighborhood of a grid reaches the kernels.

On each axis the positions of one residue modulo the dilation form a class; within it a query sees an interval
of keys whose ends never decrease from one query to the next. Then the queries of a key are an interval too,
and the union of the intervals of adjacent queries is one: a tile of queries needs one box of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

Intervals = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class AxisMap:
    """One axis: query p sees the keys lo[p] ≤ u < hi[p] of its class, at positions p mod d + d·u."""

    length: int
    key_length: int
    dilation: int
    lo: np.ndarray  # (length,) int64, in coordinates of the class
    hi: np.ndarray

    @classmethod
    def of_classes(cls, length: int, key_length: int, dilation: int, intervals: Intervals) -> AxisMap:
        """From a function of the queries u = 0, 1, … and the number of keys of one class."""
        lo, hi = np.zeros(length, np.int64), np.zeros(length, np.int64)
        for g in range(min(dilation, length)):
            u = np.arange(len(range(g, length, dilation)))
            lo[g::dilation], hi[g::dilation] = intervals(u, len(range(g, key_length, dilation)))
        return cls(length, key_length, dilation, lo, hi)

    def __post_init__(self) -> None:
        for g in range(min(self.dilation, self.length)):
            for ends in (self.lo[g :: self.dilation], self.hi[g :: self.dilation]):
                if (np.diff(ends) < 0).any():
                    raise ValueError("interval map: observed an end that decreases, expected increasing ends")

    @property
    def classes(self) -> int:
        """Classes that have queries."""
        return min(self.dilation, self.length)

    def transposed(self) -> AxisMap:
        """The same pairs from the side of the keys: key p is seen by the queries lo[p] ≤ u < hi[p]."""
        d = self.dilation
        first, last = np.zeros(self.key_length, np.int64), np.zeros(self.key_length, np.int64)
        for g in range(min(d, self.key_length)):
            keys = np.arange(len(range(g, self.key_length, d)))
            first[g::d] = np.searchsorted(self.hi[g::d], keys, side="right")
            last[g::d] = np.searchsorted(self.lo[g::d], keys, side="right")
        return AxisMap(self.key_length, self.length, d, first, np.maximum(first, last))

    def tiles(self, size: int, phase: int) -> Tiles:
        """Cut every class into tiles of ``size`` queries, the first of ``phase`` if that is not 0."""
        parts = []
        for g in range(self.classes):
            lo, hi = self.lo[g :: self.dilation], self.hi[g :: self.dilation]
            first = np.arange(phase, len(lo), size)
            if phase:
                first = np.concatenate([np.zeros(1, np.int64), first])
            count = np.diff(first, append=len(lo))
            box_lo = lo[first]
            box = np.maximum(hi[first + count - 1] - box_lo, 0)
            even = (lo[first] == lo[first + count - 1]) & (hi[first] == hi[first + count - 1])
            parts.append(np.stack([np.full_like(first, g), first, count, box_lo, box, even]))
        table = np.concatenate(parts, 1)
        return Tiles(size, table[:5].astype(np.int32), bool(table[5].all()))

    @cached_property
    def sizes(self) -> dict[int, tuple[int, int, int]]:
        """Per size of a tile: tiles of the axis, width of the widest box, and the better phase.

        From the first class, the longest.
        """
        lo, hi = self.lo[:: self.dilation], self.hi[:: self.dilation]
        changes = np.flatnonzero((np.diff(lo) != 0) | (np.diff(hi) != 0))
        run = int(changes[0]) + 1 if len(changes) else 0
        found: dict[int, tuple[int, int, int]] = {}
        for size in range(1, min(len(lo), MAX_TILE) + 1):
            options = []
            for phase in {0, run % size}:
                first = np.arange(phase, len(lo), size)
                if phase:
                    first = np.concatenate([np.zeros(1, np.int64), first])
                last = np.append(first[1:], len(lo)) - 1
                box = max(1, int((hi[last] - lo[first]).max()))
                options.append((len(first) * box, phase, len(first) * self.classes, box))
            _, phase, tiles, box = min(options)
            found[size] = (tiles, box, phase)
        return found


MAX_TILE = 256
"""No kernel has more rows in a tile."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of the queries of one axis.

    ``table`` is (5, tiles) int32: class, first query, queries, first key, keys; in coordinates of the class.
    ``even`` says that the queries of every tile see the same keys.
    """

    size: int
    table: np.ndarray
    even: bool

    @property
    def box(self) -> int:
        """Keys of the widest box, at least 1."""
        return max(1, int(self.table[4].max()))

    @property
    def frame(self) -> tuple[int, int]:
        """(back, width): key u of any tile lies at 0 ≤ u − (first query − back) < width."""
        _, first, _, lo, count = self.table.astype(np.int64)
        back = int((first - lo).max())
        return back, max(1, int((lo + count - first).max()) + back)


@dataclass(frozen=True, eq=False)
class GridMap:
    """Three axes, leading ones of length 1 for grids of lower rank."""

    rank: int
    axes: tuple[AxisMap, AxisMap, AxisMap]
    _choices: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def transposed(self) -> GridMap:
        """The same pairs with queries and keys exchanged."""
        a, b, c = (axis.transposed() for axis in self.axes)
        return GridMap(self.rank, (a, b, c))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Lengths of the axes of the queries."""
        a, b, c = self.axes
        return a.length, b.length, c.length

    @property
    def grid_kv(self) -> tuple[int, int, int]:
        """Lengths of the axes of the keys."""
        a, b, c = self.axes
        return a.key_length, b.key_length, c.key_length

    def pairs(self) -> int:
        """Visible pairs of a full grid."""
        return int(np.prod([(axis.hi - axis.lo).sum() for axis in self.axes], dtype=object))

    def choose(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the tiles, of at most ``rows`` queries, that costs least with ``columns`` keys a step.

        The cost of a step is that of its pairs and of loading its keys; see :data:`LOAD_ROWS`.
        """
        if (rows, columns) not in self._choices:
            self._choices[rows, columns] = self._cheapest(rows, columns)
        return self._choices[rows, columns]

    def cost(self, shape: Sequence[int], rows: int, columns: int) -> int:
        """Pairs that the kernels compute with tiles of this shape, padded to ``rows`` by ``columns``.

        Loads of keys are counted as LOAD_ROWS further rows.
        """
        tiles, box = 1, 1
        for axis, size in zip(self.axes, shape, strict=True):
            count, width, _ = axis.sizes[size]
            tiles, box = tiles * count, box * width
        return tiles * -(-box // columns) * columns * (rows + LOAD_ROWS)

    def _cheapest(self, rows: int, columns: int) -> tuple[int, ...]:
        a, b, c = (axis.sizes for axis in self.axes)
        shapes = (
            (x, y, z) for z in c if z <= rows for y in b if y * z <= rows for x in a if x * y * z <= rows
        )
        return min(shapes, key=lambda shape: (self.cost(shape, rows, columns), shape))

    def tiles(self, shape: Sequence[int]) -> tuple[Tiles, ...]:
        """The tiles of each axis, in the better phase."""
        return tuple(
            axis.tiles(size, axis.sizes[size][2]) for axis, size in zip(self.axes, shape, strict=True)
        )


LOAD_ROWS = 48
"""Loading a key costs about as much as scoring it against this many queries (modelled, not measured)."""


def grid_map(axes: Sequence[AxisMap]) -> GridMap:
    """A map of rank 1 to 3 with the axes it lacks put in front."""
    one = AxisMap(1, 1, 1, np.zeros(1, np.int64), np.ones(1, np.int64))
    a, b, c = (*(one,) * (3 - len(axes)), *axes)
    return GridMap(len(axes), (a, b, c))
