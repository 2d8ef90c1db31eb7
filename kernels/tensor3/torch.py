"""The torch backend of :func:`attnbench.kernels.tensor3`: batched products, blocks of queries at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORES = 2**26
"""Scores held at a time; more are computed in blocks of queries, and again in the backward pass."""


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
    """Compute with products in the input dtype and softmax in fp32 (fp64 for fp64 inputs).

    Holds B·H·n·M1·M2 scores for as many queries n as keep this number below 2²⁶, one at least.
    """
    b, h, n, _ = q.shape
    m1, m2 = k1.shape[2], k2.shape[2]
    block = max(1, SCORES // max(1, b * h * m1 * m2))
    parts = []
    for start in range(0, n, block):
        position = torch.arange(start, min(start + block, n), device=q.device) if causal else None
        removed = _removed(position, n, m1, m2, mask1, mask2, q.device)
        args = (q[:, :, start : start + block], k1, k2, v1, v2, scale, removed)
        whole = block >= n or not torch.is_grad_enabled()
        parts.append(_attend(*args) if whole else checkpoint(_attend, *args, use_reentrant=False))
    if not parts:
        return q.new_zeros(b, h, 0, v1.shape[3]), q.new_zeros(b, h, 0, dtype=_wide(q))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _removed(
    position: Tensor | None,
    n: int,
    m1: int,
    m2: int,
    mask1: Tensor | None,
    mask2: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Pairs that are not visible, broadcastable to (B, H, n, M1, M2); None where all are."""
    terms = []
    if position is not None:
        seen1, seen2 = position + (m1 - n), position + (m2 - n)
        terms.append((torch.arange(m1, device=device) > seen1[:, None])[:, :, None])
        terms.append((torch.arange(m2, device=device) > seen2[:, None])[:, None, :])
    if mask1 is not None:
        terms.append(mask1[:, None, None, :, None])
    if mask2 is not None:
        terms.append(mask2[:, None, None, None, :])
    removed = None
    for term in terms:
        removed = term if removed is None else removed | term
    return removed


def _attend(
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, scale: float, removed: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, h, n, _ = q.shape
    m1, m2 = k1.shape[2], k2.shape[2]
    rows = ((q * scale).unsqueeze(3) * k1.unsqueeze(2)).flatten(2, 3)
    scores = (rows @ k2.mT).view(b, h, n, m1, m2).to(_wide(q))
    if removed is not None:
        scores = scores.masked_fill_(removed, -math.inf)
    scores = scores.flatten(-2)
    if not m1 * m2:
        nothing = scores.sum(-1)
        return nothing.unsqueeze(-1).expand(b, h, n, v1.shape[3]).to(q.dtype), nothing - math.inf
    lse = torch.logsumexp(scores, -1)
    blind = torch.isneginf(lse)
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0).unsqueeze(-1)).to(v2.dtype)
    # by query, so that the gradient of v2 sums products of M1 terms and not N·M1 terms at once
    mixed = weights.view(b, h, n, m1, m2) @ v2.unsqueeze(2)
    o = torch.einsum("bhijd,bhjd->bhid", mixed, v1)
    return o, lse
