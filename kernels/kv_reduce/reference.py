"""The definition of :func:`attnbench.kernels.kv_reduce`: features, one sum over the keys, one product."""

from __future__ import annotations

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
    """Compute from materialised features; every gradient is autograd's."""
    fq, fk = feature(q, feature_map), feature(k, feature_map)
    if key_mask is not None:
        fk = fk.masked_fill(key_mask[:, None, :, None], 0.0)
    o = fq @ (fk.transpose(-1, -2) @ v)
    if not normalize:
        return scale * o
    den = (fq * fk.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    return o / guarded(den, eps, eps_mode)
