"""The torch backend of :func:`attnbench.kernels.flash_int8`: integers as floats, which hold them exactly."""

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
    """Compute o and lse with one batched product of integers in fp32; holds B·H·N·M scores in fp32.

    An int32 product of at most 256 terms below 2^14 is exact in fp32; PyTorch has no batched INT8 product.
    """
    b, h, n, d = q.shape
    kv_heads, m = k.shape[1:3]
    mean = key_mean(k, key_padding_mask) if smooth_k else None
    q_ints, q_scale = quantise(q.float() * (scale * LOG2E), block_q)
    k_ints, k_scale = quantise(prepared_keys(k, mean, key_padding_mask), block_k)
    rows = q_ints.float().reshape(b * kv_heads, -1, d)
    scores = torch.bmm(rows, k_ints.float().reshape(b * kv_heads, m, d).mT).view(b, h, n, m)
    columns = expand_scale(k_scale, block_k, m).repeat_interleave(h // kv_heads, 1).unsqueeze(-2)
    scores = scores.mul_(expand_scale(q_scale, block_q, n).unsqueeze(-1)).mul_(columns)
    mask = visible_pairs(
        n, m, causal=causal, block_q=block_q, block_k=block_k, key_padding_mask=key_padding_mask,
        blocks=blocks, device=q.device,
    )  # fmt: skip
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    peak = peak.masked_fill(torch.isneginf(peak), 0.0)  # −inf − −inf would be NaN
    weights = scores.sub_(peak).exp2_()
    total = weights.sum(-1, keepdim=True)
    values = v.half() if v.dtype is torch.float32 else v
    o = torch.bmm(
        weights.to(values.dtype).view(b * kv_heads, -1, m), values.reshape(b * kv_heads, m, -1)
    ).view(b, h, n, -1)
    wide = torch.promote_types(o.dtype, torch.float32)
    o = (o.to(wide) / total.masked_fill(total == 0, 1.0)).to(q.dtype)
    if not need_lse:
        return o, None
    lse = (peak + total.log2()).squeeze(-1) / LOG2E
    if mean is not None:
        rows = q.float().reshape(b, kv_heads, -1, d)
        lse = lse + scale * (rows @ mean.mT).view(b, h, n)
    return o, lse
