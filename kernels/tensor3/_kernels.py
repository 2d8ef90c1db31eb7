"""Triton kernels of third-order attention: each keeps rows, steps through a set and streams another.

A score is symmetric in the query and both keys: with the row times the element of the stepped set as the left
operand it is the score of ordinary attention, and so are its gradients. Scores live in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels._tiles import load_tile, operand, tile_at


@triton.jit
def load_row(x, x_s, b, h, row, cols, COLS: tl.constexpr):
    """One row of a (B, H, N, D) tensor, in fp32; the index may be a Python integer."""
    first = tl.full((), 0, tl.int64) + row
    return tl.load(tile_at(x, x_s, b, h, first) + cols * x_s[3], mask=cols < COLS, other=0.0).to(tl.float32)


@triton.jit
def kept(mask, mask_s, b, index, inside):
    """Which keys of a set are inside it and not removed by its mask (B, M)."""
    if mask is not None:
        removed = tl.load(mask + b * mask_s[0] + index * mask_s[1], mask=inside, other=1)
        return inside & (removed.to(tl.int32) == 0)
    return inside


@triton.jit
def kept_for(mask, mask_s, b, j, rows):
    """The rows (bool), or none of them where key j of a set is removed by its mask."""
    if mask is not None:
        return rows & (tl.load(mask + b * mask_s[0] + j * mask_s[1]).to(tl.int32) == 0)
    return rows


@triton.jit
def load_keys(x, x_s, b, h, start, m, SIZE: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """SIZE rows of a set from ``start`` on."""
    rows = tl.arange(0, SIZE)
    first = tl.full((), 0, tl.int64) + start
    return load_tile(tile_at(x, x_s, b, h, first), x_s, rows, tl.arange(0, WIDTH), start + rows < m, COLS)


@triton.jit
def seen(last, n, m, CAUSAL: tl.constexpr):
    """How many keys of a set the query at index ``last`` sees."""
    if CAUSAL:
        return tl.minimum(tl.maximum(last + (m - n) + 1, 0), m)
    else:
        return m


@triton.jit
def forward(
    q, q_s, k1, k1_s, k2, k2_s, v1, v1_s, v2, v2_s, mask1, mask1_s, mask2, mask2_s, o, o_s, lse, lse_log2,
    heads, n, m1, m2, tiles, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o and lse of a tile of queries, and lse in log 2 for the backward kernels.

    There a query that sees no pair has lse = +∞, so that its p is 0 for any score.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    start_n = (tl.program_id(0) % tiles) * BR
    rows, columns = tl.arange(0, BR), tl.arange(0, BK)
    cols_d, cols_v = tl.arange(0, BD), tl.arange(0, BDV)
    i = start_n + rows
    q_tile = load_keys(q, q_s, b, h, start_n, n, BR, D, BD).to(tl.float32)
    last = tl.minimum(start_n + BR, n) - 1
    acc = tl.zeros((BR, BDV), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    peak = tl.full((BR,), -float("inf"), tl.float32)
    for j in range(0, seen(last, n, m1, CAUSAL)):
        left, factor = operand(q_tile * load_row(k1, k1_s, b, h, j, cols_d, D)[None, :], dtype)
        value = load_row(v1, v1_s, b, h, j, cols_v, DV)
        row_live = kept_for(mask1, mask1_s, b, j, i < n)
        if CAUSAL:
            row_live = row_live & (j <= i + (m1 - n))
        for start in range(0, seen(last, n, m2, CAUSAL), BK):
            l = start + columns
            live = row_live[:, None] & kept(mask2, mask2_s, b, l, l < m2)[None, :]
            if CAUSAL:
                live = live & (l[None, :] <= i[:, None] + (m2 - n))
            k_tile = load_keys(k2, k2_s, b, h, start, m2, BK, D, BD)
            s = tl.dot(left, tl.trans(k_tile), input_precision=PRECISION) * (factor * scale_log2)
            s = tl.where(live, s, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(s, 1))
            shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            p = tl.exp2(s - shift[:, None])
            decay = tl.exp2(peak - shift)
            total = total * decay + tl.sum(p, 1)
            v_tile = load_keys(v2, v2_s, b, h, start, m2, BK, DV, BDV)
            mixed = tl.dot(p.to(dtype), v_tile, input_precision=PRECISION)
            acc = acc * decay[:, None] + mixed * value[None, :]
            peak = new_peak
    blind = total == 0.0
    safe = tl.where(blind, 1.0, total)
    row_lse = peak + tl.log2(safe)
    at = bh * n + i
    tl.store(lse + at, row_lse * 0.6931471805599453, mask=i < n)
    tl.store(lse_log2 + at, tl.where(blind, float("inf"), row_lse), mask=i < n)
    target = tile_at(o, o_s, b, h, start_n.to(tl.int64)) + rows[:, None] * o_s[2] + cols_v[None, :] * o_s[3]
    mask = (i < n)[:, None] & (cols_v < DV)[None, :]
    tl.store(target, (acc / safe[:, None]).to(o.dtype.element_ty), mask=mask)


@triton.jit
def backward_q(
    q, q_s, k1, k1_s, k2, k2_s, v1, v1_s, v2, v2_s, mask1, mask1_s, mask2, mask2_s, do, do_s, lse_log2, delta,
    dq, heads, n, m1, m2, tiles, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of a tile of queries, contiguous; delta = Σ do·o − d_lse (B·H, N)."""
    dtype: tl.constexpr = q.dtype.element_ty
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    start_n = (tl.program_id(0) % tiles) * BR
    rows, columns = tl.arange(0, BR), tl.arange(0, BK)
    cols_d, cols_v = tl.arange(0, BD), tl.arange(0, BDV)
    i = start_n + rows
    q_tile = load_keys(q, q_s, b, h, start_n, n, BR, D, BD).to(tl.float32)
    do_tile = load_keys(do, do_s, b, h, start_n, n, BR, DV, BDV).to(tl.float32)
    row_lse = tl.load(lse_log2 + bh * n + i, mask=i < n, other=float("inf"))
    row_delta = tl.load(delta + bh * n + i, mask=i < n, other=0.0)
    last = tl.minimum(start_n + BR, n) - 1
    acc = tl.zeros((BR, BD), tl.float32)
    for j in range(0, seen(last, n, m1, CAUSAL)):
        key = load_row(k1, k1_s, b, h, j, cols_d, D)
        left, factor = operand(q_tile * key[None, :], dtype)
        left_v, factor_v = operand(do_tile * load_row(v1, v1_s, b, h, j, cols_v, DV)[None, :], dtype)
        row_live = kept_for(mask1, mask1_s, b, j, i < n)
        if CAUSAL:
            row_live = row_live & (j <= i + (m1 - n))
        for start in range(0, seen(last, n, m2, CAUSAL), BK):
            l = start + columns
            live = row_live[:, None] & kept(mask2, mask2_s, b, l, l < m2)[None, :]
            if CAUSAL:
                live = live & (l[None, :] <= i[:, None] + (m2 - n))
            k_tile = load_keys(k2, k2_s, b, h, start, m2, BK, D, BD)
            v_tile = load_keys(v2, v2_s, b, h, start, m2, BK, DV, BDV)
            s = tl.dot(left, tl.trans(k_tile), input_precision=PRECISION) * (factor * scale_log2)
            p = tl.where(live, tl.exp2(s - row_lse[:, None]), 0.0)
            dp = tl.dot(left_v, tl.trans(v_tile), input_precision=PRECISION) * factor_v
            ds, factor_s = operand(p * (dp - row_delta[:, None]), dtype)
            acc += tl.dot(ds, k_tile, input_precision=PRECISION) * (key[None, :] * factor_s)
    at = dq + (bh * n + i)[:, None] * D + cols_d[None, :]
    mask = (i < n)[:, None] & (cols_d < D)[None, :]
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=mask)


