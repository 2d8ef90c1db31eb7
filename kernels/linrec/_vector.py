"""Triton kernels of a chunk under gates that differ over a dimension: decayed scores, then outputs.

P_rs = Σ_d a_rd b_sd e^(gates of d after s up to r) is no single product, because no factor of the decay may
exceed one. Two levels (arXiv 2312.06635): between sub-blocks of SUB steps the decay is split at the start of
the later one, inside one it is explicit. Every decay is the exponential of a *sum* of gates ≤ 0: a gate of −∞
resets exactly and costs its neighbours no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels._tiles import guarded, load_features, load_state, load_tile, operand, tile_at

SUB: tl.constexpr = tl.constexpr(16)


@triton.jit
def gate_tile(g, g_s, r, cols, keep, COLS: tl.constexpr, REVERSE: tl.constexpr):
    """log2-gates (rows, cols) of the steps ``r`` of a chunk, 0 where a row is not kept."""
    return load_tile(g, g_s, -r if REVERSE else r, cols, keep, COLS).to(tl.float32) * 1.4426950408889634


@triton.jit
def tile_into(g, g_s, r, cols, steps, COLS: tl.constexpr, REVERSE: tl.constexpr):
    """Decay from the start of a chunk of ``steps`` live steps to each step, by dimension."""
    return tl.exp2(tl.cumsum(gate_tile(g, g_s, r, cols, r < steps, COLS, REVERSE), 0))


@triton.jit
def tile_out(g, g_s, r, cols, steps, COLS: tl.constexpr, REVERSE: tl.constexpr):
    """Decay from each step to the end of the chunk, by dimension."""
    later = gate_tile(g, g_s, r + 1, cols, (r + 1 < steps) & (r + 1 < r.shape[0]), COLS, REVERSE)
    return tl.exp2(tl.cumsum(later, 0, reverse=True))


@triton.jit
def tile_total(g, g_s, r, cols, steps, COLS: tl.constexpr, REVERSE: tl.constexpr):
    """Sum of the log2-gates of the chunk, by dimension."""
    return tl.sum(gate_tile(g, g_s, r, cols, r < steps, COLS, REVERSE), 0)


@triton.jit
def block_into(g, g_s, r, cols, steps, i, COLS: tl.constexpr, REVERSE: tl.constexpr):
    """Decay from the start of sub-block ``i`` to each of its steps, 0 at the others."""
    inside = (r // SUB == i) & (r < steps)
    decay = tl.exp2(tl.cumsum(gate_tile(g, g_s, r, cols, inside, COLS, REVERSE), 0))
    return tl.where(inside[:, None], decay, 0.0)


@triton.jit
def block_out(g, g_s, r, cols, steps, i, COLS: tl.constexpr, REVERSE: tl.constexpr):
    """Decay from each step before sub-block ``i`` to its start, 0 at the others."""
    later = gate_tile(g, g_s, r + 1, cols, (r + 1 < i * SUB) & (r + 1 < steps), COLS, REVERSE)
    return tl.where((r < i * SUB)[:, None], tl.exp2(tl.cumsum(later, 0, reverse=True)), 0.0)


@triton.jit
def diagonal(m, r, d):
    """Entries (r, r − d) of an (L, L) tile, 0 where r − d lies before the sub-block of r."""
    kept = (r[:, None] - d == r[None, :]) & (r[:, None] % SUB >= d)
    return tl.sum(tl.where(kept, m, 0.0), 1)


@triton.jit
def decayed_scores(
    a, a_s, b, b_s, g, g_s, r, steps,
    D: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, FEATURE: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P (L, L) in fp32 over tiles of D, 0 for s after r."""
    rows = -r if REVERSE else r
    live = r < steps
    acc = tl.zeros((L, L), tl.float32)
    for d0 in range(0, D, BD):
        cols = d0 + tl.arange(0, BD)
        at = load_features(a, a_s, rows, cols, live, D, FEATURE)
        bt = load_features(b, b_s, rows, cols, live, D, FEATURE)
        if g is None:
            acc = tl.dot(at, tl.trans(bt), acc, input_precision=PRECISION)
        else:
            for i in range(1, L // SUB):
                left = (at * block_into(g, g_s, r, cols, steps, i, D, REVERSE)).to(at.dtype)
                right = (bt * block_out(g, g_s, r, cols, steps, i, D, REVERSE)).to(at.dtype)
                acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
            reader = at.to(tl.float32)
            near = tl.sum(reader * bt.to(tl.float32), 1)
            acc += tl.where(r[:, None] == r[None, :], near[:, None], 0.0)
            log = tl.zeros((L, BD), tl.float32)
            for d in range(1, SUB):
                kept = live & (r % SUB >= d)
                log += gate_tile(g, g_s, r - d + 1, cols, kept, D, REVERSE)
                past = load_features(b, b_s, rows + d if REVERSE else rows - d, cols, kept, D, FEATURE)
                near = tl.sum(reader * past.to(tl.float32) * tl.exp2(log), 1)
                acc += tl.where((r[:, None] - d == r[None, :]) & kept[:, None], near[:, None], 0.0)
    return acc if g is not None else tl.where(r[:, None] >= r[None, :], acc, 0.0)


@triton.jit
def decayed_read(
    m, b, b_s, g, g_s, r, cols, steps,
    D: tl.constexpr, L: tl.constexpr, FEATURE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_{s<r} m_rs b_s decay_rs (L, cols) in fp32, of m (L, L) in fp32, 0 for s after r."""
    rows = -r if REVERSE else r
    live = r < steps
    bt = load_features(b, b_s, rows, cols, live, D, FEATURE)
    left, factor = operand(tl.where(r[:, None] > r[None, :], m, 0.0), bt.dtype)
    if g is None:
        acc = tl.dot(left, bt, input_precision=PRECISION) * factor
    else:
        acc = tl.zeros(bt.shape, tl.float32)
        for i in range(1, L // SUB):
            right = (bt * block_out(g, g_s, r, cols, steps, i, D, REVERSE)).to(bt.dtype)
            far = tl.dot(left, right, input_precision=PRECISION) * factor
            acc += far * block_into(g, g_s, r, cols, steps, i, D, REVERSE)
        log = tl.zeros(bt.shape, tl.float32)
        for d in range(1, SUB):
            kept = live & (r % SUB >= d)
            log += gate_tile(g, g_s, r - d + 1, cols, kept, D, REVERSE)
            past = load_features(b, b_s, rows + d if REVERSE else rows - d, cols, kept, D, FEATURE)
            acc += diagonal(m, r, d)[:, None] * past.to(tl.float32) * tl.exp2(log)
    return acc


@triton.jit
def decayed_write(
    m, a, a_s, g, g_s, r, cols, steps,
    D: tl.constexpr, L: tl.constexpr, FEATURE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_{r>s} m_rs a_r decay_rs (L, cols): the transpose of :func:`decayed_read`, by the writing step s."""
    rows = -r if REVERSE else r
    live = r < steps
    at = load_features(a, a_s, rows, cols, live, D, FEATURE)
    left, factor = operand(tl.trans(tl.where(r[:, None] > r[None, :], m, 0.0)), at.dtype)
    if g is None:
        acc = tl.dot(left, at, input_precision=PRECISION) * factor
    else:
        acc = tl.zeros(at.shape, tl.float32)
        for i in range(1, L // SUB):
            right = (at * block_into(g, g_s, r, cols, steps, i, D, REVERSE)).to(at.dtype)
            far = tl.dot(left, right, input_precision=PRECISION) * factor
            acc += far * block_out(g, g_s, r, cols, steps, i, D, REVERSE)
        log = tl.zeros(at.shape, tl.float32)
        for d in range(1, SUB):
            kept = (r + d < steps) & (r % SUB + d < SUB)
            log += gate_tile(g, g_s, r + d, cols, kept, D, REVERSE)
            later = load_features(a, a_s, rows - d if REVERSE else rows + d, cols, kept, D, FEATURE)
            at_d = (r[:, None] == r[None, :] + d) & kept[None, :]
            acc += tl.sum(tl.where(at_d, m, 0.0), 0)[:, None] * later.to(tl.float32) * tl.exp2(log)
    return acc


@triton.jit
def vector_scores_kernel(
    a, a_s, b, b_s, g, g_s, scores, heads, groups, n, chunks,
    D: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, FEATURE: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P of one chunk of one head, from a and b (B, groups, N, D): φ(q) and φ(k), or dO and v."""
    c = tl.program_id(0) % chunks
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    batch, h = bh // heads, bh % heads
    group = h // (heads // groups)
    r = tl.arange(0, L)
    first = tl.cast(n - 1 - c * L if REVERSE else c * L, tl.int64)
    if g is not None:
        g = tile_at(g, g_s, batch, h, first)
    acc = decayed_scores(
        tile_at(a, a_s, batch, group, first), a_s, tile_at(b, b_s, batch, group, first), b_s, g, g_s,
        r, n - c * L, D, L, BK, FEATURE, REVERSE, PRECISION,
    )  # fmt: skip
    tl.store(scores + (bh * chunks + c) * L * L + (r[:, None] * L + r[None, :]), acc)


@triton.jit
def vector_output_kernel(
    q, q_s, v, v_s, g, g_s, gv, gv_s, beta, beta_s, scores, states, o, den,
    heads, groups, n, chunks, scale, eps,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, REVERSE: tl.constexpr, EPS_ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, and with the normaliser den, of one chunk and one tile of Dv of one head, from its scores P."""
    dtype: tl.constexpr = q.dtype.element_ty
    tiles: tl.constexpr = tl.cdiv(DV, BV)
    tile = tl.program_id(0) % tiles
    c = (tl.program_id(0) // tiles) % chunks
    bh = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    b, h = bh // heads, bh % heads
    r = tl.arange(0, L)
    steps = n - c * L
    live = r < steps
    first = tl.cast(n - 1 - c * L if REVERSE else c * L, tl.int64)
    rows = -r if REVERSE else r
    cols_v = tile * BV + tl.arange(0, BV)
    q = tile_at(q, q_s, b, h // (heads // groups), first)
    v = tile_at(v, v_s, b, h, first)
    state = states + (bh * chunks + c) * E
    acc = tl.zeros((L, BV), tl.float32)
    den_acc = tl.zeros((L,), tl.float32)
    if g is not None:
        g = tile_at(g, g_s, b, h, first)
    for k0 in range(0, D, BK):
        cols_k = k0 + tl.arange(0, BK)
        qt = load_features(q, q_s, rows, cols_k, live, D, FEATURE)
        if g is not None:
            qt = (qt * tile_into(g, g_s, r, cols_k, steps, D, REVERSE)).to(dtype)
        right, factor = operand(load_state(state, cols_k, cols_v, D, DV), dtype)
        acc += tl.dot(qt, right, input_precision=PRECISION) * factor
        if E > D * DV:
            z = tl.load(state + D * DV + cols_k, mask=cols_k < D, other=0.0)
            den_acc += tl.sum(qt.to(tl.float32) * z[None, :], 1)
    weights = tl.load(scores + (bh * chunks + c) * L * L + (r[:, None] * L + r[None, :]))
    if beta is not None:
        at_beta = tile_at(beta, beta_s, b, h, first) + rows * beta_s[2]
        weights *= tl.load(at_beta, mask=live, other=0.0).to(tl.float32)[None, :]
    if gv is None:
        left, factor = operand(weights, dtype)
        vt = load_tile(v, v_s, rows, cols_v, live, DV)
        acc += tl.dot(left, vt, input_precision=PRECISION) * factor
    else:
        gv = tile_at(gv, gv_s, b, h, first)
        acc *= tile_into(gv, gv_s, r, cols_v, steps, DV, REVERSE)
        acc += decayed_read(
            weights, v, v_s, gv, gv_s, r, cols_v, steps, DV, L, "identity", REVERSE, PRECISION
        )
        vt = load_tile(v, v_s, rows, cols_v, live, DV).to(tl.float32)
        acc += diagonal(weights, r, 0)[:, None] * vt
    if E > D * DV:
        # the rounded scores of the numerator, so that the weights of a row sum to one
        den_acc += tl.sum(left.to(tl.float32), 1) * factor
        tl.store(den + bh * n + first + rows, den_acc, mask=live & (tile == 0))
        acc = acc / guarded(den_acc, eps, EPS_ADD)[:, None]
    else:
        acc *= scale
    at_o = o + (bh * n + first) * DV + (rows[:, None] * DV + cols_v[None, :])
    tl.store(at_o, acc.to(o.dtype.element_ty), mask=live[:, None] & (cols_v < DV)[None, :])
