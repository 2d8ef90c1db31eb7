"""The forward kernels: attention of tiles of list entries, and the merge of the entries of each query."""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.buckets._device import (
    bucket_start,
    gather,
    labels,
    scatter,
    scores,
    tile_bounds,
    tokens,
)
from attnbench.kernels.flash._device import LN2, head_pointer


@triton.jit
def forward(
    q, k, v, o, lse, lse_log2, queries, keys, tiles, key_bias, extent, score,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o and the log-sum-exp of one tile of query entries of one head.

    DIRECT: to the rows of the tokens, o in its dtype, lse, and lse in log 2 with +∞ for a query without
    keys. Otherwise to the rows of the slots: o in fp32, and lse in log 2 with −∞ for such an entry.
    """
    tile = tl.program_id(0) % tiles.total
    bh = tl.program_id(0) // tiles.total
    b = bh // extent.heads
    h = bh % extent.heads
    bucket, first, end = tile_bounds(queries, tiles, b, h, tile, BLOCK_M)
    i, slots = tokens(queries, b, h, first + tl.arange(0, BLOCK_M), end)
    i_label = labels(queries, b, h, slots, i >= 0)
    q_tile = gather(head_pointer(q, b, h), q, i, D, BLOCK_D)
    k_head = head_pointer(k, b, h // extent.group)
    v_head = head_pointer(v, b, h // extent.group)
    lo = bucket_start(keys, b, h, bucket - extent.look_back, extent.count)
    hi = bucket_start(keys, b, h, bucket + 1, extent.count)
    hi = tl.where(first < end, hi, lo)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        j, key_slots = tokens(keys, b, h, start + tl.arange(0, BLOCK_N), hi)
        k_tile = gather(k_head, k, j, D, BLOCK_D)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        i_labels, j_labels = None, None
        if i_label is not None:
            i_labels = i_label[:, None]
            j_labels = labels(keys, b, h, key_slots, j >= 0)[None, :]
        s = scores(s, i[:, None], j[None, :], i_labels, j_labels, key_bias, b, h, extent, score, CAUSAL)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key yet: −inf − −inf would be NaN
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        v_tile = gather(v_head, v, j, DV, BLOCK_DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak

    seen = tl.where(total == 0.0, 1.0, total)
    row_lse = peak + tl.log2(seen)
    live = i >= 0
    rows = slots
    rows_of_head = queries.length
    if DIRECT:
        rows = i
        rows_of_head = extent.n
    row = bh.to(tl.int64) * rows_of_head + rows
    if DIRECT:
        tl.store(lse + row, row_lse * LN2, mask=live)
        row_lse = tl.where(total == 0.0, float("inf"), row_lse)
    tl.store(lse_log2 + row, row_lse, mask=live)
    scatter(head_pointer(o, b, h), o, rows, live, acc / seen[:, None], DV, BLOCK_DV)


@triton.jit
def combine(
    entries_o, entries_lse, o, lse, lse_log2, visits, starts, length, list_group, heads, n, tiles,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Write o, lse and lse in log 2 of BLOCK_T queries of one head from all entries that hold them.

    By the mass of each entry, or, if MEAN, the plain mean of the entries' outputs. In the order of the list.
    """
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b = bh // heads
    h = bh % heads
    i = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    at = head_pointer(starts, b, h // list_group) + tl.minimum(i, n - 1) * starts.n
    start = tl.load(at)
    visited = tl.where(i < n, tl.load(at + starts.n) - start, 0)
    list_of = head_pointer(visits, b, h // list_group)
    o_head = head_pointer(entries_o, b, h)
    lse_head = entries_lse + bh.to(tl.int64) * length
    acc = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    peak = tl.full([BLOCK_T], -float("inf"), tl.float32)
    for visit in range(0, tl.max(visited, 0)):
        live = visit < visited
        slot = tl.load(list_of + (start + visit).to(tl.int64) * visits.n, mask=live, other=-1)
        entry_lse = tl.load(lse_head + slot, mask=live, other=-float("inf"))
        part = gather(o_head, entries_o, slot, DV, BLOCK_DV)
        new_peak = tl.maximum(peak, entry_lse)
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        mass = tl.exp2(entry_lse - shift)
        decay = tl.exp2(peak - shift)
        total = total * decay + mass
        if MEAN:
            acc += part
        else:
            acc = acc * decay[:, None] + mass[:, None] * part
        peak = new_peak
    seen = tl.where(total == 0.0, 1.0, total)
    row_lse = peak + tl.log2(seen)
    row = bh.to(tl.int64) * n + i
    tl.store(lse + row, row_lse * LN2, mask=i < n)
    tl.store(lse_log2 + row, tl.where(total == 0.0, float("inf"), row_lse), mask=i < n)
    divisor = seen
    if MEAN:
        divisor = tl.maximum(visited, 1).to(tl.float32)
    scatter(head_pointer(o, b, h), o, i, i < n, acc / divisor[:, None], DV, BLOCK_DV)
