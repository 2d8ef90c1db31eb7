"""Axial attention: dense attention along one axis of a grid after the other."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import grid_of
from attnbench.impls.vision._lines import line_attention

AXES = 3
"""Axes that have projections: a grid of r axes takes the last r of them."""


class AxialAttention(Attention):
    """y = Attn_r(… Attn_1(x)), Attn_a multi-head attention along axis a with its own projections."""

    spec = Spec(
        id="axial_attention",
        name="Axial attention",
        family="vision",
        kind="mixer",
        paper=Paper("Axial Attention in Multidimensional Transformers", 2019, arxiv="1912.12180"),
        upstream="https://github.com/lucidrains/axial-attention",
        patterns=(Pattern.NS, Pattern.NC),
        summary="Dense attention along one axis of a grid after the other: every token reaches every other "
        "in as many steps as there are axes.",
        formula="Attn_a(x) = MHA_a(x along axis a); sequential: y = Attn_r(… Attn_1(x)); sum: y = Σ_a "
        "Attn_a(x)",
        cost="4·N·C·Σ_a G_a + 8·r·N·C² FLOPs on a grid of sides G_1, …, G_r",
        query_separable=False,
        permutation_invariant=False,
        grid_ranks=(2, 3),
        lengths="aligned",
        ops=("flash",),
        hyper=(
            Hyper(
                "phase",
                "both",
                "one axis alone, as in a layer of the paper, or all of them",
                choices=(0, 1, 2, "both"),
            ),
            Hyper(
                "combine",
                "sequential",
                "sequential: an axis reads what the one before it wrote; sum: all read the input",
                choices=("sequential", "sum"),
            ),
            Hyper("reverse", False, "fastest axis first instead of slowest first, in sequence"),
        ),
        deviations=(
            "Cross attention is ours: a query reads the tokens of the context on its line, in every phase.",
            "All axes in one layer without residual between them; a stack of the paper's layers is phase 0, "
            "1, … by turns.",
            "Positions are embedded by the model, not here.",
            "There are projections for three axes; a plane uses the last two sets.",
        ),
    )

    def setup(self) -> None:
        """Create q, k, v without bias and the output projection, for one axis or for each.

        The axes' weights lie in one matrix, so that every parameter has a gradient on grids of any rank.
        """
        sets, c = AXES if self.hp.phase == "both" else 1, self.embed_dim
        self.qkv = nn.Linear(c, sets * 3 * c, bias=False)
        self.out = nn.Linear(c, sets * c, bias=self.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C) on ``grid`` along its axes; keys are x's or the context's.

        Without a grid it is the most even plane. Raises UsageError for a phase that the grid does not have.
        """
        self.source(x, context)
        grid = grid_of(self.spec, grid, x.shape[1])
        outputs: list[Tensor] = []
        for axis in self._axes(grid):
            tokens = outputs.pop() if outputs and self.hp.combine == "sequential" else x
            outputs.append(self._along(axis, tokens, context, grid, key_padding_mask))
        return sum(outputs[1:], outputs[0])

    def _axes(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The axes to attend along, in order."""
        phase = self.hp.phase
        if phase == "both":
            axes = tuple(range(len(grid)))
            return axes[::-1] if self.hp.reverse else axes
        if phase >= len(grid):
            raise UsageError(
                f"{self.spec.id}: observed phase={phase} on a grid {grid}, expected one of its axes"
            )
        return (phase,)

    def _along(
        self,
        axis: int,
        x: Tensor,
        context: Tensor | None,
        grid: tuple[int, ...],
        padded: Tensor | None,
    ) -> Tensor:
        """Multi-head attention along one axis with that axis' projections, (B, N, C)."""
        c = self.embed_dim
        number = AXES - len(grid) + axis if self.hp.phase == "both" else 0
        into = self.qkv.weight[3 * c * number : 3 * c * (number + 1)]
        if context is None:
            q, k, v = F.linear(x, into).chunk(3, -1)
        else:
            q, (k, v) = F.linear(x, into[:c]), F.linear(context, into[c:]).chunk(2, -1)
        heads = (self.split(part, self.num_heads) for part in (q, k, v))
        o, _ = line_attention(*heads, grid=grid, axis=axis, padded=padded, backend=self.backend)
        rows = slice(c * number, c * (number + 1))
        bias = None if self.out.bias is None else self.out.bias[rows]
        return F.linear(o.movedim(1, -2).reshape(x.shape), self.out.weight[rows], bias)

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """Four projections and the pairs on its line per axis; without a grid, of the most even plane."""
        grid = grid_of(self.spec, grid, n)
        c = self.embed_dim
        return sum(8 * n * c * c + 4 * n * grid[axis] * c for axis in self._axes(grid))

    def extra_bytes(self, n: int, m: int, itemsize: int, *, grid: Grid = None) -> int:
        """q, k, v and the output of one axis, what a further one reads, and the log-sum-exp."""
        grid = grid_of(self.spec, grid, n)
        between = min(1, len(self._axes(grid)) - 1)
        return n * (self.embed_dim * (4 + between) * itemsize + 4 * self.num_heads)
