"""Block oracle: each block of queries keeps the key blocks with the most softmax mass, which it computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, Pattern, SparseAttention, Spec, causal_pairs
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import Selection, block_mass, block_sparse, flash, padding_bias
from attnbench.kernels.selection import diagonal, topk, topp, visible


class BlockTopkOracle(SparseAttention):
    """Softmax attention over the key blocks that hold the most weight of each block of queries."""

    spec = Spec(
        id="block_topk_oracle",
        name="Block-mass oracle",
        family="sparse",
        kind="core",
        paper=Paper(
            "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", 2024, arxiv="2410.13276"
        ),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC),
        summary="The best choice of key blocks for each block of queries: what block selectors are "
        "compared with.",
        formula="W_IJ = Σ_{i ∈ I, j ∈ J} softmax(q kᵀ/√D)_ij; row I keeps the ⌈share·visible⌉ largest W_IJ",
        cost="4·H·N·M·D FLOPs to find the mass and 4·H·P·D for P kept pairs, 4·H·⌈N/b⌉·⌈M/b⌉ bytes",
        causality="selection_leaky",
        query_separable=False,
        permutation_invariant=False,
        selection="softmax",
        grouped_kv=True,
        ops=("block_mass", "block_sparse"),
        hyper=(
            Hyper("block", 64, "tokens of a block, of queries and of keys"),
            Hyper("share", 0.2, "share of the visible blocks that a row keeps, rounded up"),
            Hyper(
                "top_p",
                None,
                "keep the fewest blocks that hold this share of the mass instead (0.9 is usual)",
            ),
            Hyper(
                "reduce",
                "sum",
                "mass of a block: the sum or the largest of its weights",
                choices=("sum", "max"),
            ),
        ),
        test_hyper={"block": 4, "share": 0.5},
        padding="blocks are counted in positions, which dropping a key shifts",
        deviations=(
            "The oracle of several papers, published by none as a mechanism; named after the one whose "
            "gate learns it.",
            "The diagonal block is forced under CS: without it the first rows of a block might see nothing.",
            "CC is not offered: the mass of a block sums over later queries.",
            "A padded key counts in the mass of its block as one with score zero; it is never attended to.",
        ),
    )

    def setup(self) -> None:
        """Refuse a selection of nothing."""
        hp = self.hp
        if hp.block < 1 or not 0 < hp.share <= 1 or (hp.top_p is not None and not 0 < hp.top_p <= 1):
            raise UsageError(
                f"block_topk_oracle: observed block={hp.block}, share={hp.share}, top_p={hp.top_p}, "
                "expected a positive block and shares above 0 and at most 1"
            )

    @classmethod
    def at_density(cls, density: float, n: int, m: int, pattern: Pattern) -> Mapping[str, Any]:
        """The share of the blocks of a row is the density."""
        return {"share": density}

    @torch.no_grad()
    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Selection:
        """Lists of key blocks of every block of queries and head, from the mass of dense attention."""
        n, m, b = q.shape[2], k.shape[2], self.hp.block
        causal = self.pattern is Pattern.CS
        if key_padding_mask is not None:
            k = k.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        bias = padding_bias(key_padding_mask)
        _, lse = flash(q, k, k[..., :1], causal=causal, key_bias=bias, backend=self._dense_backend)
        assert lse is not None
        mass = block_mass(
            q, k, lse, block_q=b, block_k=b, causal=causal, reduce=self.hp.reduce, backend=self.backend
        )
        seen = visible(n, m, b, b, causal, q.device)
        forced = diagonal(n, m, b, b, q.device) & seen if causal else None
        if self.hp.top_p is not None:
            mask = topp(mass, self.hp.top_p, seen, forced)
        else:
            count = (seen.sum(-1, keepdim=True) * self.hp.share).ceil()
            mask = topk(mass, count, seen, forced)
        return Selection.from_block_mask(mask, b, b, n, m)

    @property
    def _dense_backend(self) -> str:
        return self.backend if self.backend in ("reference", "torch", "triton") else "auto"

    def consume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: Selection,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention over the selected blocks."""
        return block_sparse(
            q,
            k,
            v,
            selection,
            causal=self.pattern is Pattern.CS,
            key_bias=padding_bias(key_padding_mask),
            backend=self.backend,
        )

    def flops(self, n: int, m: int) -> int:
        """2·D twice for every visible pair, to find the mass, and 4·D for a share of them, to attend."""
        pairs = causal_pairs(n, m) if self.pattern is Pattern.CS else n * m
        share = 1.0 if self.hp.top_p is not None else self.hp.share
        return self.num_heads * self.head_dim * (4 * pairs + 4 * math.ceil(share * pairs))

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair of scores three times and one product with the values."""
        return self.num_heads * n * m * (8 * self.head_dim + 2)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The mass with its order, the lists, and the log-sum-exp, fp32."""
        blocks = -(-n // self.hp.block) * -(-m // self.hp.block)
        return self.num_heads * (16 * blocks + 8 * n)
