"""Triton kernel of the gradients inside one chunk of the recurrence.

From the state S before the chunk and the gradient dS of the state after it, both of states_kernel. The L×L
blocks are recomputed, never stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels._tiles import load_features, load_state, load_tile, operand, phi_grad, tile_at
from attnbench.kernels.linrec._outputs import decay_between
from attnbench.kernels.linrec._states import decay_into, decay_out, gate_sums


@triton.jit
def products(
    q, q_s, k, k_s, rows, live,
    D: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ(q) φ(k)ᵀ (L, L) in fp32, over tiles of D."""
    acc = tl.zeros((L, L), tl.float32)
    for d0 in range(0, D, BD):
        cols = d0 + tl.arange(0, BD)
        left = load_features(q, q_s, rows, cols, live, D, FEATURE)
        right = load_features(k, k_s, rows, cols, live, D, FEATURE)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    return acc


@triton.jit
def value_gradient(
    weights, k, k_s, do, do_s, d_state, dv, rows, live, out, write,
    D: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dv = β (weightsᵀ dO + decay·φ(k) dS); ``weights`` (L, L) as written by step s, read by step r."""
    dtype: tl.constexpr = k.dtype.element_ty
    left, factor = operand(tl.trans(weights), dtype)
    for v0 in range(0, DV, BV):
        cols_v = v0 + tl.arange(0, BV)
        acc = tl.dot(left, load_tile(do, do_s, rows, cols_v, live, DV), input_precision=PRECISION) * factor
        for k0 in range(0, D, BK):
            cols_k = k0 + tl.arange(0, BK)
            kt = load_features(k, k_s, rows, cols_k, live, D, FEATURE)
            right, right_factor = operand(load_state(d_state, cols_k, cols_v, D, DV), dtype)
            acc += tl.dot(kt, right, input_precision=PRECISION) * (right_factor * out)[:, None]
        at = dv + (rows[:, None] * DV + cols_v[None, :])
        mask = live[:, None] & (cols_v < DV)[None, :]
        tl.store(at, (acc * write[:, None]).to(dv.dtype.element_ty), mask=mask)


@triton.jit
def gradient_kernel(
    q, q_s, k, k_s, v, v_s, g, g_s, beta, beta_s, do, do_s, inverse, d_den, states, d_states,
    dq, dk, dv, dg, d_beta, heads, groups, n, chunks, scale,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv, dg and dβ of one chunk of one head.

    A gate's gradient is the sum of what crosses it inside the chunk, in fp32, and the end constant ⟨S, dS⟩
    that stands for all later chunks: its error neither grows with N nor sees the rounding of dq and dk.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    c = tl.program_id(0) % chunks
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = bh // heads, bh % heads
    group = h // (heads // groups)
    r = tl.arange(0, L)
    live = c * L + r < n
    first = (n - 1 - c * L if REVERSE else c * L).to(tl.int64)
    rows = -r if REVERSE else r
    first_row = bh * n + first
    q = tile_at(q, q_s, b, group, first)
    k = tile_at(k, k_s, b, group, first)
    v = tile_at(v, v_s, b, h, first)
    do = tile_at(do, do_s, b, h, first)
    states += (bh * chunks + c) * E
    d_states += (bh * chunks + c) * E

    into = tl.full((L,), 1.0, tl.float32)
    out = into
    write = into
    read = into * scale
    sums = tl.zeros((L,), tl.float32)
    cuts = tl.zeros((L,), tl.int32)
    if g is not None:
        sums, cuts, total, all_cuts = gate_sums(tile_at(g, g_s, b, h, first) + rows * g_s[2], live)
        into = decay_into(sums, cuts)
        out = decay_out(sums, cuts, total, all_cuts)
    if beta is not None:
        at_beta = tile_at(beta, beta_s, b, h, first) + rows * beta_s[2]
        write = tl.load(at_beta, mask=live, other=0.0).to(tl.float32)
    if inverse is not None:
        read = tl.load(inverse + first_row + rows, mask=live, other=0.0)
        den_grad = tl.load(d_den + first_row + rows, mask=live, other=0.0)

    scores = products(q, q_s, k, k_s, rows, live, D, L, BK, FEATURE, PRECISION)
    scores *= decay_between(sums, cuts, r)
    value_gradient(
        scores * read[:, None], k, k_s, do, do_s, d_states, dv + first_row * DV, rows, live, out, write,
        D, DV, BK, BV, FEATURE, PRECISION,
    )  # fmt: skip
    d_scores = products(do, do_s, v, v_s, rows, live, DV, L, BV, "identity", PRECISION) * read[:, None]
    if inverse is not None:
        d_scores += den_grad[:, None]
    if d_beta is not None:
        write_grad = tl.sum(d_scores * scores, 0)
    d_scores *= write[None, :]
    if dg is not None:
        crossing = tl.where(r[:, None] > r[None, :], d_scores * scores, 0.0)
        reads = tl.sum(crossing, 1) - tl.sum(crossing, 0)
        writes = tl.zeros((L,), tl.float32)
        end = 0.0
    # The decays a second time: they cost less than the registers that would keep them.
    d_scores *= decay_between(sums, cuts, r)

    inner, inner_factor = operand(d_scores, dtype)
    for k0 in range(0, D, BK):
        cols_k = k0 + tl.arange(0, BK)
        from_state = tl.zeros((L, BK), tl.float32)
        to_state = tl.zeros((L, BK), tl.float32)
        for v0 in range(0, DV, BV):
            cols_v = v0 + tl.arange(0, BV)
            s = load_state(states, cols_k, cols_v, D, DV)
            ds = load_state(d_states, cols_k, cols_v, D, DV)
            if dg is not None:
                end += tl.sum(s * ds)
            left = load_tile(do, do_s, rows, cols_v, live, DV)
            right, factor = operand(s, dtype)
            from_state += tl.dot(left, tl.trans(right), input_precision=PRECISION) * factor
            left = load_tile(v, v_s, rows, cols_v, live, DV)
            right, factor = operand(ds, dtype)
            to_state += tl.dot(left, tl.trans(right), input_precision=PRECISION) * factor
        from_state *= read[:, None]
        if inverse is not None:
            z = tl.load(states + D * DV + cols_k, mask=cols_k < D, other=0.0)
            dz = tl.load(d_states + D * DV + cols_k, mask=cols_k < D, other=0.0)
            from_state += den_grad[:, None] * z[None, :]
            to_state += dz[None, :]
            if dg is not None:
                end += tl.sum(z * dz, 0)
        from_state *= into[:, None]
        to_state *= out[:, None]
        qt = load_features(q, q_s, rows, cols_k, live, D, FEATURE)
        kt = load_features(k, k_s, rows, cols_k, live, D, FEATURE)
        if d_beta is not None:
            write_grad += tl.sum(kt.to(tl.float32) * to_state, 1)
        to_state *= write[:, None]
        if dg is not None:
            reads += tl.sum(qt.to(tl.float32) * from_state, 1)
            writes += tl.sum(kt.to(tl.float32) * to_state, 1)
        grad_q = tl.dot(inner, kt, input_precision=PRECISION) * inner_factor + from_state
        grad_k = tl.dot(tl.trans(inner), qt, input_precision=PRECISION) * inner_factor + to_state
        if FEATURE != "identity":
            grad_q *= phi_grad(load_tile(q, q_s, rows, cols_k, live, D).to(tl.float32), FEATURE)
            grad_k *= phi_grad(load_tile(k, k_s, rows, cols_k, live, D).to(tl.float32), FEATURE)
        at = rows[:, None] * D + cols_k[None, :]
        mask = live[:, None] & (cols_k < D)[None, :]
        tl.store(dq + first_row * D + at, grad_q.to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + first_row * D + at, grad_k.to(dk.dtype.element_ty), mask=mask)
    if d_beta is not None:
        tl.store(d_beta + first_row + rows, write_grad, mask=live)
    if dg is not None:
        end *= tl.where(all_cuts == 0, tl.exp2(total), 0.0)
        # Gate t is crossed by the reads from t on, the writes before t, and the state that passes through.
        grad = tl.cumsum(reads, 0, reverse=True) + tl.cumsum(writes, 0) - writes + end
        passes = tl.load(tile_at(g, g_s, b, h, first) + rows * g_s[2], mask=live, other=0.0) > float("-inf")
        tl.store(dg + first_row + rows, tl.where(passes, grad, 0.0), mask=live)
