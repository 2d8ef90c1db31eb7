"""The definition of :func:`attnbench.kernels.flash`: the whole score matrix, in the dtype of the inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.kernels.flash.mask import Mask, RelativeBias


def visible_pairs(
    n: int,
    m: int,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    q_pos: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """The mask as bool (N, M), True where key j is visible to query i; None when all keys are."""
    if not causal and window is None:
        return None
    position = torch.arange(n, device=device) + (m - n) if q_pos is None else q_pos
    offset = torch.arange(m, device=device)[None, :] - position[:, None]
    mask = torch.ones(n, m, dtype=torch.bool, device=device)
    if causal:
        mask &= offset <= 0
    if window is not None:
        left, right = window
        if left >= 0:
            mask &= offset >= -left
        if right >= 0:
            mask &= offset <= right
    return mask


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    q_pos: Tensor | None,
    mask: Mask | None,
    scale: float,
    softcap: float,
    key_bias: Tensor | None,
    bias: Tensor | None,
    rel_bias: RelativeBias | None,
    sink: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute o and lse from the N×M score matrix; every gradient is autograd's."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scale * (q @ k.transpose(-1, -2))
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if key_bias is not None:
        scores = scores + key_bias.to(scores.dtype).unsqueeze(-2)
    if rel_bias is not None:
        scores = scores + rel_bias.dense().to(scores.dtype)
    n, m = scores.shape[-2:]
    visible = visible_pairs(n, m, causal=causal, window=window, q_pos=q_pos, device=q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(n, m), -math.inf)
    statistics = scores.double() if scores.dtype is torch.float64 else scores.float()
    # an empty row must have zero gradients: it is set to finite scores first and to o = 0, lse = -inf last
    empty = torch.isneginf(statistics).all(-1)
    statistics = statistics.masked_fill(empty.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(statistics, -1)
    total = lse if sink is None else torch.logaddexp(lse, sink.to(lse.dtype).expand_as(lse))
    weights = torch.exp(statistics - total.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0)
    o = weights.to(v.dtype) @ v
    return o, lse.masked_fill(empty, -math.inf) if need_lse else None
