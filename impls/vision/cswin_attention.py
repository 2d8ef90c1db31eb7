"""Cross-shaped windows: half of the heads attend in stripes of columns, half in stripes of rows. CSWin."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, cat, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import (
    Axes,
    DepthwiseConv,
    aligned_grid,
    count_pairs,
    grid_of,
    heads_to_image,
    image_to_heads,
    per_axis,
    round_up,
)
from attnbench.kernels import Partition, padding_bias, window

LEPE_WIDTH = 3


class CSWinAttention(Attention):
    """Softmax attention in stripes of both directions, with a convolution of the values as position code."""

    spec = Spec(
        id="cswin_attention",
        name="CSWin cross-shaped window attention",
        family="vision",
        kind="core",
        paper=Paper(
            "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
            2021,
            arxiv="2107.00652",
            venue="CVPR 2022",
        ),
        upstream="https://github.com/microsoft/CSWin-Transformer",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC),
        summary="Half of the heads attend within stripes of columns, half within stripes of rows; a small "
        "convolution of v is added.",
        formula="o_h = softmax(q kᵀ/√D) v + conv3×3(v) in windows of (Gh, s) for heads h < H/2, of (s, Gw) "
        "for the others",
        cost="2·N·s·(Gh + Gw)·C + 18·N·C FLOPs, 4·H·N + 2·N·C·e bytes",
        row_sum="free",
        permutation_invariant=False,
        linear_in_v=False,
        grid_ranks=(2,),
        lengths="aligned",
        square_heads="the convolution has a filter for each of the D channels of a head",
        ops=("window",),
        hyper=(
            Hyper("stripe", 7, "width s of a stripe; the paper's stages have 1, 2, 7 and 7"),
            Hyper("lepe", True, "add the convolution of v (locally enhanced position encoding)"),
            Hyper("full", False, "attention over the whole grid by all heads, as in the paper's last stage"),
        ),
        test_hyper={"stripe": 3},
        padding="stripes are counted in positions, which dropping a key shifts",
        deviations=(
            "A last stripe may be narrower; upstream demands a width that divides the grid.",
            "CS is ours: key j is visible to query i if j ≤ i in row-major order, and the convolution keeps "
            "only the taps up to its centre in that order. Under NC token n of x lies on token n of the "
            "context, and the convolution is that of the context's values.",
            "The convolution is of v without padded keys.",
        ),
    )

    def setup(self) -> None:
        """Create a convolution for each direction; UsageError for an odd number of heads."""
        per_axis(self.spec, "stripe", self.hp.stripe, 1)
        if self.num_heads % 2 and not self.hp.full:
            raise UsageError(f"{self.spec.id}: observed {self.num_heads} heads, expected an even number")
        count = 1 if self.hp.full else 2
        self.heads = self.num_heads // count
        width, causal = self.heads * self.head_dim, self.pattern.causal
        branches = count if self.hp.lepe else 0
        self.lepe = nn.ModuleList(
            DepthwiseConv(width, LEPE_WIDTH, (2,), causal=causal) for _ in range(branches)
        )

    def windows(self, grid: Axes) -> tuple[Axes, ...]:
        """The window of each branch of heads: columns, then rows."""
        rows, columns = grid
        if self.hp.full:
            return (grid,)
        return (rows, min(self.hp.stripe, columns)), (min(self.hp.stripe, rows), columns)

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
        """Stripe attention of q (B, H, N, D) over k, v (B, H, N, D) on one grid, and the convolution of v."""
        sides = aligned_grid(self.spec, grid, q, k)
        found = []
        for branch, sizes in enumerate(self.windows(sides)):
            heads = slice(branch * self.heads, (branch + 1) * self.heads)
            o, _ = window(
                q[:, heads],
                k[:, heads],
                v[:, heads],
                Partition.block(sizes),
                grid=sides,
                key_bias=padding_bias(key_padding_mask),
                causal=self.pattern.causal,
                backend=self.backend,
            )
            found.append(o + self._position(branch, v[:, heads], sides, sizes, key_padding_mask))
        return cat(found, 1)

    def _position(
        self, branch: int, v: Tensor, grid: Axes, sizes: Axes, key_padding_mask: Tensor | None
    ) -> Tensor | float:
        if not self.hp.lepe:
            return 0.0
        if key_padding_mask is not None:
            v = v.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        convolved = _in_windows(self.lepe[branch], heads_to_image(v, grid), sizes)
        return image_to_heads(convolved, self.heads)

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """2·D for the score and 2·D for the value of every pair in a stripe, and the convolution."""
        sides = grid_of(self.spec, grid, n)
        width = self.heads * self.head_dim
        pairs = (
            count_pairs(Partition.block(sizes).on(sides, sides), causal=self.pattern.causal)
            for sizes in self.windows(sides)
        )
        return 4 * width * sum(pairs) + self._conv_flops([n] * len(self.lepe))

    def counted_flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """The reference computes every pair and masks; the convolution pads the last stripe."""
        sides = grid_of(self.spec, grid, n)
        cells = [math.prod(round_up(sides, sizes)) for sizes in self.windows(sides)]
        return 4 * self.embed_dim * n * m + self._conv_flops(cells[: len(self.lepe)])

    def _conv_flops(self, cells: list[int]) -> int:
        return 2 * LEPE_WIDTH**2 * self.heads * self.head_dim * sum(cells)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exp, fp32, and the values by stripes with their convolution."""
        return 4 * self.num_heads * n + (2 * n * self.embed_dim * itemsize if self.hp.lepe else 0)


def _in_windows(conv: nn.Module, image: Tensor, sizes: Axes) -> Tensor:
    """``conv`` of every window of an image (B, C, Gh, Gw) on its own: zeros lie beyond its border."""
    grid = image.shape[2:]
    if tuple(grid) == sizes:
        return conv(image)
    (rows, columns), (high, wide) = round_up(tuple(grid), sizes), sizes
    cells = F.pad(image, (0, columns - grid[1], 0, rows - grid[0]))
    cells = cells.unflatten(3, (-1, wide)).unflatten(2, (-1, high)).permute(0, 2, 4, 1, 3, 5)
    tiles = conv(cells.flatten(0, 2)).unflatten(0, cells.shape[:3])  # (B, rows, columns, C, high, wide)
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)[..., : grid[0], : grid[1]]
