"""Sliding-window attention: each query sees the keys near it. CAB's "local" baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import MaskAttention, Pattern, Spec
from attnbench.impls.sparse._centres import centres
from attnbench.impls.sparse._density import keys_at
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels.flash.reference import visible_pairs


class LocalWindow(MaskAttention):
    """Softmax attention over a window: |i − j| ≤ w in NS, the w newest keys in CS."""

    spec = Spec(
        id="local_window",
        name="Local window attention",
        family="sparse",
        kind="mask",
        paper=Paper(
            "Effective Approaches to Attention-based Neural Machine Translation", 2015, arxiv="1508.04025"
        ),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Softmax attention to the keys within w positions: on both sides in NS, w past ones in CS.",
        formula="o_i = Σ_{j ∈ Ω_i} softmax_j(q_i·k_j / √D) v_j, Ω_i = {j : |i − j| ≤ w}; CS: 0 ≤ i − j < w",
        cost="O(N·w·D) time, O(N) extra memory",
        upstream="Shark-NLP/CAB efficient_attention/modules/local_attention.py (arXiv 2210.07661)",
        query_separable=True,
        permutation_invariant=False,
        grouped_kv=True,
        ops=("flash",),
        hyper=(
            Hyper(
                "window", 15, "keys on each side of a query (NS, NC), or past keys with its own (CS)", cab=16
            ),
        ),
        test_hyper={"window": 5},
        padding="windows are counted in positions, which dropping a key shifts",
        deviations=(
            "NC and CC are ours: the window is centred at the key that corresponds to the query's share of "
            "the sequence, c_i = round(i·(M − 1)/(N − 1)) in integers. Under CC that would depend on N, "
            "which a decoder does not know, so it is c_i = min(i, M − 1) there.",
            "CAB's module gathers windows and combines padding and window masks by AND, so that padded keys "
            "may be attended; here a padded key is removed, and a row left without keys is 0.",
        ),
    )

    def setup(self) -> None:
        """Refuse a window without a key, which ``flash`` would take for an unbounded one."""
        least = 1 if self.pattern is Pattern.CS else 0
        if self.hp.window < least:
            raise UsageError(
                f"local_window under {self.pattern}: observed window={self.hp.window}, "
                f"expected at least {least}"
            )

    @classmethod
    def at_density(cls, density: float, n: int, m: int, pattern: Pattern) -> Mapping[str, Any]:
        """A window of as many keys as the density gives a query."""
        kept = keys_at(density, n, m, pattern)
        return {"window": kept if pattern is Pattern.CS else kept // 2}

    def mask_options(self, n: int, m: int, device: torch.device) -> Mapping[str, Any]:
        """The window around each query's position on the axis of the keys."""
        w = self.hp.window
        if self.pattern is Pattern.CS:
            return {"causal": True, "window": (w - 1, 0)}
        if self.pattern is Pattern.NS:
            return {"window": (w, w)}
        return {"window": (w, w), "q_pos": centres(n, m, device, causal=self.pattern is Pattern.CC)}

    def visible(self, n: int, m: int, device: torch.device) -> Tensor:
        """The mask, bool (N, M)."""
        options = {"causal": False, "window": None, "q_pos": None, **self.mask_options(n, m, device)}
        mask = visible_pairs(n, m, device=device, **options)
        assert mask is not None
        return mask

    def pairs(self, n: int, m: int) -> int:
        """Visible pairs, counted row by row from the ends of each window."""
        w = self.hp.window
        i = torch.arange(n)
        if self.pattern is Pattern.CS:
            position = i + m - n
            lo, hi = position - (w - 1), position
        else:
            centre = self.mask_options(n, m, i.device).get("q_pos", i)
            lo, hi = centre - w, centre + w
        return int((hi.clamp(max=m - 1) - lo.clamp(min=0) + 1).clamp(min=0).sum())

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exp, fp32, kept for the backward."""
        return 4 * self.num_heads * n
