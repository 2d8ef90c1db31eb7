"""The backward kernels: row terms, dq by tiles of query entries, dk and dv by tiles of key entries, sums.

Each tile writes its own rows, and a token's rows are summed in the order of the list: no atomics, bitwise
reproducible. With p = exp(s − lse), ds = p·(gate·(do·v) − delta); gate is 1 but in a mean of entries.
"""

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
from attnbench.kernels.flash._device import head_pointer


@triton.jit
def row_terms(
    do, o, d_lse, lse_log2, delta, n, heads, tiles,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write delta = do·o − d_lse of BLOCK_T queries, 0 for one that sees no key, whatever d_lse says."""
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b = bh // heads
    h = bh % heads
    i = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.where(i < n, i, -1)
    do_tile = gather(head_pointer(do, b, h), do, row, DV, BLOCK_DV).to(tl.float32)
    o_tile = gather(head_pointer(o, b, h), o, row, DV, BLOCK_DV).to(tl.float32)
    row_delta = tl.sum(do_tile * o_tile, 1)
    if d_lse is not None:
        row_delta -= tl.load(head_pointer(d_lse, b, h) + i.to(tl.int64) * d_lse.n, mask=i < n, other=0.0)
    at = bh.to(tl.int64) * n + i
    row_lse = tl.load(lse_log2 + at, mask=i < n, other=0.0)
    tl.store(delta + at, tl.where(row_lse == float("inf"), 0.0, row_delta), mask=i < n)


@triton.jit
def entry_terms(
    do, entries_o, entries_lse, d_lse, lse_log2, entry_lse, delta, gate, queries, starts, n, heads, tiles,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write, for a mean of entries, the terms of BLOCK_T entries: lse (+∞ without keys), delta and gate.

    gate = 1 / entries of the query; delta = gate·(do·o) − the entry's share of the query's mass · d_lse.
    """
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b = bh // heads
    h = bh % heads
    slots = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = slots < queries.length
    i, _ = tokens(queries, b, h, slots, queries.length)
    live = i >= 0
    at_token = tl.maximum(i, 0)
    count_at = head_pointer(starts, b, h // queries.group) + at_token * starts.n
    count = tl.load(count_at + starts.n) - tl.load(count_at)
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    row = bh.to(tl.int64) * queries.length + slots
    own = tl.load(entries_lse + row, mask=live, other=-float("inf"))
    do_tile = gather(head_pointer(do, b, h), do, i, DV, BLOCK_DV).to(tl.float32)
    o_tile = gather(head_pointer(entries_o, b, h), entries_o, tl.where(live, slots, -1), DV, BLOCK_DV)
    row_delta = share * tl.sum(do_tile * o_tile, 1)
    if d_lse is not None:
        whole = tl.load(lse_log2 + bh.to(tl.int64) * n + at_token)
        slope = tl.load(head_pointer(d_lse, b, h) + at_token.to(tl.int64) * d_lse.n)
        row_delta -= tl.exp2(own - whole) * slope
    blind = own == -float("inf")
    tl.store(entry_lse + row, tl.where(blind, float("inf"), own), mask=inside)
    tl.store(delta + row, tl.where(blind, 0.0, row_delta), mask=inside)
    tl.store(gate + row, tl.where(live, share, 0.0), mask=inside)


@triton.jit
def _row_terms_of(lse_log2, delta, gate, bh, n, length, i, slots):
    """lse, delta and gate of the entries of a tile: of their tokens, or, with a gate, of the slots."""
    if gate is None:
        row = bh.to(tl.int64) * n + i
        row_gate = 1.0
    else:
        row = bh.to(tl.int64) * length + slots
        row_gate = tl.load(gate + row, mask=i >= 0, other=0.0)
    row_lse = tl.load(lse_log2 + row, mask=i >= 0, other=float("inf"))
    return row_lse, tl.load(delta + row, mask=i >= 0, other=0.0), row_gate


@triton.jit
def backward_q(
    q, k, v, do, dq, lse_log2, delta, gate, queries, keys, tiles, key_bias, extent, score,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile of query entries of one head, to rows of tokens if DIRECT, or of slots."""
    tile = tl.program_id(0) % tiles.total
    bh = tl.program_id(0) // tiles.total
    b = bh // extent.heads
    h = bh % extent.heads
    bucket, first, end = tile_bounds(queries, tiles, b, h, tile, BLOCK_M)
    i, slots = tokens(queries, b, h, first + tl.arange(0, BLOCK_M), end)
    i_label = labels(queries, b, h, slots, i >= 0)
    row_lse, row_delta, row_gate = _row_terms_of(
        lse_log2, delta, gate, bh, extent.n, queries.length, i, slots
    )
    q_tile = gather(head_pointer(q, b, h), q, i, D, BLOCK_D)
    do_tile = gather(head_pointer(do, b, h), do, i, DV, BLOCK_DV)
    k_head = head_pointer(k, b, h // extent.group)
    v_head = head_pointer(v, b, h // extent.group)
    lo = bucket_start(keys, b, h, bucket - extent.look_back, extent.count)
    hi = bucket_start(keys, b, h, bucket + 1, extent.count)
    hi = tl.where(first < end, hi, lo)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(lo, hi, BLOCK_N):
        j, key_slots = tokens(keys, b, h, start + tl.arange(0, BLOCK_N), hi)
        k_tile = gather(k_head, k, j, D, BLOCK_D)
        v_tile = gather(v_head, v, j, DV, BLOCK_DV)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        i_labels, j_labels = None, None
        if i_label is not None:
            i_labels = i_label[:, None]
            j_labels = labels(keys, b, h, key_slots, j >= 0)[None, :]
        s = scores(s, i[:, None], j[None, :], i_labels, j_labels, key_bias, b, h, extent, score, CAUSAL)
        p = tl.exp2(s - row_lse[:, None])
        dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
        if gate is not None:
            dp *= row_gate[:, None]
        ds = p * (dp - row_delta[:, None])
        if score.self_log2 is not None:
            ds = tl.where(i[:, None] == j[None, :], 0.0, ds)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    rows = slots
    if DIRECT:
        rows = i
    scatter(head_pointer(dq, b, h), dq, rows, i >= 0, acc * score.outer, D, BLOCK_D)


@triton.jit
def backward_kv(
    q, k, v, do, dk, dv, d_bias, lse_log2, delta, gate, queries, keys, tiles, key_bias, extent, score,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk, dv and, if asked, Σ ds of one tile of key entries of one query head; tiles keys by queries.

    To the rows of the tokens if DIRECT, or of the slots.
    """
    tile = tl.program_id(0) % tiles.total
    bh = tl.program_id(0) // tiles.total
    b = bh // extent.heads
    h = bh % extent.heads
    bucket, first, end = tile_bounds(keys, tiles, b, h, tile, BLOCK_N)
    j, slots = tokens(keys, b, h, first + tl.arange(0, BLOCK_N), end)
    j_label = labels(keys, b, h, slots, j >= 0)
    k_tile = gather(head_pointer(k, b, h // extent.group), k, j, D, BLOCK_D)
    v_tile = gather(head_pointer(v, b, h // extent.group), v, j, DV, BLOCK_DV)
    q_head = head_pointer(q, b, h)
    do_head = head_pointer(do, b, h)
    lo = bucket_start(queries, b, h, bucket, extent.count)
    hi = bucket_start(queries, b, h, bucket + extent.look_back + 1, extent.count)
    hi = tl.where(first < end, hi, lo)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    d_keys = tl.zeros([BLOCK_N], tl.float32)
    for start in range(lo, hi, BLOCK_M):
        i, query_slots = tokens(queries, b, h, start + tl.arange(0, BLOCK_M), hi)
        row_lse, row_delta, row_gate = _row_terms_of(
            lse_log2, delta, gate, bh, extent.n, queries.length, i, query_slots
        )
        q_tile = gather(q_head, q, i, D, BLOCK_D)
        do_tile = gather(do_head, do, i, DV, BLOCK_DV)
        s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
        i_labels, j_labels = None, None
        if j_label is not None:
            j_labels = j_label[:, None]
            i_labels = labels(queries, b, h, query_slots, i >= 0)[None, :]
        s = scores(s, i[None, :], j[:, None], i_labels, j_labels, key_bias, b, h, extent, score, CAUSAL)
        p = tl.exp2(s - row_lse[None, :])
        dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
        weights = p
        if gate is not None:
            weights = p * row_gate[None, :]
            dp *= row_gate[None, :]
        dv_acc = tl.dot(weights.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        if d_bias is not None:
            d_keys += tl.sum(ds, 1)
        if score.self_log2 is not None:
            ds = tl.where(i[None, :] == j[:, None], 0.0, ds)
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    rows = slots
    if DIRECT:
        rows = j
    live = j >= 0
    if d_bias is not None:
        tl.store(head_pointer(d_bias, b, h) + rows.to(tl.int64) * d_bias.n, d_keys, mask=live)
    scatter(head_pointer(dk, b, h), dk, rows, live, dk_acc * score.outer, D, BLOCK_D)
    scatter(head_pointer(dv, b, h), dv, rows, live, dv_acc, DV, BLOCK_DV)


@triton.jit
def sum_entries(
    parts, out, visits, starts, list_group, out_heads, group, n, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write the sums of the entries of BLOCK_T tokens, over the ``group`` heads of parts of a head of out."""
    tile = tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles // out_heads
    g = tl.program_id(0) // tiles % out_heads
    i = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for member in range(0, group):
        h = g * group + member
        at = head_pointer(starts, b, h // list_group) + tl.minimum(i, n - 1) * starts.n
        start = tl.load(at)
        visited = tl.where(i < n, tl.load(at + starts.n) - start, 0)
        list_of = head_pointer(visits, b, h // list_group)
        for visit in range(0, tl.max(visited, 0)):
            slot = tl.load(list_of + (start + visit).to(tl.int64) * visits.n, mask=visit < visited, other=-1)
            acc += gather(head_pointer(parts, b, h), parts, slot, D, BLOCK_D)
    scatter(head_pointer(out, b, g), out, i, i < n, acc, D, BLOCK_D)
