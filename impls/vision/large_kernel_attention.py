"""Large kernel attention: a gate from two depthwise convolutions that together see 23 tokens per axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import RANKS, PerRank, grid_of, lay, unlay


class LargeKernelAttention(Attention):
    """y = (u ⊙ W_pw·DWD(DW(u))) W_2 + x with u = GELU(x W_1), DWD dilated."""

    spec = Spec(
        id="large_kernel_attention",
        name="Large kernel attention (LKA)",
        family="vision",
        kind="mixer",
        paper=Paper(
            "Visual Attention Network", 2022, arxiv="2202.09741", venue="Computational Visual Media 2023"
        ),
        upstream="https://github.com/Visual-Attention-Network/VAN-Classification",
        patterns=(Pattern.NS, Pattern.CS),
        summary="Multiplies tokens by a gate that convolutions compute from a wide neighbourhood: "
        "attention without queries, keys and softmax.",
        formula="u = GELU(x W_1 + b_1), a = DWD(DW(u)) W_pw + b, y = (u ⊙ a) W_2 + b_2 + x; DW depthwise "
        "of 5 taps per axis, DWD of 7 with dilation 3",
        cost="6·N·C² + 2·(5^r + 7^r)·N·C FLOPs",
        row_sum="free",
        linear_in_v=False,
        query_separable=False,
        permutation_invariant=False,
        grid_ranks=RANKS,
        hot_loop="two depthwise convolutions and three GEMMs",
        hyper=(
            Hyper("kernel", 5, "taps per axis of the first convolution"),
            Hyper("dilated_kernel", 7, "taps per axis of the second"),
            Hyper("dilation", 3, "distance of the second's taps"),
        ),
        deviations=(
            "CS is ours: both convolutions are padded on the left of every axis only, so that no tap is "
            "after the token in row-major order.",
            "A padded token is zero to both convolutions.",
            "The layer scale of the block is the model's; the residual around the gate is inside.",
        ),
    )

    def setup(self) -> None:
        """Create the three projections and the two convolutions."""
        c, hp = self.embed_dim, self.hp
        if min(hp.kernel, hp.dilated_kernel, hp.dilation) < 1:
            raise UsageError(
                f"{self.spec.id}: observed kernel={hp.kernel}, dilated_kernel={hp.dilated_kernel}, "
                f"dilation={hp.dilation}, expected positive numbers"
            )
        if hp.kernel % 2 == 0 or hp.dilated_kernel % 2 == 0:
            raise UsageError(
                f"{self.spec.id}: observed kernel={hp.kernel}, dilated_kernel={hp.dilated_kernel}, "
                "expected odd numbers of taps"
            )
        causal = self.pattern is Pattern.CS
        self.proj_in, self.pointwise, self.proj_out = (nn.Linear(c, c, bias=self.bias) for _ in range(3))
        self.near = _Depthwise(c, hp.kernel, 1, causal=causal)
        self.far = _Depthwise(c, hp.dilated_kernel, hp.dilation, causal=causal)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Gate x (B, N, C) on ``grid`` and add x."""
        self.source(x, context)
        sides = grid_of(self.spec, grid, x.shape[1])
        u = F.gelu(self.proj_in(x))
        gate = u
        for convolution in (self.near, self.far):
            if key_padding_mask is not None:
                gate = gate.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
            gate = unlay(convolution(lay(gate, sides).movedim(-1, 1)).movedim(1, -1))
        y: Tensor = self.proj_out(u * self.pointwise(gate)) + x
        return y

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """Three projections and the taps of both convolutions."""
        rank, c = len(grid_of(self.spec, grid, n)), self.embed_dim
        taps = self.hp.kernel**rank + self.hp.dilated_kernel**rank
        return 6 * n * c * c + 2 * n * taps * c

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """u, what the first convolution wrote and the second reads, and the gate."""
        return 3 * n * self.embed_dim * itemsize


class _Depthwise(nn.Module):
    """A depthwise convolution with dilation and bias that keeps the grid, on images (B, C, *grid).

    Zero padding on both sides of every axis, or on the left only with ``causal``.
    """

    def __init__(self, channels: int, width: int, dilation: int, *, causal: bool) -> None:
        super().__init__()
        self.width, self.dilation, self.causal = width, dilation, causal
        self.taps = PerRank(channels, {rank: (width,) * rank for rank in RANKS})
        self.bias = nn.Parameter(torch.zeros(channels))
        for rank in RANKS:  # as nn.Conv2d draws its own
            bound = width ** (-rank / 2)
            nn.init.uniform_(self.taps.at(rank).detach(), -bound, bound)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *grid) → (B, C, *grid)."""
        rank, span = image.dim() - 2, self.dilation * (self.width - 1)
        padding = span // 2
        if self.causal:
            image, padding = F.pad(image, (span, 0) * rank), 0
        convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        taps = self.taps.at(rank).unsqueeze(1)
        return convolve(
            image, taps, self.bias, padding=padding, dilation=self.dilation, groups=image.shape[1]
        )
