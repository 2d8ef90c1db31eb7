"""Triton kernel of the outputs inside one chunk of the recurrence.

With Γ_rs the decay from step s to step r and S the state before the chunk,
o = ((φ(q) φ(k)ᵀ ∘ Γ) βv + decay·φ(q) S) / den (chunked form of arXiv 2312.06635).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels._tiles import guarded, load_features, load_state, load_tile, operand, tile_at
from attnbench.kernels.linrec._states import decay_into, gate_sums


@triton.jit
def decay_between(sums, cuts, r):
    """Γ (L, L): exp of the gates after step s up to step r, 0 for s after r or across a reset."""
    same = (r[:, None] >= r[None, :]) & (cuts[:, None] == cuts[None, :])
    return tl.where(same, tl.exp2(tl.minimum(sums[:, None] - sums[None, :], 0.0)), 0.0)


@triton.jit
def output_kernel(
    q, q_s, k, k_s, v, v_s, g, g_s, beta, beta_s, states, o, den,
    heads, groups, n, chunks, scale, eps,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, REVERSE: tl.constexpr, EPS_ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, and with the normaliser den, of one chunk and one tile of Dv of one head."""
    dtype: tl.constexpr = q.dtype.element_ty
    tiles: tl.constexpr = tl.cdiv(DV, BV)
    tile = tl.program_id(0) % tiles
    c = (tl.program_id(0) // tiles) % chunks
    bh = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    b, h = bh // heads, bh % heads
    group = h // (heads // groups)
    r = tl.arange(0, L)
    live = c * L + r < n
    first = (n - 1 - c * L if REVERSE else c * L).to(tl.int64)
    rows = -r if REVERSE else r
    cols_v = tile * BV + tl.arange(0, BV)
    q = tile_at(q, q_s, b, group, first)
    k = tile_at(k, k_s, b, group, first)
    state = states + (bh * chunks + c) * E
    scores = tl.zeros((L, L), tl.float32)
    acc = tl.zeros((L, BV), tl.float32)
    den_acc = tl.zeros((L,), tl.float32)
    for k0 in range(0, D, BK):
        cols_k = k0 + tl.arange(0, BK)
        qt = load_features(q, q_s, rows, cols_k, live, D, FEATURE)
        kt = load_features(k, k_s, rows, cols_k, live, D, FEATURE)
        scores = tl.dot(qt, tl.trans(kt), scores, input_precision=PRECISION)
        right, factor = operand(load_state(state, cols_k, cols_v, D, DV), dtype)
        acc += tl.dot(qt, right, input_precision=PRECISION) * factor
        if E > D * DV:
            z = tl.load(state + D * DV + cols_k, mask=cols_k < D, other=0.0)
            den_acc += tl.sum(qt.to(tl.float32) * z[None, :], 1)
    if g is not None:
        sums, cuts, _, _ = gate_sums(tile_at(g, g_s, b, h, first) + rows * g_s[2], live)
        into = decay_into(sums, cuts)
        acc *= into[:, None]
        den_acc *= into
        scores *= decay_between(sums, cuts, r)
    else:
        scores = tl.where(r[:, None] >= r[None, :], scores, 0.0)
    if beta is not None:
        at_beta = tile_at(beta, beta_s, b, h, first) + rows * beta_s[2]
        scores *= tl.load(at_beta, mask=live, other=0.0).to(tl.float32)[None, :]
    left, factor = operand(scores, dtype)
    vt = load_tile(tile_at(v, v_s, b, h, first), v_s, rows, cols_v, live, DV)
    acc += tl.dot(left, vt, input_precision=PRECISION) * factor
    if E > D * DV:
        # the rounded scores of the numerator, so that the weights of a row sum to one
        den_acc += tl.sum(left.to(tl.float32), 1) * factor
        tl.store(den + bh * n + first + rows, den_acc, mask=live & (tile == 0))
        acc = acc / guarded(den_acc, eps, EPS_ADD)[:, None]
    else:
        acc *= scale
    at_o = o + (bh * n + first) * DV + (rows[:, None] * DV + cols_v[None, :])
    tl.store(at_o, acc.to(o.dtype.element_ty), mask=live[:, None] & (cols_v < DV)[None, :])
