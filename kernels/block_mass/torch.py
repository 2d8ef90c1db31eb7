"""The torch backend of :func:`attnbench.kernels.block_mass`: the map of some query blocks at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench.kernels._attention import scaled_scores

CHUNK_SCORES = 2**25
"""Scores computed at a time, 128 MiB in fp32; without gradients no more than that exist at once."""


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
    """Compute the blocks for any dtype; autograd gives every gradient and then keeps B·H·N·M weights."""
    b, h, n, _ = q.shape
    m = k.shape[2]
    rows = max(1, CHUNK_SCORES // (b * h * block_q * m)) * block_q
    parts = []
    for start in range(0, n, rows):
        at = slice(start, start + rows)
        scores = scaled_scores(q[:, :, at], k, scale)
        if causal:
            last = torch.arange(start, min(start + rows, n), device=q.device) + (m - n)
            hidden = torch.arange(m, device=q.device)[None, :] > last[:, None]
            scores = scores.masked_fill_(hidden, -math.inf)
        shift = lse[:, :, at].unsqueeze(-1).to(scores.dtype)
        shift = shift.masked_fill(torch.isneginf(shift), math.inf)  # exp(s − ∞) = 0: an empty row has no mass
        parts.append(_reduced(scores.sub_(shift).exp_(), block_q, block_k, reduce))
    return torch.cat(parts, 2)


def _reduced(weights: Tensor, block_q: int, block_k: int, reduce: str) -> Tensor:
    n, m = weights.shape[2:]
    padded = F.pad(weights, (0, -m % block_k, 0, -n % block_q))
    blocks = padded.unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q))
    return blocks.sum((3, 5)) if reduce == "sum" else blocks.amax((3, 5))
