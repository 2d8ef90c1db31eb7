"""Resizing and pooling of tokens on a grid as one small matrix per axis.

Products have gradients that are the same bit by bit in every run, in any dtype and on grids of any rank,
which PyTorch's interpolation and adaptive pooling do not have on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Matrix = Callable[[int, int, torch.dtype, torch.device], Tensor]
"""From the old length of an axis, the new one, dtype and device to the matrix (new, old)."""


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def linear_matrix(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Linear interpolation of ``source`` cells to ``target``, centres of cells aligned: (target, source).

    The bilinear resize without aligned corners and without anti-aliasing, one axis of it.
    """
    centre = (torch.arange(target, device=device, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    centre = centre.clamp(0, source - 1).unsqueeze(-1)
    cells = torch.arange(source, device=device, dtype=torch.float64)
    return (1.0 - (cells - centre).abs()).clamp(min=0.0).to(dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def pooling_matrix(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Adaptive average pooling of ``source`` cells to ``target`` bins: (target, source).

    Bin t holds the cells from ⌊t·source/target⌋ to ⌈(t + 1)·source/target⌉ − 1: bins are uneven and may
    overlap where target does not divide source.
    """
    bins = torch.arange(target, device=device).unsqueeze(-1)
    first = torch.div(bins * source, target, rounding_mode="floor")
    beyond = -torch.div(-(bins + 1) * source, target, rounding_mode="floor")
    cells = torch.arange(source, device=device)
    inside = (cells >= first) & (cells < beyond)
    return (inside.to(torch.float64) / (beyond - first)).to(dtype)


def on_axes(x: Tensor, grid: Sequence[int], sizes: Sequence[int], matrix: Matrix) -> Tensor:
    """Bring tokens x (..., ∏grid, D), row-major on ``grid``, to ``sizes``, axis by axis: (..., ∏sizes, D)."""
    x = x.unflatten(-2, tuple(grid))
    first = x.dim() - 1 - len(grid)
    for axis, (source, target) in enumerate(zip(grid, sizes, strict=True), start=first):
        if source != target:
            moved = matrix(source, target, x.dtype, x.device) @ x.movedim(axis, -2)
            x = moved.movedim(-2, axis)
    return x.flatten(first, -2)


def on_axes_flops(grid: Sequence[int], sizes: Sequence[int], channels: int) -> int:
    """FLOPs of :func:`on_axes` with ``channels`` values per token."""
    flops, now = 0, list(grid)
    for axis, target in enumerate(sizes):
        if now[axis] != target:
            flops += 2 * target * math.prod(now) * channels
            now[axis] = target
    return flops
