"""The backward kernels: delta per query, dq by tiles of queries, dk and dv by tiles of keys.

Every gradient element is written by one program, in one order: no atomics, bitwise reproducible. With
p = exp(s − lse) and delta = do·o − d_lse, ds = p·(do·v − delta).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.window._device import (
    LOG2E,
    flat,
    head_pointer,
    intervals,
    last_column,
    load_rows,
    positions,
    store_rows,
    tile_field,
    tile_pointers,
    unravel,
    visible,
)


@triton.jit
def row_terms(
    do, o, d_lse, lse_log2, delta, heads, n, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Write delta of each query; 0 for one without keys, whatever d_lse says. Here D is o's."""
    bh = tl.program_id(0) // tiles
    b = bh // heads.count
    h = bh % heads.count
    token = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < n
    o_tile = load_rows(head_pointer(o, b, h), o, token, live, D, BLOCK_D, LONG)
    do_tile = load_rows(head_pointer(do, b, h), do, token, live, D, BLOCK_D, LONG)
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if d_lse is not None:
        at = head_pointer(d_lse, b, h) + token.to(tl.int64) * d_lse.n
        row_delta -= tl.load(at, mask=live, other=0.0)
    row = bh.to(tl.int64) * n + token
    row_lse = tl.load(lse_log2 + row, mask=live, other=0.0)
    tl.store(delta + row, tl.where(row_lse == float("inf"), 0.0, row_delta), mask=live)


@triton.jit
def add_key_bias(s, key_bias, b, h, key, live, KEYS_ARE_ROWS: tl.constexpr):
    """Add the bias of each key, in units of log 2."""
    at = head_pointer(key_bias, b, h) + key.to(tl.int64) * key_bias.n
    extra = tl.load(at, mask=live, other=0.0).to(tl.float32) * LOG2E
    if KEYS_ARE_ROWS:
        return s + extra[:, None]
    else:
        return s + extra[None, :]


