"""The backward kernels: dq by tiles of rows as the forward pass, dk and dv by items of the transposed lists.

Every number is written by one program, in one order: no atomics, bitwise reproducible. With p = exp(s − lse)
and delta = do·o − d_lse, ds = p·(do·v − delta).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.flash._device import head_pointer
from attnbench.kernels.token_blocks._device import (
    entry_rows,
    key_bias,
    listed_keys,
    load_keys,
    load_rows,
    store_rows,
)
from attnbench.kernels.token_blocks._forward import tile_rows


@triton.jit
def backward_q(
    q, k, v, bias, do, dq, lse_log2, delta, lists, items, extent, block_k, tiles, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MAJOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile of rows, or the part of one key block in it, to its place."""
    tile = tl.program_id(0) % tiles
    bu = tl.program_id(0) // tiles
    b = bu // extent.units
    u = bu % extent.units
    rows, entries, count = tile_rows(tile, b, u, lists, items, extent, BLOCK_M, KEY_MAJOR)
    at = (b * extent.heads + rows.head).to(tl.int64) * extent.n + rows.token
    row_lse = tl.load(lse_log2 + at, mask=rows.live, other=float("inf"))
    row_delta = tl.load(delta + at, mask=rows.live, other=0.0)
    q_tile = load_rows(q, b, rows, D, BLOCK_D)
    do_tile = load_rows(do, b, rows, DV, BLOCK_DV)
    last_key = rows.token + (extent.m - extent.n)
    k_head = head_pointer(k, b, u // extent.unit_keys)
    v_head = head_pointer(v, b, u // extent.unit_keys)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(0, tl.cdiv(count * block_k, BLOCK_N)):
        j, live = listed_keys(entries, step, count, block_k, extent.m, BLOCK_N, WHOLE)
        k_tile = load_keys(k_head, k, j, live, D, BLOCK_D)
        v_tile = load_keys(v_head, v, j, live, DV, BLOCK_DV)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * inner
        if bias is not None:
            s += key_bias(bias, b, u, j, live)[None, :]
        seen = live[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= last_key[:, None])
        p = tl.exp2(tl.where(seen, s, -float("inf")) - row_lse[:, None])
        dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_rows(dq, b, rows, acc * outer, D, BLOCK_D)


@triton.jit
def backward_kv(
    q, k, v, bias, do, dk, dv, d_bias, lse_log2, delta, width, items, extent, block_k, count, key_tiles,
    inner, outer, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what one item adds to dk, dv and the gradient of the bias, for one tile of the keys of its block.

    Parts are (B, U, T, block_k, ·) in fp32 for T = ``count`` items; none is written for an empty one.
    """
    key_tile = tl.program_id(0) % key_tiles
    item = tl.program_id(0) // key_tiles % count
    bu = tl.program_id(0) // key_tiles // count
    b = bu // extent.units
    u = bu % extent.units
    hs = u // extent.unit_lists
    start = tl.load(head_pointer(items.start, b, hs) + item)
    stop = tl.load(head_pointer(items.stop, b, hs) + item)
    if start == stop:
        return
    block = tl.load(head_pointer(items.block, b, hs) + item)
    inside = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = block * block_k + inside
    live = (inside < block_k) & (j < extent.m)
    k_tile = load_keys(head_pointer(k, b, u // extent.unit_keys), k, j, live, D, BLOCK_D)
    v_tile = load_keys(head_pointer(v, b, u // extent.unit_keys), v, j, live, DV, BLOCK_DV)
    if bias is not None:
        j_bias = key_bias(bias, b, u, j, live)
    order = head_pointer(items.order, b, hs)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    d_keys = tl.zeros([BLOCK_N], tl.float32)
    for step in range(0, tl.cdiv((stop - start) * extent.rows, BLOCK_M)):
        rows = entry_rows(order, start, stop, step * BLOCK_M + tl.arange(0, BLOCK_M), u, extent, width)
        at = (b * extent.heads + rows.head).to(tl.int64) * extent.n + rows.token
        row_lse = tl.load(lse_log2 + at, mask=rows.live, other=float("inf"))
        row_delta = tl.load(delta + at, mask=rows.live, other=0.0)
        q_tile = load_rows(q, b, rows, D, BLOCK_D)
        do_tile = load_rows(do, b, rows, DV, BLOCK_DV)
        s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION) * inner
        if bias is not None:
            s += j_bias[:, None]
        if CAUSAL:
            last_key = rows.token + (extent.m - extent.n)
            s = tl.where(j[:, None] <= last_key[None, :], s, -float("inf"))
        p = tl.exp2(s - row_lse[None, :])
        dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
        dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        if d_bias is not None:
            d_keys += tl.sum(ds, 1)
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    part = (bu.to(tl.int64) * count + item) * block_k + inside
    cols, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    tl.store(dk + part[:, None] * D + cols, dk_acc * outer, mask=live[:, None] & (cols < D)[None, :])
    tl.store(dv + part[:, None] * DV + values, dv_acc, mask=live[:, None] & (values < DV)[None, :])
    if d_bias is not None:
        tl.store(d_bias + part, d_keys, mask=live)


@triton.jit
def sum_items(
    parts, out, first, units, unit_lists, out_heads, m, count, block_k, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum the parts (B, U, T, block_k, D) of a tile of keys into ``out`` (B, U', M, D).

    In the order of the items, over the U/U' units of an output head. A tile lies within one block.
    """
    tile = tl.program_id(0) % tiles
    bg = tl.program_id(0) // tiles
    b = bg // out_heads
    g = bg % out_heads
    per_block = tl.cdiv(block_k, BLOCK_N)
    block = tile // per_block
    inside = tile % per_block * BLOCK_N + tl.arange(0, BLOCK_N)
    j = block * block_k + inside
    cols = tl.arange(0, BLOCK_D)
    mask = ((inside < block_k) & (j < m))[:, None] & (cols < D)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    group = units // out_heads
    for member in range(0, group):
        u = g * group + member
        bounds = head_pointer(first, b, u // unit_lists) + block
        start = (b * units + u).to(tl.int64) * count
        for item in range(tl.load(bounds), tl.load(bounds + 1)):
            row = (start + item) * block_k + inside
            acc += tl.load(parts + row[:, None] * D + cols[None, :], mask=mask, other=0.0)
    target = head_pointer(out, b, g) + j.to(tl.int64)[:, None] * out.n + cols[None, :] * out.d
    tl.store(target, acc.to(out.base.dtype.element_ty), mask=mask)
