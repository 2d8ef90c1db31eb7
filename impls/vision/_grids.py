"""What mechanisms on grids share: axes and settings per axis, padding, parameters per rank, counts of pairs.

Tokens are the row-major order of a grid of rank 1 to 3. One module serves grids of several ranks, which it
learns only when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Grid
from attnbench.impls.case import fold as even_fold
from attnbench.impls.spec import Spec
from attnbench.kernels.window._maps import GridMap

Axes = tuple[int, ...]
RANKS = (1, 2, 3)

PHASES = (0, 1, "both")
"""Choices of a mechanism whose source alternates two kinds of layers: one of them, or one after the other."""

MAX_ENTRIES = 2**15
"""Entries per head up to which a window given as one number gets a table for grids of a rank."""


def grid_of(spec: Spec, grid: Grid, n: int) -> Axes:
    """The sides of the grid of ``n`` tokens; without a grid the sequence, or its most even fold.

    Raises UsageError for a rank that the mechanism has not, or sides that do not hold ``n`` tokens.
    """
    if grid is None:
        return even_fold(n, 1, spec.grid_ranks) or (n,)
    sides = tuple(grid)
    if len(sides) not in spec.grid_ranks:
        ranks = " or ".join(map(str, spec.grid_ranks))
        raise UsageError(f"{spec.id}: observed a grid {sides} of rank {len(sides)}, expected rank {ranks}")
    if math.prod(sides) != n:
        raise UsageError(f"{spec.id}: observed a grid {sides} of {math.prod(sides)}, expected {n} tokens")
    return sides


def aligned_grid(spec: Spec, grid: Grid, q: Tensor, k: Tensor) -> Axes:
    """The grid that q and k (B, H, N, D) share. Raises UsageError as :func:`grid_of`, and where M ≠ N."""
    if k.shape[2] != q.shape[2]:
        raise UsageError(
            f"{spec.id} is aligned, token n of x lies on token n of the context: observed N = {q.shape[2]}, "
            f"M = {k.shape[2]}, expected N = M"
        )
    return grid_of(spec, grid, q.shape[2])


def phases(phase: int | str) -> tuple[int, ...]:
    """The layers of one of :data:`PHASES`, in order."""
    return (0, 1) if phase == "both" else (int(phase),)


# ---- settings per axis ---------------------------------------------------------------------------------


def per_axis(spec: Spec, name: str, value: Any, rank: int, *, least: int = 1) -> Axes:
    """A setting given as one number, or as one for each of ``rank`` axes. Raises UsageError otherwise."""
    numbers = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(numbers) != rank:
        raise UsageError(
            f"{spec.id} on a grid of rank {rank}: observed {name}={value}, expected one number, or {rank}"
        )
    if not all(isinstance(x, int) and x >= least for x in numbers):
        raise UsageError(f"{spec.id}: observed {name}={value}, expected whole numbers of at least {least}")
    return numbers


def axes_by_rank(
    spec: Spec, name: str, value: Any, defaults: Mapping[int, Axes], *, least: int = 1
) -> dict[int, Axes]:
    """A setting for each rank of grid: None is ``defaults``, a number holds for all, a tuple for its rank."""
    if value is None:
        return {rank: axes for rank, axes in defaults.items() if rank in spec.grid_ranks}
    ranks = spec.grid_ranks if isinstance(value, int) else (len(value),)
    if not set(ranks) <= set(spec.grid_ranks):
        raise UsageError(
            f"{spec.id}: observed {name}={value}, expected one number, or one for each axis of a grid of "
            f"rank {' or '.join(map(str, spec.grid_ranks))}"
        )
    return {rank: per_axis(spec, name, value, rank, least=least) for rank in ranks}


def at_rank(spec: Spec, name: str, by_rank: Mapping[int, Axes], rank: int) -> Axes:
    """The setting for grids of ``rank``. Raises UsageError where another rank's was given."""
    if rank not in by_rank:
        given = " and ".join(map(str, by_rank.values()))
        raise UsageError(
            f"{spec.id} on a grid of rank {rank}: observed {name}={given}, expected {rank} numbers"
        )
    return by_rank[rank]


# ---- views and padding ---------------------------------------------------------------------------------


def lay(x: Tensor, grid: Axes) -> Tensor:
    """(B, N, C) → (B, *grid, C), a view."""
    return x.unflatten(1, grid)


def unlay(x: Tensor) -> Tensor:
    """(B, *grid, C) → (B, N, C)."""
    return x.flatten(1, -2)


def heads_to_image(v: Tensor, grid: Axes) -> Tensor:
    """(B, H, N, D) → (B, H·D, *grid) for convolutions; a view in channels-last order of projected values."""
    return lay(v.transpose(1, 2).flatten(2), grid).movedim(-1, 1)


def image_to_heads(x: Tensor, heads: int) -> Tensor:
    """(B, H·D, *grid) → (B, H, N, D)."""
    return x.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)


