"""The gradient of the relative position bias, in two stages without atomics.

All tiles of queries are laid over each other: a tile and the frame of keys around its first query. Programs
sum ds of their share of tiles in that frame; then every entry of the table sums the pairs at its difference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.window._backward import add_key_bias
from attnbench.kernels.window._device import (
    LOG2E,
    flat,
    head_pointer,
    intervals,
    load_rows,
    positions,
    tile_field,
    tile_pointers,
    unravel,
    visible,
)


@triton.jit
def backward_bias(
    q, k, v, do, partial, lse_log2, delta, table, key_bias, walk, heads, units, splits, chunks, back,
    scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE2: tl.constexpr, TILE3: tl.constexpr,
    FRAME1: tl.constexpr, FRAME2: tl.constexpr, FRAME3: tl.constexpr, EVEN: tl.constexpr,
    RANK: tl.constexpr, CAUSAL: tl.constexpr, LONG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write Σ ds over one share of the (batch, tile) units, for one head and one chunk of the frame.

    ``partial`` is (H, splits, BLOCK_M, chunks·BLOCK_N) fp32; ``back`` is how far the frame begins before the
    first query of a tile, per axis.
    """
    chunk = tl.program_id(0) % chunks
    split = tl.program_id(0) // chunks % splits
    h = tl.program_id(0) // chunks // splits
    tiles = walk.tiles1 * walk.tiles2 * walk.tiles3
    share = tl.cdiv(units, splits)
    column = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for unit in range(split * share, tl.minimum((split + 1) * share, units)):
        b = unit // tiles
        at = tile_pointers(walk, unit % tiles)
        residue = tile_field(walk, at, 0)
        first = tile_field(walk, at, 1)
        box_first = tile_field(walk, at, 3)
        box_extent = tile_field(walk, at, 4)
        frame_first = (first[0] - back[0], first[1] - back[1], first[2] - back[2])
        u_k, live_k = unravel(column, frame_first, (FRAME1, FRAME2, FRAME3), FRAME2, FRAME3)
        live_k = live_k & (u_k[0] >= box_first[0]) & (u_k[0] < box_first[0] + box_extent[0])
        live_k = live_k & (u_k[1] >= box_first[1]) & (u_k[1] < box_first[1] + box_extent[1])
        live_k = live_k & (u_k[2] >= box_first[2]) & (u_k[2] < box_first[2] + box_extent[2])
        key = flat(positions(walk, residue, u_k), walk.moving2, walk.moving3)
        live_k = live_k & (key < walk.moving)
        if tl.max(live_k.to(tl.int32), 0) > 0:  # else no key of this chunk is in the box
            u, live = unravel(tl.arange(0, BLOCK_M), first, tile_field(walk, at, 2), TILE2, TILE3)
            p = positions(walk, residue, u)
            token = flat(p, walk.length2, walk.length3)
            live = live & (token < walk.stationary)
            lo, count = intervals(walk, p, live, EVEN, RANK)
            row = (b * heads.count + h).to(tl.int64) * walk.stationary + token
            row_lse = tl.load(lse_log2 + row, mask=live, other=float("inf"))
            row_delta = tl.load(delta + row, mask=live, other=0.0)
            q_tile = load_rows(head_pointer(q, b, h), q, token, live, D, BLOCK_D, LONG)
            k_tile = load_rows(head_pointer(k, b, h // heads.group), k, key, live_k, D, BLOCK_D, LONG)
            s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale_log2
            seen = visible(live_k, u_k, lo, count, EVEN, RANK)
            if CAUSAL:
                seen = seen & (key[None, :] <= token[:, None])
            origin = flat(u, table.size2, table.size3) + table.origin
            entry = origin[:, None] - flat(u_k, table.size2, table.size3)[None, :]
            at_table = table.base + h * table.entries + entry
            s += tl.load(at_table, mask=seen & live[:, None], other=0.0).to(tl.float32) * LOG2E
            if key_bias is not None:
                s = add_key_bias(s, key_bias, b, h, key, live_k, False)
            weights = tl.exp2(tl.where(seen, s, -float("inf")) - row_lse[:, None])
            do_tile = load_rows(head_pointer(do, b, h), do, token, live, DV, BLOCK_DV, LONG)
            v_tile = load_rows(head_pointer(v, b, h // heads.group), v, key, live_k, DV, BLOCK_DV, LONG)
            dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
            acc += weights * (dp - row_delta[:, None])
    rows = (h * splits + split).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(partial + rows[:, None] * (chunks * BLOCK_N) + column[None, :], acc)
