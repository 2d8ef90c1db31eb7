"""Permuted block-sparse attention: sorted inside segments, the important keys share blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, Pattern, SparseAttention, Spec
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import Selection, block_sparse, padding_bias
from attnbench.kernels.selection import pool, topp


@dataclass(frozen=True, eq=False)
class PermutedBlocks:
    """Blocks of permuted keys: ``order`` (B, H, M) int64 has the key at each place, ``blocks`` the places."""

    order: Tensor
    blocks: Selection

    def to_dense_mask(self) -> Tensor:
        """(B, H, N, M) bool, True where query i keeps key j, in the original order of the keys."""
        places = self.blocks.to_dense_mask()
        index = self.order.unsqueeze(-2).expand(*self.order.shape[:2], self.blocks.n, -1)
        return torch.zeros_like(places.expand(index.shape)).scatter(-1, index, places.expand(index.shape))

    def density(self, causal: bool) -> Tensor:
        """Pairs of tokens kept / pairs allowed, a fp64 scalar; causal: j ≤ i + M − N."""
        n, m = self.blocks.n, self.blocks.m
        places = self.blocks.to_dense_mask()
        if not causal:
            return places.double().mean()
        last = torch.arange(n, device=self.order.device) + (m - n)
        allowed = self.order.unsqueeze(-2) <= last.unsqueeze(-1)
        return (places & allowed).sum().double() / allowed.sum()


class PbsAttention(SparseAttention):
    """Softmax attention over blocks of keys that were sorted by importance inside their segments."""

    spec = Spec(
        id="pbs_attn",
        name="PBS-Attn",
        family="sparse",
        kind="core",
        paper=Paper("Sparser Block-Sparse Attention via Token Permutation", 2025, arxiv="2510.21270"),
        upstream="https://github.com/xinghaow99/pbs-attn",
        patterns=(Pattern.NS, Pattern.CS),
        summary="Gathers the keys that matter into few blocks by sorting inside segments, then selects "
        "blocks.",
        formula="a_j = mean of softmax(q_last kᵀ/√D)_j over the last block of queries; keys sorted by a "
        "inside segments; row I keeps its own segment, the block of token 0, and the earlier blocks that "
        "reach mass τ in softmax(q̄_I k̄_Jᵀ/√D)",
        cost="2·H·b·N·D FLOPs for the order, 2·H·(N/b)²·D to select, 4·H·P·D for P kept pairs; a permuted "
        "copy of k, v",
        causality="selection_leaky",
        query_separable=False,
        permutation_invariant=False,
        selection="softmax",
        ops=("block_sparse",),
        hyper=(
            Hyper("block", 128, "tokens b of a block"),
            Hyper(
                "segment", 256, "tokens of a segment, a multiple of the block, inside which keys are sorted"
            ),
            Hyper("top_p", 0.9, "mass τ of the pooled weights that the selected blocks reach"),
            Hyper("force_first", True, "always keep the block that holds token 0"),
        ),
        test_hyper={"block": 4, "segment": 8, "top_p": 0.5},
        padding="blocks and segments are counted in positions, which dropping a key shifts",
        deviations=(
            "NS is ours: keys are sorted over the whole sequence, all blocks are candidates, only the "
            "block of token 0 is forced.",
            "The threshold keeps the element that reaches τ, and everything where rounding keeps the sum "
            "below it; the release keeps nothing there.",
        ),
    )

    def setup(self) -> None:
        """Refuse sizes that do not fit each other."""
        hp = self.hp
        if hp.block < 1 or hp.segment < 1 or hp.segment % hp.block or not 0 < hp.top_p <= 1:
            raise UsageError(
                f"pbs_attn: observed block={hp.block}, segment={hp.segment}, top_p={hp.top_p}, "
                "expected a segment that is a multiple of the block, and 0 < top_p <= 1"
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
    ) -> PermutedBlocks:
        """The order of the keys and the lists of blocks, per query head."""
        if key_padding_mask is not None:  # pooled means and the order must not depend on what padding holds
            padded = key_padding_mask[:, None, :, None]
            q, k = q.masked_fill(padded, 0.0), k.masked_fill(padded, 0.0)
        order = self._order(q, k, key_padding_mask)
        permuted = k.gather(2, order.unsqueeze(-1).expand(*order.shape, k.shape[-1]))
        n, m, b = q.shape[2], k.shape[2], self.hp.block
        wide = torch.promote_types(q.dtype, torch.float32)
        pooled_q, pooled_k = pool(q, b).to(wide), pool(permuted, b).to(wide)
        scores = pooled_q @ pooled_k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        candidates, forced = self._candidates(scores.shape[-2], scores.shape[-1], n, q.device)
        weights = scores.masked_fill(~candidates, torch.finfo(wide).min).softmax(-1)
        mask = topp(weights, self.hp.top_p, candidates.expand(weights.shape)) | forced
        if self.hp.force_first:
            place = (order == 0).int().argmax(-1) // b
            mask = mask | (torch.arange(scores.shape[-1], device=q.device) == place[..., None, None])
        if self.pattern is Pattern.CS:  # a block of a later segment has no key that may be seen
            mask = mask & (candidates | forced)
        return PermutedBlocks(order, Selection.from_block_mask(mask, b, b, n, m))

    def _order(self, q: Tensor, k: Tensor, padded: Tensor | None) -> Tensor:
        """(B, H, M) int64: the keys by falling importance inside each complete segment, the rest in place."""
        m = k.shape[2]
        length = self.hp.segment if self.pattern is Pattern.CS else m
        whole = m // length * length
        places = torch.arange(m, device=k.device).expand(*k.shape[:3])
        if whole == 0 or (self.pattern is Pattern.CS and m <= length):
            return places
        wide = torch.promote_types(q.dtype, torch.float32)
        rows = q[:, :, -self.hp.block :].to(wide)
        scores = rows @ k[:, :, :whole].to(wide).transpose(-1, -2) / math.sqrt(q.shape[-1])
        if padded is not None:
            scores = scores.masked_fill(padded[:, None, None, :whole], torch.finfo(wide).min)
        importance = scores.softmax(-1).mean(-2).unflatten(-1, (-1, length))
        inside = importance.sort(dim=-1, descending=True, stable=True).indices
        first = torch.arange(0, whole, length, device=k.device).unsqueeze(-1)
        return torch.cat([(inside + first).flatten(-2), places[..., whole:]], -1)

    def _candidates(self, rows: int, cols: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Blocks that compete, and blocks that are always kept, as (Tq, Tk) bool."""
        if self.pattern is not Pattern.CS:
            everything = torch.ones(rows, cols, dtype=torch.bool, device=device)
            return everything, ~everything
        per_segment = self.hp.segment // self.hp.block
        segment = torch.arange(rows, device=device) // per_segment
        return segment[None, :] < segment[:, None], segment[None, :] == segment[:, None]

    def consume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: PermutedBlocks,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention over the selected blocks of permuted keys; queries and output are in place."""
        order = selection.order
        index = order.unsqueeze(-1)
        bias = padding_bias(key_padding_mask)
        return block_sparse(
            q,
            k.gather(2, index.expand(*order.shape, k.shape[-1])),
            v.gather(2, index.expand(*order.shape, v.shape[-1])),
            selection.blocks,
            causal=self.pattern is Pattern.CS,
            k_pos=order.int(),
            key_bias=None if bias is None else bias.expand(order.shape).gather(-1, order),
            backend=self.backend,
        )

    def flops(self, n: int, m: int) -> int:
        """Scores of the last block of queries, pooled scores, and 4·D for every visible pair, a bound."""
        b = self.hp.block
        causal = self.pattern is Pattern.CS
        pairs = n * (n + 1) // 2 if causal else n * m
        length = self.hp.segment if causal else m
        whole = 0 if causal and m <= length else m // length * length
        pooled = 2 * -(-n // b) * -(-m // b)
        return self.num_heads * self.head_dim * (2 * min(b, n) * whole + pooled + 4 * pairs)

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        causal = self.pattern is Pattern.CS
        pairs = n * (n + 1) // 2 if causal else n * m
        return self.flops(n, m) + 4 * self.num_heads * self.head_dim * (n * m - pairs)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Permuted copies of k and v, the order, pooled scores and the log-sum-exp."""
        b = self.hp.block
        blocks = -(-n // b) * -(-m // b)
        return self.num_heads * (m * (2 * self.head_dim * itemsize + 8) + 8 * blocks + 4 * n)
