"""Attention with fewer matrices: one for query and key, none for value and output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import flash, padding_bias


class MinimalAttention(Attention):
    """y = softmax(x W cᵀ/√C) c: every output is a convex combination of the tokens themselves."""

    spec = Spec(
        id="minimal_attention",
        name="Minimal attention (collapsed QK, no V, no O)",
        family="dense",
        kind="mixer",
        paper=Paper("Reducing the Transformer Architecture to a Minimum", 2024, arxiv="2410.13732"),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Collapses the matrices of query and key into one and drops those of value and output: a "
        "quarter of the parameters.",
        formula="y_i = Σ_j softmax_j(x_i W c_j/√C) c_j",
        cost="4·N·M·C FLOPs, and 2·N·C² for each matrix that is left, 4·N·H bytes",
        linear_in_v=False,
        ops=("flash",),
        hyper=(
            Hyper(
                "qk",
                "collapsed",
                "collapsed: one matrix, one head of width C; symmetric: W_K = W_Q; separate: as usual",
                choices=("collapsed", "symmetric", "separate"),
            ),
            Hyper("vo", False, "keep W_V and W_O; without, values are the tokens' own channels"),
        ),
        deviations=(
            "Collapsed has one head, whatever num_heads is: one matrix of width C cannot be divided.",
            "Without V and O several heads take equal slices of the channels; the paper has one head there.",
            "No projection has a bias: the paper counts matrices. Dropping the MLP is the model's matter.",
        ),
    )

    def setup(self) -> None:
        """Create the matrices that are left."""
        hp, c = self.hp, self.embed_dim
        self.heads = 1 if hp.qk == "collapsed" else self.num_heads
        if hp.qk != "collapsed" and self.num_kv_heads != self.num_heads:
            raise UsageError(
                f"minimal_attention with qk={hp.qk!r}: observed {self.num_kv_heads} key heads for "
                f"{self.num_heads} query heads, expected as many: both sides share matrices or channels"
            )
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(c, c, bias=False) if hp.qk == "separate" else None
        self.to_v = nn.Linear(c, c, bias=False) if hp.vo else None
        self.to_out = nn.Linear(c, c, bias=False) if hp.vo else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C) to itself or to the context (B, M, C)."""
        tokens = self.source(x, context)
        q = self.to_q(x)
        values = tokens if self.to_v is None else self.to_v(tokens)
        o, _ = flash(
            self.split(q, self.heads),
            self.split(self._keys(q, tokens), self.heads),
            self.split(values, self.heads),
            causal=self.pattern is Pattern.CS,
            key_bias=padding_bias(key_padding_mask),
            need_lse=False,
            backend=self.backend,
        )
        y = self.join(o)
        return y if self.to_out is None else self.to_out(y)

    def _keys(self, q: Tensor, tokens: Tensor) -> Tensor:
        """Keys (B, M, C): the tokens, or a projection of them, which in self attention may be that of q."""
        if self.hp.qk == "collapsed":
            return tokens
        if self.to_k is not None:
            return self.to_k(tokens)
        return self.to_q(tokens) if self.pattern.cross else q

    def flops(self, n: int, m: int) -> int:
        """4·C for every visible pair, and the projections that are left."""
        pairs = n * m
        if self.pattern is Pattern.CS:
            pairs = n * m - n * (n - 1) // 2 if m >= n else m * (m + 1) // 2
        return 4 * pairs * self.embed_dim + self._matrices_flops(n, m)

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return 4 * n * m * self.embed_dim + self._matrices_flops(n, m)

    def _matrices_flops(self, n: int, m: int) -> int:
        own_keys = self.to_k is not None or (self.hp.qk == "symmetric" and self.pattern.cross)
        on_queries, on_keys = 1 + int(self.hp.vo), int(own_keys) + int(self.hp.vo)
        return 2 * self.embed_dim**2 * (on_queries * n + on_keys * m)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Projected queries, keys and values, and the log-sum-exp, fp32, kept for the backward."""
        on_keys = int(self.to_k is not None) + int(self.hp.vo)
        return self.embed_dim * (n + on_keys * m) * itemsize + 4 * self.heads * n
