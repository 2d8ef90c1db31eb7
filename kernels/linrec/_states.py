"""Triton kernels of the recurrence over chunks: a state before every chunk, forward or backward in time.

The gradient of the state obeys the same recurrence as the state, with q and dO in place of k and v and time
reversed, so one kernel computes both. A state is one flat row of E = Dk·Dv (+ Dk for the normaliser) floats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels._tiles import load_features, load_tile, operand, tile_at
from attnbench.kernels.linrec._vector import tile_into, tile_out, tile_total

CUT: tl.constexpr = tl.constexpr(-150.0)  # exp2 of anything smaller is 0 in fp32: the gate is a reset


@triton.jit
def gate_sums(at, live):
    """Prefix sums of the log2-gates of a chunk and of its resets, each with its total; 0 on dead rows.

    Resets are counted, not summed: −inf − (−inf) is NaN, and a huge sum would cost later steps their digits.
    """
    x = tl.load(at, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
    cut = x < CUT
    x = tl.where(cut, 0.0, x)
    cuts = cut.to(tl.int32)
    return tl.cumsum(x, 0), tl.cumsum(cuts, 0), tl.sum(x, 0), tl.sum(cuts, 0)


@triton.jit
def decay_into(sums, cuts):
    """Decay from the start of the chunk to each step."""
    return tl.where(cuts == 0, tl.exp2(sums), 0.0)


@triton.jit
def decay_out(sums, cuts, total, all_cuts):
    """Decay from each step to the end of the chunk."""
    return tl.where(cuts == all_cuts, tl.exp2(tl.minimum(total - sums, 0.0)), 0.0)


@triton.jit
def states_kernel(
    a, a_s, x, x_s, g, g_s, gv, gv_s, weight, weight_s, d_den, initial, states, ends, logs, end_logs,
    heads, groups, n, chunks, per_segment, segments, scale,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    LOGS_K: tl.constexpr, LOGS: tl.constexpr, FEATURE: tl.constexpr, BACKWARD: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State before every chunk of one segment, one (Dk, Dv) tile of one head: state ← decay·state + φ(a)ᵀ x.

    Forward: a = k, x = v, weight = β. Backward: a = q, x = dO, weight = 1/den, d_den the z rows. ``ends`` is
    the state after the segment; all but the first segment start at zero and are completed by carry_kernel,
    from the LOGS log2-decays of a state: LOGS_K over Dk (0: no gate, 1: a scalar one), then those over Dv.
    """
    tiles_v = tl.cdiv(DV, BV)
    tiles = tiles_v * tl.cdiv(D, BK)
    tile = tl.program_id(0) % tiles
    segment = (tl.program_id(0) // tiles) % segments
    bh = (tl.program_id(0) // (tiles * segments)).to(tl.int64)
    b, h = bh // heads, bh % heads
    group = h // (heads // groups)
    cols_k, cols_v = (tile // tiles_v) * BK + tl.arange(0, BK), (tile % tiles_v) * BV + tl.arange(0, BV)
    mask_k = cols_k < D
    mask = mask_k[:, None] & (cols_v < DV)[None, :]
    cell = cols_k[:, None] * DV + cols_v[None, :]
    cell_z = D * DV + cols_k
    mask_z = mask_k & (tile % tiles_v == 0)
    r = tl.arange(0, L)
    rows = -r if REVERSE else r
    s = tl.zeros((BK, BV), tl.float32)
    z = tl.zeros((BK,), tl.float32)
    if initial is not None:
        s = tl.load(initial + bh * E + cell, mask=mask & (segment == 0), other=0.0)
        if E > D * DV:
            z = tl.load(initial + bh * E + cell_z, mask=mask_k & (segment == 0), other=0.0)
    log = 0.0
    log_k = tl.zeros((BK,), tl.float32)
    log_v = tl.zeros((BV,), tl.float32)
    for i in range(segment * per_segment, tl.minimum((segment + 1) * per_segment, chunks)):
        c = chunks - 1 - i if BACKWARD else i
        here = states + (bh * chunks + c) * E
        tl.store(here + cell, s, mask=mask)
        if E > D * DV:
            tl.store(here + cell_z, z, mask=mask_z)
        live = c * L + r < n
        first = (n - 1 - c * L if REVERSE else c * L).to(tl.int64)
        at = load_features(tile_at(a, a_s, b, group, first), a_s, rows, cols_k, live, D, FEATURE)
        xt = load_tile(tile_at(x, x_s, b, h, first), x_s, rows, cols_v, live, DV)
        decay = tl.full((L,), 1.0, tl.float32)
        if LOGS_K > 1:
            gates = tile_at(g, g_s, b, h, first)
            if BACKWARD:
                at = (at * tile_into(gates, g_s, r, cols_k, n - c * L, D, REVERSE)).to(at.dtype)
            else:
                at = (at * tile_out(gates, g_s, r, cols_k, n - c * L, D, REVERSE)).to(at.dtype)
            total_k = tile_total(gates, g_s, r, cols_k, n - c * L, D, REVERSE)
            if logs is not None:
                at_log = logs + (bh * chunks + c) * LOGS + cols_k
                tl.store(at_log, log_k, mask=mask_k & (tile % tiles_v == 0))
                log_k += total_k
            s *= tl.exp2(total_k)[:, None]
            z *= tl.exp2(total_k)
        elif g is not None:
            sums, cuts, total, all_cuts = gate_sums(tile_at(g, g_s, b, h, first) + rows * g_s[2], live)
            decay = decay_into(sums, cuts) if BACKWARD else decay_out(sums, cuts, total, all_cuts)
            if logs is not None:
                tl.store(logs + (bh * chunks + c) * LOGS, log, mask=tile == 0)
                log += tl.where(all_cuts == 0, total, float("-inf"))
            whole = tl.where(all_cuts == 0, tl.exp2(total), 0.0)
            s *= whole
            z *= whole
        if gv is not None:
            gates = tile_at(gv, gv_s, b, h, first)
            if BACKWARD:
                xt = (xt * tile_into(gates, gv_s, r, cols_v, n - c * L, DV, REVERSE)).to(xt.dtype)
            else:
                xt = (xt * tile_out(gates, gv_s, r, cols_v, n - c * L, DV, REVERSE)).to(xt.dtype)
            total_v = tile_total(gates, gv_s, r, cols_v, n - c * L, DV, REVERSE)
            if logs is not None:
                at_log = logs + (bh * chunks + c) * LOGS + LOGS_K + cols_v
                tl.store(at_log, log_v, mask=(cols_v < DV) & (tile // tiles_v == 0))
                log_v += total_v
            s *= tl.exp2(total_v)[None, :]
        row = decay
        if weight is not None:
            at_w = tile_at(weight, weight_s, b, h, first) + rows * weight_s[2]
            row *= tl.load(at_w, mask=live, other=0.0).to(tl.float32)
        if (LOGS_K == 1) or (weight is not None):
            right, factor = operand(xt.to(tl.float32) * row[:, None], a.dtype.element_ty)
            written = tl.dot(tl.trans(at), right, input_precision=PRECISION) * factor
        else:
            written = tl.dot(tl.trans(at), xt, input_precision=PRECISION)
        if E > D * DV:
            if BACKWARD:
                row = decay * tl.load(d_den + bh * n + first + rows, mask=live, other=0.0)
            z += tl.sum(at.to(tl.float32) * row[:, None], 0)
        s += written * scale
    end = ends + (bh * segments + segment) * E
    tl.store(end + cell, s, mask=mask)
    if E > D * DV:
        tl.store(end + cell_z, z, mask=mask_z)
    if end_logs is not None:
        at_log = end_logs + (bh * segments + segment) * LOGS
        if LOGS_K > 1:
            tl.store(at_log + cols_k, log_k, mask=mask_k & (tile % tiles_v == 0))
        elif LOGS_K == 1:
            tl.store(at_log, log, mask=tile == 0)
        if gv is not None:
            tl.store(at_log + LOGS_K + cols_v, log_v, mask=(cols_v < DV) & (tile // tiles_v == 0))


@triton.jit
def decay_of(logs, cell, mask, D: tl.constexpr, DV: tl.constexpr, LOGS_K: tl.constexpr, LOGS: tl.constexpr):
    """Decay of the cells of a flat state, S then z, from the log2-decays of its rows and columns."""
    log = tl.zeros(cell.shape, tl.float32)
    if LOGS_K > 1:
        row = tl.where(cell < D * DV, cell // DV, cell - D * DV)
        log += tl.load(logs + row, mask=mask, other=0.0)
    elif LOGS_K == 1:
        log += tl.load(logs)
    if LOGS > LOGS_K:
        log += tl.load(logs + LOGS_K + cell % DV, mask=mask, other=0.0)
    return tl.exp2(log)


@triton.jit
def carry_kernel(
    states, ends, logs, end_logs, final, chunks, per_segment, segments,
    D: tl.constexpr, DV: tl.constexpr, E: tl.constexpr, LOGS_K: tl.constexpr, LOGS: tl.constexpr,
    BE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Add what earlier segments leave to the states of one segment; one past the last, the final state."""
    blocks = tl.cdiv(E, BE)
    cell = (tl.program_id(0) % blocks) * BE + tl.arange(0, BE)
    segment = (tl.program_id(0) // blocks) % segments + 1
    bh = (tl.program_id(0) // (blocks * segments)).to(tl.int64)
    mask = cell < E
    carry = tl.load(ends + bh * segments * E + cell, mask=mask)
    for j in range(1, segment):
        if end_logs is not None:
            carry *= decay_of(end_logs + (bh * segments + j) * LOGS, cell, mask, D, DV, LOGS_K, LOGS)
        carry += tl.load(ends + (bh * segments + j) * E + cell, mask=mask)
    if segment == segments:
        tl.store(final + bh * E + cell, carry, mask=mask)
    for i in range(segment * per_segment, tl.minimum((segment + 1) * per_segment, chunks)):
        c = bh * chunks + (chunks - 1 - i if BACKWARD else i)
        state = tl.load(states + c * E + cell, mask=mask)
        if logs is not None:
            state += carry * decay_of(logs + c * LOGS, cell, mask, D, DV, LOGS_K, LOGS)
        else:
            state += carry
        tl.store(states + c * E + cell, state, mask=mask)
