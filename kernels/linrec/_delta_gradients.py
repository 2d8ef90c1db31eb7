"""Triton kernels of the delta rule backward: the adjoint of the writes, then every chunk's inputs.

A step's key reads the state before it writes, so the rule is ``add`` with a second reader: φ(k), which sees
strictly earlier steps, with output gradient −βλ, where λ is the whole gradient of a write before β. In a
chunk λ = Tᵀ dw, dw what the outputs and the state after the chunk ask of the writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels._tiles import load_features, load_state, load_tile, operand, phi_grad, tile_at
from attnbench.kernels.linrec._gradients import products
from attnbench.kernels.linrec._outputs import decay_between
from attnbench.kernels.linrec._states import decay_into, decay_out, gate_sums


@triton.jit
def delta_local_kernel(
    q, q_s, k, k_s, g, g_s, do, do_s, local, heads, groups, n, chunks, scale,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the outputs of one chunk ask of its writes: scale·(φ(q) φ(k)ᵀ ∘ Γ)ᵀ dO."""
    c = tl.program_id(0) % chunks
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = bh // heads, bh % heads
    group = h // (heads // groups)
    r = tl.arange(0, L)
    live = c * L + r < n
    first = tl.cast(n - 1 - c * L if REVERSE else c * L, tl.int64)
    rows = -r if REVERSE else r
    do = tile_at(do, do_s, b, h, first)
    q, k = tile_at(q, q_s, b, group, first), tile_at(k, k_s, b, group, first)
    scores = products(q, q_s, k, k_s, rows, live, D, L, BK, FEATURE, PRECISION) * scale
    if g is not None:
        sums, cuts, _, _ = gate_sums(tile_at(g, g_s, b, h, first) + rows * g_s[2], live)
        scores *= decay_between(sums, cuts, r)
    else:
        scores = tl.where(r[:, None] >= r[None, :], scores, 0.0)
    left, factor = operand(tl.trans(scores), q.dtype.element_ty)
    for v0 in range(0, DV, BV):
        cols_v = v0 + tl.arange(0, BV)
        asked = tl.dot(left, load_tile(do, do_s, rows, cols_v, live, DV), input_precision=PRECISION) * factor
        at = local + (bh * n + first) * DV + (rows[:, None] * DV + cols_v[None, :])
        tl.store(at, asked.to(local.dtype.element_ty), mask=live[:, None] & (cols_v < DV)[None, :])


