"""The definition of :func:`attnbench.kernels.selective_scan`: one step after the other, in fp32 or fp64."""

from __future__ import annotations

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
    """Compute step by step; every gradient is autograd's."""
    wide = torch.promote_types(u.dtype, torch.float32)
    batch, k, n, e = u.shape
    ns = a.shape[-1]
    visits = torch.arange(n, device=u.device).expand(k, n) if order is None else order.long()
    if reverse:
        visits = visits.flip(-1)

    def visited(x: Tensor) -> Tensor:
        index = visits[None, :, :, None].expand(*x.shape[:2], n, x.shape[-1])
        return x.to(wide).gather(2, index)

    us, steps, bs, cs = visited(u), visited(delta), visited(b), visited(c)
    if delta_bias is not None:
        steps = steps + delta_bias.to(wide)[None, :, None, :]
    if delta_softplus:
        steps = F.softplus(steps, threshold=40.0 if wide is torch.float64 else 20.0)
    decays = torch.exp(steps[..., None] * a.to(wide)[None, :, None])  # (B, K, N, E, Ns)
    writes = (steps * us)[..., None] * bs[..., None, :]
    h = u.new_zeros(batch, k, e, ns, dtype=wide) if initial_state is None else initial_state.to(wide)
    states = []
    for t in range(n):
        h = decays[:, :, t] * h + writes[:, :, t]
        states.append(h)
    if segment > 1:
        states = [x + later for x, later in zip(states, _from_later(decays, writes, segment), strict=True)]
    y = u.new_zeros(batch, k, 0, e, dtype=wide)
    if n:
        y = (torch.stack(states, 2) * cs[..., None, :]).sum(-1)
    if skip is not None:
        y = y + skip.to(wide)[None, :, None, :] * us
    if z is not None:
        y = y * F.silu(visited(z))
    places = visits[None, :, :, None].expand(y.shape)
    return torch.zeros_like(y).scatter(2, places, y).to(u.dtype), h if need_state else None


def _from_later(decays: Tensor, writes: Tensor, segment: int) -> list[Tensor]:
    """What every step receives from the later steps of its segment."""
    received = []
    x = torch.zeros_like(writes[:, :, 0])
    for t in reversed(range(decays.shape[2])):
        if (t + 1) % segment == 0:
            x = torch.zeros_like(x)
        received.append(decays[:, :, t] * x)
        x = received[-1] + writes[:, :, t]
    return received[::-1]
