"""What the kernels share: argument types, which tokens a chunk of steps visits, step sizes, the scan.

A tile is (L steps, BLOCK_E channels). With 32 channels per warp, a thread holds all steps of its channel, so
that a scan over the steps is a loop inside the thread.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class Tokens(NamedTuple):
    """A (B, K, N, X) tensor: its pointer and its strides in elements."""

    base: Any
    b: int
    k: int
    n: int
    x: int


class Parameter(NamedTuple):
    """A (K, E, Ns) tensor, or (K, E) with n = 0."""

    base: Any
    k: int
    e: int
    n: int


class Order(NamedTuple):
    """The scan orders (K, N) int32."""

    base: Any
    k: int
    n: int


class Extent(NamedTuple):
    """Sizes of a call: directions, tokens, channels, chunks of steps, blocks of channels."""

    k: int
    n: int
    e: int
    chunks: int
    blocks: int


class Place(NamedTuple):
    """Where a program works: batch element, direction and their index (64-bit), chunk, channels, tokens."""

    b: Any
    k: Any
    bk: Any
    chunk: Any
    block: Any
    channels: Any
    tokens: Any
    live: Any


@triton.jit
def place(extent, order, L: tl.constexpr, BLOCK_E: tl.constexpr, REVERSE: tl.constexpr, FAR: tl.constexpr):
    """The place of this program; those of one chunk are neighbours. FAR: a token's offset needs 64 bits."""
    pid = tl.program_id(0)
    block = pid % extent.blocks
    chunk = (pid // extent.blocks) % extent.chunks
    bk = (pid // (extent.blocks * extent.chunks)).to(tl.int64)
    k = bk % extent.k
    t = chunk * L + tl.arange(0, L)
    live = t < extent.n
    tokens = t
    if REVERSE:
        tokens = extent.n - 1 - t
    if order is not None:
        tokens = tl.load(order.base + k * order.k + tokens * order.n, mask=live, other=0)
    if FAR:
        tokens = tokens.to(tl.int64)
    channels = block * BLOCK_E + tl.arange(0, BLOCK_E)
    return Place(bk // extent.k, k, bk, chunk, block, channels, tokens, live)


@triton.jit
def load_tile(x, at, e):
    """The (L, BLOCK_E) tile in fp32, 0 beyond the tokens and the channels."""
    start = x.base + at.b * x.b + at.k * x.k
    pointers = start + at.tokens[:, None] * x.n + at.channels[None, :] * x.x
    return tl.load(pointers, mask=at.live[:, None] & (at.channels < e)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(x, at, e, tile):
    """Write what load_tile reads."""
    start = x.base + at.b * x.b + at.k * x.k
    pointers = start + at.tokens[:, None] * x.n + at.channels[None, :] * x.x
    mask = at.live[:, None] & (at.channels < e)[None, :]
    tl.store(pointers, tile.to(x.base.dtype.element_ty), mask=mask)


@triton.jit
def load_column(x, at, i):
    """Component i of b or c at every step, (L,) in fp32."""
    start = x.base + at.b * x.b + at.k * x.k
    return tl.load(start + at.tokens * x.n + i * x.x, mask=at.live, other=0.0).to(tl.float32)


@triton.jit
def load_parameter(x, at, e, i):
    """Component i of a parameter for the channels of the program, (BLOCK_E,) in fp32."""
    pointers = x.base + at.k * x.k + at.channels * x.e + i * x.n
    return tl.load(pointers, mask=at.channels < e, other=0.0).to(tl.float32)


@triton.jit
def raw_steps(delta, bias, at, e):
    """What becomes Δ of a tile: delta + bias."""
    raw = load_tile(delta, at, e)
    if bias is not None:
        raw += load_parameter(bias, at, e, 0)[None, :]
    return raw


@triton.jit
def step_sizes(delta, bias, at, e, SOFTPLUS: tl.constexpr):
    """Δ of a tile; 0 beyond the tokens, where a step must change nothing."""
    step = raw_steps(delta, bias, at, e)
    if SOFTPLUS:
        # log(1 + y) loses y below 2⁻²⁴: scaled by what rounding made of it, it does not
        y = tl.exp(-tl.abs(step))
        one = 1.0 + y
        gained = one - 1.0
        log1p = tl.where(gained == 0.0, y, tl.log(one) * (y / tl.where(gained == 0.0, 1.0, gained)))
        step = tl.maximum(step, 0.0) + log1p
    return tl.where(at.live[:, None], step, 0.0)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x)); exp overflows to ∞, and the result to 0, where it should."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _compose(decay1, x1, decay2, x2):
    return decay1 * decay2, decay2 * x1 + x2


@triton.jit
def scan(decay, x, REVERSE: tl.constexpr):
    """y_t = decay_t y_{t−1} + x_t down the steps (REVERSE: up) from y = 0, and the products of the decays."""
    return tl.associative_scan((decay, x), 0, _compose, reverse=REVERSE)


@triton.jit
def state_pointer(states, bk, slot, i, channels, extent, NS: tl.constexpr):
    """Component i of the state in a slot of the states (B·K, chunks + 1, Ns, E)."""
    slots = bk * (extent.chunks + 1) + slot
    return states + (slots * NS + i) * extent.e + channels