@triton.jit
def backward_q(
    q, k, v, do, dq, lse_log2, delta, table, key_bias, walk, heads, scale_log2, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE2: tl.constexpr, TILE3: tl.constexpr,
    BOX1: tl.constexpr, BOX2: tl.constexpr, BOX3: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
    CAUSAL: tl.constexpr, LONG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile of queries of one head."""
    tiles = walk.tiles1 * walk.tiles2 * walk.tiles3
    bh = tl.program_id(0) // tiles
    b = bh // heads.count
    h = bh % heads.count
    at = tile_pointers(walk, tl.program_id(0) % tiles)
    residue = tile_field(walk, at, 0)
    box_first = tile_field(walk, at, 3)
    box_extent = tile_field(walk, at, 4)
    u, live = unravel(tl.arange(0, BLOCK_M), tile_field(walk, at, 1), tile_field(walk, at, 2), TILE2, TILE3)
    p = positions(walk, residue, u)
    token = flat(p, walk.length2, walk.length3)
    live = live & (token < walk.stationary)
    lo, count = intervals(walk, p, live, EVEN, RANK)
    row = bh.to(tl.int64) * walk.stationary + token
    row_lse = tl.load(lse_log2 + row, mask=live, other=float("inf"))
    row_delta = tl.load(delta + row, mask=live, other=0.0)
    q_tile = load_rows(head_pointer(q, b, h), q, token, live, D, BLOCK_D, LONG)
    do_tile = load_rows(head_pointer(do, b, h), do, token, live, DV, BLOCK_DV, LONG)
    k_head = head_pointer(k, b, h // heads.group)
    v_head = head_pointer(v, b, h // heads.group)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, last_column(box_extent, BOX1, BOX2, BOX3, BLOCK_N), BLOCK_N):
        u_k, live_k = unravel(start + tl.arange(0, BLOCK_N), box_first, box_extent, BOX2, BOX3)
        key = flat(positions(walk, residue, u_k), walk.moving2, walk.moving3)
        live_k = live_k & (key < walk.moving)
        k_tile = load_rows(k_head, k, key, live_k, D, BLOCK_D, LONG)
        v_tile = load_rows(v_head, v, key, live_k, DV, BLOCK_DV, LONG)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale_log2
        seen = visible(live_k, u_k, lo, count, EVEN, RANK)
        if CAUSAL:
            seen = seen & (key[None, :] <= token[:, None])
        if table is not None:
            first = flat(u, table.size2, table.size3) + table.origin
            entry = first[:, None] - flat(u_k, table.size2, table.size3)[None, :]
            at_table = table.base + h * table.entries + entry
            s += tl.load(at_table, mask=seen & live[:, None], other=0.0).to(tl.float32) * LOG2E
        if key_bias is not None:
            s = add_key_bias(s, key_bias, b, h, key, live_k, False)
        weights = tl.exp2(tl.where(seen, s, -float("inf")) - row_lse[:, None])
        dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
        ds = weights * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_rows(head_pointer(dq, b, h), dq, token, live, acc * scale, D, BLOCK_D, LONG)


@triton.jit
def backward_kv(
    q, k, v, do, dk, dv, lse_log2, delta, table, key_bias, d_key_bias, walk, heads, scale_log2, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE2: tl.constexpr, TILE3: tl.constexpr,
    BOX1: tl.constexpr, BOX2: tl.constexpr, BOX3: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
    CAUSAL: tl.constexpr, LONG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of keys of one key head, summed over its group of query heads.

    The walk is the transposed one: tiles of keys are stationary (BLOCK_M), boxes of queries move (BLOCK_N).
    ``d_key_bias`` (B, Hkv, M) fp32 receives Σ ds of the group.
    """
    tiles = walk.tiles1 * walk.tiles2 * walk.tiles3
    kv_heads = heads.count // heads.group
    b = tl.program_id(0) // tiles // kv_heads
    g = tl.program_id(0) // tiles % kv_heads
    at = tile_pointers(walk, tl.program_id(0) % tiles)
    residue = tile_field(walk, at, 0)
    box_first = tile_field(walk, at, 3)
    box_extent = tile_field(walk, at, 4)
    u, live = unravel(tl.arange(0, BLOCK_M), tile_field(walk, at, 1), tile_field(walk, at, 2), TILE2, TILE3)
    p = positions(walk, residue, u)
    key = flat(p, walk.length2, walk.length3)
    live = live & (key < walk.stationary)
    lo, count = intervals(walk, p, live, EVEN, RANK)
    k_tile = load_rows(head_pointer(k, b, g), k, key, live, D, BLOCK_D, LONG)
    v_tile = load_rows(head_pointer(v, b, g), v, key, live, DV, BLOCK_DV, LONG)

    dk_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    d_keys = tl.zeros([BLOCK_M], tl.float32)
    steps = tl.cdiv(last_column(box_extent, BOX1, BOX2, BOX3, BLOCK_N), BLOCK_N)
    divisor = tl.maximum(steps, 1)  # the pipeline computes the first addresses even of an empty loop
    for step in range(0, steps * heads.group):
        h = g * heads.group + step // divisor
        column = step % divisor * BLOCK_N + tl.arange(0, BLOCK_N)
        u_q, live_q = unravel(column, box_first, box_extent, BOX2, BOX3)
        query = flat(positions(walk, residue, u_q), walk.moving2, walk.moving3)
        live_q = live_q & (query < walk.moving)
        row = (b * heads.count + h).to(tl.int64) * walk.moving + query
        row_lse = tl.load(lse_log2 + row, mask=live_q, other=float("inf"))
        row_delta = tl.load(delta + row, mask=live_q, other=0.0)
        q_tile = load_rows(head_pointer(q, b, h), q, query, live_q, D, BLOCK_D, LONG)
        do_tile = load_rows(head_pointer(do, b, h), do, query, live_q, DV, BLOCK_DV, LONG)
        s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION) * scale_log2
        seen = visible(live_q, u_q, lo, count, EVEN, RANK)
        if CAUSAL:
            seen = seen & (key[:, None] <= query[None, :])
        if table is not None:
            first = flat(u_q, table.size2, table.size3) + table.origin
            entry = first[None, :] - flat(u, table.size2, table.size3)[:, None]
            at_table = table.base + h * table.entries + entry
            s += tl.load(at_table, mask=seen & live[:, None], other=0.0).to(tl.float32) * LOG2E
        if key_bias is not None:
            s = add_key_bias(s, key_bias, b, h, key, live, True)
        weights = tl.exp2(tl.where(seen, s, -float("inf")) - row_lse[None, :])
        dv_acc = tl.dot(weights.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
        dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
        ds = weights * (dp - row_delta[None, :])
        if d_key_bias is not None:
            d_keys += tl.sum(ds, 1)
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    if d_key_bias is not None:
        tl.store(head_pointer(d_key_bias, b, g) + key, d_keys, mask=live)
    store_rows(head_pointer(dk, b, g), dk, key, live, dk_acc * scale, D, BLOCK_D, LONG)
    store_rows(head_pointer(dv, b, g), dv, key, live, dv_acc, DV, BLOCK_DV, LONG)
