"""The backward kernels: row terms, dq over splits of the keys, dk and dv over splits of the rows, sums.

Every gradient element is the sum of its splits in their order: no atomics, bitwise reproducible. With
p = exp(s − lse) and delta = do·o − d_lse, ds = p·(do·v − delta).
"""

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
from attnbench.kernels.flash._device import head_pointer


@triton.jit
def row_terms(
    do, o, d_lse, lse_log2, delta, extent, grid,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write delta = do·o − d_lse of a tile of rows, 0 for a row that sees no key, whatever d_lse says."""
    tile, _, b, g, bg = program(grid, extent)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < extent.rows
    do_tile = load(row_pointers(do, b, g, rows, extent), do, live, DV, BLOCK_DV).to(tl.float32)
    o_tile = load(row_pointers(o, b, g, rows, extent), o, live, DV, BLOCK_DV).to(tl.float32)
    row_delta = tl.sum(do_tile * o_tile, 1)
    if d_lse is not None:
        row_delta -= tl.load(row_pointers(d_lse, b, g, rows, extent))
    row = bg.to(tl.int64) * extent.rows + rows
    row_lse = tl.load(lse_log2 + row, mask=live, other=0.0)
    tl.store(delta + row, tl.where(row_lse == float("inf"), 0.0, row_delta), mask=live)


@triton.jit
def backward_q(
    q, k, v, do, dq, d_bias, lse_log2, delta, biases, extent, grid, outer, inner,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile of rows over one split of the keys, and ds of its pairs to ``d_bias`` if given.

    SPLIT: dq to parts (splits, B, H, N, D) in fp32.
    """
    tile, split, b, g, bg = program(grid, extent)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < extent.rows
    row = bg.to(tl.int64) * extent.rows + rows
    row_lse = tl.load(lse_log2 + row, mask=live, other=float("inf"))
    row_delta = tl.load(delta + row, mask=live, other=0.0)
    q_tile = load(row_pointers(q, b, g, rows, extent), q, live, D, BLOCK_D)
    do_tile = load(row_pointers(do, b, g, rows, extent), do, live, DV, BLOCK_DV)
    lo = split * grid.length
    hi = tl.minimum(lo + grid.length, extent.m)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(lo, hi, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k_tile = load(key_pointers(k, b, g, j, extent), k, j < extent.m, D, BLOCK_D)
        v_tile = load(key_pointers(v, b, g, j, extent), v, j < extent.m, DV, BLOCK_DV)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        s = scores(s, rows[:, None], j[None, :], b, g, biases, extent, inner, CAUSAL)
        dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
        ds = tl.exp2(s - row_lse[:, None]) * (dp - row_delta[:, None])
        if d_bias is not None:
            target = row_pointers(d_bias, b, g, rows, extent)[:, None] + j[None, :] * d_bias.d
            tl.store(target, ds, mask=live[:, None] & (j < extent.m)[None, :])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    acc *= outer
    if SPLIT:
        heads = tl.num_programs(0) // (grid.tiles * grid.splits)
        first = (split.to(tl.int64) * heads + bg) * extent.rows
        store_part(dq, first, rows, live, acc, D, BLOCK_D)
    else:
        store(row_pointers(dq, b, g, rows, extent), dq, live, acc, D, BLOCK_D)


@triton.jit
def backward_kv(
    q, k, v, do, dq, dk, dv, d_keys, d_bias, lse_log2, delta, biases, extent, grid, outer, inner,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk, dv and Σ ds of one tile of keys over one split of the rows; tiles are keys by rows.

    ``dq``, and ds to ``d_bias`` (B, H, N, M), are written as well if given: for calls whose keys all stand in
    this one tile. ``d_keys`` (splits, B, Hkv, M) fp32 receives Σ ds. SPLIT: dk and dv to parts
    (splits, B, Hkv, M, ·) in fp32.
    """
    tile, split, b, g, bg = program(grid, extent)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    live_keys = j < extent.m
    k_tile = load(key_pointers(k, b, g, j, extent), k, live_keys, D, BLOCK_D)
    v_tile = load(key_pointers(v, b, g, j, extent), v, live_keys, DV, BLOCK_DV)
    lo = split * grid.length
    hi = tl.minimum(lo + grid.length, extent.rows)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    key_acc = tl.zeros([BLOCK_N], tl.float32)
    for start in range(lo, hi, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        live = rows < extent.rows
        row = bg.to(tl.int64) * extent.rows + rows
        row_lse = tl.load(lse_log2 + row, mask=live, other=float("inf"))
        row_delta = tl.load(delta + row, mask=live, other=0.0)
        q_tile = load(row_pointers(q, b, g, rows, extent), q, live, D, BLOCK_D)
        do_tile = load(row_pointers(do, b, g, rows, extent), do, live, DV, BLOCK_DV)
        s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
        s = scores(s, rows[None, :], j[:, None], b, g, biases, extent, inner, CAUSAL)
        p = tl.exp2(s - row_lse[None, :])
        dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
        dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        if d_keys is not None:
            key_acc += tl.sum(ds, 1)
        if d_bias is not None:
            target = row_pointers(d_bias, b, g, rows, extent)[None, :] + j[:, None] * d_bias.d
            tl.store(target, ds, mask=live[None, :] & live_keys[:, None])
        ds = ds.to(q_tile.dtype)
        dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision=PRECISION)
        if dq is not None:
            dq_tile = tl.dot(ds.T, k_tile, input_precision=PRECISION) * outer
            store(row_pointers(dq, b, g, rows, extent), dq, live, dq_tile, D, BLOCK_D)
    heads = tl.num_programs(0) // (grid.tiles * grid.splits)
    first = (split.to(tl.int64) * heads + bg) * extent.m
    if d_keys is not None:
        tl.store(d_keys + first + j, key_acc, mask=live_keys)
    dk_acc *= outer
    if SPLIT:
        store_part(dk, first, j, live_keys, dk_acc, D, BLOCK_D)
        store_part(dv, first, j, live_keys, dv_acc, DV, BLOCK_DV)
    else:
        store(key_pointers(dk, b, g, j, extent), dk, live_keys, dk_acc, D, BLOCK_D)
        store(key_pointers(dv, b, g, j, extent), dv, live_keys, dv_acc, DV, BLOCK_DV)


@triton.jit
def backward_resident(
    q, k, v, do, dq, dk, dv, d_keys, d_bias, lse_log2, delta, biases, extent, grid, outer, inner,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write every gradient over one split of the keys, with all rows of a key head in one tile.

    The keys and values are read once. SPLIT: dq to parts (splits, B, H, N, D) in fp32. ``d_keys``
    (B, Hkv, M) and ``d_bias`` (B, H, N, M), fp32, receive Σ ds over the rows, and ds, if given.
    """
    _, split, b, g, bg = program(grid, extent)
    rows = tl.arange(0, BLOCK_M)
    live = rows < extent.rows
    row = bg.to(tl.int64) * extent.rows + rows
    row_lse = tl.load(lse_log2 + row, mask=live, other=float("inf"))
    row_delta = tl.load(delta + row, mask=live, other=0.0)
    q_tile = load(row_pointers(q, b, g, rows, extent), q, live, D, BLOCK_D)
    do_tile = load(row_pointers(do, b, g, rows, extent), do, live, DV, BLOCK_DV)
    lo = split * grid.length
    hi = tl.minimum(lo + grid.length, extent.m)
    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(lo, hi, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        live_keys = j < extent.m
        k_tile = load(key_pointers(k, b, g, j, extent), k, live_keys, D, BLOCK_D)
        v_tile = load(key_pointers(v, b, g, j, extent), v, live_keys, DV, BLOCK_DV)
        s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
        s = scores(s, rows[None, :], j[:, None], b, g, biases, extent, inner, CAUSAL)
        p = tl.exp2(s - row_lse[None, :])
        dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, input_precision=PRECISION)
        store(key_pointers(dv, b, g, j, extent), dv, live_keys, dv_tile, DV, BLOCK_DV)
        dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        if d_keys is not None:
            tl.store(d_keys + bg.to(tl.int64) * extent.m + j, tl.sum(ds, 1), mask=live_keys)
        if d_bias is not None:
            target = row_pointers(d_bias, b, g, rows, extent)[None, :] + j[:, None] * d_bias.d
            tl.store(target, ds, mask=live[None, :] & live_keys[:, None])
        ds = ds.to(q_tile.dtype)
        dk_tile = tl.dot(ds, q_tile, input_precision=PRECISION) * outer
        store(key_pointers(dk, b, g, j, extent), dk, live_keys, dk_tile, D, BLOCK_D)
        dq_acc = tl.dot(ds.T, k_tile, dq_acc, input_precision=PRECISION)
    dq_acc *= outer
    if SPLIT:
        heads = tl.num_programs(0) // (grid.tiles * grid.splits)
        store_part(dq, (split.to(tl.int64) * heads + bg) * extent.rows, rows, live, dq_acc, D, BLOCK_D)
    else:
        store(row_pointers(dq, b, g, rows, extent), dq, live, dq_acc, D, BLOCK_D)


@triton.jit
def sum_splits(
    parts, out, splits, heads, n, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Write one row of ``out`` (B, heads, n, D), the sum of its rows in parts (splits, B, heads, n, D)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = split.to(tl.int64) * rows + row
        mask = (split < splits)[:, None] & (cols < D)[None, :]
        acc += tl.sum(tl.load(parts + at[:, None] * D + cols[None, :], mask=mask, other=0.0), 0)
    target = head_pointer(out, row // n // heads, row // n % heads) + row % n * out.n + cols * out.d
    tl.store(target, acc.to(out.base.dtype.element_ty), mask=cols < D)
