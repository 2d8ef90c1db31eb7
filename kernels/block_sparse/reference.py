"""The definition of :func:`attnbench.kernels.block_sparse`: dense attention under a mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.kernels.selection import Selection


def visible_pairs(
    selection: Selection,
    heads: int,
    *,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    key_bias: Tensor | None,
    row_threshold: Tensor | None,
) -> Tensor:
    """The mask as bool, broadcastable to (B, H, N, M), True where key j is visible to query i."""
    mask = selection.to_dense_mask()
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    if causal:
        n, m, device = selection.n, selection.m, mask.device
        queries = torch.arange(n, device=device) + (m - n) if q_pos is None else q_pos
        keys = torch.arange(m, device=device) if k_pos is None else k_pos
        mask = mask & (keys.unsqueeze(-2) <= queries.unsqueeze(-1))
    if row_threshold is not None:
        mask = mask & (key_bias.unsqueeze(-2) >= row_threshold.unsqueeze(-1))
    return mask


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    key_bias: Tensor | None,
    row_threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse from the N×M score matrix; every gradient is autograd's."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scale * (q @ k.transpose(-1, -2))
    if key_bias is not None:
        scores = scores + key_bias.to(scores.dtype).unsqueeze(-2)
    mask = visible_pairs(
        selection, q.shape[1], causal=causal, q_pos=q_pos, k_pos=k_pos, key_bias=key_bias,
        row_threshold=row_threshold,
    )  # fmt: skip
    scores = scores.masked_fill(~mask, -math.inf)
    statistics = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # an empty row must have zero gradients: it is set to finite scores first and to o = 0, lse = -inf last
    empty = torch.isneginf(statistics).all(-1)
    statistics = statistics.masked_fill(empty.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(statistics, -1)
    weights = torch.exp(statistics - lse.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0)
    return weights.to(v.dtype) @ v, lse.masked_fill(empty, -math.inf)
