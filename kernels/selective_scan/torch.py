"""The torch backend of :func:`attnbench.kernels.selective_scan`: all chunks step at once, then they combine.

A loop over the N tokens would be N launches of small kernels; chunks of √N make it 2√N.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor | None,
    reverse: bool,
    segment: int,
    initial_state: Tensor | None,
    need_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute in fp32 (fp64 for fp64 inputs); to differentiate, autograd keeps B·K·N·E·Ns states."""
    wide = torch.promote_types(u.dtype, torch.float32)
    n = u.shape[2]
    visits = _visits(order, reverse, n, u.device)
    us, steps, bs, cs = (_visited(x.to(wide), visits) for x in (u, delta, b, c))
    if delta_bias is not None:
        steps = steps + delta_bias.to(wide).unsqueeze(-2)
    if delta_softplus:
        steps = F.softplus(steps, threshold=40.0 if wide is torch.float64 else 20.0)
    length = segment * max(1, round(math.sqrt(n) / segment))
    chunks = [_chunked(x, length) for x in (us * steps, steps, bs, cs)]
    y, state = _scan(*chunks, a.to(wide), segment, initial_state)
    y = y[:, :, :n]
    if skip is not None:
        y = y + us * skip.to(wide).unsqueeze(-2)
    if visits is not None:
        places = visits[None, :, :, None].expand(y.shape)
        y = torch.zeros_like(y).scatter(2, places, y)
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype), state if need_state else None


def _visits(order: Tensor | None, reverse: bool, n: int, device: torch.device) -> Tensor | None:
    """The token of every step as (K, N) int64, None where step t is at token t."""
    if order is not None:
        return (order.flip(-1) if reverse else order).long()
    return torch.arange(n - 1, -1, -1, device=device).unsqueeze(0) if reverse else None


def _visited(x: Tensor, visits: Tensor | None) -> Tensor:
    if visits is None:
        return x
    return x.gather(2, visits[None, :, :, None].expand(*x.shape[:3], x.shape[3]))


def _chunked(x: Tensor, length: int) -> Tensor:
    """(B, K, N, X) → (B, K, chunks, length, X), zeros in the tail: with Δ = 0 these steps change nothing."""
    n = x.shape[2]
    return F.pad(x, (0, 0, 0, -n % length)).unflatten(2, (-1, length))


def _scan(
    weighted: Tensor, steps: Tensor, b: Tensor, c: Tensor, a: Tensor, segment: int, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """H c (B, K, N, E) without the skip connection, and the last state, from Δu, Δ, b and c by chunks."""
    batch, k, chunks, length, e = steps.shape
    rates = a[None, :, None]  # beside (B, K, chunks, E, Ns)
    h = steps.new_zeros(batch, k, chunks, e, a.shape[-1])
    outputs = []
    for t in range(length):
        write = weighted[:, :, :, t, :, None] * b[:, :, :, t, None, :]
        h = torch.exp(steps[:, :, :, t, :, None] * rates) * h + write
        outputs.append((h * c[:, :, :, t, None, :]).sum(-1))
    if segment > 1:
        later = _from_later(weighted, steps, b, c, rates, segment)
        outputs = [y + x for y, x in zip(outputs, later, strict=True)]
    sums = steps.cumsum(3)
    state = steps.new_zeros(batch, k, e, a.shape[-1]) if initial is None else initial.to(steps.dtype)
    before = []
    for chunk in range(chunks):
        before.append(state)
        state = torch.exp(sums[:, :, chunk, -1, :, None] * a) * state + h[:, :, chunk]
    if not chunks:
        return steps.flatten(2, 3), state
    starts = torch.stack(before, 2)
    for t in range(length):
        carried = torch.exp(sums[:, :, :, t, :, None] * rates) * starts
        outputs[t] = outputs[t] + (carried * c[:, :, :, t, None, :]).sum(-1)
    return torch.stack(outputs, 3).flatten(2, 3), state


def _from_later(
    weighted: Tensor, steps: Tensor, b: Tensor, c: Tensor, rates: Tensor, segment: int
) -> list[Tensor]:
    """What the outputs of a chunk receive from later steps of their segments; chunks hold whole segments."""
    length = steps.shape[3]
    outputs = []
    x = torch.zeros(())
    for t in reversed(range(length)):
        write = weighted[:, :, :, t, :, None] * b[:, :, :, t, None, :]
        if (t + 1) % segment == 0:
            outputs.append(torch.zeros_like(steps[:, :, :, t]))
            x = write
        else:
            received = torch.exp(steps[:, :, :, t, :, None] * rates) * x
            outputs.append((received * c[:, :, :, t, None, :]).sum(-1))
            x = received + write
    return outputs[::-1]
