"""Kernel of the gradients inside one chunk, from the state before it and the gradient of the state after it.

The states inside the chunk are computed again. Sums over chunks and over blocks of channels are written per
program and added afterwards, so that they do not depend on the order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.selective_scan._device import (
    LOG2E,
    Place,
    load_column,
    load_parameter,
    load_tile,
    place,
    raw_steps,
    scan,
    sigmoid,
    state_pointer,
    step_sizes,
    store_tile,
)


@triton.jit
def _neighbour(extent, order, at, r, OFFSET: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr):
    """The place with the tokens OFFSET steps on, dead where that leaves the chunk or the sequence."""
    t = at.chunk * L + r + OFFSET
    live = (r + OFFSET >= 0) & (r + OFFSET < L) & (t < extent.n)
    tokens = t
    if REVERSE:
        tokens = extent.n - 1 - t
    if order is not None:
        tokens = tl.load(order.base + at.k * order.k + tokens * order.n, mask=live, other=0)
    return Place(at.b, at.k, at.bk, at.chunk, at.block, at.channels, tokens.to(at.tokens.dtype), live)


@triton.jit
def gradients(
    u, delta, bias, z, rates, b, c, skip, order, extent, states, d_states, do,
    du, d_delta, dz, d_rates, db, dc, d_skip, d_bias,
    NS: tl.constexpr, L: tl.constexpr, BLOCK_E: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, FAR: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Write every gradient of one chunk and one block of channels.

    db, dc: (B·K, blocks of channels, N, Ns); d_rates: (B·K, chunks, Ns, E); d_skip, d_bias: (B·K, chunks, E).
    """
    at = place(extent, order, L, BLOCK_E, REVERSE, FAR)
    r = tl.arange(0, L)
    inside = at.channels < extent.e
    step = step_sizes(delta, bias, at, extent.e, SOFTPLUS)
    # A gradient comes back through the decay of the next step; after the last step of the chunk it is 1.
    step_after = step_sizes(delta, bias, _neighbour(extent, order, at, r, 1, L, REVERSE), extent.e, SOFTPLUS)
    weight = step * load_tile(u, at, extent.e)
    dy = load_tile(do, at, extent.e)
    if z is not None:
        gate = load_tile(z, at, extent.e)
        dy *= gate * sigmoid(gate)
        y = tl.zeros((L, BLOCK_E), tl.float32)
    if SEGMENT > 1:
        step_before = step_sizes(
            delta, bias, _neighbour(extent, order, at, r, -1, L, REVERSE), extent.e, SOFTPLUS
        )
        first = (r % SEGMENT == 0)[:, None]
        last = (r % SEGMENT == SEGMENT - 1)[:, None]
    to_write = tl.zeros((L, BLOCK_E), tl.float32)  # Σ over the state of dh b
    to_decay = tl.zeros((L, BLOCK_E), tl.float32)  # Σ over the state of A · d(log decay)
    row = ((at.bk * extent.blocks + at.block) * extent.n + at.tokens) * NS
    for i in range(0, NS):
        rate = load_parameter(rates, at, extent.e, i)
        bi = load_column(b, at, i)[:, None]
        ci = load_column(c, at, i)[:, None]
        h0 = tl.load(
            state_pointer(states, at.bk, at.chunk, i, at.channels, extent, NS), mask=inside, other=0.0
        )
        dh_end = tl.load(
            state_pointer(d_states, at.bk, at.chunk + 1, i, at.channels, extent, NS), mask=inside, other=0.0
        )
        decay = tl.exp2((rate * LOG2E)[None, :] * step)
        write = weight * bi
        product, h = scan(decay, write, False)
        h += product * h0[None, :]
        read = dy * ci
        product, dh = scan(tl.exp2((rate * LOG2E)[None, :] * step_after), read, True)
        dh += product * dh_end[None, :]
        d_log = dh * (h - write)  # decay_t h_{t−1} is what the write of step t does not explain
        if SEGMENT > 1:
            _, later = scan(tl.where(last, 0.0, decay), write, True)
            later -= write
            h += later
            back = tl.where(first, 0.0, tl.exp2((rate * LOG2E)[None, :] * step_before))
            _, d_later = scan(back, read, False)
            d_log += d_later * later
            dh += d_later - read
        to_write += dh * bi
        to_decay += rate[None, :] * d_log
        if z is not None:
            y += h * ci
        at_rates = d_rates + ((at.bk * extent.chunks + at.chunk) * NS + i) * extent.e + at.channels
        tl.store(at_rates, tl.sum(d_log * step, 0), mask=inside)
        tl.store(db + row + i, tl.sum(dh * weight, 1), mask=at.live)
        tl.store(dc + row + i, tl.sum(dy * h, 1), mask=at.live)

    value = load_tile(u, at, extent.e)
    parts = (at.bk * extent.chunks + at.chunk) * extent.e + at.channels
    d_value = to_write * step
    if skip is not None:
        factor = load_parameter(skip, at, extent.e, 0)[None, :]
        d_value += factor * dy
        tl.store(d_skip + parts, tl.sum(dy * value, 0), mask=inside)
    store_tile(du, at, extent.e, d_value)
    d_step = to_decay + to_write * value
    if SOFTPLUS:
        d_step *= sigmoid(raw_steps(delta, bias, at, extent.e))
    store_tile(d_delta, at, extent.e, d_step)
    if bias is not None:
        tl.store(d_bias + parts, tl.sum(tl.where(at.live[:, None], d_step, 0.0), 0), mask=inside)
    if z is not None:
        if skip is not None:
            y += factor * value
        gate = load_tile(z, at, extent.e)
        share = sigmoid(gate)
        slope = share * (1.0 + gate * (1.0 - share))
        store_tile(dz, at, extent.e, load_tile(do, at, extent.e) * y * slope)
