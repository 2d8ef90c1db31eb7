"""The forward kernel: one program per tile of queries, an online softmax over the box of keys it sees."""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.window._device import (
    LN2,
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
def forward(
    q, k, v, o, lse, lse_log2, table, key_bias, walk, heads, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE2: tl.constexpr, TILE3: tl.constexpr,
    BOX1: tl.constexpr, BOX2: tl.constexpr, BOX3: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
    CAUSAL: tl.constexpr, LONG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o and lse of one tile of queries of one head, and lse in log 2 for the backward kernels.

    There a query without keys has lse = +∞, so that its p is 0 for any score.
    """
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
    q_tile = load_rows(head_pointer(q, b, h), q, token, live, D, BLOCK_D, LONG)
    k_head = head_pointer(k, b, h // heads.group)
    v_head = head_pointer(v, b, h // heads.group)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for start in range(0, last_column(box_extent, BOX1, BOX2, BOX3, BLOCK_N), BLOCK_N):
        u_k, live_k = unravel(start + tl.arange(0, BLOCK_N), box_first, box_extent, BOX2, BOX3)
        key = flat(positions(walk, residue, u_k), walk.moving2, walk.moving3)
        live_k = live_k & (key < walk.moving)
        k_tile = load_rows(k_head, k, key, live_k, D, BLOCK_D, LONG)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale_log2
        seen = visible(live_k, u_k, lo, count, EVEN, RANK)
        if CAUSAL:
            seen = seen & (key[None, :] <= token[:, None])
        if table is not None:
            row = flat(u, table.size2, table.size3) + table.origin
            entry = row[:, None] - flat(u_k, table.size2, table.size3)[None, :]
            at_table = table.base + h * table.entries + entry
            s += tl.load(at_table, mask=seen & live[:, None], other=0.0).to(tl.float32) * LOG2E
        if key_bias is not None:
            at_bias = head_pointer(key_bias, b, h) + key.to(tl.int64) * key_bias.n
            s += (tl.load(at_bias, mask=live_k, other=0.0).to(tl.float32) * LOG2E)[None, :]
        s = tl.where(seen, s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # −inf − −inf would be NaN
        weights = tl.exp2(s - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weights, 1)
        v_tile = load_rows(v_head, v, key, live_k, DV, BLOCK_DV, LONG)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak

    row = bh.to(tl.int64) * walk.stationary + token
    seen_mass = tl.where(total == 0.0, 1.0, total)
    row_lse = peak + tl.log2(seen_mass)
    tl.store(lse + row, row_lse * LN2, mask=live)
    tl.store(lse_log2 + row, tl.where(total == 0.0, float("inf"), row_lse), mask=live)
    acc = acc / seen_mass[:, None]
    store_rows(head_pointer(o, b, h), o, token, live, acc, DV, BLOCK_DV, LONG)
