"""The torch backend of :func:`attnbench.kernels.neighborhood`: tiles of queries and the boxes they see."""

from __future__ import annotations

from torch import Tensor

from attnbench.kernels.neighborhood.pattern import Neighborhood
from attnbench.kernels.window.torch import attend


def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Neighborhood,
    *,
    grid: tuple[int, ...],
    bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse for any dtype and option; autograd gives every gradient."""
    shift = None if bias is None else pattern.bias_shift
    return attend(
        q, k, v, pattern.on(grid), bias=bias, bias_shift=shift, key_bias=key_bias, causal=False, scale=scale
    )
