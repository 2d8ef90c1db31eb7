"""The forward kernels: an online softmax of a tile of rows over listed blocks, and the merge of parts.

A tile is the heads of one query (query-major), which walk its list, or the rows of some queries that chose
one block (key-major), which leave a part per entry of their lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.flash._device import LN2, head_pointer
from attnbench.kernels.token_blocks._device import (
    Rows,
    entry_rows,
    key_bias,
    listed_keys,
    load_keys,
    load_rows,
    store_rows,
)


@triton.jit
def tile_rows(tile, b, u, lists, items, extent, BLOCK_M: tl.constexpr, KEY_MAJOR: tl.constexpr):
    """The rows of a tile, and the list of blocks that they walk: pointer and length."""
    index = tl.arange(0, BLOCK_M)
    hs = u // extent.unit_lists
    if KEY_MAJOR:
        start = tl.load(head_pointer(items.start, b, hs) + tile)
        stop = tl.load(head_pointer(items.stop, b, hs) + tile)
        order = head_pointer(items.order, b, hs)
        rows = entry_rows(order, start, stop, index, u, extent, lists.width)
        # an item has as many entries as fit the tile: rows beyond them belong to the next item
        return rows, head_pointer(items.block, b, hs) + tile, tl.where(stop > start, 1, 0)
    else:
        head = u * extent.rows + index
        token = tl.zeros([BLOCK_M], tl.int32) + tile
        entries = head_pointer(lists.indices, b, hs) + tile.to(tl.int64) * lists.width
        count = tl.load(head_pointer(lists.counts, b, hs) + tile)
        return Rows(token, head, token, index < extent.rows), entries, count


@triton.jit
def forward(
    q, k, v, bias, o, lse, lse_log2, lists, items, extent, block_k, tiles, slots, inner,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MAJOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o and lse of one tile to their places, ``slots`` per head: queries, or entries of their lists.

    ``lse_log2`` is for the backward kernels and the merge; of a query without keys it is +∞ where the tile is
    all of it, so that its p is 0 for any score, and −∞ in a part.
    """
    tile = tl.program_id(0) % tiles
    bu = tl.program_id(0) // tiles
    b = bu // extent.units
    u = bu % extent.units
    rows, entries, count = tile_rows(tile, b, u, lists, items, extent, BLOCK_M, KEY_MAJOR)
    q_tile = load_rows(q, b, rows, D, BLOCK_D)
    last_key = rows.token + (extent.m - extent.n)
    k_head = head_pointer(k, b, u // extent.unit_keys)
    v_head = head_pointer(v, b, u // extent.unit_keys)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for step in range(0, tl.cdiv(count * block_k, BLOCK_N)):
        j, live = listed_keys(entries, step, count, block_k, extent.m, BLOCK_N, WHOLE)
        k_tile = load_keys(k_head, k, j, live, D, BLOCK_D)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * inner
        if bias is not None:
            s += key_bias(bias, b, u, j, live)[None, :]
        seen = live[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= last_key[:, None])
        s = tl.where(seen, s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key yet: −inf − −inf would be NaN
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        v_tile = load_keys(v_head, v, j, live, DV, BLOCK_DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak
    weight = tl.where(total == 0.0, 1.0, total)
    row_lse = peak + tl.log2(weight)
    at = (b * extent.heads + rows.head).to(tl.int64) * slots + rows.slot
    if KEY_MAJOR:
        tl.store(lse_log2 + at, row_lse, mask=rows.live)
    else:
        tl.store(lse + at, row_lse * LN2, mask=rows.live)
        tl.store(lse_log2 + at, tl.where(total == 0.0, float("inf"), row_lse), mask=rows.live)
    store_rows(o, b, rows, acc / weight[:, None], DV, BLOCK_DV)


@triton.jit
def merge(
    parts, part_lse, o, lse, lse_log2, lists, heads, group, n, tiles, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Sum the parts (B, H, N·K, D) of each query in fp32, in the order of its list.

    WEIGHTED: parts are outputs with an lse each, (B, H, N·K) in log 2; they are weighted by its exponential,
    and lse and ``lse_log2`` of the whole are written. ``group``: query heads of one head of lists.
    """
    start = tl.program_id(0) % tiles * BLOCK_M
    bh = tl.program_id(0) // tiles
    b = bh // heads
    h = bh % heads
    token = start + tl.arange(0, BLOCK_M)
    inside = token < n
    cols = tl.arange(0, BLOCK_D)
    count = tl.load(head_pointer(lists.counts, b, h // group) + token, mask=inside, other=0)
    row = bh.to(tl.int64) * n + token
    longest = tl.max(count, 0)
    if WEIGHTED:
        peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
        for place in range(0, longest):
            part = tl.load(part_lse + row * lists.width + place, mask=place < count, other=-float("inf"))
            peak = tl.maximum(peak, part)
        shift = tl.where(peak == -float("inf"), 0.0, peak)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for place in range(0, longest):
        live = place < count
        at = (row * lists.width + place) * D
        part = tl.load(
            parts + at[:, None] + cols[None, :], mask=live[:, None] & (cols < D)[None, :], other=0.0
        )
        if WEIGHTED:
            weight = tl.load(part_lse + row * lists.width + place, mask=live, other=-float("inf"))
            weight = tl.exp2(weight - shift)
            total += weight
            acc += part * weight[:, None]
        else:
            acc += part
    if WEIGHTED:
        whole = tl.where(total == 0.0, 1.0, total)
        acc = acc / whole[:, None]
        row_lse = peak + tl.log2(whole)
        tl.store(lse + row, row_lse * LN2, mask=inside)
        tl.store(lse_log2 + row, tl.where(total == 0.0, float("inf"), row_lse), mask=inside)
    target = head_pointer(o, b, h) + token.to(tl.int64)[:, None] * o.n + cols[None, :] * o.d
    tl.store(target, acc.to(o.base.dtype.element_ty), mask=inside[:, None] & (cols < D)[None, :])
