"""Triton kernels of noncausal linear attention: sums of outer products, and two ways to read them.

Each serves forward and backward. The sums of one (batch, head) are one flat row of E = D·Dv (+ D for the
normaliser) floats: KV = Σ φ(k) vᵀ and z = Σ φ(k), or their gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels._tiles import (
    guarded,
    load_features,
    load_state,
    load_tile,
    operand,
    phi_grad,
    tile_at,
)


@triton.jit
def live_rows(mask, mask_s, b, first, rows, n):
    """Rows inside the sequence that ``mask`` (B, N), where there is one, does not remove."""
    live = first + rows < n
    if mask is not None:
        at = mask + b * mask_s[0] + first * mask_s[1] + rows * mask_s[1]
        live = live & (tl.load(at, mask=live, other=1).to(tl.int32) == 0)
    return live


@triton.jit
def sums_kernel(
    a, a_s, x, x_s, mask, mask_s, inverse, d_den, sums, heads, n, blocks, per_split, splits, scale,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (D, Dv) tile of Σ φ(a) xᵀ, and of Σ φ(a), over one split of the rows: sums (B·H, splits, E).

    Forward: a = k, x = v. Backward: a = q, x = dO, with rows weighted by 1/den in the product and by d_den in
    the vector. Every split has its own place, so that the result does not depend on the order of programs.
    """
    tiles_v = tl.cdiv(DV, BV)
    tiles = tiles_v * tl.cdiv(D, BK)
    tile = tl.program_id(0) % tiles
    split = (tl.program_id(0) // tiles) % splits
    bh = (tl.program_id(0) // (tiles * splits)).to(tl.int64)
    b, h = bh // heads, bh % heads
    cols_k, cols_v = (tile // tiles_v) * BK + tl.arange(0, BK), (tile % tiles_v) * BV + tl.arange(0, BV)
    rows = tl.arange(0, BN)
    acc = tl.zeros((BK, BV), tl.float32)
    vector = tl.zeros((BK,), tl.float32)
    for i in range(split * per_split, tl.minimum((split + 1) * per_split, blocks)):
        start = i * BN
        first = start.to(tl.int64)
        live = live_rows(mask, mask_s, b, first, rows, n)
        at = load_features(tile_at(a, a_s, b, h, first), a_s, rows, cols_k, live, D, FEATURE)
        xt = load_tile(tile_at(x, x_s, b, h, first), x_s, rows, cols_v, live, DV)
        if inverse is not None:
            row = tl.load(inverse + bh * n + first + rows, mask=live, other=0.0)
            right, factor = operand(xt.to(tl.float32) * row[:, None], a.dtype.element_ty)
            acc += tl.dot(tl.trans(at), right, input_precision=PRECISION) * factor
        else:
            acc = tl.dot(tl.trans(at), xt, acc, input_precision=PRECISION)
        if E > D * DV:
            weighted = at.to(tl.float32)
            if d_den is not None:
                weighted *= tl.load(d_den + bh * n + first + rows, mask=live, other=0.0)[:, None]
            vector += tl.sum(weighted, 0)
    sums += (bh * splits + split) * E
    mask_k = cols_k < D
    cell = cols_k[:, None] * DV + cols_v[None, :]
    tl.store(sums + cell, acc * scale, mask=mask_k[:, None] & (cols_v < DV)[None, :])
    if E > D * DV:
        tl.store(sums + D * DV + cols_k, vector, mask=mask_k & (tile % tiles_v == 0))


@triton.jit
def read_kernel(
    a, a_s, mask, mask_s, sums, out, den, heads, n, blocks, scale, eps,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, EPS_ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows and Dv of φ(a) KV, divided by φ(a)·z where ``den`` receives it: o of q, or dv of k."""
    tiles = tl.cdiv(DV, BV)
    tile = tl.program_id(0) % tiles
    first = ((tl.program_id(0) // tiles) % blocks * BN).to(tl.int64)
    bh = (tl.program_id(0) // (tiles * blocks)).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows, cols_v = tl.arange(0, BN), tile * BV + tl.arange(0, BV)
    live = live_rows(mask, mask_s, b, first, rows, n)
    inside = first + rows < n
    a = tile_at(a, a_s, b, h, first)
    sums += bh * E
    acc = tl.zeros((BN, BV), tl.float32)
    den_acc = tl.zeros((BN,), tl.float32)
    for k0 in range(0, D, BK):
        cols_k = k0 + tl.arange(0, BK)
        at = load_features(a, a_s, rows, cols_k, live, D, FEATURE)
        right, factor = operand(load_state(sums, cols_k, cols_v, D, DV), a.dtype.element_ty)
        acc += tl.dot(at, right, input_precision=PRECISION) * factor
        if den is not None:
            z = tl.load(sums + D * DV + cols_k, mask=cols_k < D, other=0.0)
            den_acc += tl.sum(at.to(tl.float32) * z[None, :], 1)
    if den is not None:
        tl.store(den + bh * n + first + rows, den_acc, mask=inside & (tile == 0))
        acc = acc / guarded(den_acc, eps, EPS_ADD)[:, None]
    else:
        acc *= scale
    at_out = out + (bh * n + first) * DV + (rows[:, None] * DV + cols_v[None, :])
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=inside[:, None] & (cols_v < DV)[None, :])


@triton.jit
def feature_gradient_kernel(
    x, x_s, u, u_s, mask, mask_s, inverse, d_den, sums, out, heads, n, blocks, scale,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FEATURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows and D of φ'(u) ∘ (weight · x KVᵀ + w zᵀ), 0 on masked rows.

    dq: x = dO, u = q, weight = 1/den, w = d_den. dk: x = v, u = k, gradients of KV and z, weight = w = 1.
    """
    tiles = tl.cdiv(D, BK)
    tile = tl.program_id(0) % tiles
    first = ((tl.program_id(0) // tiles) % blocks * BN).to(tl.int64)
    bh = (tl.program_id(0) // (tiles * blocks)).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows, cols_k = tl.arange(0, BN), tile * BK + tl.arange(0, BK)
    live = live_rows(mask, mask_s, b, first, rows, n)
    inside = first + rows < n
    x = tile_at(x, x_s, b, h, first)
    sums += bh * E
    acc = tl.zeros((BN, BK), tl.float32)
    for v0 in range(0, DV, BV):
        cols_v = v0 + tl.arange(0, BV)
        xt = load_tile(x, x_s, rows, cols_v, live, DV)
        right, factor = operand(load_state(sums, cols_k, cols_v, D, DV), x.dtype.element_ty)
        acc += tl.dot(xt, tl.trans(right), input_precision=PRECISION) * factor
    acc *= scale
    if inverse is not None:
        acc *= tl.load(inverse + bh * n + first + rows, mask=live, other=0.0)[:, None]
    if E > D * DV:
        z = tl.load(sums + D * DV + cols_k, mask=cols_k < D, other=0.0)
        weight = tl.full((BN,), 1.0, tl.float32)
        if d_den is not None:
            weight = tl.load(d_den + bh * n + first + rows, mask=live, other=0.0)
        acc += weight[:, None] * z[None, :]
    if FEATURE != "identity":
        ut = load_tile(tile_at(u, u_s, b, h, first), u_s, rows, cols_k, live, D)
        acc *= phi_grad(ut.to(tl.float32), FEATURE)
    acc = tl.where(live[:, None], acc, 0.0)
    at_out = out + (bh * n + first) * D + (rows[:, None] * D + cols_k[None, :])
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=inside[:, None] & (cols_k < D)[None, :])
