"""Exact top-k attention: each query keeps the keys with the largest scores, found by computing them all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, Pattern, SparseAttention, Spec
from attnbench.impls.sparse._density import keys_at
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import gather, padding_bias
from attnbench.kernels.token_selection import TokenKeys

QUERIES_AT_ONCE = 1024
"""Queries whose scores are in memory at the same time."""


class TopkOracle(SparseAttention):
    """Softmax attention over the k keys with the largest scores, or over the fewest that reach a mass."""

    spec = Spec(
        id="topk_oracle",
        name="Exact top-k attention",
        family="sparse",
        kind="core",
        paper=Paper("Memory-efficient Transformers via Top-k Attention", 2021, arxiv="2106.06899"),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="The best selection of k keys per query that there is: the upper bound of all selectors.",
        formula="o_i = softmax over Ω_i of q_i·k_j / √D, Ω_i: the k largest visible scores, ties to the "
        "lower j",
        cost="2·H·N·M·D FLOPs of scores and 4·H·N·k·D, H·1024·M·4 bytes of scores at once and H·N·k·4 of "
        "lists",
        selection="softmax",
        grouped_kv=True,
        ops=("gather",),
        hyper=(
            Hyper("top_k", 64, "keys k that a query keeps"),
            Hyper("share", None, "keep ⌈share·M⌉ keys instead"),
            Hyper(
                "top_p", None, "keep the fewest keys whose weights add up to top_p instead (0.95 is usual)"
            ),
        ),
        test_hyper={"top_k": 3},
        deviations=(
            "The papers use it in training; gradients reach the kept pairs only, the choice has none.",
            "Scores are computed in fp32 whatever the dtype: ties are frequent in bf16.",
        ),
    )

    def setup(self) -> None:
        """Refuse a selection of nothing."""
        hp = self.hp
        for name, value, most in (
            ("top_k", hp.top_k, math.inf),
            ("share", hp.share, 1),
            ("top_p", hp.top_p, 1),
        ):
            if value is not None and not 0 < value <= most:
                raise UsageError(f"topk_oracle: observed {name}={value}, expected above 0 and at most {most}")

    @classmethod
    def at_density(cls, density: float, n: int, m: int, pattern: Pattern) -> Mapping[str, Any]:
        """Lists of as many keys as the density gives a query."""
        return {"top_k": keys_at(density, n, m, pattern)}

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> TokenKeys:
        """Lists of keys of every query and head, from scores in fp32 (fp64 for fp64 inputs)."""
        n, m = q.shape[2], k.shape[2]
        wide = torch.promote_types(q.dtype, torch.float32)
        keys = k.detach().to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
        lists = []
        for first in range(0, n, QUERIES_AT_ONCE):
            rows = q.detach()[:, :, first : first + QUERIES_AT_ONCE].to(wide)
            scores = rows @ keys / math.sqrt(q.shape[-1])
            if self.pattern is Pattern.CS:
                position = torch.arange(first, first + rows.shape[2], device=q.device) + (m - n)
                scores = scores.masked_fill(
                    torch.arange(m, device=q.device) > position.unsqueeze(-1), -math.inf
                )
            if key_padding_mask is not None:
                scores = scores.masked_fill(key_padding_mask[:, None, None, :], -math.inf)
            lists.append(self._largest(scores))
        return TokenKeys.from_indices(torch.cat(lists, 2), m)

    def _largest(self, scores: Tensor) -> Tensor:
        """(B, H, ·, K) int64: the kept keys of each row of scores, −1 where there are fewer."""
        order = scores.sort(dim=-1, descending=True, stable=True)
        live = order.values > -math.inf
        if self.hp.top_p is None:
            kept = min(self._count(scores.shape[-1]), scores.shape[-1])
            return order.indices[..., :kept].masked_fill(~live[..., :kept], -1)
        weights = torch.where(live, order.values, torch.finfo(scores.dtype).min).softmax(-1)
        before = weights.cumsum(-1) - weights
        return order.indices.masked_fill(~live | (before >= self.hp.top_p), -1)

    def _count(self, m: int) -> int:
        return int(self.hp.top_k) if self.hp.share is None else math.ceil(self.hp.share * m)

    def consume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: TokenKeys,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention over the listed keys."""
        return gather(
            q,
            k,
            v,
            selection,
            causal=self.pattern is Pattern.CS,
            key_bias=padding_bias(key_padding_mask),
            backend=self.backend,
        )

    def flops(self, n: int, m: int) -> int:
        """2·D for the score of every pair, and 4·D for each kept one (with top_p: each visible one)."""
        kept = m if self.hp.top_p is not None else min(m, self._count(m))
        if self.pattern is Pattern.CS:
            pairs = sum(min(kept, max(0, i + 1 + m - n)) for i in range(n))
        else:
            pairs = n * kept
        return 2 * self.num_heads * self.head_dim * (n * m + 2 * pairs)

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair twice: to select, and to mask."""
        return 6 * self.num_heads * n * m * self.head_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Scores of some queries with their order, and the lists."""
        kept = m if self.hp.top_p is not None else min(m, self._count(m))
        return self.num_heads * (12 * min(n, QUERIES_AT_ONCE) * m + 4 * n * kept)
