"""Triton kernels of attention in which queries compete for keys: owners of the keys, sums, and gradients.

Scores live in units of log 2. What a key needs to know of all queries is one number: the log-sum-exp of its
scores (``owner``, fp32), or the query that takes it (int32, −1 for none).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels._tiles import load_tile, operand, tile_at


@triton.jit
def wide(start):
    """A row index as a 64-bit number, also where the interpreter has it as a Python integer."""
    return tl.full((), 0, tl.int64) + start


@triton.jit
def pairs(mask, mask_s, b, h, i, j, n, m):
    """Which of the queries i and keys j, as a tile, are pairs: inside both sequences and not masked."""
    live = (i < n)[:, None] & (j < m)[None, :]
    if mask is not None:
        rows = i.to(tl.int64)[:, None] * mask_s[2]
        columns = j.to(tl.int64)[None, :] * mask_s[3]
        at = mask + b * mask_s[0] + h * mask_s[1] + rows + columns
        live = live & (tl.load(at, mask=live, other=1).to(tl.int32) == 0)
    return live


@triton.jit
def scores(
    q, q_s, k_tile, b, h, start, rows, n, scale_log2, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr
):
    """(queries, keys) scores of the queries from ``start`` on and a tile of keys."""
    first = wide(start)
    q_tile = load_tile(tile_at(q, q_s, b, h, first), q_s, rows, tl.arange(0, BD), start + rows < n, D)
    return tl.dot(q_tile, tl.trans(k_tile), input_precision=P) * scale_log2


@triton.jit
def row_operand(x, DTYPE: tl.constexpr):
    """An fp32 tile as an operand of a dot in DTYPE, and what the rows of the product are to be multiplied by.

    fp16 holds neither the weights of a query that no key prefers nor their reciprocals: rows are scaled.
    """
    if DTYPE == tl.float16:  # noqa: SIM300
        top = tl.max(tl.abs(x), 1)
        factor = tl.where(top > 1e-30, top, 1.0)
        return (x / factor[:, None]).to(DTYPE), factor[:, None]
    else:  # not after the branch: the compiler would want the types of both results to be equal
        return x.to(DTYPE), 1.0


@triton.jit
def load_wide(x, first, rows, n, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """The given rows of a contiguous (B·H·N, COLS) fp32 tensor, of the N from ``first`` on; 0 beyond."""
    cols = tl.arange(0, WIDTH)
    at = x + (first + rows)[:, None] * COLS + cols[None, :]
    return tl.load(at, mask=(rows < n)[:, None] & (cols < COLS)[None, :], other=0.0)


@triton.jit
def weights_of(s, live, i, owner, eps, HARD: tl.constexpr):
    """Weights of a tile without and with eps, from its scores or, if HARD, from the owners alone."""
    if HARD:
        a = tl.where(live & (i[:, None] == owner[None, :]), 1.0, 0.0)
    else:
        a = tl.where(live, tl.exp2(s - owner[None, :]), 0.0)
    return a, tl.where(live, a + eps, 0.0)


@triton.jit
def owners(
    q, q_s, k, k_s, mask, mask_s, owner, heads, n, m, tiles, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, HARD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what one tile of keys needs to know of all queries; +∞ or −1 for a key without queries."""
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    start_m = (tl.program_id(0) % tiles) * BM
    columns, rows = tl.arange(0, BM), tl.arange(0, BN)
    j = start_m + columns
    k_tile = load_tile(tile_at(k, k_s, b, h, start_m.to(tl.int64)), k_s, columns, tl.arange(0, BD), j < m, D)
    peak = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    best = tl.full((BM,), -1, tl.int32)
    for start in range(0, n, BN):
        s = scores(q, q_s, k_tile, b, h, start, rows, n, scale_log2, D, BD, PRECISION)
        s = tl.where(pairs(mask, mask_s, b, h, start + rows, j, n, m), s, -float("inf"))
        top = tl.max(s, 0)
        if HARD:
            first = tl.min(tl.where(s == top[None, :], rows[:, None], BN), 0)  # of equals, the first
            best = tl.where(top > peak, start + first, best)
            peak = tl.maximum(peak, top)
        else:
            new_peak = tl.maximum(peak, top)
            shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(s - shift[None, :]), 0)
            peak = new_peak
    at = owner + bh * m + j
    if HARD:
        tl.store(at, best, mask=j < m)
    else:
        lse = peak + tl.log2(tl.where(total == 0.0, 1.0, total))
        tl.store(at, tl.where(total == 0.0, float("inf"), lse), mask=j < m)


