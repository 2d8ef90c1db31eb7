"""What the kernels share: argument types, packed rows, tiles of rows and keys, and scores.

The N·H/Hkv queries of a key head are the rows of its tiles: row r is query r mod N of the head's member
r div N. (B, H, N) and (B, Hkv, rows) are the same memory. Scores are in units of log 2.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from attnbench.kernels.flash._device import LOG2E, View, head_pointer


class Extent(NamedTuple):
    """Lengths and heads of a call; rows = n·group."""

    n: int
    m: int
    rows: int
    group: int
    kv_heads: int


class Grid(NamedTuple):
    """How a launch is cut: tiles of the side that a program holds, splits of the side that it walks."""

    tiles: int
    splits: int
    length: int


class Biases(NamedTuple):
    """Biases of a call, expanded: of the keys of a key head (B, H, M), one for its group; of pairs."""

    keys: View | None
    pairs: View | None


@triton.jit
def program(grid, extent):
    """The tile, the split, the batch element and the key head of a program, and its index among heads."""
    pid = tl.program_id(0)
    tile = pid % grid.tiles
    split = pid // grid.tiles % grid.splits
    bg = pid // (grid.tiles * grid.splits)
    return tile, split, bg // extent.kv_heads, bg % extent.kv_heads, bg


@triton.jit
def row_pointers(x, b, g, rows, extent):
    """Start of packed rows of key head g, 64-bit each; rows beyond the last point at it."""
    rows = tl.minimum(rows, extent.rows - 1)
    h = g * extent.group + rows // extent.n
    return x.base + b.to(tl.int64) * x.b + h.to(tl.int64) * x.h + (rows % extent.n).to(tl.int64) * x.n


@triton.jit
def key_pointers(x, b, g, j, extent):
    """Start of the keys j of key head g; keys beyond the last point at it."""
    return head_pointer(x, b, g) + tl.minimum(j, extent.m - 1).to(tl.int64) * x.n


@triton.jit
def load(pointers, x, live, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """The tile (rows, COLS) at these row pointers: 0 where not live, and beyond WIDTH columns."""
    cols = tl.arange(0, COLS)
    tile = pointers[:, None] + cols[None, :] * x.d
    if WIDTH == COLS:
        return tl.load(tile, mask=live[:, None], other=0.0)
    else:
        return tl.load(tile, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def store(pointers, x, live, tile, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Write a tile to these row pointers, where live."""
    cols = tl.arange(0, COLS)
    target = pointers[:, None] + cols[None, :] * x.d
    tl.store(target, tile.to(x.base.dtype.element_ty), mask=live[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def store_part(parts, first, rows, live, tile, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Write a tile in fp32 to the rows first + rows of a contiguous array of rows of WIDTH."""
    cols = tl.arange(0, COLS)
    target = parts + first * WIDTH + rows[:, None].to(tl.int64) * WIDTH + cols[None, :]
    tl.store(target, tile, mask=live[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def scores(dot, rows, j, b, g, biases, extent, inner, CAUSAL: tl.constexpr):
    """Turn q·k into scores in log 2, −inf where a key is not seen; rows and j broadcast to the pairs."""
    s = dot * inner
    key = tl.minimum(j, extent.m - 1).to(tl.int64)
    if biases.keys is not None:
        at = head_pointer(biases.keys, b, g * extent.group) + key * biases.keys.n
        s += tl.load(at).to(tl.float32) * LOG2E
    if biases.pairs is not None:
        at = row_pointers(biases.pairs, b, g, rows, extent) + key * biases.pairs.d
        s += tl.load(at).to(tl.float32) * LOG2E
    seen = j < extent.m
    if CAUSAL:
        seen = seen & (j <= rows % extent.n + (extent.m - extent.n))
    return tl.where(seen, s, -float("inf"))
