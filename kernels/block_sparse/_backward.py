"""The backward kernels: dq by query tiles along the lists, dk and dv by key tiles along the transpose.

Every gradient element is written by one program, in one order: no atomics, bitwise reproducible. With
p = exp(s − lse) and delta = do·o − d_lse, ds = p·(do·v − delta).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.block_sparse._device import (
    biased,
    key_positions,
    list_bounds,
    query_positions,
    row_values,
)
from attnbench.kernels.flash._device import head_pointer, load_tile, store_tile


@triton.jit
def _accumulate_dq(
    dq, q_tile, do_tile, row_lse, row_delta, pos, threshold, entries, lo, hi, k, v, columns, b, h, extent,
    inner, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add Σ ds k over the entries lo..hi of a list."""
    k_head = head_pointer(k, b, h // extent.group)
    v_head = head_pointer(v, b, h // extent.group)
    for step in range(lo * TILES, hi * TILES):
        block = tl.load(entries + step // TILES)
        start = block * extent.block_k + step % TILES * BLOCK_N
        end = tl.minimum((block + 1) * extent.block_k, extent.m)
        j = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_head, k, start, end, D, BLOCK_N, BLOCK_D, EDGE)
        v_tile = load_tile(v_head, v, start, end, DV, BLOCK_N, BLOCK_DV, EDGE)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * inner
        if columns.bias is not None:
            bias = row_values(columns.bias, b, h, j, end, 0.0, EDGE).to(tl.float32)
            s = biased(s, bias[None, :], threshold)
        if CAUSAL:
            s = tl.where(
                key_positions(columns, b, h, j, end, EDGE)[None, :] <= pos[:, None], s, -float("inf")
            )
        if EDGE:
            s = tl.where((j < end)[None, :], s, -float("inf"))
        p = tl.exp2(s - row_lse[:, None])
        dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_q(
    q, k, v, do, dq, lse_log2, delta, lists, rows, columns, extent, inner, outer, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr,
    RAGGED_K: tl.constexpr, UNEVEN_K: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile of queries of one head; lists as in the forward kernel."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b = bh // extent.heads
    h = bh % extent.heads
    block = tile // Q_TILES
    start_q = block * extent.block_q + tile % Q_TILES * BLOCK_M
    end_q = tl.minimum((block + 1) * extent.block_q, extent.n)
    index = start_q + tl.arange(0, BLOCK_M)
    entries, split, count = list_bounds(lists, b, h, block)
    row = bh.to(tl.int64) * extent.n + index
    row_lse = tl.load(lse_log2 + row, mask=index < end_q, other=float("inf"))
    row_delta = tl.load(delta + row, mask=index < end_q, other=0.0)
    q_tile = load_tile(head_pointer(q, b, h), q, start_q, end_q, D, BLOCK_M, BLOCK_D, True)
    do_tile = load_tile(head_pointer(do, b, h), do, start_q, end_q, DV, BLOCK_M, BLOCK_DV, True)
    pos = query_positions(rows, b, h, index, end_q, extent, True)
    threshold = None
    if rows.threshold is not None:
        threshold = row_values(rows.threshold, b, h, index, end_q, 0.0, True).to(tl.float32)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    masked_from = 0
    if lists.split is not None:
        masked_from = split
        acc = _accumulate_dq(
            acc, q_tile, do_tile, row_lse, row_delta, pos, threshold, entries, 0, split, k, v, columns,
            b, h, extent, inner, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, K_TILES, PRECISION, RAGGED_K, False,
        )  # fmt: skip
    if CAUSAL or UNEVEN_K:
        acc = _accumulate_dq(
            acc, q_tile, do_tile, row_lse, row_delta, pos, threshold, entries, masked_from, count, k, v,
            columns, b, h, extent, inner, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, K_TILES, PRECISION, True, CAUSAL,
        )  # fmt: skip
    store_tile(head_pointer(dq, b, h), dq, start_q, end_q, acc * outer, D, BLOCK_M, BLOCK_D)


@triton.jit
def _accumulate_dkv(
    dk, dv, d_keys, k_tile, v_tile, j, end_k, entries, lo, hi, q, do, lse_log2, delta, rows, columns,
    b, h, extent, inner,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add Σ ds q, Σ p do and Σ ds over the query blocks lo..hi of a list; tiles are keys by queries.

    What is computed for keys from ``end_k`` on is not stored, so they need no mask.
    """
    q_head = head_pointer(q, b, h)
    do_head = head_pointer(do, b, h)
    first_row = (b * extent.heads + h).to(tl.int64) * extent.n
    if columns.bias is not None:
        bias = row_values(columns.bias, b, h, j, end_k, 0.0, True).to(tl.float32)[:, None]
    if CAUSAL:
        key_pos = key_positions(columns, b, h, j, end_k, True)
    for step in range(lo * TILES, hi * TILES):
        block = tl.load(entries + step // TILES)
        start = block * extent.block_q + step % TILES * BLOCK_M
        end = tl.minimum((block + 1) * extent.block_q, extent.n)
        i = start + tl.arange(0, BLOCK_M)
        row = first_row + i
        if EDGE:
            row_lse = tl.load(lse_log2 + row, mask=i < end, other=float("inf"))
            row_delta = tl.load(delta + row, mask=i < end, other=0.0)
        else:
            row_lse = tl.load(lse_log2 + row)
            row_delta = tl.load(delta + row)
        q_tile = load_tile(q_head, q, start, end, D, BLOCK_M, BLOCK_D, EDGE)
        do_tile = load_tile(do_head, do, start, end, DV, BLOCK_M, BLOCK_DV, EDGE)
        s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION) * inner
        if columns.bias is not None:
            threshold = None
            if rows.threshold is not None:
                threshold = row_values(rows.threshold, b, h, i, end, 0.0, EDGE).to(tl.float32)[None, :]
            s = biased(s, bias, threshold)
        if CAUSAL:
            pos = query_positions(rows, b, h, i, end, extent, EDGE)
            s = tl.where(key_pos[:, None] <= pos[None, :], s, -float("inf"))
        p = tl.exp2(s - row_lse[None, :])
        dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        if columns.bias is not None:
            d_keys += tl.sum(ds, 1)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv, d_keys


@triton.jit
def backward_kv(
    q, k, v, do, dk, dv, d_bias, lse_log2, delta, lists, rows, columns, extent, inner, outer, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr,
    RAGGED_Q: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of keys of one key head, summed over its group of query heads.

    ``d_bias`` (B, H, M) fp32 receives Σ ds of each query head. The list has first the query blocks that
    need the mask of causality. RAGGED_Q: some tile of queries is cut.
    """
    tile = tl.program_id(0) % tiles
    kv_heads = extent.heads // extent.group
    b = tl.program_id(0) // tiles // kv_heads
    g = tl.program_id(0) // tiles % kv_heads
    block = tile // K_TILES
    start_k = block * extent.block_k + tile % K_TILES * BLOCK_N
    end_k = tl.minimum((block + 1) * extent.block_k, extent.m)
    j = start_k + tl.arange(0, BLOCK_N)
    k_tile = load_tile(head_pointer(k, b, g), k, start_k, end_k, D, BLOCK_N, BLOCK_D, True)
    v_tile = load_tile(head_pointer(v, b, g), v, start_k, end_k, DV, BLOCK_N, BLOCK_DV, True)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, extent.group):
        h = g * extent.group + member
        entries, split, count = list_bounds(lists, b, h, block)
        d_keys = tl.zeros([BLOCK_N], tl.float32)
        dk_acc, dv_acc, d_keys = _accumulate_dkv(
            dk_acc, dv_acc, d_keys, k_tile, v_tile, j, end_k, entries, 0, split, q, do, lse_log2, delta,
            rows, columns, b, h, extent, inner,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, Q_TILES, PRECISION, RAGGED_Q, CAUSAL,
        )  # fmt: skip
        if lists.split is not None:
            dk_acc, dv_acc, d_keys = _accumulate_dkv(
                dk_acc, dv_acc, d_keys, k_tile, v_tile, j, end_k, entries, split, count, q, do, lse_log2,
                delta, rows, columns, b, h, extent, inner,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, Q_TILES, PRECISION, RAGGED_Q, False,
            )  # fmt: skip
        if d_bias is not None:
            tl.store(head_pointer(d_bias, b, h) + j, d_keys, mask=j < end_k)
    store_tile(head_pointer(dk, b, g), dk, start_k, end_k, dk_acc * outer, D, BLOCK_N, BLOCK_D)
    store_tile(head_pointer(dv, b, g), dv, start_k, end_k, dv_acc, DV, BLOCK_N, BLOCK_DV)