@triton.jit
def mix(
    q, q_s, k, k_s, v, v_s, mask, mask_s, owner, o, mass, heads, n, m, tiles, splits, per_split, scale_log2,
    eps, eps_mass, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, HARD: tl.constexpr, WHOLE: tl.constexpr, NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the weighted values, and the weights, of one tile of queries over one part of the keys.

    o (B·H, splits, N, Dv) and mass (B·H, splits, N). WHOLE: this tile holds all queries, so that owners are
    found here, and written. NORMALIZE, with one split: divide by mass + eps_mass.
    """
    split = tl.program_id(0) % splits
    start_n = (tl.program_id(0) // splits % tiles) * BN
    bh = (tl.program_id(0) // (splits * tiles)).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows, columns = tl.arange(0, BN), tl.arange(0, BM)
    i = start_n + rows
    cols_d, cols_v = tl.arange(0, BD), tl.arange(0, BDV)
    acc = tl.zeros((BN, BDV), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(m, BM))):
        start = tile * BM
        first = start.to(tl.int64)
        j = start + columns
        live = pairs(mask, mask_s, b, h, i, j, n, m)
        s = tl.zeros((BN, BM), tl.float32)
        if WHOLE or not HARD:
            k_tile = load_tile(tile_at(k, k_s, b, h, first), k_s, columns, cols_d, j < m, D)
            s = scores(q, q_s, k_tile, b, h, start_n, rows, n, scale_log2, D, BD, PRECISION)
        if WHOLE:
            s = tl.where(live, s, -float("inf"))
            peak = tl.max(s, 0)
            lost = peak == -float("inf")
            if HARD:
                of_key = tl.min(tl.where(s == peak[None, :], rows[:, None], BN), 0)
                of_key = tl.where(lost, -1, of_key)
            else:
                shift = tl.where(lost, 0.0, peak)
                of_key = shift + tl.log2(tl.where(lost, 1.0, tl.sum(tl.exp2(s - shift[None, :]), 0)))
                of_key = tl.where(lost, float("inf"), of_key)
            tl.store(owner + bh * m + j, of_key, mask=j < m)
        else:
            of_key = tl.load(owner + bh * m + j, mask=j < m, other=-1)
        _, w = weights_of(s, live, i, of_key, eps, HARD)
        total += tl.sum(w, 1)
        if v is not None:
            v_tile = load_tile(tile_at(v, v_s, b, h, first), v_s, columns, cols_v, j < m, DV)
            left, factor = row_operand(w, v.dtype.element_ty)
            acc += tl.dot(left, v_tile, input_precision=PRECISION) * factor
    out = (bh * splits + split) * n + i
    tl.store(mass + out, total, mask=i < n)
    if v is not None:
        if NORMALIZE:
            den = total + eps_mass
            acc = tl.where((den == 0.0)[:, None], 0.0, acc / tl.where(den == 0.0, 1.0, den)[:, None])
        at = o + out[:, None] * DV + cols_v[None, :]
        tl.store(at, acc.to(o.dtype.element_ty), mask=(i < n)[:, None] & (cols_v < DV)[None, :])


@triton.jit
def backward_kv(
    q, q_s, k, k_s, v, v_s, mask, mask_s, owner, d_num, d_mass, delta, dk, dv, heads, n, m, tiles, scale,
    scale_log2, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, HARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dv of one tile of keys, and without HARD dk and delta_j = Σ_i a_ij g_ij, g the gradient of w.

    d_num (B·H, N, Dv) fp32, the gradient of Σ w v, is None without values; d_mass (B·H, N) fp32.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    start_m = (tl.program_id(0) % tiles) * BM
    first_m = start_m.to(tl.int64)
    columns, rows = tl.arange(0, BM), tl.arange(0, BN)
    cols_d, cols_v = tl.arange(0, BD), tl.arange(0, BDV)
    j = start_m + columns
    of_key = tl.load(owner + bh * m + j, mask=j < m, other=-1)
    if not HARD:
        k_tile = load_tile(tile_at(k, k_s, b, h, first_m), k_s, columns, cols_d, j < m, D)
    if v is not None:
        v_tile = load_tile(tile_at(v, v_s, b, h, first_m), v_s, columns, cols_v, j < m, DV)
    dv_acc = tl.zeros((BM, BDV), tl.float32)
    back = tl.zeros((BM,), tl.float32)
    for start in range(0, n, BN):
        i = start + rows
        live = pairs(mask, mask_s, b, h, i, j, n, m)
        s = tl.zeros((BN, BM), tl.float32)
        if not HARD:
            s = scores(q, q_s, k_tile, b, h, start, rows, n, scale_log2, D, BD, PRECISION)
        a, w = weights_of(s, live, i, of_key, eps, HARD)
        g = tl.zeros((BN, BM), tl.float32)
        if v is not None:
            num = load_wide(d_num, bh * n, i, n, DV, BDV)
            # w may be tiny where the gradient is huge: what one row of w is scaled by goes into the other
            left, row = row_operand(w, dtype)
            right, factor = operand(num * row, dtype)
            dv_acc += tl.dot(tl.trans(left), right, input_precision=PRECISION) * factor
            if not HARD:
                left, row = row_operand(num, dtype)
                g += tl.dot(left, tl.trans(v_tile), input_precision=PRECISION) * row
        if not HARD:
            g += tl.load(d_mass + bh * n + i, mask=i < n, other=0.0)[:, None]
            back += tl.sum(a * g, 0)
    if v is not None:
        at = dv + (bh * m + j)[:, None] * DV + cols_v[None, :]
        tl.store(at, dv_acc.to(dv.dtype.element_ty), mask=(j < m)[:, None] & (cols_v < DV)[None, :])
    if not HARD:
        tl.store(delta + bh * m + j, back, mask=j < m)
        dk_acc = tl.zeros((BM, BD), tl.float32)
        for start in range(0, n, BN):
            i = start + rows
            q_tile = load_tile(tile_at(q, q_s, b, h, wide(start)), q_s, rows, cols_d, i < n, D)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
            live = pairs(mask, mask_s, b, h, i, j, n, m)
            a, _ = weights_of(s, live, i, of_key, eps, HARD)
            g = tl.zeros((BN, BM), tl.float32)
            if v is not None:
                num = load_wide(d_num, bh * n, i, n, DV, BDV)
                left, row = row_operand(num, dtype)
                g += tl.dot(left, tl.trans(v_tile), input_precision=PRECISION) * row
            g += tl.load(d_mass + bh * n + i, mask=i < n, other=0.0)[:, None]
            ds, factor = operand(a * (g - back[None, :]) * scale, dtype)
            dk_acc += tl.dot(tl.trans(ds), q_tile, input_precision=PRECISION) * factor
        at = dk + (bh * m + j)[:, None] * D + cols_d[None, :]
        tl.store(at, dk_acc.to(dk.dtype.element_ty), mask=(j < m)[:, None] & (cols_d < D)[None, :])


@triton.jit
def backward_q(
    q, q_s, k, k_s, v, v_s, mask, mask_s, owner, d_num, d_mass, delta, dq, heads, n, m, tiles, splits,
    per_split, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of one tile of queries over one part of the keys: dq (B·H, splits, N, D)."""
    dtype: tl.constexpr = q.dtype.element_ty
    split = tl.program_id(0) % splits
    start_n = (tl.program_id(0) // splits % tiles) * BN
    bh = (tl.program_id(0) // (splits * tiles)).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows, columns = tl.arange(0, BN), tl.arange(0, BM)
    cols_d, cols_v = tl.arange(0, BD), tl.arange(0, BDV)
    i = start_n + rows
    mass_grad = tl.load(d_mass + bh * n + i, mask=i < n, other=0.0)
    if v is not None:
        num = load_wide(d_num, bh * n, i, n, DV, BDV)
        left, row = row_operand(num, dtype)
    acc = tl.zeros((BN, BD), tl.float32)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(m, BM))):
        start = tile * BM
        first = start.to(tl.int64)
        j = start + columns
        k_tile = load_tile(tile_at(k, k_s, b, h, first), k_s, columns, cols_d, j < m, D)
        s = scores(q, q_s, k_tile, b, h, start_n, rows, n, scale_log2, D, BD, PRECISION)
        of_key = tl.load(owner + bh * m + j, mask=j < m, other=float("inf"))
        live = pairs(mask, mask_s, b, h, i, j, n, m)
        a, _ = weights_of(s, live, i, of_key, 0.0, False)
        g = tl.zeros((BN, BM), tl.float32)
        if v is not None:
            v_tile = load_tile(tile_at(v, v_s, b, h, first), v_s, columns, cols_v, j < m, DV)
            g += tl.dot(left, tl.trans(v_tile), input_precision=PRECISION) * row
        g += mass_grad[:, None]
        back = tl.load(delta + bh * m + j, mask=j < m, other=0.0)
        ds, factor = operand(a * (g - back[None, :]) * scale, dtype)
        acc += tl.dot(ds, k_tile, input_precision=PRECISION) * factor
    at = dq + ((bh * splits + split) * n + i)[:, None] * D + cols_d[None, :]
    tl.store(at, acc.to(dq.dtype.element_ty), mask=(i < n)[:, None] & (cols_d < D)[None, :])
