"""The definition of :func:`attnbench.kernels.neighborhood`: a dense mask and bias from the formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.kernels.neighborhood.pattern import Neighborhood
from attnbench.kernels.window.reference import coordinates, dense_bias, masked_softmax

Axes = tuple[int, ...]


def visible(pattern: Neighborhood, grid: Axes, n: int, device: torch.device) -> Tensor:
    """The mask of the first n tokens of a grid, bool (N, N), axis by axis."""
    mask = torch.ones(n, n, dtype=torch.bool, device=device)
    for a, p in enumerate(coordinates(grid, n, device)):
        w, t, d = pattern.window[a], pattern.stride[a], pattern.dilation[a]
        u = p // d
        length = (grid[a] - p % d + d - 1) // d  # of the class of each query
        if pattern.causal[a]:
            leader = torch.minimum(u // t * t + t - 1, length - 1)
            first, last = (leader - w + 1).clamp(min=0), u
        else:
            leader = torch.minimum(u // t * t + t // 2, length - 1)
            first = torch.minimum((leader - w // 2).clamp(min=0), length - w)
            last = first + w - 1
        key, residue = u[None, :], (p % d)[None, :]
        mask &= (residue == (p % d)[:, None]) & (first[:, None] <= key) & (key <= last[:, None])
    return mask


def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Neighborhood,
    *,
    grid: Axes,
    bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse from the N×N score matrix; every gradient is autograd's."""
    n = q.shape[2]
    mask = visible(pattern, grid, n, q.device)
    if bias is None:
        dense = torch.zeros(n, n, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    else:
        dense = dense_bias(bias, pattern.bias_shift, pattern.dilation, grid, n, n, mask)
    return masked_softmax(q, k, v, dense, key_bias, scale)
