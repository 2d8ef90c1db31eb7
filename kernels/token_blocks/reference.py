"""The definition of :func:`attnbench.kernels.token_blocks`: dense attention under a mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.kernels.token_selection import SharedKeys, TokenBlocks, TokenKeys


def token_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenBlocks,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse from the N×M score matrix; every gradient is autograd's."""
    return masked_attention(q, k, v, selection, causal=causal, scale=scale, key_bias=key_bias)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenBlocks | TokenKeys | SharedKeys,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse of softmax attention under ``selection.to_dense_mask()`` and causality."""
    n, m = q.shape[2], k.shape[2]
    mask = selection.to_dense_mask()
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    if causal:
        mask = mask & torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scale * (q @ k.transpose(-1, -2))
    if key_bias is not None:
        scores = scores + key_bias.to(scores.dtype).unsqueeze(-2)
    scores = scores.masked_fill(~mask, -math.inf)
    statistics = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # an empty row must have zero gradients: it is set to finite scores first and to o = 0, lse = -inf last
    empty = torch.isneginf(statistics).all(-1)
    statistics = statistics.masked_fill(empty.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(statistics, -1)
    weights = torch.exp(statistics - lse.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0)
    return weights.to(v.dtype) @ v, lse.masked_fill(empty, -math.inf)
