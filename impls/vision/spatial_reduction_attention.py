"""Spatial-reduction attention: all tokens of a grid attend to a coarser grid of keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import few_query, padding_bias


class SpatialReductionAttention(Attention):
    """Multi-head attention from x to the keys and values W_kv x' of a reduced grid x'.

    ``variant="conv"`` (PVT): x' = LN(convolution of x with kernel and stride R on every axis); for R = 1
    there is neither convolution nor LN. ``variant="linear"`` (PVTv2): x' = GELU(LN(W·pool(x))), the adaptive
    mean pool to P cells an axis. An axis that R does not divide ends in zeros; padded tokens are zeros to the
    convolution and left out of the means, and a cell without any other token is hidden. A plain sequence is a
    grid of one axis.
    """

    spec = Spec(
        id="spatial_reduction_attention",
        name="Spatial-reduction attention",
        family="vision",
        kind="mixer",
        paper=Paper(
            "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
            2021,
            arxiv="2102.12122",
            venue="ICCV 2021",
        ),
        upstream="whai362/PVT",
        patterns=(Pattern.NS, Pattern.NC, Pattern.CC),
        summary="Keys and values come from a grid that a strided convolution has made coarser.",
        formula="softmax(q kᵀ/√D) v with k, v = W_kv LN(conv_{R, stride R}(x))",
        cost="O(N·C² + N·M·C / R^r) on grids of r axes",
        row_sum="free",
        permutation_invariant=False,
        grid_ranks=(1, 2, 3),
        grid_kv=True,
        ops=("few_query",),
        hyper=(
            Hyper("variant", "conv", "conv: PVT; linear: PVTv2, pooled to a fixed size", ("conv", "linear")),
            Hyper(
                "reduction", 4, "R: kernel and stride of the convolution; 8, 4, 2, 1 by stage in the paper"
            ),
            Hyper("pool", 7, "P: cells of an axis in the linear variant"),
            Hyper(
                "kernel_rank",
                3,
                "axes of the convolution's kernel; on grids with fewer only its first slices are used",
                (1, 2, 3),
            ),
        ),
        test_hyper={"reduction": 2},
        deviations=(
            "Trailing tokens of an axis that R does not divide reach the keys, with zeros beside them; the "
            "paper's code drops them.",
            "Causal cross attention is taken for defined: every query reads the reduced context by itself.",
            "One module serves grids of one to three axes, so that its kernel has kernel_rank of them; for "
            "the parameters of the paper take kernel_rank=2.",
        ),
    )

    def setup(self) -> None:
        """Projections of queries, keys with values, and output; the reduction where there is one."""
        c, r, rank = self.embed_dim, self.hp.reduction, self.hp.kernel_rank
        if r < 1 or self.hp.pool < 1:
            raise UsageError(
                f"{self.spec.id}: reduction and pool: observed {r} and {self.hp.pool}, expected ≥ 1"
            )
        self.q_proj = nn.Linear(c, c, bias=self.bias)
        self.kv_proj = nn.Linear(c, 2 * c, bias=self.bias)
        self.out_proj = nn.Linear(c, c, bias=self.bias)
        if not self._reduces:
            return
        shape = (r,) * rank if self.hp.variant == "conv" else ()
        bound = 1.0 / math.sqrt(c * r ** min(len(shape), 2))
        self.kernel = nn.Parameter(torch.empty(*shape, c, c).uniform_(-bound, bound))
        self.kernel_bias = nn.Parameter(torch.empty(c).uniform_(-bound, bound))
        self.norm = nn.LayerNorm(c)

    @property
    def _reduces(self) -> bool:
        return bool(self.hp.variant == "linear" or self.hp.reduction > 1)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        grid_kv: Grid = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C) on ``grid`` to the context (B, M, C) on ``grid_kv``, → (B, N, C)."""
        source = self.source(x, context)
        at = (grid_kv if self.pattern.cross else grid) or (source.shape[1],)
        coarse, hidden = self.reduce(source, at, key_padding_mask)
        q = self.split(self.q_proj(x), self.num_heads)
        k, v = (self.split(y, self.num_heads) for y in self.kv_proj(coarse).chunk(2, -1))
        o, _ = few_query(q, k, v, key_bias=padding_bias(hidden), need_lse=False, backend=self.backend)
        y: Tensor = self.out_proj(self.join(o))
        return y

    def reduce(
        self, x: Tensor, grid: tuple[int, ...], key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, ΠG, C) → cells (B, M', C), and the mask (B, M') of cells that hold padding only."""
        if not self._reduces:
            return x, key_padding_mask
        live = x.new_ones(*x.shape[:2], 1)
        if key_padding_mask is not None:
            dead = key_padding_mask.unsqueeze(-1)
            x, live = x.masked_fill(dead, 0.0), live.masked_fill(dead, 0.0)
        both = torch.cat((x, live), -1).reshape(x.shape[0], *grid, -1)
        coarse, hidden = self._pooled(both) if self.hp.variant == "linear" else self._convolved(both)
        return coarse, None if key_padding_mask is None else hidden

    def _convolved(self, both: Tensor) -> tuple[Tensor, Tensor]:
        cells = _patches(both, self.hp.reduction)
        coarse = (
            cells[..., :-1].flatten(2) @ self._kernel_on(both.dim() - 2).flatten(0, -2) + self.kernel_bias
        )
        return self.norm(coarse), ~cells[..., -1].any(-1)

    def _pooled(self, both: Tensor) -> tuple[Tensor, Tensor]:
        for axis, size in enumerate(both.shape[1:-1], 1):
            bins = _bins(size, self.hp.pool, both)
            both = torch.tensordot(both, bins, ([axis], [1])).movedim(-1, axis)
        total, count = both[..., :-1].flatten(1, -2), both[..., -1:].flatten(1, -2)
        coarse = (total / count.clamp_min(1)) @ self.kernel + self.kernel_bias
        return F.gelu(self.norm(coarse)), count.squeeze(-1) == 0

    def _kernel_on(self, rank: int) -> Tensor:
        """The kernel for grids of ``rank`` axes: the missing axes have length 1, beside zeros."""
        if rank > self.hp.kernel_rank:
            raise UsageError(
                f"{self.spec.id}: observed a grid of {rank} axes, expected at most kernel_rank = "
                f"{self.hp.kernel_rank}"
            )
        kernel: Tensor = self.kernel
        for _ in range(self.hp.kernel_rank - rank):
            kernel = kernel[0]
        return kernel

    def flops(self, n: int, m: int, *, grid: Grid = None, grid_kv: Grid = None) -> int:
        """Projections, 4·C for every query and cell, and what makes the cells."""
        c, r, p = self.embed_dim, self.hp.reduction, self.hp.pool
        at = (grid_kv if self.pattern.cross else grid) or (m,)
        if self.hp.variant == "conv":
            cells = math.prod(-(-size // r) for size in at)
            making = 2 * cells * r ** len(at) * c * c if r > 1 else 0
        else:
            cells = p ** len(at)
            pooling = sum(p ** (axis + 1) * math.prod(at[axis:]) for axis in range(len(at)))
            making = 2 * pooling * (c + 1) + 2 * cells * c * c
        return int(4 * n * c * c + 4 * cells * c * c + 4 * n * cells * c + making)


def _patches(x: Tensor, size: int) -> Tensor:
    """(B, *G, C) → (B, cells, size^r, C), row-major in both; axes end in zeros up to a multiple of size."""
    rank = x.dim() - 2
    ends = [end for length in reversed(x.shape[1:-1]) for end in (0, -length % size)]
    x = F.pad(x, (0, 0, *ends))
    for axis in range(rank):
        at = 1 + 2 * axis
        x = x.reshape(*x.shape[:at], -1, size, *x.shape[at + 1 :])
    cells, inside = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    x = x.permute(0, *cells, *inside, 2 * rank + 1)
    return x.flatten(1 + rank, 2 * rank).flatten(1, rank)


def _bins(size: int, count: int, like: Tensor) -> Tensor:
    """(count, size), 1 where a bin ⌊i·size/count⌋ .. ⌈(i + 1)·size/count⌉ − 1 holds a position."""
    i = torch.arange(count, device=like.device).unsqueeze(-1)
    at = torch.arange(size, device=like.device)
    return ((at >= i * size // count) & (at < -((i + 1) * -size // count))).to(like.dtype)
