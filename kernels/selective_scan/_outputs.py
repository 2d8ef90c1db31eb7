"""Kernel of the outputs of one chunk, from the state before it."""

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
    store_tile,
)


@triton.jit
def outputs(
    u, delta, bias, z, rates, b, c, skip, order, extent, states, y,
    NS: tl.constexpr, L: tl.constexpr, BLOCK_E: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, FAR: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Write y of one chunk and one block of channels; SEGMENT, a power of two, divides L."""
    at = place(extent, order, L, BLOCK_E, REVERSE, FAR)
    step = step_sizes(delta, bias, at, extent.e, SOFTPLUS)
    value = load_tile(u, at, extent.e)
    weight = step * value
    acc = tl.zeros((L, BLOCK_E), tl.float32)
    if skip is not None:
        acc += load_parameter(skip, at, extent.e, 0)[None, :] * value
    last = (tl.arange(0, L) % SEGMENT == SEGMENT - 1)[:, None]
    for i in range(0, NS):
        rate = load_parameter(rates, at, extent.e, i) * LOG2E
        before = state_pointer(states, at.bk, at.chunk, i, at.channels, extent, NS)
        h0 = tl.load(before, mask=at.channels < extent.e, other=0.0)
        decay = tl.exp2(rate[None, :] * step)
        write = weight * load_column(b, at, i)[:, None]
        product, h = scan(decay, write, False)
        h += product * h0[None, :]
        if SEGMENT > 1:
            _, later = scan(tl.where(last, 0.0, decay), write, True)
            h += later - write
        acc += h * load_column(c, at, i)[:, None]
    if z is not None:
        gate = load_tile(z, at, extent.e)
        acc *= gate * sigmoid(gate)
    store_tile(y, at, extent.e, acc)
