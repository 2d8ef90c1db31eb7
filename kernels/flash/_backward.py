"""The backward kernels: per-row terms, then dq by query tiles, then dk and dv by key tiles.

Every gradient element is written by one program, in one order: no atomics, bitwise reproducible. With
p = exp(s − lse), gate = the share of the row's mass that is not the sink's, and delta as below,
ds = p·(gate·(do·v) − delta).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.flash._device import (
    LOG2E,
    add_biases,
    head_pointer,
    key_segments,
    listed_segments,
    load_tile,
    positions,
    query_segments,
    relative_index,
    store_tile,
    tanh,
    tile_start,
    visible,
)


@triton.jit
def row_terms(
    do, o, d_lse, sink, lse_log2, delta, gate, d_sink, extent, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write per query delta = gate·(do·o) − d_lse, gate and the gradient of the sink. Here D is o's.

    All are 0, or without effect, for a query without keys, whatever d_lse says.
    """
    start = tl.program_id(0) % tiles * BLOCK_M
    bh = tl.program_id(0) // tiles
    b = bh // extent.heads
    h = bh % extent.heads
    rows = start + tl.arange(0, BLOCK_M)
    inside = rows < extent.n
    o_tile = load_tile(head_pointer(o, b, h), o, start, extent.n, D, BLOCK_M, BLOCK_D, True)
    do_tile = load_tile(head_pointer(do, b, h), do, start, extent.n, D, BLOCK_M, BLOCK_D, True)
    product = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    row = bh.to(tl.int64) * extent.n + rows
    strided = tl.minimum(rows, extent.n - 1).to(tl.int64)
    row_lse = tl.load(lse_log2 + row, mask=inside, other=0.0)
    row_delta = product
    if sink is not None:
        sink_log2 = tl.load(head_pointer(sink, b, h) + strided * sink.n).to(tl.float32) * LOG2E
        row_gate = 1.0 / (1.0 + tl.exp2(sink_log2 - row_lse))
        row_delta = product * row_gate
        tl.store(gate + row, row_gate, mask=inside)
        tl.store(d_sink + row, row_delta - product, mask=inside)
    if d_lse is not None:
        row_delta -= tl.load(head_pointer(d_lse, b, h) + strided * d_lse.n)
    tl.store(delta + row, tl.where(row_lse == float("inf"), 0.0, row_delta), mask=inside)


