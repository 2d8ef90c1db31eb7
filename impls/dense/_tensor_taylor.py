"""Third-order attention with a Taylor polynomial for the exponential: sums over pairs become two sums.

The r-th power of a third-order score is a sum over monomials of degree r of products of three factors, one of
the query and one of each key. So the sums over pairs of keys are products of two sums over keys, per
monomial.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

TOKENS = 1024
"""Tokens whose monomials are held at a time."""

PREFIXES = 16
"""Queries whose prefix sums, F·(Dv + 1) numbers each, are held at a time."""


def monomials(dim: int, order: int) -> int:
    """Number F of monomials of degree ≤ order in ``dim`` variables."""
    return math.comb(dim + order, order)


def taylor3(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    order: int,
    scale: float,
    causal: bool = False,
    padded: Tensor | None = None,
) -> Tensor:
    """:func:`attnbench.kernels.tensor3` with Σ_{r ≤ order} s^r/r! for exp(s), positive for even order.

    q (B, H, N, D), k1, k2 (B, H, M, D), v1, v2 (B, H, M, Dv) → (B, H, N, Dv), summed in fp32 (fp64 for fp64
    inputs). ``padded`` (B, M), True where a key is not there. A query that sees nothing gets 0. Causal: query
    i sees j ≤ i + M − N of both sets.

    Cost: 2·B·H·(N + 2·M)·F·(Dv + 1) FLOPs for F monomials; linear in the lengths, and matrix products except
    under ``causal``. Source: Alman and Song (arXiv 2310.04064), whose polynomial method this is an instance
    of.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k1, k2 = (x.to(wide) for x in (q, k1, k2))
    v1, v2 = (_counted(v.to(wide), padded) for v in (v1, v2))
    if causal:
        sums = _causal(q, k1, k2, v1, v2, order, scale)
    else:
        state = _state(k1, v1, order) * _state(k2, v2, order)
        parts = [_read(part, state, order, scale) for part in q.split(TOKENS, 2)]
        sums = torch.cat(parts, 2)
    total = sums[..., -1:].clamp_min(torch.finfo(wide).tiny)
    return sums[..., :-1] / total


def _counted(v: Tensor, padded: Tensor | None) -> Tensor:
    """Values with a column of ones, which sums the weights; zero where a key is not there."""
    counted = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    return counted if padded is None else counted.masked_fill(padded[:, None, :, None], 0.0)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _exponents(dim: int, order: int, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    """For each degree r ≥ 1 the factors of its monomials, (r, F_r); and 1/α! of all F of them."""
    factors, coefficients = [], [1.0]
    for degree in range(1, order + 1):
        chosen = list(combinations_with_replacement(range(dim), degree))
        factors.append(torch.tensor(chosen, device=device).T.contiguous())
        coefficients += [1.0 / math.prod(map(math.factorial, Counter(c).values())) for c in chosen]
    return tuple(factors), torch.tensor(coefficients, dtype=torch.float64, device=device)


def _features(z: Tensor, order: int) -> Tensor:
    """All monomials of degree ≤ order of z (..., D), by degree: (..., F)."""
    found = [torch.ones_like(z[..., :1])]
    for factors in _exponents(z.shape[-1], order, z.device)[0]:
        product = z[..., factors[0]]
        for factor in factors[1:]:
            product = product * z[..., factor]
        found.append(product)
    return torch.cat(found, -1)


def _weighted_features(q: Tensor, order: int, scale: float) -> Tensor:
    """Monomials of the queries times scale^r/α!, (..., F)."""
    coefficients = _exponents(q.shape[-1], order, q.device)[1].to(q.dtype)
    # a factor of scale for every factor of q gives scale^r
    return _features(q * scale, order) * coefficients


def _state(k: Tensor, v: Tensor, order: int) -> Tensor:
    """Σ_j μ(k_j) v_jᵀ, (B, H, F, Dv + 1), by blocks of keys whose monomials are computed again backward."""
    state = k.new_zeros(*k.shape[:2], monomials(k.shape[-1], order), v.shape[-1])
    for keys, values in zip(k.split(TOKENS, 2), v.split(TOKENS, 2), strict=True):
        state = state + _recomputed(_block_state, keys, values, order)
    return state


def _block_state(k: Tensor, v: Tensor, order: int) -> Tensor:
    return _features(k, order).mT @ v


def _read(q: Tensor, state: Tensor, order: int, scale: float) -> Tensor:
    return _recomputed(_block_read, q, state, order, scale)


def _block_read(q: Tensor, state: Tensor, order: int, scale: float) -> Tensor:
    return _weighted_features(q, order, scale) @ state


def _causal(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, order: int, scale: float) -> Tensor:
    """Numerators and weights with the sums over the keys that each query sees, a few queries at a time."""
    n, m = q.shape[2], k1.shape[2]
    before, missing = max(m - n, 0), max(n - m, 0)
    a, b = (_state(k[:, :, :before], v[:, :, :before], order) for k, v in ((k1, v1), (k2, v2)))
    # from here on query i sees the keys up to i: the first queries of N > M see rows of zeros
    aligned = [torch.nn.functional.pad(x[:, :, before:], (0, 0, missing, 0)) for x in (k1, v1, k2, v2)]
    found = []
    for start in range(0, n, PREFIXES):
        block = slice(start, start + PREFIXES)
        inputs = [x[:, :, block] for x in (q, *aligned)]
        sums, a, b = _recomputed(_prefix_step, a, b, *inputs, order, scale)
        found.append(sums)
    return torch.cat(found, 2)


def _prefix_step(
    a: Tensor,
    b: Tensor,
    q: Tensor,
    k1: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    order: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a block of queries reads, (B, H, T, Dv + 1), and both sums after it."""
    prefixes = [
        state.unsqueeze(2) + (_features(k, order).unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
        for state, k, v in ((a, k1, v1), (b, k2, v2))
    ]
    both = prefixes[0] * prefixes[1]
    sums = (_weighted_features(q, order, scale).unsqueeze(-2) @ both).squeeze(-2)
    return sums, prefixes[0][:, :, -1], prefixes[1][:, :, -1]


def _recomputed(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)``; where gradients are wanted, what it holds inside is computed again for them."""
    if not torch.is_grad_enabled():
        return function(*args)
    result: T = checkpoint(function, *args, use_reentrant=False)
    return result
