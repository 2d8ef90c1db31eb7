"""The definition of :func:`attnbench.kernels.linrec`: one step after another."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.kernels.features import feature, guarded
from attnbench.kernels.linrec import State


def linrec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None,
    gv: Tensor | None,
    beta: Tensor | None,
    rule: str,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    eps_mode: str,
    initial_state: State | None,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, State]:
    """Compute sequentially in fp32 (fp64 for fp64 inputs); every gradient is autograd's."""
    b, h, n, dv = v.shape
    dtype = torch.float64 if v.dtype is torch.float64 else torch.float32
    groups = h // q.shape[1]
    fq = feature(q.to(dtype), feature_map).repeat_interleave(groups, 1)
    fk = feature(k.to(dtype), feature_map).repeat_interleave(groups, 1)
    dk = fq.shape[-1]
    values = v.to(dtype)
    write = torch.ones(b, h, n, dtype=dtype, device=v.device) if beta is None else beta.to(dtype)
    decay_k = _per_step(g, b, h, n, dtype, v.device).exp()
    decay_v = None if gv is None else gv.to(dtype).exp()
    s = torch.zeros(b, h, dk, dv, dtype=dtype, device=v.device)
    z = torch.zeros(b, h, dk, dtype=dtype, device=v.device)
    if initial_state is not None:
        s = initial_state.s.to(dtype)
        z = z if initial_state.z is None else initial_state.z.to(dtype)
    outputs: list[Tensor] = [s] * n
    for t in reversed(range(n)) if reverse else range(n):
        s = decay_k[:, :, t, :, None] * s
        if decay_v is not None:
            s = s * decay_v[:, :, t, None, :]
        value = values[:, :, t]
        if rule == "delta":
            value = value - (s * fk[:, :, t].unsqueeze(-1)).sum(-2)
        s = s + (write[:, :, t, None] * fk[:, :, t]).unsqueeze(-1) * value.unsqueeze(-2)
        z = decay_k[:, :, t] * z + write[:, :, t, None] * fk[:, :, t]
        o = (s * fq[:, :, t].unsqueeze(-1)).sum(-2)
        if normalize:
            o = o / guarded((fq[:, :, t] * z).sum(-1, keepdim=True), eps, eps_mode)
        else:
            o = scale * o
        outputs[t] = o
    return torch.stack(outputs, 2).to(v.dtype), State(s, z if normalize else None)


def _per_step(g: Tensor | None, b: int, h: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Log-gates as (B, H, N, 1 or Dk), from any accepted shape."""
    if g is None:
        return torch.zeros(b, h, n, 1, dtype=dtype, device=device)
    if g.dim() == 1:
        return g.detach().to(dtype).view(1, h, 1, 1).expand(b, h, n, 1)
    return (g if g.dim() == 4 else g.unsqueeze(-1)).to(dtype)
