"""What the kernels of windows share: argument types, tokens of tiles and boxes, visibility, loads and stores.

Every kernel holds a tile of one side, *stationary*, and steps through the box of the other side, *moving*,
that any row of the tile sees. Scores live in units of log 2, so that exp2 serves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class View(NamedTuple):
    """A (B, H, N, D) tensor, or (B, H, N) with d = 0: its pointer and its strides in elements."""

    base: Any
    b: int
    h: int
    n: int
    d: int


class Walk(NamedTuple):
    """Where tiles and boxes lie: see :class:`attnbench.kernels.window._launch.Plan`.

    ``tiles`` (5, Σ tiles of an axis) and ``rows`` (2, Σ stationary lengths) are int32, axis after axis.
    """

    tiles: Any
    rows: Any
    tiles1: int
    tiles2: int
    tiles3: int
    length1: int  # of the axes of the stationary side
    length2: int
    length3: int
    moving2: int  # of the axes of the moving side
    moving3: int
    dilation1: int
    dilation2: int
    dilation3: int
    stationary: int  # tokens
    moving: int


class Heads(NamedTuple):
    """Query heads, and how many of them read one key head."""

    count: int
    group: int


class Table(NamedTuple):
    """The relative position bias (H, entries), contiguous; entry = flat(u_query) − flat(u_key) + origin."""

    base: Any
    entries: int
    size2: int
    size3: int
    origin: int


@triton.jit
def head_pointer(x, b, h):
    """Start of head h of batch element b; 64-bit, since B·H·N·D may exceed 2³¹."""
    return x.base + b.to(tl.int64) * x.b + h.to(tl.int64) * x.h


@triton.jit
def tile_pointers(walk, tile):
    """Addresses of the first field of the three axes of a tile."""
    rest = tile // walk.tiles3
    at3 = walk.tiles + (walk.tiles1 + walk.tiles2 + tile % walk.tiles3)
    at2 = walk.tiles + (walk.tiles1 + rest % walk.tiles2)
    at1 = walk.tiles + rest // walk.tiles2
    return at1, at2, at3


@triton.jit
def tile_field(walk, at, FIELD: tl.constexpr):
    """One field of a tile on each axis: 0 class, 1 first row, 2 rows, 3 first of the box, 4 its extent."""
    skip = FIELD * (walk.tiles1 + walk.tiles2 + walk.tiles3)
    return tl.load(at[0] + skip), tl.load(at[1] + skip), tl.load(at[2] + skip)


@triton.jit
def unravel(index, first, extent, SIZE2: tl.constexpr, SIZE3: tl.constexpr):
    """Coordinates in the class of the members ``index`` of a row-major tile or box, and which are in it."""
    i3 = index % SIZE3
    i2 = index // SIZE3 % SIZE2
    i1 = index // (SIZE2 * SIZE3)
    live = (i1 < extent[0]) & (i2 < extent[1]) & (i3 < extent[2])
    return (first[0] + i1, first[1] + i2, first[2] + i3), live


@triton.jit
def positions(walk, residue, u):
    """Positions on the axes of the grid of coordinates in a class."""
    p1 = residue[0] + walk.dilation1 * u[0]
    p2 = residue[1] + walk.dilation2 * u[1]
    p3 = residue[2] + walk.dilation3 * u[2]
    return p1, p2, p3


@triton.jit
def flat(x, size2, size3):
    """Row-major index of three coordinates."""
    return (x[0] * size2 + x[1]) * size3 + x[2]


@triton.jit
def intervals(walk, p, live, EVEN: tl.constexpr, RANK: tl.constexpr):
    """First and number of the moving coordinates that each stationary row sees, on each axis.

    Not needed, and not loaded, where all rows of a tile see the whole box; nor for axes beyond the rank.
    """
    lo1 = 0
    lo2 = 0
    lo3 = 0
    count1 = 1
    count2 = 1
    count3 = 1
    if not EVEN:
        total = walk.length1 + walk.length2 + walk.length3
        at3 = walk.rows + walk.length1 + walk.length2 + p[2]
        lo3 = tl.load(at3, mask=live, other=0)
        count3 = tl.load(at3 + total, mask=live, other=0)
        if RANK >= 2:
            at2 = walk.rows + walk.length1 + p[1]
            lo2 = tl.load(at2, mask=live, other=0)
            count2 = tl.load(at2 + total, mask=live, other=0)
        if RANK == 3:
            lo1 = tl.load(walk.rows + p[0], mask=live, other=0)
            count1 = tl.load(walk.rows + p[0] + total, mask=live, other=0)
    return (lo1, lo2, lo3), (count1, count2, count3)


@triton.jit
def inside(u, lo, count):
    """Whether 0 ≤ u − lo < count, for every pair, as one unsigned comparison."""
    return (u[None, :] - lo[:, None]).to(tl.uint32, bitcast=True) < count[:, None].to(tl.uint32, bitcast=True)


@triton.jit
def visible(live, u, lo, count, EVEN: tl.constexpr, RANK: tl.constexpr):
    """Whether stationary rows see moving columns: (rows, columns), or (1, columns) where all rows agree."""
    seen = live[None, :]
    if not EVEN:
        seen = seen & inside(u[2], lo[2], count[2])
        if RANK >= 2:
            seen = seen & inside(u[1], lo[1], count[1])
        if RANK == 3:
            seen = seen & inside(u[0], lo[0], count[0])
    return seen


@triton.jit
def last_column(extent, SIZE1: tl.constexpr, SIZE2: tl.constexpr, SIZE3: tl.constexpr, BLOCK: tl.constexpr):
    """End of the members of a box of ``extent`` in the order of boxes of SIZE1·SIZE2·SIZE3."""
    if SIZE1 * SIZE2 * SIZE3 <= BLOCK:  # one step, known at compile time
        return SIZE1 * SIZE2 * SIZE3
    else:
        return flat((extent[0] - 1, extent[1] - 1, extent[2] - 1), SIZE2, SIZE3) + 1


@triton.jit
def load_rows(
    pointer, x, token, live, WIDTH: tl.constexpr, COLS: tl.constexpr, LONG: tl.constexpr
):  # fmt: skip
    """Gather rows of a head as (rows, COLS), 0 where dead or beyond WIDTH. LONG: offsets exceed 32 bits."""
    cols = tl.arange(0, COLS)
    if LONG:
        token = token.to(tl.int64)
    at = pointer + (token[:, None] * x.n + cols[None, :] * x.d)
    if WIDTH == COLS:
        return tl.load(at, mask=live[:, None], other=0.0)
    else:
        return tl.load(at, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(
    pointer, x, token, live, tile, WIDTH: tl.constexpr, COLS: tl.constexpr, LONG: tl.constexpr
):  # fmt: skip
    """Scatter (rows, COLS) to rows of a head."""
    cols = tl.arange(0, COLS)
    if LONG:
        token = token.to(tl.int64)
    at = pointer + (token[:, None] * x.n + cols[None, :] * x.d)
    tl.store(at, tile.to(x.base.dtype.element_ty), mask=live[:, None] & (cols < WIDTH)[None, :])
