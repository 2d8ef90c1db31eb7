"""How many tiles a tiled kernel visits under a sparse mask: the bound of its speed-up over dense attention.

A neighborhood may skip 95 % of the pairs and still touch twice as many tiles as pairs would need; the stride
of generalized neighborhood attention (arXiv 2504.16922) exists to make tiles full. Pure integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from attnbench.errors import UsageError

Tiling = Literal["multi", "single"]
T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """One axis of a neighborhood: its length and its window, stride and dilation in tokens."""

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window:
            raise UsageError(f"neighborhood: observed stride {self.stride}, expected 1 to {self.window}")
        if self.dilation < 1 or self.window * self.dilation > self.length:
            raise UsageError(
                f"neighborhood: observed window {self.window} × dilation {self.dilation} on an axis of "
                f"{self.length}, expected at most its length"
            )

    def classes(self) -> list[int]:
        """Lengths of the residue classes that a dilation splits the axis into."""
        return [-(-(self.length - g) // self.dilation) for g in range(self.dilation)]

    def span(self, i: int, length: int) -> tuple[int, int]:
        """Keys [start, end) of query i of a class of ``length``: those of the leader of its stride group."""
        first = i // self.stride * self.stride
        if self.causal:
            leader = min(first + self.stride - 1, length - 1)
            return max(leader - self.window + 1, 0), i + 1
        leader = min(first + self.stride // 2, length - 1)
        start = min(max(leader - self.window // 2, 0), length - self.window)
        return start, start + self.window

    def pairs(self) -> int:
        """Visible (query, key) pairs on this axis."""
        if not self.causal:
            return self.length * self.window  # borders shift a window, they do not cut it
        spans = (self.span(i, length) for length in self.classes() for i in range(length))
        return sum(end - start for start, end in spans)

    def visited(self, query_tile: int, key_tile: int) -> int:
        """Key tiles that the query tiles of all classes visit; a tile lies within a class."""
        count = 0
        for length in self.classes():
            for first in range(0, length, query_tile):
                last = min(first + query_tile, length) - 1
                low, high = self.span(first, length)[0], self.span(last, length)[1]  # both ends only grow
                count += -(-high // key_tile) - low // key_tile
        return count


@dataclass(frozen=True)
class TileCount:
    """Tiles of ``block_m`` × ``block_n`` pairs: how many are visited, how many dense attention visits."""

    visited: int
    dense: int
    pairs: int
    all_pairs: int
    block_m: int
    block_n: int

    @property
    def speedup(self) -> float:
        """Upper bound of the speed-up over dense attention with the same tiles."""
        return self.dense / self.visited

    @property
    def speedup_flops(self) -> float:
        """The same if every pair could be skipped by itself: what counting FLOPs promises."""
        return self.all_pairs / self.pairs

    @property
    def efficiency(self) -> float:
        """Share of the computed pairs that the mask needs; 1 is a mask made of whole tiles."""
        return self.pairs / (self.visited * self.block_m * self.block_n)


def neighborhood(
    axes: Sequence[Axis],
    query_tile: Sequence[int],
    key_tile: Sequence[int],
    tiling: Tiling = "multi",
) -> TileCount:
    """Tiles that generalized neighborhood attention visits.

    ``multi`` cuts tiles along every axis; its count is a product over the axes, because a window is one.
    ``single`` cuts the flattened order, as a kernel does that knows no grid: it enumerates, so keep it small.
    Raises UsageError for tiles of another rank than the grid.
    """
    if not len(axes) == len(query_tile) == len(key_tile):
        raise UsageError(
            f"tiles: observed rank {len(query_tile)} and {len(key_tile)} on a grid of rank {len(axes)}"
        )
    n = math.prod(axis.length for axis in axes)
    block_m, block_n = math.prod(query_tile), math.prod(key_tile)
    if tiling == "multi":
        per_axis = zip(axes, query_tile, key_tile, strict=True)
        visited = math.prod(axis.visited(q, k) for axis, q, k in per_axis)
    else:
        visited = _flattened(axes, block_m, block_n)
    return TileCount(
        visited=visited,
        dense=-(-n // block_m) * -(-n // block_n),
        pairs=math.prod(axis.pairs() for axis in axes),
        all_pairs=n * n,
        block_m=block_m,
        block_n=block_n,
    )


def _flattened(axes: Sequence[Axis], block_m: int, block_n: int) -> int:
    n = math.prod(axis.length for axis in axes)
    tiles: set[tuple[int, int]] = set()
    for query in range(n):
        for first, last in _runs(axes, query):
            tiles |= {(query // block_m, tile) for tile in range(first // block_n, last // block_n + 1)}
    return len(tiles)


def _runs(axes: Sequence[Axis], query: int) -> list[tuple[int, int]]:
    """First and last key of each contiguous run of keys that ``query`` sees, in the flattened order."""
    place, keys = query, []
    for axis in reversed(axes):
        place, i = divmod(place, axis.length)
        residue, step = i % axis.dilation, axis.dilation
        start, end = axis.span(i // step, axis.classes()[residue])
        keys.append([residue + step * j for j in range(start, end)])
    keys.reverse()
    rows = [0]
    for axis, found in zip(axes, keys, strict=True):
        rows = [row * axis.length + j for row in rows for j in found]
    if axes[-1].dilation > 1:
        return [(key, key) for key in rows]
    width = len(keys[-1])
    return [(rows[i], rows[i + width - 1]) for i in range(0, len(rows), width)]


def block_sparse(counts: Sequence[int], n: int, m: int, block_m: int, block_n: int) -> TileCount:
    """Tiles of a block mask, from the number of key blocks of each query block. Every visited tile is full.

    Raises UsageError for another number of query blocks than n needs, or more key blocks than m has.
    """
    rows, columns = -(-n // block_m), -(-m // block_n)
    if len(counts) != rows or not all(0 <= count <= columns for count in counts):
        raise UsageError(
            f"block mask: observed {len(counts)} rows of {min(counts, default=0)} to "
            f"{max(counts, default=0)} blocks, expected {rows} of 0 to {columns}"
        )
    visited = sum(counts)
    return TileCount(visited, rows * columns, visited * block_m * block_n, n * m, block_m, block_n)


def smallest_full_stride(axis: Axis, query_tile: int, key_tile: int) -> int | None:
    """The smallest stride that makes every visited tile full on this axis; None when no stride does."""
    for stride in range(1, axis.window + 1):
        tried = replace(axis, stride=stride)
        if tried.pairs() == tried.visited(query_tile, key_tile) * query_tile * key_tile:
            return stride
    return None


def broadcast(value: T | Sequence[T], rank: int, convert: Callable[[T], T]) -> tuple[T, ...]:
    """One value for every axis, or one per axis."""
    if isinstance(value, Sequence):
        if len(value) != rank:
            raise UsageError(f"observed {list(value)}, expected one value or {rank}")
        return tuple(convert(item) for item in value)
    return (convert(value),) * rank
