"""Super token attention: soft cells of tokens attend to each other and hand the result back."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._cells import cell_means, cells_of, from_cells, to_cells
from attnbench.impls.vision._grids import RANKS, Axes, grid_of, pad_grid, per_axis
from attnbench.kernels import flash, padding_bias

EPS = 1e-12
"""Added to the mass of a super token, by which its sum is divided."""

REACH = 3
"""Cells per axis that a token is shared out to: its own and the two beside it."""

CELL = {1: 16, 2: 4, 3: 4}
"""Tokens of a cell per axis, by the rank of the grid."""


def neighbours(cells: Tensor, sides: Axes) -> Tensor:
    """The 3^r cells around each of (B, K, C), row-major: (B, K, 3^r, C); zeros beyond the grid."""
    around = tuple(s + 2 for s in sides)
    wide = pad_grid(cells, sides, (1,) * len(sides), around).unflatten(1, around)
    return torch.stack([_at(wide, sides, place).flatten(1, -2) for place in _places(sides)], -2)


def gathered(shares: Tensor, sides: Axes) -> Tensor:
    """What each cell receives when (B, K, 3^r, C) is sent to the 3^r cells around: (B, K, C).

    The adjoint of :func:`neighbours`, as sums in a fixed order.
    """
    around = tuple(s + 2 for s in sides)
    wide = pad_grid(shares.flatten(2), sides, (1,) * len(sides), around)
    wide = wide.unflatten(1, around).unflatten(-1, shares.shape[2:])
    total: Tensor | None = None
    for number, place in enumerate(_places(sides)):
        mirrored = tuple(REACH - 1 - p for p in place)
        part = _at(wide[..., number, :], sides, mirrored).flatten(1, -2)
        total = part if total is None else total + part
    assert total is not None  # there is a place at least
    return total


def _places(sides: Axes) -> product[tuple[int, ...]]:
    return product(range(REACH), repeat=len(sides))


def _at(wide: Tensor, sides: Axes, start: Axes) -> Tensor:
    """The part (B, *sides, C) of (B, *(sides + 2), C) that begins at ``start``."""
    for axis, (first, length) in enumerate(zip(start, sides, strict=True), start=1):
        wide = wide.narrow(axis, first, length)
    return wide


class SuperTokenAttention(Attention):
    """Tokens are shared out to the super tokens around them, which attend and are handed back alike."""

    spec = Spec(
        id="super_token_attention",
        name="Super token attention (STA)",
        family="vision",
        kind="mixer",
        paper=Paper(
            "Vision Transformer with Super Token Sampling", 2022, arxiv="2211.11167", venue="CVPR 2023"
        ),
        upstream="https://github.com/hhb072/STViT",
        patterns=(Pattern.NS,),
        summary="Tokens are summed up softly in cells, the cells attend to each other, and the weights "
        "carry the result back.",
        formula="Q[n,j] = softmax_j(x_n·S_j/√C) over the 3^r cells j around n; S_j = Σ_n Q[n,j] x_n / Σ_n "
        "Q[n,j]; y_n = Σ_j Q[n,j] MHSA(S)_j",
        cost="2·3^r·N·C·(2·n_iter + 1) + 4·M²·C + 8·M·C² FLOPs for M cells; N·3^r weights",
        query_separable=False,
        permutation_invariant=False,
        padding="cells are counted in positions, which dropping a token shifts",
        grid_ranks=RANKS,
        ops=("flash",),
        hyper=(
            Hyper(
                "cell_size",
                None,
                "tokens of a cell per axis, one number or one per axis; None: 4, on a sequence 16; 1: plain "
                "attention",
            ),
            Hyper("n_iter", 1, "updates of the super tokens"),
            Hyper(
                "border",
                "upstream",
                "cells beyond the grid: upstream gives them the score 0 and lets them take weight, masked "
                "leaves them out",
                choices=("upstream", "masked"),
            ),
            Hyper("detach", True, "no gradient through the weights Q, as in the source"),
        ),
        test_hyper={"cell_size": 2, "detach": False},
        deviations=(
            "Cells at the end of a grid that they do not divide are smaller; the source appends zeros, which "
            "take part.",
            "A cell of padding only counts as one beyond the grid.",
        ),
    )

    def setup(self) -> None:
        """Create the projections of the attention among super tokens."""
        if self.hp.n_iter < 1:
            raise UsageError(f"{self.spec.id}: observed n_iter={self.hp.n_iter}, expected a positive number")
        self.qkv = nn.Linear(self.embed_dim, 3 * self.embed_dim, bias=self.bias)
        self.out = nn.Linear(self.embed_dim, self.embed_dim, bias=self.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Share out x (B, N, C) on ``grid``, attend among the cells, hand back."""
        self.source(x, context)
        sides = grid_of(self.spec, grid, x.shape[1])
        cell = self._cell(sides)
        if max(cell) == 1:
            return self._attended(x, key_padding_mask)
        means, dead = cell_means(x, sides, cell, key_padding_mask)
        means = means.to(x.dtype)
        if key_padding_mask is not None:
            x = x.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        tokens, cells = to_cells(x, sides, cell), cells_of(sides, cell)
        kept = self._kept(x, sides, cell, key_padding_mask)
        for _ in range(self.hp.n_iter):
            weights = self._weights(tokens, means, cells, dead)
            means = self._updated(tokens, weights, kept, cells, dead)
        mixed = _without(self._attended(means, dead), dead)
        return from_cells(weights @ neighbours(mixed, cells), sides, cell)

    def _cell(self, grid: Axes) -> Axes:
        """Tokens of a cell along each axis."""
        rank, size = len(grid), self.hp.cell_size
        return per_axis(self.spec, "cell_size", CELL[rank] if size is None else size, rank)

    @staticmethod
    def _kept(x: Tensor, grid: Axes, cell: Axes, padded: Tensor | None) -> Tensor:
        """1 for a token, 0 for padding and what hangs over the grid, (B or 1, cells, tokens, 1)."""
        kept = x.new_ones(1, x.shape[1], 1) if padded is None else (~padded).unsqueeze(-1).to(x.dtype)
        return to_cells(kept, grid, cell)

    def _weights(self, tokens: Tensor, means: Tensor, cells: Axes, dead: Tensor | None) -> Tensor:
        """Q (B, cells, tokens, 3^r), softmax over the cells around a token, in fp32 at least."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.hp.detach):
            scores = (tokens / math.sqrt(self.embed_dim)) @ neighbours(means, cells).transpose(-1, -2)
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            if self.hp.border == "masked":
                there = means.new_ones(1, math.prod(cells), 1) if dead is None else ~dead.unsqueeze(-1)
                absent = neighbours(there.to(means.dtype), cells).transpose(-1, -2) == 0
                scores = scores.masked_fill(absent, torch.finfo(scores.dtype).min)
            return scores.softmax(-1).to(tokens.dtype)

    @staticmethod
    def _updated(tokens: Tensor, weights: Tensor, kept: Tensor, cells: Axes, dead: Tensor | None) -> Tensor:
        """S_j = Σ_n Q[n,j] x_n / Σ_n Q[n,j], (B, cells, C)."""
        given = weights * kept
        wide = torch.promote_types(tokens.dtype, torch.float32)
        total = gathered(given.transpose(-1, -2) @ tokens, cells)
        mass = gathered(given.sum(-2, dtype=wide).unsqueeze(-1), cells)
        return _without((total / (mass + EPS)).to(tokens.dtype), dead)

    def _attended(self, x: Tensor, dead: Tensor | None) -> Tensor:
        """Multi-head self attention, (B, M, C)."""
        q, k, v = (self.split(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        o, _ = flash(q, k, v, key_bias=padding_bias(dead), need_lse=False, backend=self.backend)
        return self.out(self.join(o))

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """Weights and update per iteration, attention among cells with projections, handing back."""
        sides, c = grid_of(self.spec, grid, n), self.embed_dim
        cell = self._cell(sides)
        few = math.prod(cells_of(sides, cell))
        shared = 0 if max(cell) == 1 else 2 * REACH ** len(sides) * n * c * (2 * self.hp.n_iter + 1)
        return shared + 4 * few * few * c + 8 * few * c * c

    def extra_bytes(self, n: int, m: int, itemsize: int, *, grid: Grid = None) -> int:
        """Weights, tokens in the order of cells, the cells around each cell; q, k, v and o of the cells."""
        sides, c = grid_of(self.spec, grid, n), self.embed_dim
        cell = self._cell(sides)
        few, around = math.prod(cells_of(sides, cell)), REACH ** len(sides)
        attended = 4 * few * c * itemsize + 4 * few * self.num_heads
        if max(cell) == 1:
            return attended
        return attended + (n * (around + 2 * c) + 2 * few * around * c) * itemsize


def _without(cells: Tensor, dead: Tensor | None) -> Tensor:
    """Cells (B, K, C) with zeros where a cell is dead."""
    return cells if dead is None else cells.masked_fill(dead.unsqueeze(-1), 0.0)
