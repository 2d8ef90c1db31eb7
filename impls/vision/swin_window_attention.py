"""Window and shifted-window attention with relative position bias: Swin Transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import (
    Axes,
    aligned_grid,
    at_rank,
    axes_by_rank,
    count_pairs,
    crop_grid,
    grid_of,
    pad_grid,
    position_tables,
    round_up,
)
from attnbench.kernels import Partition, padding_bias, window
from attnbench.kernels.window import reference

WINDOWS = {1: (256,), 2: (7, 7), 3: (8, 7, 7)}
"""Sides of a window by the rank of the grid: the paper's on images, Video Swin's on videos."""


class SwinWindowAttention(Attention):
    """Softmax attention among the tokens of a window, with a learned bias per relative position."""

    spec = Spec(
        id="swin_window_attention",
        name="Swin (shifted) window attention",
        family="vision",
        kind="core",
        paper=Paper(
            "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
            2021,
            arxiv="2103.14030",
            venue="ICCV 2021",
        ),
        upstream="https://github.com/microsoft/Swin-Transformer",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Tokens attend inside non-overlapping windows; every second layer moves the windows by half.",
        formula="o_i = softmax over {j : ⌊(p_j − σ)/w⌋ = ⌊(p_i − σ)/w⌋ on every axis} of "
        "q_i·k_j/√D + T[h, p_i − p_j]",
        cost="4·N·Πw·C FLOPs, 4·H·N bytes",
        permutation_invariant=False,
        grouped_kv=True,
        grid_ranks=(1, 2, 3),
        lengths="aligned",
        ops=("window",),
        hyper=(
            Hyper(
                "window",
                None,
                "side w of a window, one number or one per axis; None: 256 tokens of a sequence, 7×7 of an "
                "image, 8×7×7 of a video",
            ),
            Hyper(
                "phase",
                0,
                "0: windows from the first token on; 1: moved by ⌊w/2⌋. Layers of a stack alternate",
                choices=(0, 1),
            ),
            Hyper(
                "pad",
                "masked",
                "where windows do not divide the grid: cut them at its border, or, as upstream's detection "
                "models, fill the grid up with zeros before the projections, which are attended to",
                choices=("masked", "upstream"),
            ),
        ),
        test_hyper={"window": 5, "phase": 1},
        padding="windows are counted in positions, which dropping a key shifts",
        deviations=(
            "Windows are moved and cut at the border. Upstream rolls the grid and masks with −100 what was "
            "not adjacent, which is the same map but for weights below e^−100.",
            "CS and CC are ours: within the window, key j is visible to query i if j ≤ i in row-major order. "
            "Under NC and CC token n of x lies on token n of the context.",
            "A window given as one number serves grids of every rank; its tables for several ranks are "
            "stored as sections of one parameter.",
        ),
    )

    def setup(self) -> None:
        """Create the tables, (H, 2w − 1, …) for each rank that the window is given for."""
        self.windows = axes_by_rank(self.spec, "window", self.hp.window, WINDOWS)
        shapes = {rank: tuple(2 * w - 1 for w in sides) for rank, sides in self.windows.items()}
        self.tables = position_tables(self.num_heads, shapes)

    def partition(self, grid: Axes) -> Partition:
        """The windows of a grid; an axis that one window covers is not shifted."""
        sides = at_rank(self.spec, "window", self.windows, len(grid))
        shift = tuple(w // 2 if self.hp.phase == 1 and g > w else 0 for w, g in zip(sides, grid, strict=True))
        return Partition.block(sides, shift=shift)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C) to itself or to ``context`` (B, N, C), on one grid; returns (B, N, C)."""
        sides = grid_of(self.spec, grid, x.shape[1])
        padded = self._padded(sides)
        if padded == sides:
            return super().forward(x, context, grid=sides, key_padding_mask=key_padding_mask, **inputs)
        origin = (0,) * len(sides)
        x = pad_grid(x, sides, origin, padded)
        if context is not None:
            context = pad_grid(context, sides, origin, padded)
        if key_padding_mask is not None:
            key_padding_mask = pad_grid(key_padding_mask.unsqueeze(-1), sides, origin, padded).squeeze(-1)
        y = super().forward(x, context, grid=padded, key_padding_mask=key_padding_mask, **inputs)
        return crop_grid(y, padded, sides)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Window attention of q (B, H, N, D) over k, v (B, Hkv, N, ·) on one grid.

        With ``pad="upstream"`` keys beyond the grid are 0; ``forward`` makes them the projections' biases.
        """
        sides = aligned_grid(self.spec, grid, q, k)
        padded = self._padded(sides)
        key_bias = padding_bias(key_padding_mask)
        if padded != sides:
            origin = (0,) * len(sides)
            q, k, v = (pad_grid(x, sides, origin, padded) for x in (q, k, v))
            if key_bias is not None:
                key_bias = pad_grid(key_bias.unsqueeze(-1), sides, origin, padded).squeeze(-1)
        o, _ = window(
            q,
            k,
            v,
            self.partition(padded),
            grid=padded,
            bias=self.tables.at(len(sides)),
            key_bias=key_bias,
            causal=self.pattern.causal,
            backend=self.backend,
        )
        return o if padded == sides else crop_grid(o, padded, sides)

    def _padded(self, grid: Axes) -> Axes:
        """The grid that is attended on: filled up to whole windows where upstream does."""
        if self.hp.pad == "masked":
            return grid
        sides = at_rank(self.spec, "window", self.windows, len(grid))
        return round_up(grid, tuple(min(w, g) for w, g in zip(sides, grid, strict=True)))

    def visible(self, n: int, m: int, device: torch.device, *, grid: Grid = None) -> Tensor:
        """The mask among the tokens of the grid, bool (N, N)."""
        sides = grid_of(self.spec, grid, n)
        mask = reference.visible(self.partition(sides), sides, sides, n, m, device)
        return mask.tril() if self.pattern.causal else mask

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """2·D for the score and 2·D for the value of every pair in a window."""
        padded = self._padded(grid_of(self.spec, grid, n))
        pairs = count_pairs(self.partition(padded).on(padded, padded), causal=self.pattern.causal)
        return 4 * self.embed_dim * pairs

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return 4 * self.embed_dim * n * m

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exp, fp32, kept for the backward."""
        return 4 * self.num_heads * n
