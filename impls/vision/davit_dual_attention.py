"""DaViT's dual attention: windows of tokens attend to each other, then groups of channels do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import (
    PHASES,
    RANKS,
    Axes,
    DepthwiseConv,
    grid_of,
    lay,
    per_axis,
    phases,
    unlay,
)
from attnbench.kernels import Partition, kv_reduce, padding_bias, window

LAYERS = ("window", "channel")
"""Names of the phases, in order."""


class DavitDualAttention(Attention):
    """y = Channel(Window(x)): attention inside windows, then attention of each head's channels to another."""

    spec = Spec(
        id="davit_dual_attention",
        name="Dual attention (DaViT)",
        family="vision",
        kind="mixer",
        paper=Paper("DaViT: Dual Attention Vision Transformers", 2022, arxiv="2204.03645", venue="ECCV 2022"),
        upstream="https://github.com/dingmyu/davit",
        patterns=(Pattern.NS,),
        summary="Attention inside windows of tokens, then attention between the channels of a head, whose "
        "map sums over all tokens.",
        formula="Window: softmax(q kᵀ/√D) v inside windows of w per axis; Channel: A = softmax(σ·qᵀk) over "
        "the D channels of a head, o = v Aᵀ",
        cost="4·N·w^r·C + 4·N·D·C + 16·N·C² FLOPs; D² numbers per head",
        query_separable=False,
        permutation_invariant=False,
        grid_ranks=RANKS,
        ops=("window", "kv_reduce"),
        flops_note="counted_flops: the reference of the windows computes every pair; the channel map is "
        "read out by a basis, 2·D³ per head.",
        hyper=(
            Hyper(
                "phase", "both", "0: windows alone, 1: channels alone, or one after the other", choices=PHASES
            ),
            Hyper("window", 7, "side w of a window, one number or one per axis"),
            Hyper(
                "scale",
                "head",
                "σ of the channels: head 1/√D, as the first models; tokens 1/√N, as the later large ones",
                choices=("head", "tokens"),
            ),
            Hyper(
                "cpe",
                False,
                "add a depthwise convolution of 3 taps per axis to the input of each phase, as the model "
                "does",
            ),
        ),
        test_hyper={"window": 4},
        deviations=(
            "Windows at the end of a grid that w does not divide are smaller; the source pads them with "
            "zeros, which take part.",
            "The published code contracts keys with values and applies the map to queries: the same function "
            "with renamed projections.",
            "Both phases in one layer, without residual between them; a stack of the paper's layers takes "
            "them by turns.",
        ),
    )

    def setup(self) -> None:
        """Create the layers of each phase."""
        self.layers = nn.ModuleDict(
            {
                LAYERS[phase]: _Layer(self.embed_dim, self.num_heads, bias=self.bias, cpe=self.hp.cpe)
                for phase in phases(self.hp.phase)
            }
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend among the tokens x (B, N, C) of each window of ``grid``, then among the channels."""
        self.source(x, context)
        sides = grid_of(self.spec, grid, x.shape[1])
        for name, layer in self.layers.items():
            assert isinstance(layer, _Layer)
            q, k, v = layer.projected(x, sides, key_padding_mask)
            if name == "window":
                o = self._within_windows(q, k, v, sides, key_padding_mask)
            else:
                o = self.between_channels(q, k, v, key_padding_mask)
            x = layer.out(self.join(o))
        return x

    def _window(self, grid: Axes) -> Axes:
        return per_axis(self.spec, "window", self.hp.window, len(grid))

    def _within_windows(self, q: Tensor, k: Tensor, v: Tensor, grid: Axes, padded: Tensor | None) -> Tensor:
        partition = Partition.block(self._window(grid))
        return window(q, k, v, partition, grid=grid, key_bias=padding_bias(padded), backend=self.backend)[0]

    def between_channels(self, q: Tensor, k: Tensor, v: Tensor, padded: Tensor | None = None) -> Tensor:
        """o[n, a] = Σ_b softmax_b(σ·Σ_n q[n, a] k[n, b]) v[n, b] of every head, all (B, H, N, D).

        The sums run over the tokens that are not padding, in fp32.
        """
        n, d = q.shape[2:]
        basis = torch.eye(d, dtype=q.dtype, device=q.device).expand(*q.shape[:2], d, d)
        sigma = 1.0 / math.sqrt(d if self.hp.scale == "head" else n)
        scores = kv_reduce(basis, q, k, scale=sigma, normalize=False, key_mask=padded, backend=self.backend)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32))
        if padded is not None and self.hp.scale == "tokens":
            kept = (~padded).sum(-1).clamp(min=1).to(scores.dtype)
            scores = scores * (n / kept).sqrt()[:, None, None, None]
        return v @ scores.softmax(-1).to(v.dtype).transpose(-1, -2)

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """Projections, w^r keys for a token of a window, 4·D for a channel of a token, convolutions."""
        sides = grid_of(self.spec, grid, n)
        inside = math.prod(map(min, self._window(sides), sides))
        return self._flops(n, inside, len(sides), basis=0)

    def counted_flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """The reference of the windows computes every pair; the map of the channels is read by a basis."""
        return self._flops(
            n, n, len(grid_of(self.spec, grid, n)), basis=2 * self.head_dim**2 * self.embed_dim
        )

    def _flops(self, n: int, keys: int, rank: int, *, basis: int) -> int:
        c = self.embed_dim
        own = {"window": 4 * n * keys * c, "channel": 4 * n * self.head_dim * c + basis}
        convolution = 2 * n * 3**rank * c if self.hp.cpe else 0
        return sum(own[name] + 8 * n * c * c + convolution for name in self.layers)

    def extra_bytes(self, n: int, m: int, itemsize: int, *, grid: Grid = None) -> int:
        """q, k, v and o of one phase, and its input; the log-sum-exp or the channel maps."""
        own = {"window": 4 * n * self.num_heads, "channel": self.head_dim * self.embed_dim * (4 + itemsize)}
        return 5 * n * self.embed_dim * itemsize + max(own[name] for name in self.layers)


class _Layer(nn.Module):
    """The projections of one phase, and the convolution that encodes positions before it."""

    def __init__(self, dim: int, heads: int, *, bias: bool, cpe: bool) -> None:
        super().__init__()
        self.heads = heads
        self.cpe = DepthwiseConv(dim, 3, RANKS) if cpe else None
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def projected(self, x: Tensor, grid: Axes, padded: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, D) of x (B, N, C), with its positions encoded first."""
        if self.cpe is not None:
            seen = x if padded is None else x.masked_fill(padded.unsqueeze(-1), 0.0)
            x = x + unlay(self.cpe(lay(seen, grid).movedim(-1, 1)).movedim(1, -1))
        q, k, v = (Attention.split(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return q, k, v
