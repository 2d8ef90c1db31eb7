"""Pointer Networks: an additive score, w·tanh(W₁ e_j + W₂ d_i), and a softmax that points at an input."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnbench.impls.base import Attention, Grid, causal_pairs
from attnbench.impls.spec import Paper, Pattern, Spec

PAIRS_AT_ONCE = 1 << 22
"""Elements of tanh(k + q) that the torch backend holds at a time: 16 MiB in fp32."""


class PointerAttention(Attention):
    """p_ij = softmax_j(w·tanh(q_i + k_j)) with q = W₂ d, k = W₁ e; read: o_i = Σ_j p_ij v_j."""

    spec = Spec(
        id="pointer_attention",
        name="Pointer Networks",
        family="cross",
        kind="core",
        paper=Paper("Pointer Networks", 2015, arxiv="1506.03134", venue="NeurIPS 2015"),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Scores a pair by a one-layer network of both tokens instead of a product; the weights are "
        "the output of a decoder that points.",
        formula="u_ij = w·tanh(W₁ e_j + W₂ d_i), p_i = softmax_j(u_ij), o_i = Σ_j p_ij v_j",
        cost="4·H·N·M·D elementwise operations, one a tanh, and 2·H·N·M·D FLOPs to read; 4·H·N·M bytes",
        hot_loop="tanh(q_i + k_j) elementwise over N·M·D, bound by the rate of tanh, then one batched GEMM",
        deviations=(
            "Reads values with the weights, and has heads: with one head W₁ and W₂ are the paper's, of "
            "A = C rows. The distribution itself is log_probabilities().",
            "The projections have a bias unless built with bias=False; the paper's have none.",
            "w is drawn uniformly from ±1/√D, as a linear layer's row.",
        ),
        flops_note="Counters see the product with the values alone; flops() adds 4 operations for every "
        "element of the scores: two additions, a tanh, a multiplication.",
    )

    def setup(self) -> None:
        """Create w, one row for each head."""
        bound = 1.0 / math.sqrt(self.head_dim)
        weight = torch.empty(self.num_heads, self.head_dim).uniform_(-bound, bound)
        self.score_weight = nn.Parameter(weight)

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
        """Read v (B, H, M, Dv) where q (B, H, N, D) points among k (B, H, M, D); a row without a key is 0.

        The reference holds all N·M·D elements; the torch backend some rows, which it computes again for the
        gradient.
        """
        if self.backend == "reference":
            return self._rows(q, k, v, self._hidden(q, k, key_padding_mask, None))
        hidden = self._hidden(q, k, key_padding_mask, None)
        size = max(1, PAIRS_AT_ONCE // max(1, k.numel()))
        parts = []
        for first in range(0, q.shape[2], size):
            rows = slice(first, first + size)
            masked = hidden if hidden is None or hidden.shape[-2] == 1 else hidden[..., rows, :]
            compute = partial(checkpoint, self._rows, use_reentrant=False, preserve_rng_state=False)
            parts.append(compute(q[:, :, rows], k, v, masked))
        return torch.cat(parts, 2)

    def log_probabilities(
        self,
        q: Tensor,
        k: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Logarithms of p (B, H, N, M) for q (B, H, N, D), k (B, H, M, D), at least in fp32; −inf: no weight.

        ``allowed`` (B, N, M) is False for keys that a decoder may not point at, such as those it has chosen.
        """
        scores = self._scores(q, k, self._hidden(q, k, key_padding_mask, allowed))
        empty = (scores == -math.inf).all(-1, keepdim=True)
        return scores.masked_fill(empty, 0.0).log_softmax(-1).masked_fill(scores == -math.inf, -math.inf)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        scores = self._scores(q, k, hidden)
        empty = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        return (weights.to(v.dtype) @ v).to(q.dtype)

    def _scores(self, q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
        """w·tanh(q_i + k_j), (B, H, N, M), in fp32 (fp64 for fp64 inputs); −inf where hidden."""
        wide = torch.promote_types(q.dtype, torch.float32)
        bent = torch.tanh(q.to(wide).unsqueeze(-2) + k.to(wide).unsqueeze(-3))
        scores = (bent * self.score_weight.to(wide)[:, None, None, :]).sum(-1)
        return scores if hidden is None else scores.masked_fill(hidden, -math.inf)

    def _hidden(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, allowed: Tensor | None
    ) -> Tensor | None:
        """Pairs that have no weight, bool, broadcastable to (B, 1, N, M): future, padding, not allowed."""
        n, m = q.shape[2], k.shape[2]
        hidden = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        if allowed is not None:
            chosen = ~allowed.unsqueeze(1)
            hidden = chosen if hidden is None else hidden | chosen
        if self.pattern is Pattern.CS:
            future = torch.ones(1, 1, n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
            hidden = future if hidden is None else hidden | future
        return hidden

    def pairs(self, n: int, m: int) -> int:
        """Visible pairs of one head."""
        if self.pattern is not Pattern.CS:
            return n * m
        return causal_pairs(n, m)

    def flops(self, n: int, m: int) -> int:
        """For every visible pair 4·D elementwise operations and 2·D for the value."""
        return 6 * self.pairs(n, m) * self.embed_dim

    def counted_flops(self, n: int, m: int) -> int:
        """The product of every weight with the values, which is all that a counter sees."""
        return 2 * n * m * self.embed_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Scores and weights in fp32, and the elements held at a time."""
        return 8 * self.num_heads * n * m + 4 * min(n * m * self.embed_dim, PAIRS_AT_ONCE)
