"""The definition of :func:`attnbench.kernels.flash_int8`: integer products and a softmax in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.kernels.flash_int8._quantise import (
    LOG2E,
    expand_scale,
    key_mean,
    prepared_keys,
    quantise,
    visible_pairs,
)


def flash_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    smooth_k: bool,
    block_q: int,
    block_k: int,
    key_padding_mask: Tensor | None,
    blocks: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute o and lse from the N×M matrix of scores; integers and scales are exact, the rest is fp64."""
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    mean = key_mean(k, key_padding_mask) if smooth_k else None
    q_ints, q_scale = quantise(q.float() * (scale * LOG2E), block_q)
    k_ints, k_scale = quantise(prepared_keys(k, mean, key_padding_mask), block_k)
    q_rows = q_ints.double() * expand_scale(q_scale, block_q, n).double().unsqueeze(-1)
    k_rows = k_ints.double() * expand_scale(k_scale, block_k, m).double().unsqueeze(-1)
    scores = q_rows @ k_rows.repeat_interleave(groups, 1).mT / LOG2E
    mask = visible_pairs(
        n, m, causal=causal, block_q=block_q, block_k=block_k, key_padding_mask=key_padding_mask,
        blocks=blocks, device=q.device,
    )  # fmt: skip
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1)
    blind = torch.isneginf(lse)
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0).unsqueeze(-1))
    values = v.half() if v.dtype is torch.float32 else v
    o = weights @ values.double().repeat_interleave(groups, 1)
    if mean is not None:
        lse = lse + scale * (q.double() @ mean.double().repeat_interleave(groups, 1).mT).squeeze(-1)
    return o.to(q.dtype), lse.float() if need_lse else None
