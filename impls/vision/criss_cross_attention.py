"""Criss-cross attention: every token attends to its row and its column in one softmax."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import Axes, coordinates, grid_of
from attnbench.impls.vision._lines import line_attention
from attnbench.kernels import Mask, merge

REDUCTION = 8
"""Channels of x per channel of queries and keys in the module of the source."""


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _others(length: int, device: torch.device) -> Mask:
    """Every token of a line but the query's own."""
    place = torch.arange(length, device=device, dtype=torch.int32)
    return Mask.upto(place, strict=True) | Mask.upto(-place, strict=True)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _before(length: int, device: torch.device) -> Tensor:
    """For each place of a line the one before it, the last that a causal query sees of the others."""
    return torch.arange(length, device=device, dtype=torch.int32) - 1


class CrissCrossAttention(Attention):
    """Softmax attention over the union of the lines through a token, its own place counted once."""

    spec = Spec(
        id="criss_cross_attention",
        name="Criss-cross attention",
        family="vision",
        kind="core",
        paper=Paper(
            "CCNet: Criss-Cross Attention for Semantic Segmentation",
            2019,
            arxiv="1811.11721",
            venue="ICCV 2019",
        ),
        upstream="https://github.com/speedinghzl/CCNet",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC),
        summary="Every token attends to its row and its column in one softmax; applied twice, to all tokens.",
        formula="o_n = Σ_{m ∈ Ω_n} softmax_m(scale·q_n·k_m) v_m, Ω_n = tokens that differ from n on one "
        "axis at most",
        cost="4·N·(Σ_a (G_a − 1) + 1)·C FLOPs on a grid of sides G_1, …, G_r",
        permutation_invariant=False,
        grid_ranks=(2, 3),
        lengths="aligned",
        ops=("flash",),
        flops_note="counted_flops: the reference computes a query's own place on every line and masks it.",
        hyper=(
            Hyper("scale", None, "multiplier of the scores; None: 1/√D, with module=True 1 as in the source"),
            Hyper(
                "recurrence", 1, "times R that the layer is applied, with the same weights; the source has 2"
            ),
            Hyper(
                "module",
                False,
                f"the layer of the source: q and k of C/{REDUCTION} channels, no output projection, "
                "y = γ·o + x with a scalar γ that starts at 0",
            ),
        ),
        deviations=(
            "CS is ours: keys before the query in row-major order. So is NC: keys of a context on the same "
            "grid.",
            "On a grid of three axes the union of three lines.",
            "By default a core with 1/√D between full projections; module=True is the source's, whose single "
            "head is num_heads=1.",
        ),
    )

    def setup(self) -> None:
        """Check the hyper-parameters; with ``module`` put the source's projections and γ in place."""
        if self.hp.recurrence < 1:
            raise UsageError(
                f"{self.spec.id}: observed recurrence={self.hp.recurrence}, expected a positive number"
            )
        if not self.hp.module or not self.projections:
            return
        c, narrow = self.embed_dim, self.embed_dim // REDUCTION
        if c % REDUCTION or narrow % self.num_heads:
            raise UsageError(
                f"{self.spec.id} with module=True: observed embed_dim={c}, num_heads={self.num_heads}, "
                f"expected embed_dim/{REDUCTION} a multiple of num_heads"
            )
        if self.num_kv_heads != self.num_heads:
            raise UsageError(
                f"{self.spec.id} with module=True: observed num_kv_heads={self.num_kv_heads}, "
                f"expected num_heads={self.num_heads}"
            )
        self.q_proj, self.k_proj = (nn.Linear(c, narrow, bias=self.bias) for _ in range(2))
        self.gamma = nn.Parameter(torch.zeros(()))
        del self.out_proj

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend ``recurrence`` times from x (B, N, C) on ``grid``; a context is the same every time."""
        common = {"grid": grid, "key_padding_mask": key_padding_mask, **inputs}
        for _ in range(self.hp.recurrence):
            x = (
                self._residual(x, context, **common)
                if self.hp.module
                else super().forward(x, context, **common)
            )
        return x

    def _residual(self, x: Tensor, context: Tensor | None, **common: Any) -> Tensor:
        """γ·o + x."""
        source = self.source(x, context)
        projected = (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        o = self.attend(*(self.split(part, self.num_heads) for part in projected), **common)
        return self.gamma * self.join(o) + x

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
        """Attention along every axis, merged; a token's own place counts on the last axis alone."""
        grid = grid_of(self.spec, grid, q.shape[2])
        last = len(grid) - 1
        common = {"padded": key_padding_mask, "scale": self._scale(q), "backend": self.backend}
        o, lse = self._along(last, q, k, v, grid, common)
        for axis in (a for a in range(last) if grid[a] > 1):
            o, lse = merge(o, lse, *self._along(axis, q, k, v, grid, common))
        return o.flatten(2, -2)

    def _scale(self, q: Tensor) -> float:
        if self.hp.scale is not None:
            return float(self.hp.scale)
        return 1.0 if self.hp.module else 1.0 / math.sqrt(q.shape[-1])

    def _along(
        self, axis: int, q: Tensor, k: Tensor, v: Tensor, grid: Axes, common: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Attention and log-sum-exp along one axis, CS: of the past; one's own place on the last only."""
        length, own = grid[axis], axis == len(grid) - 1
        options: dict[str, Any] = {}
        if self.pattern is Pattern.CS:
            options = {"causal": True} if own else {"causal": True, "q_pos": _before(length, q.device)}
        elif not own:
            options = {"mask": _others(length, q.device)}
        o, lse = line_attention(q, k, v, grid=grid, axis=axis, need_lse=True, **common, **options)
        assert lse is not None  # need_lse is True
        return o, lse

    def visible(self, n: int, m: int, device: torch.device, grid: Grid = None) -> Tensor:
        """The mask, bool (N, M)."""
        places = coordinates(grid_of(self.spec, grid, n), device)
        apart = torch.stack([p[:, None] != p[None, :] for p in places]).sum(0)
        seen = apart <= 1
        return seen.tril() if self.pattern is Pattern.CS else seen

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """4·D for every visible pair of every head, in one pass."""
        others = n * sum(g - 1 for g in grid_of(self.spec, grid, n))
        pairs = n + (others // 2 if self.pattern is Pattern.CS else others)
        return 4 * pairs * self.embed_dim

    def counted_flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """The reference computes whole lines and masks."""
        *slow, fast = grid_of(self.spec, grid, n)
        return 4 * n * (fast + sum(g for g in slow if g > 1)) * self.embed_dim

    def layer_flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """``recurrence`` passes with projections; with ``module`` q and k are narrow and there is no W_o."""
        c, once = self.embed_dim, self.flops(n, m, grid=grid)
        if not self.hp.module:
            return self.hp.recurrence * (once + self._projection_flops(n, m))
        narrow = c // REDUCTION
        attended = once * (narrow + c) // (2 * c)
        return self.hp.recurrence * (attended + 2 * (n + m) * c * narrow + 2 * m * c * c)

    def extra_bytes(self, n: int, m: int, itemsize: int, *, grid: Grid = None) -> int:
        """Output and log-sum-exp of the lines of every axis but one, which are merged."""
        axes = len(grid_of(self.spec, grid, n))
        return n * (axes - 1) * (self.embed_dim * itemsize + 4 * self.num_heads) + 4 * n * self.num_heads
