"""Cells of a grid: its tokens in the order of equal boxes, and the means of those boxes.

The last boxes of an axis may hang over its end; what hangs over is zero, and no part of a mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.impls.vision._grids import Axes, crop_grid, pad_grid, round_up


def cells_of(grid: Axes, cell: Axes) -> Axes:
    """How many cells there are along each axis."""
    return tuple(-(-g // c) for g, c in zip(grid, cell, strict=True))


def to_cells(x: Tensor, grid: Axes, cell: Axes) -> Tensor:
    """Tokens (..., N, C) of ``grid`` as (..., cells, tokens of a cell, C), both row-major; zeros beyond."""
    boxes = _boxes(x, grid, cell)
    first, rank = x.dim() - 2, len(grid)
    cells = [first + 2 * axis for axis in range(rank)]
    order = (*range(first), *cells, *(axis + 1 for axis in cells), boxes.dim() - 1)
    laid = boxes.permute(order)
    return laid.flatten(first + rank, -2).flatten(first, first + rank - 1)


def from_cells(x: Tensor, grid: Axes, cell: Axes) -> Tensor:
    """The inverse of :func:`to_cells`: (..., cells, tokens of a cell, C) to (..., N, C)."""
    first, rank = x.dim() - 3, len(grid)
    boxes = x.unflatten(first + 1, cell).unflatten(first, cells_of(grid, cell))
    order = [axis for a in range(rank) for axis in (first + a, first + rank + a)]
    tokens = boxes.permute(*range(first), *order, boxes.dim() - 1).flatten(first, -2)
    whole = round_up(grid, cell)
    return tokens if whole == grid else crop_grid(tokens, whole, grid)


def cell_means(
    x: Tensor, grid: Axes, cell: Axes, padded: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Mean of the tokens x (B, N, C) of every cell, without those that are padding, (B, cells, C).

    ``padded`` (B, N) is True where a token is padding. Also returns which cells have no other token, bool
    (B, cells), whose mean is 0; None without ``padded``. Means of fp16 and bf16 are in fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if padded is not None:
        x = x.masked_fill(padded.unsqueeze(-1), 0.0)
    boxes = _boxes(x, grid, cell)
    inside = tuple(range(2, boxes.dim() - 1, 2))
    total = boxes.sum(inside, dtype=wide).flatten(1, -2)
    if padded is None and round_up(grid, cell) == grid:
        return total / math.prod(cell), None
    shape = (1, x.shape[1], 1)
    kept = x.new_ones(shape, dtype=wide) if padded is None else (~padded).unsqueeze(-1).to(wide)
    count = _boxes(kept, grid, cell).sum(inside).flatten(1, -2)
    return total / count.clamp(min=1.0), None if padded is None else count.squeeze(-1) == 0


def _boxes(x: Tensor, grid: Axes, cell: Axes) -> Tensor:
    """(..., N, C) → (..., cells of axis 1, tokens of axis 1, cells of axis 2, …, C); zeros beyond."""
    whole = round_up(grid, cell)
    if whole != grid:
        x = pad_grid(x, grid, (0,) * len(grid), whole)
    pairs = [n for g, c in zip(whole, cell, strict=True) for n in (g // c, c)]
    return x.unflatten(-2, pairs)
