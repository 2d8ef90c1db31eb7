"""What the forward and the backward kernels share: argument types, tile loads, scores, masks, tile ranges.

Scores live in units of log 2 (``_log2``), so that exp2 serves. Tensors travel as :class:`View`, a pointer
with its strides, because every stride is the caller's.
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


class Extent(NamedTuple):
    """Lengths, heads and mask of a call. A side of the window that is None sees everything."""

    n: int
    m: int
    heads: int
    group: int  # query heads of one key head
    left: int | None
    right: int | None


class Tests(NamedTuple):
    """The tests of a mask, (B, H, M, T) and twice (B, H, N, T): codes of keys, bounds of queries."""

    code: View
    low: View
    high: View


class Lists(NamedTuple):
    """Which tiles to visit, (B, H, T, T'), and (B, H, T, 2) how many are seen wholly and how many at all."""

    indices: View
    counts: View


class Relative(NamedTuple):
    """A table (H, size) of biases in fp32, its stride over heads, the codes whose differences index it."""

    table: Any
    stride: int
    size: int
    q_code: Any
    k_code: Any


class TableSums(NamedTuple):
    """Where the gradient of a table is summed: (copies, H, size) int64, as multiples of 1/unit."""

    sums: Any
    copies: int
    unit: Any


class Score(NamedTuple):
    """Multipliers of a call: of q·k on its way into exp2 or tanh, of the capped score, and of dq and dk."""

    inner: float
    cap_log2: float | None
    outer: float


@triton.jit
def head_pointer(x, b, h):
    """Start of head h of batch element b; 64-bit, since B·H·N·D may exceed 2³¹."""
    return x.base + b.to(tl.int64) * x.b + h.to(tl.int64) * x.h


@triton.jit
def load_tile(
    pointer, x, start, n, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EDGE: tl.constexpr
):
    """Load rows start..start+ROWS of a head as (ROWS, COLS): 0 beyond WIDTH columns and, if EDGE, n rows."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    tile = pointer + start.to(tl.int64) * x.n + rows[:, None] * x.n + cols[None, :] * x.d
    if EDGE:
        if WIDTH == COLS:
            return tl.load(tile, mask=(start + rows < n)[:, None], other=0.0)
        else:
            return tl.load(tile, mask=(start + rows < n)[:, None] & (cols < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == COLS:
            return tl.load(tile)
        else:
            return tl.load(tile, mask=(cols < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(pointer, x, start, n, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Write (ROWS, COLS) to the rows start..start+ROWS of a head, as far as the head has rows and columns."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    target = pointer + start.to(tl.int64) * x.n + rows[:, None] * x.n + cols[None, :] * x.d
    tl.store(
        target, tile.to(x.base.dtype.element_ty), mask=(start + rows < n)[:, None] & (cols < WIDTH)[None, :]
    )


@triton.jit
def tanh(x):
    """Compute tanh to 3e-7 relative: by exp2 away from 0, where it does not cancel, by a series near 0."""
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    x2 = x * x
    near = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.2, near, far)


@triton.jit
def relative_index(rel, i, j, extent):
    """Place in the table of queries i and keys j, which exist, and whether it is in the table."""
    index = tl.load(rel.q_code + tl.minimum(i, extent.n - 1)) - tl.load(
        rel.k_code + tl.minimum(j, extent.m - 1)
    )
    return index, (index >= 0) & (index < rel.size)


@triton.jit
def add_biases(s_log2, i, j, b, h, extent, key_bias, bias, rel):
    """Add the biases of queries i and keys j, index tensors that broadcast to the shape of the scores."""
    if rel is not None:
        index, listed = relative_index(rel, i, j, extent)
        s_log2 += tl.load(rel.table + h * rel.stride + index, mask=listed, other=0.0) * LOG2E
    j = tl.minimum(j, extent.m - 1).to(tl.int64)  # clamped rather than masked: the scores are masked later
    if key_bias is not None:
        s_log2 += tl.load(head_pointer(key_bias, b, h) + j * key_bias.n).to(tl.float32) * LOG2E
    if bias is not None:
        i = tl.minimum(i, extent.n - 1).to(tl.int64)
        s_log2 += tl.load(head_pointer(bias, b, h) + i * bias.n + j * bias.d).to(tl.float32) * LOG2E
    return s_log2


@triton.jit
def admitted(tests, b, h, i, j, extent, CLAUSES: tl.constexpr):
    """Whether key j exists and passes every test of some clause for query i; i, j as of the scores."""
    code = head_pointer(tests.code, b, h) + tl.minimum(j, extent.m - 1) * tests.code.n
    row = tl.minimum(i, extent.n - 1)
    low = head_pointer(tests.low, b, h) + row * tests.low.n
    high = head_pointer(tests.high, b, h) + row * tests.high.n
    seen = j < 0
    for clause in tl.static_range(len(CLAUSES)):
        inside = j < extent.m
        for place in tl.static_range(len(CLAUSES[clause])):
            found = tl.load(code + CLAUSES[clause][place] * tests.code.d)
            inside = inside & (found >= tl.load(low + CLAUSES[clause][place] * tests.low.d))
            inside = inside & (found <= tl.load(high + CLAUSES[clause][place] * tests.high.d))
        seen = seen | inside
    return seen


@triton.jit
def visible(pos, i, j, b, h, extent, tests, CLAUSES: tl.constexpr):
    """Whether key j exists and is seen by query i, which is at ``pos``; index tensors as of the scores."""
    if tests is not None:
        return admitted(tests, b, h, i, j, extent, CLAUSES)
    else:
        seen = j < extent.m
        if extent.right is not None:
            seen = seen & (j <= pos + extent.right)
        if extent.left is not None:
            seen = seen & (j >= pos - extent.left)
        return seen


@triton.jit
def listed_segments(lists, b, h, tile, BLOCK: tl.constexpr):
    """The list of a tile as a pointer, and the ranges of a loop over it as :func:`segments` has them.

    In units of BLOCK an entry, so that a loop over a list and one over a sequence are the same.
    """
    entries = head_pointer(lists.indices, b, h) + tile.to(tl.int64) * lists.indices.n
    counts = head_pointer(lists.counts, b, h) + tile * lists.counts.n
    return entries, tl.load(counts) * BLOCK, tl.load(counts + lists.counts.d) * BLOCK


@triton.jit
def tile_start(entries, at, BLOCK: tl.constexpr):
    """First token of the tile at place ``at`` of a loop: of the sequence, or of a list of its tiles."""
    if entries is None:
        return tl.multiple_of(at, BLOCK)
    else:
        return tl.multiple_of(tl.load(entries + at // BLOCK) * BLOCK, BLOCK)


@triton.jit
def positions(q_pos, start, extent, ROWS: tl.constexpr):
    """Positions of the queries start..start+ROWS on the axis of the keys, the first and the last of them."""
    rows = start + tl.arange(0, ROWS)
    if q_pos is None:
        offset = extent.m - extent.n
        return rows + offset, start + offset, tl.minimum(start + ROWS, extent.n) - 1 + offset
    else:
        pos = tl.load(q_pos + tl.minimum(rows, extent.n - 1))
        return pos, tl.min(pos, 0), tl.max(pos, 0)


@triton.jit
def segments(lo, full_lo, full_hi, hi, limit, BLOCK: tl.constexpr):
    """Tile-aligned ranges of a loop: masked [lo, full_lo), unmasked [full_lo, full_hi), masked [full_hi, hi).

    From the first and the last index that any row sees (lo, hi) and that every row sees (full_lo, full_hi),
    ends exclusive. The first range ends at hi where no tile is full.
    """
    lo = tl.maximum(lo, 0) // BLOCK * BLOCK
    hi = tl.minimum(tl.maximum(hi, 0), limit)
    full_lo = tl.cdiv(tl.maximum(full_lo, 0), BLOCK) * BLOCK
    full_hi = tl.maximum(tl.minimum(tl.maximum(full_hi, 0), limit) // BLOCK * BLOCK, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def key_segments(first, last, extent, BLOCK: tl.constexpr):
    """The ranges of keys for queries at the positions first..last."""
    lo = 0
    full_lo = 0
    full_hi = extent.m
    hi = extent.m
    if extent.left is not None:
        lo = first - extent.left
        full_lo = last - extent.left
    if extent.right is not None:
        full_hi = first + extent.right + 1
        hi = last + extent.right + 1
    return segments(lo, full_lo, full_hi, hi, extent.m, BLOCK)


@triton.jit
def query_segments(start, q_ranges, tile, tiles, extent, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """The ranges of queries for the keys start..start+KEYS.

    With positions of the caller's, ``q_ranges`` (4, tiles) holds them, found by a search; without, position
    i + M − N is inverted.
    """
    lo = 0
    full_lo = 0
    full_hi = extent.n
    hi = extent.n
    if q_ranges is not None:
        lo = tl.load(q_ranges + tile)
        full_lo = tl.load(q_ranges + tiles + tile)
        full_hi = tl.load(q_ranges + 2 * tiles + tile)
        hi = tl.load(q_ranges + 3 * tiles + tile)
    else:
        first = start - (extent.m - extent.n)
        last = tl.minimum(start + KEYS, extent.m) - 1 - (extent.m - extent.n)
        if extent.right is not None:
            lo = first - extent.right
            full_lo = last - extent.right
        if extent.left is not None:
            full_hi = first + extent.left + 1
            hi = last + extent.left + 1
    return segments(lo, full_lo, full_hi, hi, extent.n, BLOCK)
