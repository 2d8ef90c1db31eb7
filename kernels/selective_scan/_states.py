"""Kernels of the states between chunks, and their gradients: what each chunk adds, then a scan over chunks.

Slot c of the states (B·K, chunks + 1, Ns, E) is the state before chunk c; the last one is the final state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.selective_scan._device import (
    LOG2E,
    load_column,
    load_parameter,
    load_tile,
    place,
    scan,
    sigmoid,
    state_pointer,
    step_sizes,
)


@triton.jit
def chunk_states(
    x, delta, bias, z, rates, column, order, extent, sums, states,
    NS: tl.constexpr, L: tl.constexpr, BLOCK_E: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, FAR: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Write what a chunk adds to the state after it, from x = u and column = b, and its ΣΔ.

    GRADIENT: what it adds to the gradient of the state before it, from x = dy, gated by z, and column = c.
    No scan is needed: a step reaches the end of the chunk through the Δ after it, the start through those up
    to it.
    """
    at = place(extent, order, L, BLOCK_E, REVERSE, FAR)
    step = step_sizes(delta, bias, at, extent.e, SOFTPLUS)
    weight = load_tile(x, at, extent.e)
    if GRADIENT:
        between = tl.cumsum(step, 0)
        slot = at.chunk
        if z is not None:
            gate = load_tile(z, at, extent.e)
            weight *= gate * sigmoid(gate)
    else:
        between = tl.cumsum(step, 0, reverse=True) - step
        slot = at.chunk + 1
        weight *= step
        inside = at.channels < extent.e
        total = sums + (at.bk * extent.chunks + at.chunk) * extent.e + at.channels
        tl.store(total, tl.sum(step, 0), mask=inside)
    for i in range(0, NS):
        rate = load_parameter(rates, at, extent.e, i) * LOG2E
        scaled = weight * load_column(column, at, i)[:, None]
        added = tl.sum(tl.exp2(rate[None, :] * between) * scaled, 0)
        pointer = state_pointer(states, at.bk, slot, i, at.channels, extent, NS)
        tl.store(pointer, added, mask=at.channels < extent.e)


@triton.jit
def carry(
    rates, sums, states, extent,
    NS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Turn what the chunks add into states: slot 0 holds the initial state, slot c + 1 what chunk c adds.

    GRADIENT: from the last slot, the gradient of the final state, up; slot c holds what chunk c adds.
    """
    width = NS * extent.e
    blocks = tl.cdiv(width, BLOCK_X)
    bk = (tl.program_id(0) // blocks).to(tl.int64)
    x = (tl.program_id(0) % blocks) * BLOCK_X + tl.arange(0, BLOCK_X)
    inside = x < width
    i = x // extent.e
    e = x % extent.e
    rate = tl.load(rates.base + (bk % extent.k) * rates.k + e * rates.e + i * rates.n, mask=inside, other=0.0)
    rate = rate.to(tl.float32) * LOG2E
    states += bk * (extent.chunks + 1) * width + x
    sums += bk * extent.chunks * extent.e + e
    first_slot = states
    if GRADIENT:
        first_slot = states + extent.chunks.to(tl.int64) * width
    h = tl.load(first_slot, mask=inside, other=0.0)
    rows = tl.arange(0, BLOCK_C)
    for first in range(0, extent.chunks, BLOCK_C):
        chunk = first + rows
        mask = (chunk < extent.chunks)[:, None] & inside[None, :]
        if GRADIENT:
            chunk = extent.chunks - 1 - chunk
            slot = chunk.to(tl.int64)
        else:
            slot = chunk.to(tl.int64) + 1
        total = tl.load(sums[None, :] + (chunk.to(tl.int64) * extent.e)[:, None], mask=mask, other=0.0)
        target = states[None, :] + (slot * width)[:, None]
        product, after = scan(tl.exp2(total * rate[None, :]), tl.load(target, mask=mask, other=0.0), False)
        after += product * h[None, :]
        tl.store(target, after, mask=mask)
        h = tl.sum(tl.where((rows == BLOCK_C - 1)[:, None], after, 0.0), 0)