@triton.jit
def backward_set(
    q, q_s, kx, kx_s, ky, ky_s, vx, vx_s, vy, vy_s, maskx, maskx_s, masky, masky_s, do, do_s, lse_log2, delta,
    dkx, dvx, heads, n, mx, my, tiles, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the keys and values of a tile of one set, x, contiguous; y is the other set."""
    dtype: tl.constexpr = q.dtype.element_ty
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    start_x = (tl.program_id(0) % tiles) * BR
    rows, columns = tl.arange(0, BR), tl.arange(0, BK)
    cols_d, cols_v = tl.arange(0, BD), tl.arange(0, BDV)
    x = start_x + rows
    k_rows = load_keys(kx, kx_s, b, h, start_x, mx, BR, D, BD).to(tl.float32)
    v_rows = load_keys(vx, vx_s, b, h, start_x, mx, BR, DV, BDV).to(tl.float32)
    row_live = kept(maskx, maskx_s, b, x, x < mx)
    acc_k = tl.zeros((BR, BD), tl.float32)
    acc_v = tl.zeros((BR, BDV), tl.float32)
    lo = 0
    if CAUSAL:
        lo = tl.maximum(start_x - (mx - n), 0)
    for i in range(lo, n):
        query = load_row(q, q_s, b, h, i, cols_d, D)
        grad = load_row(do, do_s, b, h, i, cols_v, DV)
        left, factor = operand(k_rows * query[None, :], dtype)
        left_v, factor_v = operand(v_rows * grad[None, :], dtype)
        i_lse = tl.load(lse_log2 + bh * n + i)
        i_delta = tl.load(delta + bh * n + i)
        i_live = row_live
        if CAUSAL:
            i_live = i_live & (x <= i + (mx - n))
        for start in range(0, seen(i, n, my, CAUSAL), BK):
            l = start + columns
            y_live = kept(masky, masky_s, b, l, l < my)
            if CAUSAL:
                y_live = y_live & (l <= i + (my - n))
            k_tile = load_keys(ky, ky_s, b, h, start, my, BK, D, BD)
            v_tile = load_keys(vy, vy_s, b, h, start, my, BK, DV, BDV)
            s = tl.dot(left, tl.trans(k_tile), input_precision=PRECISION) * (factor * scale_log2)
            p = tl.where(i_live[:, None] & y_live[None, :], tl.exp2(s - i_lse), 0.0)
            dp = tl.dot(left_v, tl.trans(v_tile), input_precision=PRECISION) * factor_v
            ds, factor_s = operand(p * (dp - i_delta), dtype)
            acc_k += tl.dot(ds, k_tile, input_precision=PRECISION) * (query[None, :] * factor_s)
            acc_v += tl.dot(p.to(dtype), v_tile, input_precision=PRECISION) * grad[None, :]
    at = bh * mx + x
    mask = (x < mx)[:, None]
    at_k = dkx + at[:, None] * D + cols_d[None, :]
    tl.store(at_k, (acc_k * scale).to(dkx.dtype.element_ty), mask=mask & (cols_d < D)[None, :])
    at_v = dvx + at[:, None] * DV + cols_v[None, :]
    tl.store(at_v, acc_v.to(dvx.dtype.element_ty), mask=mask & (cols_v < DV)[None, :])
