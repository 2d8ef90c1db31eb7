"""The controls as attention modules; see :mod:`attnbench.tasks.controls` for what they are for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Paper, Pattern, Spec


class NoMixing(Attention):
    """W_o W_v x in self attention, nothing at all from the context in cross attention."""

    spec = Spec(
        id="no_mixing",
        name="No mixing",
        family="control",
        kind="core",
        paper=Paper("Control of this benchmark: a model whose tokens cannot exchange information", 2026),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Every token keeps its own value; in cross patterns the context is not read.",
        formula="self: o_i = v_i; cross: o_i = 0",
        cost="none",
        row_sum="at_most_one",
        permutation_invariant=False,
        hot_loop="none",
    )

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
        """The values themselves (B, H, N, Dv), or zeros of that shape in a cross pattern."""
        if self.pattern.cross:
            return q.new_zeros(*q.shape[:3], v.shape[-1])
        if key_padding_mask is None:
            return v
        return v.masked_fill(key_padding_mask[:, None, :, None], 0.0)

    def flops(self, n: int, m: int) -> int:
        """Nothing is computed."""
        return 0


class Uniform(Attention):
    """The mean of the visible values: all that is left of attention when every score is equal."""

    spec = Spec(
        id="uniform",
        name="Uniform",
        family="control",
        kind="core",
        paper=Paper(
            "Accelerating Neural Transformer via an Average Attention Network",
            2018,
            arxiv="1805.00631",
            venue="ACL 2018",
        ),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Averages the visible values: mixing without addressing.",
        formula="o_i = mean of v_j over the visible j (j ≤ i under CS)",
        cost="none that is GEMM-like",
        hot_loop="a cumulative sum",
        deviations=("The average alone, without the feed-forward layer and the gates of the paper.",),
    )

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
        """Mean of the visible values (B, H, N, Dv), summed in fp32 or wider; 0 where nothing is visible."""
        wide = v if v.dtype == torch.float64 else v.float()
        kept = wide.new_ones(v.shape[0], 1, v.shape[2], 1)
        if key_padding_mask is not None:
            kept = kept.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        if self.pattern is Pattern.CS:
            total, count = (wide * kept).cumsum(2), kept.cumsum(2)
        else:
            total, count = (wide * kept).sum(2, keepdim=True), kept.sum(2, keepdim=True)
        return (total / count.clamp(min=1.0)).to(q.dtype).expand(*q.shape[:3], -1)

    def flops(self, n: int, m: int) -> int:
        """Sums only, no multiply-adds."""
        return 0
