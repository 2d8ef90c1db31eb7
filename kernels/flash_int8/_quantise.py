"""Quantisation as the definition has it: blocks of rows in fp32, whatever the dtype of the inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
TINY = 1e-30
"""The least maximum of a block: one of zeros gets ints of 0, not 0/0."""


def key_mean(k: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """The mean of the keys that are not removed, (B, Hkv, 1, D) in fp32."""
    if key_padding_mask is None:
        return k.mean(2, keepdim=True, dtype=torch.float32)
    kept = (~key_padding_mask)[:, None, :, None]
    return (k.float() * kept).sum(2, keepdim=True) / kept.sum(2, keepdim=True).clamp(min=1)


def quantise(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Integers (…, N, D) in int8 and the scale (…, ⌈N/block⌉) in fp32 of each block of rows of x."""
    n = x.shape[-2]
    rows = torch.nn.functional.pad(x.float(), (0, 0, 0, -n % block)).unflatten(-2, (-1, block))
    scale = rows.abs().amax((-1, -2)).clamp(min=TINY) / 127.0
    ratio = rows / scale[..., None, None]
    ints = (ratio + torch.copysign(torch.full_like(ratio, 0.5), ratio)).trunc().clamp(-127, 127)
    return ints.flatten(-3, -2)[..., :n, :].to(torch.int8), scale


def expand_scale(scale: Tensor, block: int, n: int) -> Tensor:
    """The scale of each of n rows."""
    return scale.repeat_interleave(block, -1)[..., :n]


def prepared_keys(k: Tensor, mean: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
    """What is quantised of k, in fp32: without the mean, and 0 where a key is removed."""
    k = k.float() if mean is None else k.float() - mean
    return k if key_padding_mask is None else k.masked_fill(key_padding_mask[:, None, :, None], 0.0)


def visible_pairs(
    n: int,
    m: int,
    *,
    causal: bool,
    block_q: int,
    block_k: int,
    key_padding_mask: Tensor | None,
    blocks: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """The mask as bool broadcastable to (B, H, N, M); None when every pair is computed."""
    parts = []
    if causal:
        parts.append(torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)[None, None])
    if key_padding_mask is not None:
        parts.append(~key_padding_mask[:, None, None])
    if blocks is not None:
        parts.append(blocks.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :n, :m])
    mask = None
    for part in parts:
        mask = part if mask is None else mask & part
    return mask
