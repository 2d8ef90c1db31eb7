"""The torch backend of :func:`attnbench.kernels.query_softmax`: two batched products around a softmax.

With arg-max the second product is a segment sum, which is linear in the keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def query_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    hard: bool,
    normalize: bool,
    eps: float,
    eps_mode: str,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Compute o, mass and index for any dtype; holds B·H·N·M scores in fp32 (fp64 for fp64 inputs).

    The segment sum adds in an order that CUDA does not fix, unless deterministic algorithms are asked for.
    """
    mix = _hard if hard else _soft
    o, mass, index = mix(q, k, v, scale, mask, eps if eps_mode == "weight" else 0.0)
    if o is None:
        return None, mass, index
    if normalize:
        den = mass + eps if eps_mode == "mass" else mass
        o = o / den.masked_fill(den == 0, 1.0).unsqueeze(-1)
    return o.to(q.dtype), mass, index


def _scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = ((q * scale) @ k.mT).to(wide)
    return scores if mask is None else scores.masked_fill_(mask, -math.inf)


def _soft(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float, mask: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor, None]:
    scores = _scores(q, k, scale, mask)
    if mask is not None and q.shape[2]:
        lost = mask.all(-2, keepdim=True)
        scores = scores.masked_fill(lost, 0.0)  # −inf throughout would make the softmax NaN
    weights = torch.softmax(scores, -2)
    if eps:
        weights = weights + eps
    if mask is not None:
        weights = weights.masked_fill(mask, 0.0)
    return None if v is None else _product(weights, v), weights.sum(-1), None


def _product(weights: Tensor, v: Tensor) -> Tensor:
    """Weights @ v: in half precision with each row scaled by its largest weight, which may be tiny."""
    if v.dtype in (torch.float32, torch.float64) or not weights.numel():
        return weights @ v.to(weights.dtype)
    top = weights.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return ((weights / top).to(v.dtype) @ v).to(weights.dtype) * top


def _hard(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float, mask: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    b, h, n, _ = q.shape
    m = k.shape[2]
    with torch.no_grad():
        scores = _scores(q, k, scale, mask)
        if n:
            best, index = scores.max(-2)
            index = index.masked_fill(torch.isneginf(best), n)  # the segment that is dropped
        else:
            index = scores.new_full((b, h, m), 0, dtype=torch.int64)
        mass = scores.new_zeros(b, h, n + 1).scatter_add_(2, index, scores.new_ones(b, h, m))[..., :n]
        live = None if mask is None else (~mask).to(scores.dtype)
        if eps:
            mass = mass + eps * (m if live is None else live.sum(-1))
    index_out = index.masked_fill(index == n, -1).to(torch.int32)
    if v is None:
        return None, mass, index_out
    values = v.to(scores.dtype)
    places = index[..., None].expand(b, h, m, v.shape[3])
    o = values.new_zeros(b, h, n + 1, v.shape[3]).scatter_add(2, places, values)[:, :, :n]
    if eps:
        o = o + eps * (values.sum(2, keepdim=True) if live is None else live @ values)
    return o, mass, index_out
