"""The definition of :func:`attnbench.kernels.kv_reduce`: features, one sum over the keys, one product."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.kernels.features import feature, guarded


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
    """Compute in fp32 (fp64 for fp64 inputs) from materialised features; every gradient is autograd's."""
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    fq, fk = feature(q.to(dtype), feature_map), feature(k.to(dtype), feature_map)
    if key_mask is not None:
        fk = fk.masked_fill(key_mask[:, None, :, None], 0.0)
    o = fq @ (fk.transpose(-1, -2) @ v.to(dtype))
    if normalize:
        den = (fq * fk.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        o = o / guarded(den, eps, eps_mode)
    else:
        o = scale * o
    return o.to(q.dtype)
