"""The definition of :func:`attnbench.kernels.buckets`: all scores, and how often each pair is seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.kernels.buckets.layout import Buckets, one_hot


def buckets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Buckets,
    *,
    causal: bool,
    self_score: float | None,
    combine: str,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse from the N×M scores, or one row of scores per entry; gradients are autograd's."""
    h, n, m = q.shape[1], q.shape[2], k.shape[2]
    groups = h // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = _scores(q, k, causal, self_score, scale, key_bias)
    holds = _per_head(one_hot(lists.queries, n), h)  # (B, H, Lq, N)
    seen = _per_head(lists.visible_entries().double() @ one_hot(lists.keys, m), h)  # (B, H, Lq, M)
    o, lse = _softmax(scores + (holds.mT @ seen).log().to(scores.dtype), v)
    if combine == "mean":
        held = holds.to(scores.dtype)
        rows = lists.queries.clamp(min=0).long().repeat_interleave(h // lists.queries.shape[1], 1)
        rows = rows.expand(q.shape[0], -1, -1).unsqueeze(-1).expand(-1, -1, -1, m)
        entries, _ = _softmax(scores.gather(2, rows) + seen.log().to(scores.dtype), v)
        o = (held.mT @ entries.to(held.dtype) / held.sum(2).clamp(min=1.0).unsqueeze(-1)).to(v.dtype)
    return o, lse


def _scores(
    q: Tensor, k: Tensor, causal: bool, self_score: float | None, scale: float, key_bias: Tensor | None
) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    scores = scale * (q @ k.mT)
    scores = scores if scores.dtype is torch.float64 else scores.float()
    i = torch.arange(n, device=q.device).unsqueeze(-1)
    j = torch.arange(m, device=q.device)
    if self_score is not None:
        scores = scores.masked_fill(i == j, self_score)
    if key_bias is not None:
        scores = scores + key_bias.to(scores.dtype).unsqueeze(-2)
    return scores.masked_fill(j > i + (m - n), -math.inf) if causal else scores


def _softmax(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scores) v and the log-sum-exp; a row of −inf gives 0, −inf and zero gradients."""
    empty = torch.isneginf(scores).all(-1)
    scores = scores.masked_fill(empty.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0)
    return weights.to(v.dtype) @ v, lse.masked_fill(empty, -math.inf)


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)