def round_up(grid: Axes, multiple: Axes) -> Axes:
    """The sides of a grid, each increased to a multiple."""
    return tuple(-(-g // m) * m for g, m in zip(grid, multiple, strict=True))


def pad_grid(x: Tensor, grid: Axes, before: Axes, wanted: Axes, value: float = 0.0) -> Tensor:
    """Tokens (..., N, C) of ``grid`` inside a grid ``wanted``, after ``before`` cells on each axis."""
    laid = x.unflatten(-2, grid)
    amounts = [0, 0]
    for g, b, w in reversed(list(zip(grid, before, wanted, strict=True))):
        amounts += [b, w - g - b]
    return F.pad(laid, amounts, value=value).flatten(-len(grid) - 1, -2)


def crop_grid(x: Tensor, padded: Axes, grid: Axes) -> Tensor:
    """The tokens (..., N, C) of the first ``grid`` cells of each axis of a grid ``padded``."""
    laid = x.unflatten(-2, padded)
    for axis, length in enumerate(grid):
        laid = laid.narrow(axis - len(grid) - 1, 0, length)
    return laid.flatten(-len(grid) - 1, -2)


def coordinates(grid: Axes, device: torch.device) -> list[Tensor]:
    """Position of every token on each axis, (N,) each."""
    laid = torch.meshgrid(*(torch.arange(g, device=device) for g in grid), indexing="ij")
    return [axis.flatten() for axis in laid]


# ---- parameters per rank -------------------------------------------------------------------------------


class PerRank(nn.Module):
    """A parameter (count, *shape) whose shape depends on the rank of the grid, in sections of one tensor.

    One tensor, because every parameter of a layer is to have a gradient whatever the grid.
    """

    def __init__(self, count: int, shapes: Mapping[int, Axes]) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        self.weight = nn.Parameter(torch.empty(count, sum(map(math.prod, self.shapes.values()))))

    def at(self, rank: int) -> Tensor:
        """The section (count, *shape) for grids of ``rank``, a view. Raises UsageError without one."""
        if rank not in self.shapes:
            ranks = " or ".join(map(str, self.shapes))
            raise UsageError(
                f"parameters by grid rank: observed a grid of rank {rank}, expected rank {ranks}; where a "
                "setting is one number, give one for each axis"
            )
        before = sum(math.prod(shape) for r, shape in self.shapes.items() if r < rank)
        shape = self.shapes[rank]
        return self.weight[:, before : before + math.prod(shape)].unflatten(1, shape)


def position_tables(heads: int, shapes: Mapping[int, Axes]) -> PerRank:
    """Tables of relative position biases (H, *shape), drawn as Swin's: normal with deviation 0.02.

    Among several ranks those of more than ``MAX_ENTRIES`` entries are left out: a window of 256 on sequences
    must not cost a cube of 511³.
    """
    kept = {r: s for r, s in shapes.items() if len(shapes) == 1 or math.prod(s) <= MAX_ENTRIES}
    tables = PerRank(heads, kept or {min(shapes): shapes[min(shapes)]})
    nn.init.trunc_normal_(tables.weight, std=0.02)
    return tables


class DepthwiseConv(nn.Module):
    """A depthwise convolution of odd width with zero padding, on images (B, C, *grid) of several ranks.

    ``causal`` drops the taps after the centre in row-major order: output n then reads tokens up to n. As a
    local position encoding (LePE) it is applied to values.
    """

    def __init__(self, channels: int, width: int, ranks: Sequence[int], *, causal: bool = False) -> None:
        super().__init__()
        if width % 2 == 0:
            raise UsageError(f"depthwise convolution: observed width {width}, expected an odd one")
        self.width, self.causal = width, causal
        self.taps = PerRank(channels, {rank: (width,) * rank for rank in sorted(ranks)})
        self.bias = nn.Parameter(torch.zeros(channels))
        for rank in ranks:  # as nn.Conv2d draws its own
            bound = width ** (-rank / 2)
            nn.init.uniform_(self.taps.at(rank).detach(), -bound, bound)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *grid) → (B, C, *grid)."""
        rank = image.dim() - 2
        taps = self.taps.at(rank)
        if self.causal:
            place = torch.arange(self.width**rank, device=taps.device).unflatten(0, taps.shape[1:])
            taps = taps * (place <= self.width**rank // 2)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        return convolve(image, taps.unsqueeze(1), self.bias, padding=self.width // 2, groups=image.shape[1])

    def flops(self, cells: int, rank: int) -> int:
        """FLOPs on images of ``cells`` cells."""
        return int(2 * self.bias.numel() * self.width**rank * cells)


# ---- counting ------------------------------------------------------------------------------------------


def count_pairs(pairs: GridMap, *, causal: bool = False) -> int:
    """Visible pairs of a whole grid, from its axes; with ``causal`` those with key ≤ query, row-major.

    A key is before the query iff it is before it on one axis and at its place on all slower ones.
    """
    every = [int((axis.hi - axis.lo).sum()) for axis in pairs.axes]
    if not causal:
        return math.prod(every)
    total, same = 0, 1
    for a, axis in enumerate(pairs.axes):
        own = np.arange(axis.length) // axis.dilation
        before = int(np.clip(np.minimum(axis.hi, own) - axis.lo, 0, None).sum())
        total += same * before * math.prod(every[a + 1 :])
        same *= int(((axis.lo <= own) & (own < axis.hi)).sum())
    return total + same
