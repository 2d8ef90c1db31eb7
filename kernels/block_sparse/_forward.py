"""The forward kernel: one program per tile of queries, an online softmax over the listed key blocks."""

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
from attnbench.kernels.flash._device import LN2, head_pointer, load_tile, store_tile


@triton.jit
def _attend(
    acc, total, peak, q_tile, pos, threshold, entries, lo, hi, k, v, columns, b, h, extent, inner,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Fold the entries lo..hi of a list into acc, total and peak: Σ p v, Σ p and the largest score so far.

    TILES of BLOCK_N keys make a block. One loop over entries and tiles, so that loads of the next are ahead.
    """
    k_head = head_pointer(k, b, h // extent.group)
    v_head = head_pointer(v, b, h // extent.group)
    for step in range(lo * TILES, hi * TILES):
        block = tl.load(entries + step // TILES)
        start = block * extent.block_k + step % TILES * BLOCK_N
        end = tl.minimum((block + 1) * extent.block_k, extent.m)
        j = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_head, k, start, end, D, BLOCK_N, BLOCK_D, EDGE)
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
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key yet: −inf − −inf would be NaN
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        v_tile = load_tile(v_head, v, start, end, DV, BLOCK_N, BLOCK_DV, EDGE)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit
def forward(
    q, k, v, o, lse, lse_log2, lists, rows, columns, extent, inner, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr,
    RAGGED_K: tl.constexpr, UNEVEN_K: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o and lse of one tile of queries of one head, and lse in log 2 for the backward kernels.

    There a query without keys has lse = +∞, so that its p is 0 for any score. A block of queries makes
    Q_TILES tiles, a block of keys K_TILES; RAGGED_K: the last of those is cut. UNEVEN_K: the last block
    of keys is. The list has first the entries that need no mask.
    """
    tile = tiles - 1 - tl.program_id(0) % tiles  # under causality the long lists come last: start with them
    bh = tl.program_id(0) // tiles
    b = bh // extent.heads
    h = bh % extent.heads
    block = tile // Q_TILES
    start_q = block * extent.block_q + tile % Q_TILES * BLOCK_M
    end_q = tl.minimum((block + 1) * extent.block_q, extent.n)
    index = start_q + tl.arange(0, BLOCK_M)
    entries, split, count = list_bounds(lists, b, h, block)
    q_tile = load_tile(head_pointer(q, b, h), q, start_q, end_q, D, BLOCK_M, BLOCK_D, True)
    pos = query_positions(rows, b, h, index, end_q, extent, True)
    threshold = None
    if rows.threshold is not None:
        threshold = row_values(rows.threshold, b, h, index, end_q, 0.0, True).to(tl.float32)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    masked_from = 0
    if lists.split is not None:
        masked_from = split
        acc, total, peak = _attend(
            acc, total, peak, q_tile, pos, threshold, entries, 0, split, k, v, columns, b, h, extent, inner,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, K_TILES, PRECISION, RAGGED_K, False,
        )  # fmt: skip
    if CAUSAL or UNEVEN_K:
        acc, total, peak = _attend(
            acc, total, peak, q_tile, pos, threshold, entries, masked_from, count, k, v, columns, b, h,
            extent, inner, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, K_TILES, PRECISION, True, CAUSAL,
        )  # fmt: skip

    inside = index < end_q
    row = bh.to(tl.int64) * extent.n + index
    seen = tl.where(total == 0.0, 1.0, total)
    row_lse = peak + tl.log2(seen)
    tl.store(lse + row, row_lse * LN2, mask=inside)
    tl.store(lse_log2 + row, tl.where(total == 0.0, float("inf"), row_lse), mask=inside)
    store_tile(head_pointer(o, b, h), o, start_q, end_q, acc / seen[:, None], DV, BLOCK_M, BLOCK_DV)
