"""The forward kernel: one program per query tile, an online softmax over the key tiles that it sees."""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.flash._device import (
    LN2,
    LOG2E,
    add_biases,
    head_pointer,
    key_segments,
    listed_segments,
    load_tile,
    positions,
    store_tile,
    tanh,
    tile_start,
    visible,
)


@triton.jit
def _attend(
    acc, total, peak, q_tile, pos, start_q, lo, hi, entries, k, v, key_bias, bias, rel, tests, b, h,
    extent, score,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr,
    CLAUSES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Fold the keys lo..hi, of the sequence or of a list of its tiles, into acc, total and peak.

    That is Σ p v, Σ p and the largest score so far, per query.
    """
    k_head = head_pointer(k, b, h // extent.group)
    v_head = head_pointer(v, b, h // extent.group)
    i = start_q + tl.arange(0, BLOCK_M)[:, None]
    for at in range(lo, hi, BLOCK_N):
        start = tile_start(entries, at, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)[None, :]
        k_tile = load_tile(k_head, k, start, extent.m, D, BLOCK_N, BLOCK_D, EDGE)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        if RAW:  # the multiplier is applied together with the subtraction of the peak, in one instruction
            multiplier = score.inner
        else:
            multiplier = 1.0
            s = s * score.inner
            if score.cap_log2 is not None:
                s = tanh(s) * score.cap_log2
            s = add_biases(s, i, j, b, h, extent, key_bias, bias, rel)
        if EDGE:
            seen = visible(pos[:, None], i, j, b, h, extent, tests, CLAUSES)
            s = tl.where(seen, s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * multiplier)
        if EDGE or not RAW:  # a query that has seen no key yet: −inf − −inf would be NaN
            shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        else:
            shift = new_peak
        p = tl.exp2(s * multiplier - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        v_tile = load_tile(v_head, v, start, extent.m, DV, BLOCK_N, BLOCK_DV, EDGE)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit
def forward(
    q, k, v, o, lse, lse_log2, key_bias, bias, rel, sink, q_pos, tests, lists, extent, score,
    tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAW: tl.constexpr, UNEVEN: tl.constexpr,
    PRECISION: tl.constexpr, CLAUSES: tl.constexpr,
):  # fmt: skip
    """Write o and lse of one query tile of one head, and lse in log 2 for the backward kernels.

    There a query without keys has lse = +∞, so that its p is 0 for any score.

    RAW: a positive multiplier is all that stands between q·k and exp2. UNEVEN: M is no multiple of BLOCK_N.
    With ``lists`` the tiles of keys are those of a mask, of which the second part needs its ``tests``.
    """
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    if extent.right is not None or lists is not None:  # long rows first: short ones fill the last wave
        tile = tiles - 1 - tile
    b = bh // extent.heads
    h = bh % extent.heads
    start_q = tile * BLOCK_M
    q_tile = load_tile(head_pointer(q, b, h), q, start_q, extent.n, D, BLOCK_M, BLOCK_D, True)
    pos, first, last = positions(q_pos, start_q, extent, BLOCK_M)
    entries = None
    if lists is None:
        lo, full_lo, full_hi, hi = key_segments(first, last, extent, BLOCK_N)
    else:
        entries, full_hi, hi = listed_segments(lists, b, h, tile, BLOCK_N)
        lo = 0
        full_lo = 0
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if extent.left is not None:
        acc, total, peak = _attend(
            acc, total, peak, q_tile, pos, start_q, lo, tl.minimum(full_lo, hi), entries, k, v, key_bias,
            bias, rel, tests, b, h, extent, score,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, RAW, PRECISION, CLAUSES, True,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q_tile, pos, start_q, full_lo, full_hi, entries, k, v, key_bias, bias, rel, tests,
        b, h, extent, score,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, RAW, PRECISION, CLAUSES, False,
    )  # fmt: skip
    if extent.right is not None or UNEVEN or lists is not None:
        acc, total, peak = _attend(
            acc, total, peak, q_tile, pos, start_q, full_hi, hi, entries, k, v, key_bias, bias, rel, tests,
            b, h, extent, score,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, RAW, PRECISION, CLAUSES, True,
        )  # fmt: skip

    rows = start_q + tl.arange(0, BLOCK_M)
    inside = rows < extent.n
    row = bh.to(tl.int64) * extent.n + rows
    seen = tl.where(total == 0.0, 1.0, total)
    row_lse = peak + tl.log2(seen)
    tl.store(lse + row, row_lse * LN2, mask=inside)
    tl.store(lse_log2 + row, tl.where(total == 0.0, float("inf"), row_lse), mask=inside)
    if sink is not None:
        rows64 = tl.minimum(rows, extent.n - 1).to(tl.int64)
        sink_log2 = tl.load(head_pointer(sink, b, h) + rows64 * sink.n).to(tl.float32) * LOG2E
        seen += tl.exp2(sink_log2 - tl.where(peak == -float("inf"), 0.0, peak))
    acc = acc / seen[:, None]
    store_tile(head_pointer(o, b, h), o, start_q, extent.n, acc, DV, BLOCK_M, BLOCK_DV)
