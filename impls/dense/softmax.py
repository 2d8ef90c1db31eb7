"""Softmax attention, the baseline that everything else is compared with; with grouped keys and sinks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import flash, merge, padding_bias

SINKS = ("none", "off_by_one", "logit", "kv")


class Softmax(Attention):
    """o_i = Σ_j p_ij v_j with p = softmax(scale · q kᵀ) over the visible keys."""

    spec = Spec(
        id="softmax",
        name="Softmax attention",
        family="dense",
        kind="core",
        paper=Paper("Attention Is All You Need", 2017, arxiv="1706.03762"),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Every query averages all visible values, weighted by the exponential of its scaled scores.",
        formula="o_i = Σ_j softmax_j(q_i·k_j / √D) v_j",
        cost="O(N·M·D) time, O(N) extra memory",
        upstream="pytorch/pytorch scaled_dot_product_attention; Dao-AILab/flash-attention",
        exact=True,
        grouped_kv=True,
        ops=("flash",),
        hyper=(
            Hyper("scale", None, "multiplier of the scores; 1/√D when None"),
            Hyper("softcap", 0.0, "cap > 0 replaces a score s by cap·tanh(s/cap)"),
            Hyper(
                "sink",
                "none",
                "extra term in the denominator: 1 (off_by_one), a learned e^σ per head (logit), "
                "or learned key-value pairs that every query sees (kv)",
                choices=SINKS,
            ),
            Hyper("n_sink", 1, "learned key-value pairs of sink kv"),
        ),
        deviations=(
            "Grouped key and value heads follow GQA (arXiv 2305.13245): query head h reads head ⌊h·Hkv/H⌋.",
            "For N ≠ M the causal mask is aligned at the last token: query i sees keys j ≤ i + M − N.",
            "Sinks follow StreamingLLM (arXiv 2309.17453) and the per-head sink logits of gpt-oss.",
        ),
    )

    def setup(self) -> None:
        """Create the learned sink, when there is one."""
        if self.hp.sink == "logit":
            self.sink_logit = nn.Parameter(torch.zeros(self.num_heads))
        if self.hp.sink == "kv":
            shape = (self.num_kv_heads, self.hp.n_sink, self.head_dim)
            self.sink_key = nn.Parameter(0.02 * torch.randn(shape))
            self.sink_value = nn.Parameter(torch.zeros(shape))

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
        """Attend from q (B, H, N, D) to k and v (B, Hkv, M, ·); a row without a visible key is 0.

        Raises UsageError for values of another width than the learned ones of sink kv.
        """
        scale = 1.0 / math.sqrt(q.shape[-1]) if self.hp.scale is None else self.hp.scale
        options: dict[str, Any] = {"scale": scale, "softcap": self.hp.softcap, "backend": self.backend}
        with_kv_sink = self.hp.sink == "kv"
        if with_kv_sink and v.shape[-1] != self.head_dim:
            raise UsageError(
                f"softmax with sink='kv': observed values of width {v.shape[-1]}, "
                f"expected {self.head_dim}, the width of the learned ones"
            )
        o, lse = flash(
            q,
            k,
            v,
            causal=self.pattern is Pattern.CS,
            key_bias=padding_bias(key_padding_mask),
            sink=self._sink(q),
            need_lse=with_kv_sink,
            **options,
        )
        if not with_kv_sink:
            return o
        batch = q.shape[0]
        sink_k = self.sink_key.expand(batch, -1, -1, -1)
        sink_v = self.sink_value.expand(batch, -1, -1, -1)
        sink_o, sink_lse = flash(q, sink_k, sink_v, **options)
        assert lse is not None  # need_lse is True
        assert sink_lse is not None
        return merge(o, lse, sink_o, sink_lse)[0]

    def _sink(self, q: Tensor) -> Tensor | None:
        """The exponent of the extra denominator term, broadcastable to (B, H, N)."""
        if self.hp.sink == "off_by_one":
            return q.new_zeros(1, 1, 1)
        if self.hp.sink == "logit":
            return self.sink_logit.view(1, -1, 1)
        return None

    def flops(self, n: int, m: int) -> int:
        """4·H·P·D for P visible pairs; a sink of n pairs adds n keys."""
        pairs = n * m
        if self.pattern is Pattern.CS:
            pairs = n * m - n * (n - 1) // 2 if m >= n else m * (m + 1) // 2
        if self.hp.sink == "kv":
            pairs += n * self.hp.n_sink
        return 4 * self.num_heads * pairs * self.head_dim

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        extra = self.hp.n_sink if self.hp.sink == "kv" else 0
        return 4 * self.num_heads * n * (m + extra) * self.head_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exp, fp32, kept for the backward."""
        return 4 * self.num_heads * n