@triton.jit
def _probabilities(
    dot, row_lse, pos, i, j, b, h, key_bias, bias, rel, tests, extent, score,
    CLAUSES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Turn q·k into p and the derivative of the soft-cap (1 without), in the orientation of the indices."""
    slope = 1.0
    s = dot * score.inner
    if score.cap_log2 is not None:
        t = tanh(s)
        s = t * score.cap_log2
        slope = 1.0 - t * t
    s = add_biases(s, i, j, b, h, extent, key_bias, bias, rel)
    if EDGE:
        s = tl.where(visible(pos, i, j, b, h, extent, tests, CLAUSES), s, -float("inf"))
    return tl.exp2(s - row_lse), slope


@triton.jit
def _accumulate_dq(
    dq, q_tile, do_tile, row_lse, row_delta, row_gate, pos, start_q, lo, hi, entries, k, v, key_bias, bias,
    rel, d_bias, d_table, tests, b, h, extent, score,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CLAUSES: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Add Σ ds k over the keys lo..hi, and hand ds itself to the gradients of the biases of pairs."""
    k_head = head_pointer(k, b, h // extent.group)
    v_head = head_pointer(v, b, h // extent.group)
    i = start_q + tl.arange(0, BLOCK_M)[:, None]
    for at in range(lo, hi, BLOCK_N):
        start = tile_start(entries, at, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)[None, :]
        k_tile = load_tile(k_head, k, start, extent.m, D, BLOCK_N, BLOCK_D, EDGE)
        v_tile = load_tile(v_head, v, start, extent.m, DV, BLOCK_N, BLOCK_DV, EDGE)
        qk = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        p, slope = _probabilities(
            qk, row_lse[:, None], pos[:, None], i, j, b, h, key_bias, bias, rel, tests, extent, score,
            CLAUSES, EDGE,
        )  # fmt: skip
        dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
        if row_gate is not None:
            dp *= row_gate[:, None]
        ds = p * (dp - row_delta[:, None])
        if d_bias is not None:
            target = head_pointer(d_bias, b, h) + i.to(tl.int64) * d_bias.n + j.to(tl.int64) * d_bias.d
            tl.store(target, ds, mask=(i < extent.n) & (j < extent.m))
        if d_table is not None:
            index, listed = relative_index(rel, i, j, extent)
            counted = listed & (i < extent.n) & (j < extent.m)
            units = (ds * tl.load(d_table.unit)).to(tl.int64)
            copy = tl.program_id(0) % d_table.copies
            sums = d_table.sums + (copy * extent.heads + h).to(tl.int64) * rel.size
            tl.atomic_add(sums + index, units, mask=counted, sem="relaxed")
        ds *= slope
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_q(
    q, k, v, do, dq, lse_log2, delta, gate, key_bias, bias, rel, d_bias, d_table, q_pos, tests, lists,
    extent, score, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNEVEN: tl.constexpr, PRECISION: tl.constexpr,
    CLAUSES: tl.constexpr,
):  # fmt: skip
    """Write dq of one query tile of one head and ds of its pairs to ``d_bias`` (fp32, zeroed) if given."""
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    if extent.right is not None or lists is not None:
        tile = tiles - 1 - tile
    b = bh // extent.heads
    h = bh % extent.heads
    start_q = tile * BLOCK_M
    rows = start_q + tl.arange(0, BLOCK_M)
    row = bh.to(tl.int64) * extent.n + rows
    row_lse = tl.load(lse_log2 + row, mask=rows < extent.n, other=float("inf"))
    row_delta = tl.load(delta + row, mask=rows < extent.n, other=0.0)
    row_gate = None
    if gate is not None:
        row_gate = tl.load(gate + row, mask=rows < extent.n, other=0.0)
    q_tile = load_tile(head_pointer(q, b, h), q, start_q, extent.n, D, BLOCK_M, BLOCK_D, True)
    do_tile = load_tile(head_pointer(do, b, h), do, start_q, extent.n, DV, BLOCK_M, BLOCK_DV, True)
    pos, first, last = positions(q_pos, start_q, extent, BLOCK_M)
    entries = None
    if lists is None:
        lo, full_lo, full_hi, hi = key_segments(first, last, extent, BLOCK_N)
    else:
        entries, full_hi, hi = listed_segments(lists, b, h, tile, BLOCK_N)
        lo = 0
        full_lo = 0
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if extent.left is not None:
        acc = _accumulate_dq(
            acc, q_tile, do_tile, row_lse, row_delta, row_gate, pos, start_q, lo, tl.minimum(full_lo, hi),
            entries, k, v, key_bias, bias, rel, d_bias, d_table, tests, b, h, extent, score,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, CLAUSES, True,
        )  # fmt: skip
    acc = _accumulate_dq(
        acc, q_tile, do_tile, row_lse, row_delta, row_gate, pos, start_q, full_lo, full_hi,
        entries, k, v, key_bias, bias, rel, d_bias, d_table, tests, b, h, extent, score,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, CLAUSES, False,
    )  # fmt: skip
    if extent.right is not None or UNEVEN or lists is not None:
        acc = _accumulate_dq(
            acc, q_tile, do_tile, row_lse, row_delta, row_gate, pos, start_q, full_hi, hi,
            entries, k, v, key_bias, bias, rel, d_bias, d_table, tests, b, h, extent, score,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, CLAUSES, True,
        )  # fmt: skip
    store_tile(head_pointer(dq, b, h), dq, start_q, extent.n, acc * score.outer, D, BLOCK_M, BLOCK_D)


@triton.jit
def _accumulate_dkv(
    dk, dv, d_keys, k_tile, v_tile, start_k, lo, hi, entries, q, do, lse_log2, delta, gate, key_bias, bias,
    rel, q_pos, d_key_bias, tests, b, first_head, extent, score,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CLAUSES: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Add Σ ds q, Σ p do and Σ ds over the queries lo..hi of a group's heads; tiles are keys by queries.

    One loop over heads and tiles: nested loops keep the addresses of all three ranges in registers.
    """
    j = start_k + tl.arange(0, BLOCK_N)[:, None]
    tiles = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_M)
    divisor = tl.maximum(tiles, 1)  # the pipeline computes the first addresses even of an empty loop
    for step in range(0, tiles * extent.group):
        h = first_head + step // divisor
        start = tile_start(entries, lo + step % divisor * BLOCK_M, BLOCK_M)
        rows = start + tl.arange(0, BLOCK_M)
        row = (b * extent.heads + h).to(tl.int64) * extent.n + rows
        if EDGE:
            row_lse = tl.load(lse_log2 + row, mask=rows < extent.n, other=float("inf"))
            row_delta = tl.load(delta + row, mask=rows < extent.n, other=0.0)
        else:
            row_lse = tl.load(lse_log2 + row)
            row_delta = tl.load(delta + row)
        q_tile = load_tile(head_pointer(q, b, h), q, start, extent.n, D, BLOCK_M, BLOCK_D, EDGE)
        do_tile = load_tile(head_pointer(do, b, h), do, start, extent.n, DV, BLOCK_M, BLOCK_DV, EDGE)
        kq = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
        pos, _, _ = positions(q_pos, start, extent, BLOCK_M)
        p, slope = _probabilities(
            kq, row_lse[None, :], pos[None, :], rows[None, :], j, b, h, key_bias, bias, rel, tests,
            extent, score, CLAUSES, EDGE,
        )  # fmt: skip
        dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
        weights = p
        if gate is not None:
            row_gate = tl.load(gate + row, mask=rows < extent.n, other=0.0)[None, :]
            weights = p * row_gate
            dp *= row_gate
        dv = tl.dot(weights.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        if d_key_bias is not None:
            d_keys += tl.sum(ds, 1)
        ds *= slope
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv, d_keys


@triton.jit
def backward_kv(
    q, k, v, do, dk, dv, lse_log2, delta, gate, key_bias, d_key_bias, bias, rel, q_pos, q_ranges, tests,
    lists, extent, score, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNEVEN: tl.constexpr, PRECISION: tl.constexpr,
    CLAUSES: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one key tile of one key head, summed over its group of query heads.

    UNEVEN: N is no multiple of BLOCK_M. ``d_key_bias`` (B, Hkv, M) fp32 receives Σ ds of the group.
    """
    tile = tl.program_id(0) % tiles
    kv_heads = extent.heads // extent.group
    b = tl.program_id(0) // tiles // kv_heads
    g = tl.program_id(0) // tiles % kv_heads
    h = g * extent.group
    start_k = tile * BLOCK_N
    k_tile = load_tile(head_pointer(k, b, g), k, start_k, extent.m, D, BLOCK_N, BLOCK_D, True)
    v_tile = load_tile(head_pointer(v, b, g), v, start_k, extent.m, DV, BLOCK_N, BLOCK_DV, True)
    entries = None
    if lists is None:
        lo, full_lo, full_hi, hi = query_segments(start_k, q_ranges, tile, tiles, extent, BLOCK_M, BLOCK_N)
    else:
        entries, full_hi, hi = listed_segments(lists, b, g, tile, BLOCK_M)
        lo = 0
        full_lo = 0
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    d_keys = tl.zeros([BLOCK_N], tl.float32)
    if extent.right is not None:
        dk_acc, dv_acc, d_keys = _accumulate_dkv(
            dk_acc, dv_acc, d_keys, k_tile, v_tile, start_k, lo, tl.minimum(full_lo, hi), entries, q, do,
            lse_log2, delta, gate, key_bias, bias, rel, q_pos, d_key_bias, tests, b, h, extent, score,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, CLAUSES, True,
        )  # fmt: skip
    dk_acc, dv_acc, d_keys = _accumulate_dkv(
        dk_acc, dv_acc, d_keys, k_tile, v_tile, start_k, full_lo, full_hi, entries, q, do,
        lse_log2, delta, gate, key_bias, bias, rel, q_pos, d_key_bias, tests, b, h, extent, score,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, CLAUSES, False,
    )  # fmt: skip
    if extent.left is not None or UNEVEN or lists is not None:
        dk_acc, dv_acc, d_keys = _accumulate_dkv(
            dk_acc, dv_acc, d_keys, k_tile, v_tile, start_k, full_hi, hi, entries, q, do,
            lse_log2, delta, gate, key_bias, bias, rel, q_pos, d_key_bias, tests, b, h, extent, score,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, CLAUSES, True,
        )  # fmt: skip
    if d_key_bias is not None:
        keys = start_k + tl.arange(0, BLOCK_N)
        tl.store(head_pointer(d_key_bias, b, g) + keys, d_keys, mask=keys < extent.m)
    store_tile(head_pointer(dk, b, g), dk, start_k, extent.m, dk_acc * score.outer, D, BLOCK_N, BLOCK_D)
    store_tile(head_pointer(dv, b, g), dv, start_k, extent.m, dv_acc, DV, BLOCK_N, BLOCK_DV)
