"""Gated positional self-attention: heads start as a convolution and learn when to look at content."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.case import fold
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import RelativeBias, flash, padding_bias


class Gpsa(Attention):
    """A = (1 − σ(λ))·softmax(q kᵀ/√D) + σ(λ)·softmax(⟨w, r⟩), r of the offset from query to key."""

    spec = Spec(
        id="gpsa",
        name="Gated positional self-attention (ConViT)",
        family="dense",
        kind="mixer",
        paper=Paper(
            "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
            2021,
            arxiv="2103.10697",
            venue="ICML 2021",
        ),
        upstream="https://github.com/facebookresearch/convit",
        patterns=(Pattern.NS,),
        summary="Mixes a map of content with a map of relative positions by a gate per head, which starts "
        "on the side of positions: a convolution that may become attention.",
        formula="A_h = (1 − σ(λ_h))·softmax_j(q_i·k_j/√D) + σ(λ_h)·softmax_j(w_h·(d_x, d_y, d_x² + d_y²))",
        cost="4·N²·C + 2·N·C·(Gh + Gw) + 8·N·C² FLOPs on a grid (Gh, Gw), 4·H·N + 2·N·C·e bytes",
        permutation_invariant=False,
        grid_ranks=(2,),
        ops=("flash",),
        hyper=(
            Hyper("local_init", True, "start as a convolution: identity values, heads at fixed offsets"),
            Hyper("locality_strength", 1.0, "how sharply a head starts at its offset, positive"),
        ),
        deviations=(
            "The map of positions is a product of one per axis and never held; with padding, which breaks "
            "the product, it is a softmax of its own over a table of relative positions.",
            "The bias of the positional scores is left out: it cancels in the softmax, as does the final "
            "division by the row sum, which is 1.",
            "Grids need not be square. Heads beyond a perfect square start at random, as in the release.",
        ),
    )

    def setup(self) -> None:
        """Create projections, whose q, k, v have no bias, positional weights (H, 3) and gates (H,)."""
        if self.hp.locality_strength <= 0:
            raise UsageError(
                f"gpsa: observed locality_strength={self.hp.locality_strength}, expected a positive one"
            )
        c, kv = self.embed_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(c, c, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(c, kv, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(c, c, bias=self.bias)
        self.position = nn.Parameter(torch.empty(self.num_heads, 3))
        self.gate = nn.Parameter(torch.ones(self.num_heads))
        nn.init.trunc_normal_(self.position, std=0.02)
        if self.hp.local_init:
            nn.init.eye_(self.v_proj.weight)
            self._start_as_convolution()

    @torch.no_grad()
    def _start_as_convolution(self) -> None:
        """Heads of the largest square, k·k, start at the offsets of a k×k window."""
        side = math.isqrt(self.num_heads)
        centre = (side - 1) / 2 if side % 2 == 0 else side // 2
        for h1 in range(side):
            for h2 in range(side):
                weights = [2.0 * (h2 - centre), 2.0 * (h1 - centre), -1.0]
                self.position[h1 + side * h2] = torch.tensor(weights)
        self.position.mul_(self.hp.locality_strength)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Mix the tokens x (B, N, C) of a grid (Gh, Gw). UsageError where it is none of N tokens."""
        tokens = self.source(x, context)
        rows, columns = self._sides(grid, x.shape[1])
        q = self.split(self.q_proj(x), self.num_heads)
        k = self.split(self.k_proj(tokens), self.num_kv_heads)
        k, v = self.grouped(k, self.split(self.v_proj(tokens), self.num_kv_heads))
        bias = padding_bias(key_padding_mask)
        by_content, _ = flash(q, k, v, key_bias=bias, need_lse=False, backend=self.backend)
        if bias is None:
            by_position = self._separable(v, rows, columns)
        else:
            by_position = self._unseparable(q, v, bias, rows, columns)
        gate = torch.sigmoid(self.gate).view(1, -1, 1, 1)
        o = (1.0 - gate) * by_content + gate * by_position
        result: Tensor = self.out_proj(self.join(o))
        return result

    def _sides(self, grid: Grid, n: int) -> tuple[int, int]:
        if grid is None or len(grid) != 2 or math.prod(grid) != n:
            raise UsageError(f"gpsa: observed grid {grid} for {n} tokens, expected (Gh, Gw) with Gh·Gw = {n}")
        return grid[0], grid[1]

    def axis_maps(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The factors (H, Gh, Gh) and (H, Gw, Gw) whose Kronecker product is the map of positions.

        ⟨w, r⟩ is a function of d_y plus one of d_x, so the exponential is a product and so is its sum.
        In fp32, or fp64 for parameters in fp64.
        """
        w = self.position.to(torch.promote_types(self.position.dtype, torch.float32))
        maps = []
        for size, linear in ((rows, w[:, 1]), (columns, w[:, 0])):
            place = torch.arange(size, device=w.device, dtype=w.dtype)
            d = place[None, :] - place[:, None]  # key − query
            scores = linear[:, None, None] * d + w[:, 2, None, None] * d.square()
            maps.append(scores.softmax(-1))
        return maps[0], maps[1]

    def _separable(self, v: Tensor, rows: int, columns: int) -> Tensor:
        """The map of positions times v (B, H, N, D): along the columns, then along the rows."""
        along_rows, along_columns = (a.to(v.dtype) for a in self.axis_maps(rows, columns))
        on_grid = along_columns.unsqueeze(1) @ v.unflatten(2, (rows, columns))
        mixed = along_rows @ on_grid.flatten(3)
        return mixed.unflatten(3, (columns, -1)).flatten(2, 3)

    def _unseparable(self, q: Tensor, v: Tensor, bias: Tensor, rows: int, columns: int) -> Tensor:
        """The same without the padded keys, whose ``bias`` (B, 1, N) is −∞: scores out of a table."""
        y, x = (torch.arange(size, device=q.device) for size in (rows, columns))
        # an entry of the table is read at query − key, the weights are of key − query
        d_y, d_x = (torch.arange(size - 1, -size, -1, device=q.device) for size in (rows, columns))
        d_y = d_y[:, None]
        w = self.position.to(torch.promote_types(self.position.dtype, torch.float32))[..., None, None]
        table = w[:, 0] * d_x + w[:, 1] * d_y + w[:, 2] * (d_x.square() + d_y.square())
        places = torch.cartesian_prod(y, x)
        nothing = q.new_zeros(()).expand(q.shape)  # no score but that of the table
        o, _ = flash(
            nothing,
            nothing,
            v,
            scale=1.0,
            key_bias=bias,
            rel_bias=RelativeBias.grid(table, places, offsets=(rows - 1, columns - 1)),
            need_lse=False,
            backend=self.backend,
        )
        return o

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """Projections, the content's softmax attention, and two small products along the axes."""
        rows, columns = fold(n, 2, (2,)) if grid is None else grid
        c, kv = self.embed_dim, self.num_kv_heads * self.head_dim
        return 4 * n * c * (c + kv) + 4 * n * n * c + 2 * n * c * (rows + columns)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Both outputs before they are mixed, and the log-sum-exp, fp32."""
        return 2 * n * self.embed_dim * itemsize + 4 * self.num_heads * n
