"""The kernels: quantise blocks of rows, then attention with integer scores.

One program per tile; tensors travel as views with the caller's strides, as in dense attention.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.flash._device import LN2, head_pointer, load_tile, store_tile, tile_start

TINY = tl.constexpr(1e-30)
"""The least maximum of a block: one of zeros gets ints of 0, not 0/0."""


@triton.jit
def quantise(
    x, mean, removed, ints, scale, multiplier, n, heads, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write (x − mean)·multiplier of one block of rows as integers, and its scale.

    ``removed`` (B, N) int8 rows count as 0.
    """
    tile = tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles // heads
    h = tl.program_id(0) // tiles % heads
    start = tile * BLOCK
    rows = start + tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    values = load_tile(head_pointer(x, b, h), x, start, n, D, BLOCK, BLOCK_D, True).to(tl.float32)
    if mean is not None:
        shift = tl.load(head_pointer(mean, b, h) + cols * mean.d, mask=cols < D, other=0.0)
        values = tl.where((rows < n)[:, None], values - shift[None, :], 0.0)
    if removed is not None:
        gone = tl.load(removed + b.to(tl.int64) * n + rows, mask=rows < n, other=1)
        values = tl.where((gone != 0)[:, None], 0.0, values)
    values = values * multiplier
    block_scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values)), TINY), 127.0)
    ratio = tl.div_rn(values, block_scale)
    rounded = tl.where(ratio < 0, ratio - 0.5, ratio + 0.5).to(tl.int32)  # the cast truncates: away from zero
    rounded = tl.minimum(tl.maximum(rounded, -127), 127)
    store_tile(head_pointer(ints, b, h), ints, start, n, rounded, D, BLOCK, BLOCK_D)
    tl.store(scale + tl.program_id(0), block_scale)


@triton.jit
def _attend(
    acc, total, peak, q_ints, q_scale, rows, lo, hi, entries, k_ints, k_scale, v, removed, b, g, n, m,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Fold the keys lo..hi, of the sequence or of a list of its blocks, into acc, total and peak."""
    k_head = head_pointer(k_ints, b, g)
    v_head = head_pointer(v, b, g)
    scales = head_pointer(k_scale, b, g)
    for at in range(lo, hi, BLOCK_N):
        start = tile_start(entries, at, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_head, k_ints, start, m, D, BLOCK_N, BLOCK_D, EDGE)
        product = tl.dot(q_ints, k_tile.T, out_dtype=tl.int32)
        s = product.to(tl.float32) * (q_scale * tl.load(scales + start // BLOCK_N))
        if EDGE:
            seen = (j < m)[None, :]
            if CAUSAL:
                seen = seen & (j[None, :] <= rows[:, None] + (m - n))
            if removed is not None:
                gone = tl.load(removed + b.to(tl.int64) * m + j, mask=j < m, other=1)
                seen = seen & (gone == 0)[None, :]
            s = tl.where(seen, s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key yet: −inf − −inf would be NaN
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        v_tile = load_tile(v_head, v, start, m, DV, BLOCK_N, BLOCK_DV, EDGE)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None])
        peak = new_peak
    return acc, total, peak


@triton.jit
def attend(
    q_ints, q_scale, k_ints, k_scale, v, o, lse, removed, lists, n, m, heads, group, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, CAUSAL: tl.constexpr,
    UNEVEN: tl.constexpr,
):  # fmt: skip
    """Write o and lse of one tile of queries of one head. UNEVEN: M is no multiple of BLOCK_N.

    With ``lists`` the blocks of keys of a block of queries are listed.
    """
    tile = tiles - 1 - tl.program_id(0) % tiles  # under causality the long rows come last: start with them
    bh = tl.program_id(0) // tiles
    b = bh // heads
    h = bh % heads
    g = h // group
    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    block = start // BLOCK_Q
    q_tile = load_tile(head_pointer(q_ints, b, h), q_ints, start, n, D, BLOCK_M, BLOCK_D, True)
    scale = tl.load(head_pointer(q_scale, b, h) + block)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    entries = None
    whole = 0  # end of the keys that need no mask
    hi = m
    if lists is not None:
        entries = head_pointer(lists.indices, b, h) + block.to(tl.int64) * lists.indices.n
        hi = tl.load(head_pointer(lists.counts, b, h) + block * lists.counts.n) * BLOCK_N
    else:
        if CAUSAL:
            hi = tl.minimum(tl.maximum(tl.minimum(start + BLOCK_M, n) + m - n, 0), m)
        if removed is None:
            whole = m // BLOCK_N * BLOCK_N
            if CAUSAL:
                whole = tl.minimum(tl.maximum(start + 1 + m - n, 0), m) // BLOCK_N * BLOCK_N
            acc, total, peak = _attend(
                acc, total, peak, q_tile, scale, rows, 0, whole, entries, k_ints, k_scale, v, removed, b, g,
                n, m, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, False,
            )  # fmt: skip
    if CAUSAL or UNEVEN or removed is not None or lists is not None:
        acc, total, peak = _attend(
            acc, total, peak, q_tile, scale, rows, whole, hi, entries, k_ints, k_scale, v, removed, b, g,
            n, m, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, True,
        )  # fmt: skip
    seen = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + bh.to(tl.int64) * n + rows, (peak + tl.log2(seen)) * LN2, mask=rows < n)
    store_tile(head_pointer(o, b, h), o, start, n, acc / seen[:, None], DV, BLOCK_M, BLOCK_DV)
