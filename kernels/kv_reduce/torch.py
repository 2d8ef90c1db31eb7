"""Noncausal linear attention in eager PyTorch: one product over the keys, one over the queries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbench.kernels.features import feature, guarded

BLOCK = 256
"""Keys whose products are summed in half precision before the sums continue in fp32."""


def kv_reduce(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    eps_mode: str,
    key_mask: Tensor | None,
) -> Tensor:
    """Compute with products in the input dtype and sums over the keys in fp32; gradients are autograd's.

    Half precision reads the mean over the keys in place of the sum, which outgrows fp16. Extra memory: the
    features of q and k, and with half inputs M/256 partial sums.
    """
    features_q, features_k = feature(q, feature_map), feature(k, feature_map)
    if key_mask is not None:
        features_k = features_k.masked_fill(key_mask[:, None, :, None], 0.0)
    half = q.dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if half else q.dtype
    keys = k.shape[-2] if half else 1
    sums = _blocked_product(features_k, v) if half else features_k.mT @ v
    o = (features_q @ (sums / keys).to(q.dtype)).to(wide)
    if not normalize:
        return (o * (scale * keys)).to(q.dtype)
    den = (features_q * features_k.sum(-2, keepdim=True, dtype=wide)).sum(-1, keepdim=True)
    return (o * (keys / guarded(den, eps, eps_mode))).to(q.dtype)


def _blocked_product(features: Tensor, v: Tensor) -> Tensor:
    """Σ_j features_j v_jᵀ (B, H, Dk, Dv) in fp32, of blocks of keys multiplied in half precision."""
    m = features.shape[-2]
    block = min(BLOCK, m)
    if m % block:
        features, v = (F.pad(x, (0, 0, 0, -m % block)) for x in (features, v))
    features, v = (x.unflatten(-2, (-1, block)) for x in (features, v))
    return (features.mT @ v).sum(-3, dtype=torch.float32)
