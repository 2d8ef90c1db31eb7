"""HiLo attention: some heads attend inside small windows, the others to the means of those windows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._cells import cell_means, cells_of
from attnbench.impls.vision._grids import RANKS, Axes, grid_of, per_axis
from attnbench.kernels import Partition, flash, padding_bias, window


class HiLoAttention(Attention):
    """y = concat(attention inside windows W_ho, attention to the means of windows W_lo), heads shared out."""

    spec = Spec(
        id="hilo_attention",
        name="HiLo attention",
        family="vision",
        kind="mixer",
        paper=Paper(
            "Fast Vision Transformers with HiLo Attention", 2022, arxiv="2205.13213", venue="NeurIPS 2022"
        ),
        upstream="https://github.com/ziplab/LITv2",
        patterns=(Pattern.NS, Pattern.NC),
        summary="High-frequency heads attend inside small windows, low-frequency heads to the means of all "
        "windows.",
        formula="Hi: softmax(q kᵀ/√D) v inside windows of s per axis; Lo: softmax(q k̄ᵀ/√D) v̄, k̄ and v̄ "
        "of the means of windows; y = concat(Hi W_ho, Lo W_lo)",
        cost="4·N·s^r·D·H_h + 4·N·(N/s^r)·D·H_l FLOPs and projections, about 7·N·C²",
        query_separable=False,
        permutation_invariant=False,
        padding="windows are counted in positions, which dropping a token shifts",
        grid_ranks=RANKS,
        lengths="aligned",
        ops=("window", "flash"),
        flops_note="counted_flops: the reference of the windows computes every pair and masks.",
        hyper=(
            Hyper(
                "window", 2, "side s of a window, one number or one per axis; 1: all heads are low-frequency"
            ),
            Hyper(
                "alpha", 0.9, "share of low-frequency heads, H_l = ⌊alpha·H⌋; the default of the class is 0.5"
            ),
            Hyper("qkv_bias", False, "bias of the projections to q, k and v"),
        ),
        test_hyper={"alpha": 0.5},
        deviations=(
            "Cross attention is ours: keys of a context on the same grid.",
            "Windows at the end of a grid that s does not divide are smaller, and their means over what they "
            "hold; the source appends zeros, which take part.",
        ),
    )

    def setup(self) -> None:
        """Share the heads out and create the projections of each group that has some."""
        hp, c = self.hp, self.embed_dim
        sides = (hp.window,) if isinstance(hp.window, int) else tuple(hp.window)
        if not sides or min(sides) < 1 or not 0 <= hp.alpha <= 1:
            raise UsageError(
                f"{self.spec.id}: observed window={hp.window}, alpha={hp.alpha}, expected sides of at "
                "least 1 and a share from 0 to 1"
            )
        self.low_heads = self.num_heads if max(sides) == 1 else math.floor(hp.alpha * self.num_heads)
        self.high_heads = self.num_heads - self.low_heads
        high, low = self.high_heads * self.head_dim, self.low_heads * self.head_dim
        if high:
            self.high_q = nn.Linear(c, high, bias=hp.qkv_bias)
            self.high_kv = nn.Linear(c, 2 * high, bias=hp.qkv_bias)
            self.high_out = nn.Linear(high, high, bias=self.bias)
        if low:
            self.low_q = nn.Linear(c, low, bias=hp.qkv_bias)
            self.low_kv = nn.Linear(c, 2 * low, bias=hp.qkv_bias)
            self.low_out = nn.Linear(low, low, bias=self.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C) on ``grid`` to itself or to the context on the same grid."""
        source = self.source(x, context)
        sides = grid_of(self.spec, grid, x.shape[1])
        outputs = []
        if self.high_heads:
            outputs.append(self._high(x, source, sides, key_padding_mask))
        if self.low_heads:
            outputs.append(self._low(x, source, sides, key_padding_mask))
        return torch.cat(outputs, -1)

    def _window(self, grid: Axes) -> Axes:
        sides = per_axis(self.spec, "window", self.hp.window, len(grid))
        return tuple(map(min, sides, grid))

    def _high(self, x: Tensor, source: Tensor, grid: Axes, padded: Tensor | None) -> Tensor:
        """Attention inside windows, (B, N, H_h·D)."""
        q = self.split(self.high_q(x), self.high_heads)
        k, v = (self.split(part, self.high_heads) for part in self.high_kv(source).chunk(2, -1))
        o, _ = window(
            q, k, v, Partition.block(self._window(grid)), grid=grid, key_bias=padding_bias(padded),
            backend=self.backend,
        )  # fmt: skip
        return self.high_out(self.join(o))

    def _low(self, x: Tensor, source: Tensor, grid: Axes, padded: Tensor | None) -> Tensor:
        """Attention to the means of windows, (B, N, H_l·D)."""
        means, dead = cell_means(source, grid, self._window(grid), padded)
        q = self.split(self.low_q(x), self.low_heads)
        k, v = (self.split(part, self.low_heads) for part in self.low_kv(means.to(x.dtype)).chunk(2, -1))
        o, _ = flash(q, k, v, key_bias=padding_bias(dead), need_lse=False, backend=self.backend)
        return self.low_out(self.join(o))

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """Projections of both groups, s^r keys for a high head, ⌈N/s^r⌉ for a low one."""
        return self._flops(n, math.prod(self._window(grid_of(self.spec, grid, n))), grid)

    def counted_flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """The reference of the windows computes every pair and masks."""
        return self._flops(n, n, grid)

    def _flops(self, n: int, keys_of_high: int, grid: Grid) -> int:
        sides, c = grid_of(self.spec, grid, n), self.embed_dim
        cells = math.prod(cells_of(sides, self._window(sides)))
        high, low = self.high_heads * self.head_dim, self.low_heads * self.head_dim
        projections = 6 * n * c * high + 2 * n * high**2 + 2 * (n + 2 * cells) * c * low + 2 * n * low**2
        return projections + 4 * n * keys_of_high * high + 4 * n * cells * low

    def extra_bytes(self, n: int, m: int, itemsize: int, *, grid: Grid = None) -> int:
        """q, k, v and o of the high heads; q and o of the low ones, means and their k and v; log-sum-exp."""
        sides = grid_of(self.spec, grid, n)
        cells = math.prod(cells_of(sides, self._window(sides)))
        high, low = self.high_heads * self.head_dim, self.low_heads * self.head_dim
        numbers = 4 * n * high + 2 * n * low + cells * (self.embed_dim + 2 * low)
        return numbers * itemsize + 4 * n * self.num_heads
