"""The forward kernels: rows against a split of the keys, the merge of splits, and resident keys."""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.few_query._device import (
    key_pointers,
    load,
    program,
    row_pointers,
    scores,
    store,
    store_part,
)
from attnbench.kernels.flash._device import LN2, head_pointer


@triton.jit
def forward(
    q, k, v, o, lse, lse_log2, biases, extent, grid, inner,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o and lse of one tile of rows over one split of the keys of one key head.

    SPLIT: o and lse in log 2 (−∞ without keys) to parts (splits, B, H, N, Dv) in fp32. Otherwise final: o,
    lse, and lse in log 2, +∞ for a query without keys, so that the backward kernels find its p to be 0.
    """
    tile, split, b, g, bg = program(grid, extent)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < extent.rows
    q_tile = load(row_pointers(q, b, g, rows, extent), q, live, D, BLOCK_D)
    lo = split * grid.length
    hi = tl.minimum(lo + grid.length, extent.m)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k_tile = load(key_pointers(k, b, g, j, extent), k, j < extent.m, D, BLOCK_D)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        s = scores(s, rows[:, None], j[None, :], b, g, biases, extent, inner, CAUSAL)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key yet: −inf − −inf would be NaN
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        v_tile = load(key_pointers(v, b, g, j, extent), v, j < extent.m, DV, BLOCK_DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak

    seen = tl.where(total == 0.0, 1.0, total)
    row_lse = peak + tl.log2(seen)
    acc = acc / seen[:, None]
    first = bg.to(tl.int64) * extent.rows
    if SPLIT:
        heads = tl.num_programs(0) // (grid.tiles * grid.splits)
        first += split.to(tl.int64) * heads * extent.rows
        tl.store(lse_log2 + first + rows, row_lse, mask=live)
        store_part(o, first, rows, live, acc, DV, BLOCK_DV)
    else:
        tl.store(lse + first + rows, row_lse * LN2, mask=live)
        tl.store(lse_log2 + first + rows, tl.where(total == 0.0, float("inf"), row_lse), mask=live)
        store(row_pointers(o, b, g, rows, extent), o, live, acc, DV, BLOCK_DV)


@triton.jit
def merge(
    parts_o, parts_lse, o, lse, lse_log2, splits, heads, n,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write o and lse of one query of one head from its splits, in their order."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    total = 0.0
    peak = -float("inf")
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = split.to(tl.int64) * rows + row
        part_lse = tl.load(parts_lse + at, mask=split < splits, other=-float("inf"))
        mask = (split < splits)[:, None] & (cols < DV)[None, :]
        part = tl.load(parts_o + at[:, None] * DV + cols[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(part_lse, 0))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        mass = tl.exp2(part_lse - shift)
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(mass, 0)
        acc = acc * decay + tl.sum(mass[:, None] * part, 0)
        peak = new_peak
    seen = tl.where(total == 0.0, 1.0, total)
    row_lse = peak + tl.log2(seen)
    tl.store(lse + row, row_lse * LN2)
    tl.store(lse_log2 + row, tl.where(total == 0.0, float("inf"), row_lse))
    target = head_pointer(o, row // n // heads, row // n % heads) + row % n * o.n + cols * o.d
    tl.store(target, (acc / seen).to(o.base.dtype.element_ty), mask=cols < DV)


@triton.jit
def forward_resident(
    q, k, v, o, lse, lse_log2, biases, extent, grid, inner,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o, lse and lse in log 2 of one split of the rows, with all keys of a key head in one tile.

    The keys are read once for all rows of a program, and a softmax over one tile needs no rescaling.
    """
    _, split, b, g, bg = program(grid, extent)
    j = tl.arange(0, BLOCK_N)
    k_tile = load(key_pointers(k, b, g, j, extent), k, j < extent.m, D, BLOCK_D)
    v_tile = load(key_pointers(v, b, g, j, extent), v, j < extent.m, DV, BLOCK_DV)
    lo = split * grid.length
    hi = tl.minimum(lo + grid.length, extent.rows)
    for start in range(lo, hi, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        live = rows < extent.rows
        q_tile = load(row_pointers(q, b, g, rows, extent), q, live, D, BLOCK_D)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        s = scores(s, rows[:, None], j[None, :], b, g, biases, extent, inner, CAUSAL)
        peak = tl.max(s, 1)
        p = tl.exp2(s - tl.where(peak == -float("inf"), 0.0, peak)[:, None])
        total = tl.sum(p, 1)
        seen = tl.where(total == 0.0, 1.0, total)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION) / seen[:, None]
        row_lse = peak + tl.log2(seen)
        row = bg.to(tl.int64) * extent.rows + rows
        tl.store(lse + row, row_lse * LN2, mask=live)
        tl.store(lse_log2 + row, tl.where(total == 0.0, float("inf"), row_lse), mask=live)
        store(row_pointers(o, b, g, rows, extent), o, live, acc, DV, BLOCK_DV)
