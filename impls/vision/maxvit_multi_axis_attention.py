"""Multi-axis attention: windows of adjacent tokens, then groups of tokens spread over the grid. MaxViT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import (
    PHASES,
    Axes,
    aligned_grid,
    at_rank,
    axes_by_rank,
    count_pairs,
    grid_of,
    phases,
    position_tables,
)
from attnbench.kernels import Partition, padding_bias, window

SIZES = {1: (64,), 2: (7, 7), 3: (7, 7, 7)}
"""Tokens of a window and of a group by the rank of the grid; 7×7 is the paper's, 64 is √N at N = 4096."""


class MaxViTMultiAxisAttention(Attention):
    """Block attention and grid attention, each with its own projections and relative position bias."""

    spec = Spec(
        id="maxvit_multi_axis_attention",
        name="MaxViT multi-axis attention",
        family="vision",
        kind="mixer",
        paper=Paper("MaxViT: Multi-Axis Vision Transformer", 2022, arxiv="2204.01697", venue="ECCV 2022"),
        upstream="google-research/maxvit; huggingface/pytorch-image-models timm/models/maxxvit.py",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC),
        summary="Window attention, then attention among g tokens per axis at equal distances over the whole "
        "grid.",
        formula="y = Grid(Block(x)), each softmax(q·k/√D + T[h, i_q − i_k]) v among the tokens of a group; "
        "Block: ⌊p/w⌋ agree, Grid: p mod ⌈G/g⌉ agree",
        cost="4·N·(Πw + Πg)·C + 16·N·C² FLOPs, 4·H·N bytes each",
        permutation_invariant=False,
        linear_in_v=False,
        grouped_kv=True,
        grid_ranks=(1, 2, 3),
        lengths="aligned",
        ops=("window",),
        hyper=(
            Hyper(
                "window",
                None,
                "side w of a block, one number or one per axis; None: 64 of a sequence, else 7 per axis",
            ),
            Hyper(
                "group",
                None,
                "tokens g per axis of a group of grid attention, one number or one per axis; None: as window",
            ),
            Hyper(
                "phase",
                "both",
                "0: block attention; 1: grid attention; both: one after the other",
                choices=PHASES,
            ),
        ),
        test_hyper={"window": 3, "group": 2},
        padding="windows are counted in positions, which dropping a key shifts",
        deviations=(
            "The norms, residuals and MLP between the two, and the convolution before them, belong to the "
            "block around a mechanism.",
            "Where sizes do not divide the grid, windows and groups at its end are short; upstream demands "
            "divisibility.",
            "CS is ours: in each of the two, key j is visible to query i if j ≤ i in row-major order. NC is, "
            "too: both read their keys from the context, whose token n lies on token n of x.",
        ),
    )

    def setup(self) -> None:
        """Create one attention layer per phase."""
        window = axes_by_rank(self.spec, "window", self.hp.window, SIZES)
        group = self.hp.group
        self.sizes = (
            window,
            window if group is None else axes_by_rank(self.spec, "group", group, SIZES),
        )
        kv_dim = self.num_kv_heads * self.head_dim
        self.layers = nn.ModuleList(
            _Layer(self.embed_dim, kv_dim, self.num_heads, self.sizes[phase], bias=self.bias)
            for phase in phases(self.hp.phase)
        )

    def partition(self, phase: int, grid: Axes) -> Partition:
        """The groups of tokens of phase 0 or 1."""
        name = ("window", "group")[phase]
        sizes = at_rank(self.spec, name, self.sizes[phase], len(grid))
        return Partition.strided(grid, sizes) if phase else Partition.block(sizes)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Mix x (B, N, C) → (B, N, C) on one grid; in NC with keys from ``context`` (B, N, C)."""
        for phase, layer in zip(phases(self.hp.phase), self.layers, strict=True):
            assert isinstance(layer, _Layer)  # a ModuleList forgets the type
            source = self.source(x, context)
            q = self.split(layer.q_proj(x), self.num_heads)
            k = self.split(layer.k_proj(source), self.num_kv_heads)
            v = self.split(layer.v_proj(source), self.num_kv_heads)
            sides = aligned_grid(self.spec, grid, q, k)
            o, _ = window(
                q,
                k,
                v,
                self.partition(phase, sides),
                grid=sides,
                bias=layer.tables.at(len(sides)),
                key_bias=padding_bias(key_padding_mask),
                causal=self.pattern.causal,
                backend=self.backend,
            )
            x = layer.out_proj(self.join(o))
        return x

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """Scores and values of every pair of a group, and the four projections, of each phase."""
        sides = grid_of(self.spec, grid, n)
        total = 0
        for phase in phases(self.hp.phase):
            pairs = count_pairs(self.partition(phase, sides).on(sides, sides), causal=self.pattern.causal)
            total += 4 * self.embed_dim * pairs + self._projections(n, m)
        return total

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return len(self.layers) * (4 * self.embed_dim * n * m + self._projections(n, m))

    def _projections(self, n: int, m: int) -> int:
        return 4 * self.embed_dim * (n * self.embed_dim + m * self.num_kv_heads * self.head_dim)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exps, fp32, kept for the backward."""
        return 4 * self.num_heads * n * len(self.layers)


class _Layer(nn.Module):
    """The parameters of one phase."""

    def __init__(self, c: int, kv_dim: int, heads: int, sizes: dict[int, Axes], *, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(c, c, bias=bias)
        self.k_proj = nn.Linear(c, kv_dim, bias=bias)
        self.v_proj = nn.Linear(c, kv_dim, bias=bias)
        self.out_proj = nn.Linear(c, c, bias=bias)
        shapes = {rank: tuple(2 * w - 1 for w in axes) for rank, axes in sizes.items()}
        self.tables = position_tables(heads, shapes)
