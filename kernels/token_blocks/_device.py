"""What the kernels share: argument types, rows of a tile, listed keys, scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnbench.kernels.flash._device import LOG2E, View, head_pointer


class Extent(NamedTuple):
    """Lengths, heads and units of a call. A unit is a run of query heads with one key head and one list."""

    n: int
    m: int
    heads: int
    units: int
    rows: int  # query heads of a unit
    unit_keys: int  # units that read one key head
    unit_lists: int  # units that read one head of lists


class Lists(NamedTuple):
    """Lists of key blocks per query (B, Hs, N, K) with their lengths (B, Hs, N), contiguous from dim 2 on."""

    indices: View
    counts: View
    width: int


class Items(NamedTuple):
    """Work items of the transposed lists: see ``attnbench.kernels.token_selection.Tiles``.

    ``order`` (B, Hs, N·K), ``block``, ``start`` and ``stop`` (B, Hs, T), ``first`` (B, Hs, Tk + 1).
    """

    order: View
    block: View
    start: View
    stop: View
    first: View


class Rows(NamedTuple):
    """Rows of a tile: query, head, place in the output, and whether there is such a row."""

    token: Any
    head: Any
    slot: Any
    live: Any


@triton.jit
def entry_rows(entries, start, stop, index, u, extent, width):
    """The rows ``index`` of the entries start..stop of a block, ``extent.rows`` heads each."""
    entry = start + index // extent.rows
    live = entry < stop
    slot = tl.load(entries + entry, mask=live, other=0)
    return Rows(slot // width, u * extent.rows + index % extent.rows, slot, live)


@triton.jit
def row_pointers(x, b, rows, at):
    """Start of row ``at`` of the head of each row of a tile; 64-bit."""
    head = rows.head.to(tl.int64) * x.h
    return x.base + b.to(tl.int64) * x.b + head + at.to(tl.int64) * x.n


@triton.jit
def load_rows(x, b, rows, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """The queries of a tile as (rows, COLS): 0 beyond WIDTH columns and where there is no row."""
    cols = tl.arange(0, COLS)
    at = row_pointers(x, b, rows, rows.token)[:, None] + cols[None, :] * x.d
    return tl.load(at, mask=rows.live[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(x, b, rows, tile, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Write a tile to the places of its rows."""
    cols = tl.arange(0, COLS)
    at = row_pointers(x, b, rows, rows.slot)[:, None] + cols[None, :] * x.d
    tl.store(at, tile.to(x.base.dtype.element_ty), mask=rows.live[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def listed_keys(entries, step, count, block_k, m, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr):
    """The keys that places step·BLOCK_N .. of a list name, one place per key, and whether there is one.

    WHOLE: tiles divide blocks, so the keys of one follow each other.
    """
    place = step * BLOCK_N + tl.arange(0, BLOCK_N)
    if WHOLE:
        block = tl.load(entries + step * BLOCK_N // block_k)
        j = block * block_k + step * BLOCK_N % block_k + tl.arange(0, BLOCK_N)
        return j, j < m
    else:
        live = place < count * block_k
        block = tl.load(entries + place // block_k, mask=live, other=0)
        j = block * block_k + place % block_k
        return j, live & (j < m)


@triton.jit
def load_keys(pointer, x, j, live, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """The rows j of a head as (keys, COLS), 0 where there is none."""
    cols = tl.arange(0, COLS)
    at = (pointer + j.to(tl.int64) * x.n)[:, None] + cols[None, :] * x.d
    return tl.load(at, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def key_bias(bias, b, u, j, live):
    """Bias of the keys in log 2."""
    at = head_pointer(bias, b, u) + j.to(tl.int64) * bias.n
    return tl.load(at, mask=live, other=0.0).to(tl.float32) * LOG2E