@triton.jit
def delta_state_gradients_kernel(
    q, q_s, k, k_s, g, g_s, beta, beta_s, do, do_s, inverse, d_final, adjoint, d_states, d_initial,
    heads, groups, n, chunks, scale,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the state after every chunk, for one tile of Dv of one head; BK ≥ Dk.

    ``adjoint`` comes with what the outputs of each chunk ask of its writes, and becomes λ.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    tiles = tl.cdiv(DV, BV)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    group = h // (heads // groups)
    cols_k, cols_v = tl.arange(0, BK), (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    mask = (cols_k < D)[:, None] & (cols_v < DV)[None, :]
    cell = cols_k[:, None] * DV + cols_v[None, :]
    r = tl.arange(0, L)
    rows = -r if REVERSE else r
    ds = tl.zeros((BK, BV), tl.float32)
    if d_final is not None:
        ds = load_state(d_final + bh * E, cols_k, cols_v, D, DV)
    for i in range(chunks):
        c = chunks - 1 - i
        tl.store(d_states + (bh * chunks + c) * E + cell, ds, mask=mask)
        live = c * L + r < n
        first = tl.cast(n - 1 - c * L if REVERSE else c * L, tl.int64)
        at = adjoint + (bh * n + first) * DV + (rows[:, None] * DV + cols_v[None, :])
        mask_v = live[:, None] & (cols_v < DV)[None, :]
        kt = load_features(tile_at(k, k_s, b, group, first), k_s, rows, cols_k, live, D, FEATURE)
        right, factor = operand(ds, dtype)
        asked = tl.dot(kt, right, input_precision=PRECISION) * factor
        into = tl.full((L,), 1.0, tl.float32)
        if g is not None:
            sums, cuts, total, all_cuts = gate_sums(tile_at(g, g_s, b, h, first) + rows * g_s[2], live)
            asked *= decay_out(sums, cuts, total, all_cuts)[:, None]
            into = decay_into(sums, cuts)
            ds *= tl.where(all_cuts == 0, tl.exp2(total), 0.0)
        asked += tl.load(at, mask=mask_v, other=0.0).to(tl.float32)
        t = tl.load(inverse + (bh * chunks + c) * L * L + (r[:, None] * L + r[None, :]))
        right, factor = operand(asked, dtype)
        grad = tl.dot(tl.trans(t), right, input_precision=PRECISION) * factor
        tl.store(at, grad.to(adjoint.dtype.element_ty), mask=mask_v)
        if beta is not None:
            at_beta = tile_at(beta, beta_s, b, h, first) + rows * beta_s[2]
            grad *= tl.load(at_beta, mask=live, other=0.0).to(tl.float32)[:, None]
        right, factor = operand(grad * into[:, None], dtype)
        ds -= tl.dot(tl.trans(kt), right, input_precision=PRECISION) * factor
        qt = load_features(tile_at(q, q_s, b, group, first), q_s, rows, cols_k, live, D, FEATURE)
        dot_ = load_tile(tile_at(do, do_s, b, h, first), do_s, rows, cols_v, live, DV).to(tl.float32)
        right, factor = operand(dot_ * (into * scale)[:, None], dtype)
        ds += tl.dot(tl.trans(qt), right, input_precision=PRECISION) * factor
    tl.store(d_initial + bh * E + cell, ds, mask=mask)


@triton.jit
def delta_gradient_kernel(
    q, q_s, k, k_s, v, v_s, g, g_s, beta, beta_s, do, do_s, written, adjoint, states, d_states,
    dq, dk, dv, dg, d_beta, heads, groups, n, chunks, scale,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv, dg and dβ of one chunk of one head, from its writes and their adjoint λ (B, H, N, Dv)."""
    dtype: tl.constexpr = q.dtype.element_ty
    c = tl.program_id(0) % chunks
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = bh // heads, bh % heads
    group = h // (heads // groups)
    r = tl.arange(0, L)
    live = c * L + r < n
    first = tl.cast(n - 1 - c * L if REVERSE else c * L, tl.int64)
    rows = -r if REVERSE else r
    first_row = bh * n + first
    q, k = tile_at(q, q_s, b, group, first), tile_at(k, k_s, b, group, first)
    v, do = tile_at(v, v_s, b, h, first), tile_at(do, do_s, b, h, first)
    own_s = (0, 0, DV, 1)
    written += first_row * DV
    adjoint += first_row * DV
    states += (bh * chunks + c) * E
    d_states += (bh * chunks + c) * E

    into = tl.full((L,), 1.0, tl.float32)
    out = into
    write = into
    sums = tl.zeros((L,), tl.float32)
    cuts = tl.zeros((L,), tl.int32)
    if g is not None:
        sums, cuts, total, all_cuts = gate_sums(tile_at(g, g_s, b, h, first) + rows * g_s[2], live)
        into = decay_into(sums, cuts)
        out = decay_out(sums, cuts, total, all_cuts)
    if beta is not None:
        at_beta = tile_at(beta, beta_s, b, h, first) + rows * beta_s[2]
        write = tl.load(at_beta, mask=live, other=0.0).to(tl.float32)

    write_grad = tl.zeros((L,), tl.float32)
    for v0 in range(0, DV, BV):
        cols_v = v0 + tl.arange(0, BV)
        grad = load_tile(adjoint, own_s, rows, cols_v, live, DV).to(tl.float32)
        if d_beta is not None:
            vt = load_tile(v, v_s, rows, cols_v, live, DV).to(tl.float32)
            write_grad += tl.sum(grad * vt, 1)
        at = dv + first_row * DV + (rows[:, None] * DV + cols_v[None, :])
        mask = live[:, None] & (cols_v < DV)[None, :]
        tl.store(at, (grad * write[:, None]).to(dv.dtype.element_ty), mask=mask)

    # Of the scores that the outputs read, then of those that the keys read; the first without its diagonal,
    # which no gate decays.
    d_scores = products(do, do_s, written, own_s, rows, live, DV, L, BV, "identity", PRECISION)
    d_scores *= decay_between(sums, cuts, r) * scale
    if dg is not None:
        scores = products(q, q_s, k, k_s, rows, live, D, L, BK, FEATURE, PRECISION)
        crossing = tl.where(r[:, None] > r[None, :], d_scores * scores, 0.0)
        reads = tl.sum(crossing, 1) - tl.sum(crossing, 0)
        writes = tl.zeros((L,), tl.float32)
        end = 0.0
    inner, inner_factor = operand(d_scores, dtype)
    d_held = products(adjoint, own_s, written, own_s, rows, live, DV, L, BV, "identity", PRECISION)
    d_held = tl.where(r[:, None] > r[None, :], d_held * decay_between(sums, cuts, r), 0.0)
    if (dg is not None) or (d_beta is not None):
        crossing = d_held * products(k, k_s, k, k_s, rows, live, D, L, BK, FEATURE, PRECISION)
        if d_beta is not None:
            write_grad -= tl.sum(crossing, 1)
        if dg is not None:
            crossing *= write[:, None]
            reads += tl.sum(crossing, 0) - tl.sum(crossing, 1)
    d_held *= write[:, None]
    both, both_factor = operand(d_held + tl.trans(d_held), dtype)

    for k0 in range(0, D, BK):
        cols_k = k0 + tl.arange(0, BK)
        from_state = tl.zeros((L, BK), tl.float32)
        held_state = tl.zeros((L, BK), tl.float32)
        to_state = tl.zeros((L, BK), tl.float32)
        for v0 in range(0, DV, BV):
            cols_v = v0 + tl.arange(0, BV)
            s = load_state(states, cols_k, cols_v, D, DV)
            ds = load_state(d_states, cols_k, cols_v, D, DV)
            if dg is not None:
                end += tl.sum(s * ds)
            right, factor = operand(s, dtype)
            right = tl.trans(right)
            left = load_tile(do, do_s, rows, cols_v, live, DV)
            from_state += tl.dot(left, right, input_precision=PRECISION) * factor
            left = load_tile(adjoint, own_s, rows, cols_v, live, DV)
            held_state += tl.dot(left, right, input_precision=PRECISION) * factor
            left = load_tile(written, own_s, rows, cols_v, live, DV)
            right, factor = operand(ds, dtype)
            to_state += tl.dot(left, tl.trans(right), input_precision=PRECISION) * factor
        from_state *= (into * scale)[:, None]
        held_state *= into[:, None]
        to_state *= out[:, None]
        qt = load_features(q, q_s, rows, cols_k, live, D, FEATURE)
        kt = load_features(k, k_s, rows, cols_k, live, D, FEATURE)
        if d_beta is not None:
            write_grad -= tl.sum(kt.to(tl.float32) * held_state, 1)
        held_state *= write[:, None]
        if dg is not None:
            reads += tl.sum(qt.to(tl.float32) * from_state, 1) - tl.sum(kt.to(tl.float32) * held_state, 1)
            writes += tl.sum(kt.to(tl.float32) * to_state, 1)
        grad_q = tl.dot(inner, kt, input_precision=PRECISION) * inner_factor + from_state
        grad_k = tl.dot(tl.trans(inner), qt, input_precision=PRECISION) * inner_factor + to_state
        grad_k -= tl.dot(both, kt, input_precision=PRECISION) * both_factor + held_state
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
        grad = tl.cumsum(reads, 0, reverse=True) + tl.cumsum(writes, 0) - writes + end
        passes = tl.load(tile_at(g, g_s, b, h, first) + rows * g_s[2], mask=live, other=0.0) > float("-inf")
        tl.store(dg + first_row + rows, tl.where(passes, grad, 0.0), mask=live)
