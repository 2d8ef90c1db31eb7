"""The definition of :func:`attnbench.kernels.block_mass`: the whole map of weights, then its blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    causal: bool,
    reduce: str,
) -> Tensor:
    """Compute the blocks from the N×M map; every gradient is autograd's."""
    n, m = q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = scale * (q @ k.transpose(-1, -2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if causal:
        hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    empty = torch.isneginf(lse).unsqueeze(-1)
    shift = lse.to(scores.dtype).unsqueeze(-1).masked_fill(empty, 0.0)
    weights = torch.exp(scores.masked_fill(empty, -math.inf) - shift)
    padded = F.pad(weights, (0, -m % block_k, 0, -n % block_q))
    blocks = padded.unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q))
    return blocks.sum((3, 5)) if reduce == "sum" else blocks.amax((3, 5))
