"""The definition of :func:`attnbench.kernels.query_softmax`: the whole N×M map, in fp32 or fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def query_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    hard: bool,
    normalize: bool,
    eps: float,
    eps_mode: str,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Compute o, mass and index from the map; every gradient is autograd's."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q @ k.mT).to(wide)
    live = torch.ones_like(scores, dtype=torch.bool) if mask is None else ~mask
    scores = scores.masked_fill(~live, -math.inf)
    owned = live.any(-2)
    index = None
    if hard:
        index = torch.full_like(owned, -1, dtype=torch.int64)
        if q.shape[2]:
            index = scores.detach().argmax(-2).masked_fill(~owned, -1)
        weights = (torch.arange(q.shape[2], device=q.device)[:, None] == index[..., None, :]).to(wide)
        index = index.to(torch.int32)
    else:
        # a key without queries must have zero gradients: finite scores first, zero weights last
        finite = scores.masked_fill(~owned.unsqueeze(-2), 0.0)
        weights = torch.softmax(finite, -2).masked_fill(~live, 0.0)
    if eps_mode == "weight":
        weights = (weights + eps).masked_fill(~live, 0.0)
    mass = weights.sum(-1)
    if v is None:
        return None, mass, index
    o = weights @ v.to(wide)
    if normalize:
        den = mass + eps if eps_mode == "mass" else mass
        empty = den == 0
        o = (o / den.masked_fill(empty, 1.0).unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0)
    return o.to(q.dtype), mass, index
