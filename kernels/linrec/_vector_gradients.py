"""Triton kernel of the gradients inside one chunk under gates that differ over a dimension.

The recurrence is symmetric in keys and values: q, k, gates over Dk and dP = dO vᵀ play towards S the part
that dO, v, gates over Dv and P = q kᵀ play towards Sᵀ. One kernel serves both sides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels._tiles import load_features, load_tile, operand, phi_grad, tile_at
from attnbench.kernels.linrec._vector import (
    decayed_read,
    decayed_write,
    diagonal,
    tile_into,
    tile_out,
    tile_total,
)


@triton.jit
def vector_gradient_kernel(
    a, a_s, b, b_s, x, x_s, y, y_s, g, g_s, gx, gx_s, beta, beta_s, inverse, d_den, m, p, states, d_states,
    da, db, dg, d_beta, heads, groups, groups_x, n, chunks, scale,
    D: tl.constexpr, DX: tl.constexpr, E: tl.constexpr, SD: tl.constexpr, SX: tl.constexpr, L: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, FEATURE: tl.constexpr, FEATURE_X: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da, db and dg of one chunk, one tile of D of one head; of dβ the part of this tile.

    Key side: a = q, b = k, x = dO, y = v, m = dP. Value side: a = dO, b = v, x = q, y = k, m = P, no da. The
    entry (d, x) of a state lies at d·SD + x·SX. p is P for dβ, and d_den given on the key side alone.
    """
    dtype: tl.constexpr = a.dtype.element_ty
    tiles: tl.constexpr = tl.cdiv(D, BK)
    tile = tl.program_id(0) % tiles
    c = (tl.program_id(0) // tiles) % chunks
    bh = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    batch, h = bh // heads, bh % heads
    group, group_x = h // (heads // groups), h // (heads // groups_x)
    r = tl.arange(0, L)
    steps = n - c * L
    live = r < steps
    first = tl.cast(n - 1 - c * L if REVERSE else c * L, tl.int64)
    rows = -r if REVERSE else r
    first_row = bh * n + first
    cols = tile * BK + tl.arange(0, BK)
    a, b = tile_at(a, a_s, batch, group, first), tile_at(b, b_s, batch, group, first)
    x, y = tile_at(x, x_s, batch, group_x, first), tile_at(y, y_s, batch, group_x, first)
    states += (bh * chunks + c) * E
    d_states += (bh * chunks + c) * E
    if g is not None:
        g = tile_at(g, g_s, batch, h, first)
    if gx is not None:
        gx = tile_at(gx, gx_s, batch, h, first)

    read = tl.full((L,), 1.0, tl.float32) * scale
    if inverse is not None:
        read = tl.load(inverse + first_row + rows, mask=live, other=0.0)
    square = (bh * chunks + c) * L * L + (r[:, None] * L + r[None, :])
    weights = tl.load(m + square) * read[:, None]
    if d_den is not None:
        den_grad = tl.load(d_den + first_row + rows, mask=live, other=0.0)
        weights += tl.where(r[:, None] >= r[None, :], den_grad[:, None], 0.0)
    write = tl.full((L,), 1.0, tl.float32)
    if beta is not None:
        at_beta = tile_at(beta, beta_s, batch, h, first) + rows * beta_s[2]
        write = tl.load(at_beta, mask=live, other=0.0).to(tl.float32)
    if d_beta is not None:
        write_grad = tl.sum(weights * tl.load(p + square), 0) * tl.where(tile == 0, 1.0, 0.0)
    weights *= write[None, :]

    from_state = tl.zeros((L, BK), tl.float32)
    to_state = tl.zeros((L, BK), tl.float32)
    end = tl.zeros((BK,), tl.float32)
    for x0 in range(0, DX, BV):
        cols_x = x0 + tl.arange(0, BV)
        cell = cols_x[:, None] * SX + cols[None, :] * SD
        mask = (cols_x < DX)[:, None] & (cols < D)[None, :]
        s = tl.load(states + cell, mask=mask, other=0.0)
        ds = tl.load(d_states + cell, mask=mask, other=0.0)
        if dg is not None:
            kept = s * ds
            if gx is not None:
                kept *= tl.exp2(tile_total(gx, gx_s, r, cols_x, steps, DX, REVERSE))[:, None]
            end += tl.sum(kept, 0)
        if (da is not None) or (dg is not None):
            left = load_features(x, x_s, rows, cols_x, live, DX, FEATURE_X)
            if gx is not None:
                left = (left * tile_into(gx, gx_s, r, cols_x, steps, DX, REVERSE)).to(dtype)
            right, factor = operand(s, dtype)
            from_state += tl.dot(left, right, input_precision=PRECISION) * factor
        left = load_features(y, y_s, rows, cols_x, live, DX, FEATURE_X)
        if gx is not None:
            left = (left * tile_out(gx, gx_s, r, cols_x, steps, DX, REVERSE)).to(dtype)
        right, factor = operand(ds, dtype)
        to_state += tl.dot(left, right, input_precision=PRECISION) * factor
    from_state *= read[:, None]
    if d_den is not None:
        z = tl.load(states + D * DX + cols, mask=cols < D, other=0.0)
        dz = tl.load(d_states + D * DX + cols, mask=cols < D, other=0.0)
        from_state += den_grad[:, None] * z[None, :]
        to_state += dz[None, :]
        end += z * dz
    if g is not None:
        from_state *= tile_into(g, g_s, r, cols, steps, D, REVERSE)
        to_state *= tile_out(g, g_s, r, cols, steps, D, REVERSE)
    bt = load_features(b, b_s, rows, cols, live, D, FEATURE).to(tl.float32)
    if d_beta is not None:
        write_grad += tl.sum(bt * to_state, 1)
        tl.store(d_beta + (tile * (tl.num_programs(0) // tiles // chunks) + bh) * n + first + rows,
                 write_grad, mask=live)  # fmt: skip
    to_state *= write[:, None]

    own = diagonal(weights, r, 0)  # what a step reads of its own write: no gate decays it
    at_tile = rows[:, None] * D + cols[None, :]
    mask = live[:, None] & (cols < D)[None, :]
    pairs = decayed_write(weights, a, a_s, g, g_s, r, cols, steps, D, L, FEATURE, REVERSE, PRECISION)
    if dg is not None:
        # Gate t is crossed by the reads from t on, the writes before t, and the state that passes through.
        written = bt * to_state
        crossed = tl.cumsum(written, 0) - written - tl.cumsum(bt * pairs, 0, reverse=True)
    at = load_features(a, a_s, rows, cols, live, D, FEATURE).to(tl.float32)
    grad = pairs + to_state + own[:, None] * at
    if FEATURE != "identity":
        grad *= phi_grad(load_tile(b, b_s, rows, cols, live, D).to(tl.float32), FEATURE)
    tl.store(db + first_row * D + at_tile, grad.to(db.dtype.element_ty), mask=mask)
    if (da is not None) or (dg is not None):
        pairs = decayed_read(weights, b, b_s, g, g_s, r, cols, steps, D, L, FEATURE, REVERSE, PRECISION)
        pairs += from_state
        if dg is not None:
            end *= tl.exp2(tile_total(g, g_s, r, cols, steps, D, REVERSE))
            crossed += tl.cumsum(at * pairs, 0, reverse=True) + end[None, :]
            passes = load_tile(g, g_s, rows, cols, live, D) > float("-inf")
            tl.store(dg + first_row * D + at_tile, tl.where(passes, crossed, 0.0), mask=mask)
        if da is not None:
            grad = pairs + own[:, None] * bt
            if FEATURE != "identity":
                grad *= phi_grad(load_tile(a, a_s, rows, cols, live, D).to(tl.float32), FEATURE)
            tl.store(da + first_row * D + at_tile, grad.to(da.dtype.element_ty), mask=mask)
