"""Attention of others as backends of :func:`attnbench.kernels.neighborhood`: NATTEN, and flex with a mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnbench.kernels.backends import Unsupported
from attnbench.kernels.neighborhood.pattern import Neighborhood
from attnbench.kernels.window.peers import flex_attend

Axes = tuple[int, ...]


def flex(
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
    """Compute with ``flex_attention``: compiled on CUDA, as its eager definition on CPU.

    The neighborhoods are a block mask of tokens in row-major order, built from all N² pairs on the first
    call with a pattern, grid and device. Raises Unsupported on CPU when a gradient is required.
    """
    shift = None if bias is None else pattern.bias_shift
    return flex_attend(
        "neighborhood", q, k, v, pattern.on(grid), bias=bias, bias_shift=shift, key_bias=key_bias,
        causal=False, scale=scale,
    )  # fmt: skip


def natten(
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
    """Compute with NATTEN's fused operations, which choose among their kernels by device and shape.

    They want heads last: tensors that lie so in memory, as projections write them, are not copied. Raises
    Unsupported for biases, for a sequence that ends before its grid, for a scale of 0, which NATTEN takes
    for its default, and for what NATTEN has no kernel for; on a gradient through lse, too.
    """
    import natten as library

    for option, x in (("bias", bias), ("key_bias", key_bias)):
        if x is not None:
            raise Unsupported(f"neighborhood/natten {option}", "given", "none")
    if q.shape[2] != math.prod(grid):
        raise Unsupported("neighborhood/natten tokens", q.shape[2], f"{math.prod(grid)}, the whole grid")
    if scale == 0:
        raise Unsupported("neighborhood/natten scale", scale, "another number")
    function = (library.na1d, library.na2d, library.na3d)[len(grid) - 1]
    heads_last = [x.transpose(1, 2).unflatten(1, grid) for x in (q, k, v)]
    try:
        o, lse = function(
            *heads_last,
            kernel_size=pattern.window,
            stride=pattern.stride,
            dilation=pattern.dilation,
            is_causal=pattern.causal,
            scale=scale,
            return_lse=True,
        )
    except NotImplementedError as why:
        raise Unsupported("neighborhood/natten", f"refused: {why}", "a case that NATTEN serves") from why
    axes = 1, len(grid)
    return o.flatten(*axes).transpose(1, 2), _WithoutGradient.apply(lse.flatten(*axes).transpose(1, 2))


class _WithoutGradient(torch.autograd.Function):
    """Identity whose gradient is refused: NATTEN differentiates o only, and would drop it in silence."""

    @staticmethod
    def forward(ctx: Any, lse: Tensor) -> Tensor:
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise Unsupported("neighborhood/natten", "a gradient through lse", "gradients through o only")
