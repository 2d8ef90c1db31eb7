"""The definition of :func:`attnbench.kernels.tensor3`: all N×M1×M2 scores, in fp32 or fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tensor3(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    causal: bool,
    scale: float,
    mask1: Tensor | None,
    mask2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse from the scores; every gradient is autograd's."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_wide, first, second = q.to(wide), k1.to(wide), k2.to(wide)
    scores = scale * torch.einsum("bhid,bhjd,bhld->bhijl", q_wide, first, second)
    n, m1, m2 = scores.shape[2:]
    removed = torch.zeros(n, m1, m2, dtype=torch.bool, device=q.device)
    if causal:
        i, j, l = (torch.arange(size, device=q.device) for size in (n, m1, m2))
        removed |= (j > i[:, None] + (m1 - n))[:, :, None] | (l > i[:, None] + (m2 - n))[:, None, :]
    removed = removed.expand(q.shape[0], 1, n, m1, m2)
    if mask1 is not None:
        removed = removed | mask1[:, None, None, :, None]
    if mask2 is not None:
        removed = removed | mask2[:, None, None, None, :]
    # an empty row must have zero gradients: it is set to finite scores first and to o = 0, lse = -inf last
    empty = removed.flatten(-2).all(-1)
    scores = scores.masked_fill(removed & ~empty[..., None, None], -math.inf)
    if not m1 * m2:
        return scores.sum((-2, -1)).unsqueeze(-1).expand(*q.shape[:3], v1.shape[3]).to(q.dtype), (
            scores.sum((-2, -1)) - math.inf
        )
    lse = torch.logsumexp(scores.flatten(-2), -1)
    weights = torch.exp(scores - lse[..., None, None]).masked_fill(empty[..., None, None], 0.0)
    o = torch.einsum("bhijl,bhjd,bhld->bhid", weights, v1.to(wide), v2.to(wide))
    return o.to(q.dtype), lse.masked_fill(empty, -math.inf)
