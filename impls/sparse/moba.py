"""MoBA: each query attends to its own block and the few key blocks whose mean key it is most similar to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, Pattern, SparseAttention, Spec
from attnbench.impls.sparse._masked_pool import block_mean, occupied
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import TokenBlocks, padding_bias, token_blocks
from attnbench.kernels.selection import topk

GATES_AT_ONCE = 2**25
"""Gate values that are in memory, and are sorted, at the same time."""


class Moba(SparseAttention):
    """Softmax attention over the K key blocks that every query of every head chooses for itself."""

    spec = Spec(
        id="moba",
        name="MoBA (mixture of block attention)",
        family="sparse",
        kind="core",
        paper=Paper("MoBA: Mixture of Block Attention for Long-Context LLMs", 2025, arxiv="2502.13189"),
        upstream="https://github.com/MoonshotAI/MoBA",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Routes each query to its own block and the blocks with the most similar mean keys.",
        formula="Ω_i: own block and the K − 1 earlier blocks J with the largest q_i·mean_{j ∈ J} k_j; "
        "o_i = softmax over j ∈ Ω_i, j ≤ i, of q_i·k_j / √D",
        cost="2·H·N·⌈M/S⌉·D FLOPs to route and 4·H·N·K·S·D to attend; H·N·K·4 bytes of lists",
        permutation_invariant=False,
        grouped_kv=True,
        selection="softmax",
        ops=("token_blocks",),
        hyper=(
            Hyper("block", 512, "keys S of a block"),
            Hyper("top_k", 3, "blocks K of a query, its own among them"),
        ),
        test_hyper={"block": 4, "top_k": 2},
        padding="blocks are counted in positions, which dropping a key shifts",
        deviations=(
            "NS, NC and CC are ours: NS forces the own block and has all others as candidates; NC and CC "
            "have no own block and choose among all.",
            "Gates are computed in fp32 at least; equal ones go to the lower block.",
            "The mean of a block leaves out padded keys, and a block of padding alone is not chosen.",
        ),
    )

    def setup(self) -> None:
        """Refuse a selection of nothing."""
        if self.hp.block < 1 or self.hp.top_k < 1:
            raise UsageError(
                f"moba: observed block={self.hp.block}, top_k={self.hp.top_k}, expected positive numbers"
            )

    @torch.no_grad()
    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> TokenBlocks:
        """The key blocks of every query of every head."""
        s, m = self.hp.block, k.shape[2]
        means = block_mean(k, s, key_padding_mask)
        b, kv_heads, blocks, _ = means.shape
        there = None if key_padding_mask is None else occupied(key_padding_mask, s)[:, None, None]
        rows = max(1, GATES_AT_ONCE // (b * q.shape[1] * blocks))
        counts, indices = [], []
        for first in range(0, q.shape[2], rows):
            some = q[:, :, first : first + rows].to(means.dtype)
            gates = some.unflatten(1, (kv_heads, -1)) @ means.unsqueeze(2).mT
            mask = self._chosen(gates.flatten(1, 2), first, there)
            lists = TokenBlocks.from_block_mask(mask, s, m, k_max=min(self.hp.top_k, blocks))
            counts.append(lists.counts)
            indices.append(lists.indices)
        return TokenBlocks(torch.cat(counts, 2), torch.cat(indices, 2), s, m)

    def _chosen(self, gates: Tensor, first: int, there: Tensor | None) -> Tensor:
        """The mask of the chosen blocks of the queries from ``first`` on, of the shape of ``gates``."""
        block = torch.arange(gates.shape[-1], device=gates.device)
        seen, own = torch.ones_like(block, dtype=torch.bool), None
        if not self.pattern.cross:
            query_block = torch.arange(first, first + gates.shape[2], device=gates.device) // self.hp.block
            own = block == query_block.unsqueeze(-1)
            if self.pattern is Pattern.CS:
                seen = block <= query_block.unsqueeze(-1)
        if there is not None:
            seen = seen & there
        gates = gates.nan_to_num(nan=0.0)  # of a query that diverged: the lists of all others still stand
        return topk(gates, self.hp.top_k, seen.expand(gates.shape), own)

    def consume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: TokenBlocks,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention over the chosen blocks."""
        return token_blocks(
            q,
            k,
            v,
            selection,
            causal=self.pattern is Pattern.CS,
            key_bias=padding_bias(key_padding_mask),
            backend=self.backend,
        )

    def flops(self, n: int, m: int) -> int:
        """2·D for the gate of every query and block, 4·D for every kept pair: exact but for a short block."""
        s, kept = self.hp.block, self.hp.top_k
        if self.pattern is Pattern.CS:
            pairs = sum(min(kept - 1, i // s) * s + i % s + 1 for i in range(n))
        else:
            pairs = n * min(kept * s, m)
        return self.num_heads * self.head_dim * (2 * n * -(-m // s) + 4 * pairs)

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return self.num_heads * self.head_dim * (2 * n * -(-m // self.hp.block) + 4 * n * m)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Mean keys and gates with their order in fp32, the lists, and the log-sum-exp."""
        blocks = -(-m // self.hp.block)
        kept = min(self.hp.top_k, blocks)
        return self.num_heads * (n * (12 * blocks + 4 * kept + 8) + 4 * blocks * self.head_dim)
