"""Triton kernels of the delta rule forward: the triangular system of every chunk, then states and writes.

A step writes w_r = β_r (v_r − S'ᵀφ(k_r)). With A the part of S' that the chunk wrote and T = (I + A)⁻¹, the
writes of a chunk are T β(v − decay·φ(k) S): T needs no state, so all chunks are inverted at once. Given
the writes, outputs are those of the rule ``add`` (arXiv 2406.06484, 2412.06464).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels._tiles import load_features, load_state, load_tile, operand, tile_at
from attnbench.kernels.linrec._gradients import products
from attnbench.kernels.linrec._outputs import decay_between
from attnbench.kernels.linrec._states import decay_into, decay_out, gate_sums


@triton.jit
def unit_inverse(a, L: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)⁻¹ in fp32, a (L, L) strictly lower: substitution in blocks of 16 steps, products between."""
    BLOCKS: tl.constexpr = L // 16
    block, step = tl.arange(0, BLOCKS), tl.arange(0, 16)
    own = block[:, None, None, None] == block[None, None, :, None]
    # Transposed, the entries of one row already lie along the axis that they multiply.
    at = tl.sum(tl.where(own, tl.reshape(tl.trans(a), (BLOCKS, 16, BLOCKS, 16)), 0.0), 2)
    one = step[:, None] == step[None, :]
    x = tl.where(one[None, :, :], 1.0, tl.zeros((BLOCKS, 16, 16), tl.float32))
    for i in range(1, 16):
        row = tl.sum(tl.where((step == i)[None, None, :], at, 0.0), 2)
        known = tl.sum(row[:, :, None] * x, 1)
        x = tl.where((step == i)[None, :, None], x - known[:, None, :], x)
    diagonal = tl.reshape(tl.where(own, x[:, :, None, :], 0.0), (L, L))
    if BLOCKS > 1:
        # Between blocks: (I + m)⁻¹ diagonal, where m is strictly lower by blocks, so that m^BLOCKS = 0.
        r = tl.arange(0, L) // 16
        m = tl.dot(diagonal, tl.where(r[:, None] > r[None, :], a, 0.0), input_precision=PRECISION)
        if BLOCKS == 4:
            twice = tl.dot(m, diagonal, input_precision=PRECISION)
            diagonal = tl.dot(m, twice, diagonal, input_precision=PRECISION)
        diagonal -= tl.dot(m, diagonal, input_precision=PRECISION)
    return diagonal


@triton.jit
def inverse_kernel(
    k, k_s, g, g_s, beta, beta_s, inverse, heads, groups, n, chunks,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T (L, L) of one chunk of one head; rows and columns in the order of time."""
    c = tl.program_id(0) % chunks
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = bh // heads, bh % heads
    r = tl.arange(0, L)
    live = c * L + r < n
    first = tl.cast(n - 1 - c * L if REVERSE else c * L, tl.int64)
    rows = -r if REVERSE else r
    k = tile_at(k, k_s, b, h // (heads // groups), first)
    a = products(k, k_s, k, k_s, rows, live, D, L, BK, FEATURE, PRECISION)
    if g is not None:
        sums, cuts, _, _ = gate_sums(tile_at(g, g_s, b, h, first) + rows * g_s[2], live)
        a *= decay_between(sums, cuts, r)
    if beta is not None:
        at_beta = tile_at(beta, beta_s, b, h, first) + rows * beta_s[2]
        a *= tl.load(at_beta, mask=live, other=0.0).to(tl.float32)[:, None]
    a = tl.where(r[:, None] > r[None, :], a, 0.0)
    at = inverse + (bh * chunks + c) * L * L + (r[:, None] * L + r[None, :])
    tl.store(at, unit_inverse(a, L, PRECISION).to(inverse.dtype.element_ty))


@triton.jit
def delta_states_kernel(
    k, k_s, v, v_s, g, g_s, beta, beta_s, inverse, initial, states, written, final,
    heads, groups, n, chunks,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State before every chunk and what every step writes, for one tile of Dv of one head; BK ≥ Dk.

    The difference v − φ(k) S is taken in fp32 before it is rounded: what the state already holds cancels.
    """
    dtype: tl.constexpr = k.dtype.element_ty
    tiles = tl.cdiv(DV, BV)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    group = h // (heads // groups)
    cols_k, cols_v = tl.arange(0, BK), (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    mask = (cols_k < D)[:, None] & (cols_v < DV)[None, :]
    cell = cols_k[:, None] * DV + cols_v[None, :]
    r = tl.arange(0, L)
    rows = -r if REVERSE else r
    s = tl.zeros((BK, BV), tl.float32)
    if initial is not None:
        s = load_state(initial + bh * E, cols_k, cols_v, D, DV)
    for c in range(chunks):
        tl.store(states + (bh * chunks + c) * E + cell, s, mask=mask)
        live = c * L + r < n
        first = tl.cast(n - 1 - c * L if REVERSE else c * L, tl.int64)
        kt = load_features(tile_at(k, k_s, b, group, first), k_s, rows, cols_k, live, D, FEATURE)
        t = tl.load(inverse + (bh * chunks + c) * L * L + (r[:, None] * L + r[None, :]))
        right, factor = operand(s, dtype)
        held = tl.dot(kt, right, input_precision=PRECISION) * factor
        out = tl.full((L,), 1.0, tl.float32)
        if g is not None:
            sums, cuts, total, all_cuts = gate_sums(tile_at(g, g_s, b, h, first) + rows * g_s[2], live)
            held *= decay_into(sums, cuts)[:, None]
            out = decay_out(sums, cuts, total, all_cuts)
            s *= tl.where(all_cuts == 0, tl.exp2(total), 0.0)
        new = load_tile(tile_at(v, v_s, b, h, first), v_s, rows, cols_v, live, DV).to(tl.float32) - held
        if beta is not None:
            at_beta = tile_at(beta, beta_s, b, h, first) + rows * beta_s[2]
            new *= tl.load(at_beta, mask=live, other=0.0).to(tl.float32)[:, None]
        right, factor = operand(new, dtype)
        new = tl.dot(t, right, input_precision=PRECISION) * factor
        at = written + (bh * n + first) * DV + (rows[:, None] * DV + cols_v[None, :])
        tl.store(at, new.to(written.dtype.element_ty), mask=live[:, None] & (cols_v < DV)[None, :])
        right, factor = operand(new * out[:, None], dtype)
        s += tl.dot(tl.trans(kt), right, input_precision=PRECISION) * factor
    tl.store(final + bh * E + cell, s, mask=mask)
