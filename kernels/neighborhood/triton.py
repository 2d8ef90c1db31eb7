"""The Triton backend of :func:`attnbench.kernels.neighborhood`: the kernels of windows on other intervals.

A tile of queries of the grid reads the exact box of keys that any of them sees: nothing outside it is
visited, and where the stride makes the tile share one window, nothing in it is masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.kernels.aot import AotCase
from attnbench.kernels.neighborhood.pattern import Neighborhood
from attnbench.kernels.window.triton import attend, kernels_of


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
    """Compute o and lse without the N×N matrix; once differentiable in q, k, v and both biases.

    fp32 inputs multiply in fp32 unless PyTorch is told to allow TF32. Raises Unsupported for another dtype
    or D or Dv beyond 256.
    """
    shift = None if bias is None else pattern.bias_shift
    return attend(
        "neighborhood", q, k, v, pattern.on(grid), bias=bias, bias_shift=shift, key_bias=key_bias,
        causal=False, scale=scale,
    )  # fmt: skip


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel as a call would launch it: images, video with strides, and every option."""
    image = Neighborhood.of((7, 7))
    video = Neighborhood.of((8, 8, 8), stride=(4, 4, 4), causal=(True, False, False))
    found = []
    for dtype, d in ((torch.bfloat16, 32), (torch.bfloat16, 64), (torch.bfloat16, 128),
                     (torch.bfloat16, 256), (torch.float32, 64)):  # fmt: skip
        found += kernels_of("neighborhood", image.on((56, 56)), capability, dtype, d, d)
    found += kernels_of("neighborhood", video.on((8, 24, 24)), capability, torch.bfloat16, 128, 128)
    dilated = Neighborhood.of((7, 7), dilation=(4, 2), stride=(2, 1))
    found += kernels_of(
        "neighborhood", dilated.on((50, 56)), capability, torch.float16, 40, 48, shift=dilated.bias_shift,
        table=dilated.table,
    )  # fmt: skip
    return found
