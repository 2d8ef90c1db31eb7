"""SeerAttention: a small learnt gate on pooled queries and keys predicts which blocks of the map matter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, Pattern, SparseAttention, Spec
from attnbench.impls.sparse._masked_pool import block_extremes, block_mean, occupied
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import (
    Selection,
    TokenBlocks,
    block_mass,
    block_sparse,
    flash,
    padding_bias,
    token_blocks,
)
from attnbench.kernels.selection import diagonal, thr, topk, visible

LOSS_WEIGHT = 10.0
"""Multiplier of the distillation loss."""


class SeerAttention(SparseAttention):
    """Softmax attention over the key blocks that a gate, distilled from dense attention, predicts."""

    gate_q: nn.Parameter | None
    gate_k: nn.Parameter

    spec = Spec(
        id="seer_attention",
        name="SeerAttention",
        family="sparse",
        kind="core",
        paper=Paper(
            "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", 2024, arxiv="2410.13276"
        ),
        upstream="https://github.com/microsoft/SeerAttention",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="A learnt gate on pooled queries and keys selects key blocks, per block of queries or per "
        "query.",
        formula="P_g = softmax((pool_mean(q) W_q)([pool_max(k); pool_min(k)] W_k)ᵀ / √D_g) over blocks; keep "
        "the largest, the diagonal, and everything in the last two rows",
        cost="4·H·⌈M/b⌉·D·D_g + 2·H·⌈N/b⌉·⌈M/b⌉·D_g FLOPs to select, 4·H·P·D for P kept pairs",
        causality="selection_leaky",
        query_separable=False,
        permutation_invariant=False,
        grouped_kv=True,
        selection="softmax",
        ops={
            Pattern.NS: ("block_sparse",),
            Pattern.CS: ("block_sparse",),
            Pattern.NC: ("block_sparse",),
            Pattern.CC: ("token_blocks",),
        },
        hyper=(
            Hyper("block", 64, "tokens b of a block"),
            Hyper("gate_dim", 128, "width D_g of the gate"),
            Hyper(
                "gate",
                "prefill",
                "one row of the gate per block of queries, or per query for all heads of a key head "
                "(arXiv 2506.08889), as always under CC",
                choices=("prefill", "decode"),
            ),
            Hyper(
                "method",
                "ratio",
                "keep a share of the blocks, those above a threshold, or a number of keys",
                choices=("ratio", "threshold", "budget"),
            ),
            Hyper("share", 0.5, "share of the visible pairs that ratio keeps, without forced blocks"),
            Hyper("threshold", 5e-4, "weight above which a block is kept; tuned for 32k to 128k keys"),
            Hyper("budget", 4096, "keys that budget keeps"),
            Hyper("force_double", False, "project pooled queries even where D = D_g"),
            Hyper(
                "rotary_base",
                None,
                "rotate the gate's queries and keys by the position of the first token of their block, as "
                "for models with rotary positions; given q and k are those before that step",
            ),
        ),
        test_hyper={"block": 4, "gate_dim": 6},
        padding="blocks are counted in positions, which dropping a key shifts",
        deviations=(
            "The default keeps a share of the blocks: the threshold of the release is for 500 blocks and "
            "more, and keeps all of a shorter sequence.",
            "The gate is random until fit() distils it from dense attention, and no other gradient reaches "
            "it: its parameters are frozen outside of fit().",
            "NS and NC are ours: no block is hidden and the last rows are not special; NC forces nothing.",
            "With gate='decode' under CS the block of the query is kept without being weighed, since its "
            "pooled keys read the future; the choice is then strictly causal.",
        ),
    )

    def setup(self) -> None:
        """Create the weights of the gate, frozen, and refuse what has no meaning."""
        self._check()
        d, width, kv = self.head_dim, self.hp.gate_dim, self.num_kv_heads
        if self._per_token:
            self.gate_q = _frozen(kv, self.num_heads // kv * d, width)
            self.gate_k = _frozen(kv, 2 * d, width)
        elif width != d or self.hp.force_double:
            self.gate_q = _frozen(self.num_heads, d, width)
            self.gate_k = _frozen(kv, 2 * d, width)
        else:
            self.gate_q = None
            self.gate_k = _frozen(self.num_heads, 2 * d, width)

    def _check(self) -> None:
        hp = self.hp
        if min(hp.block, hp.gate_dim, hp.budget) < 1 or not 0 < hp.share <= 1 or hp.threshold < 0:
            raise UsageError(
                f"seer_attention: observed block={hp.block}, gate_dim={hp.gate_dim}, budget={hp.budget}, "
                f"share={hp.share}, threshold={hp.threshold}, expected positive sizes, 0 < share <= 1 and a "
                "threshold of 0 or more"
            )
        if hp.rotary_base is not None and hp.gate_dim % 2:
            raise UsageError(
                f"seer_attention: observed gate_dim={hp.gate_dim} with rotary_base, expected an even number"
            )

    @property
    def _per_token(self) -> bool:
        return self.hp.gate == "decode" or self.pattern is Pattern.CC

    @property
    def _causal(self) -> bool:
        return self.pattern is Pattern.CS

    # ---- the gate --------------------------------------------------------------------------------------

    def gate(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """P_g: weights of the key blocks, in fp32 at least, 0 for blocks that are hidden.

        (B, H, ⌈N/b⌉, ⌈M/b⌉), or (B, Hkv, N, ⌈M/b⌉) per query. Differentiable in the weights of the gate.
        """
        queries = self._gate_queries(q, None if self.pattern.cross else key_padding_mask)
        keys = block_extremes(k, self.hp.block, key_padding_mask)
        weight = self.gate_k.to(keys.dtype)
        keys = keys.repeat_interleave(weight.shape[0] // keys.shape[1], 1) @ weight
        first = torch.arange(0, k.shape[2], self.hp.block, device=k.device)
        keys = self._rotated(keys, first).repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        logits = queries @ keys.mT / math.sqrt(self.hp.gate_dim)
        weighed = self._weighed(q.shape[2], k.shape[2], q.device)
        if key_padding_mask is not None:
            weighed = weighed & occupied(key_padding_mask, self.hp.block)[:, None, None]
        weights = logits.masked_fill(~weighed, torch.finfo(logits.dtype).min).softmax(-1)
        return weights.masked_fill(~weighed, 0.0)

    def _gate_queries(self, q: Tensor, padded: Tensor | None) -> Tensor:
        """(B, H, ⌈N/b⌉, D_g), or (B, Hkv, N, D_g) per query."""
        n = q.shape[2]
        if self._per_token:
            assert self.gate_q is not None  # it is there for every gate per query
            wide = torch.promote_types(q.dtype, torch.float32)
            grouped = q.to(wide).unflatten(1, (self.num_kv_heads, -1)).transpose(2, 3).flatten(3)
            return self._rotated(grouped @ self.gate_q.to(wide), torch.arange(n, device=q.device))
        pooled = block_mean(q, self.hp.block, padded)
        if self.gate_q is not None:
            pooled = pooled @ self.gate_q.to(pooled.dtype)
        return self._rotated(pooled, torch.arange(0, n, self.hp.block, device=q.device))

    def _rotated(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotate x (B, H, T, D_g) by the code of the positions (T), if there is one."""
        if self.hp.rotary_base is None:
            return x
        half = x.shape[-1] // 2
        steps = torch.arange(half, device=x.device, dtype=x.dtype) / half
        angle = position.to(x.dtype).unsqueeze(-1) * self.hp.rotary_base**-steps
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def _seen(self, n: int, m: int, device: torch.device) -> Tensor:
        """(rows, Tk) bool: blocks that causality leaves to each row of the gate."""
        return visible(n, m, 1 if self._per_token else self.hp.block, self.hp.block, self._causal, device)

    def _weighed(self, n: int, m: int, device: torch.device) -> Tensor:
        """(rows, Tk) bool: blocks that the gate weighs; per query under CS those that are complete."""
        seen = self._seen(n, m, device)
        if self._per_token and self._causal:
            return seen & ~diagonal(n, m, 1, self.hp.block, device)
        return seen

    def _forced(self, n: int, m: int, device: torch.device) -> Tensor | None:
        """(rows, Tk) bool: blocks that are kept whatever their weight; None in cross attention."""
        if self.pattern.cross:
            return None
        if self._per_token:
            return diagonal(n, m, 1, self.hp.block, device)
        forced = diagonal(n, m, self.hp.block, self.hp.block, device)
        if self._causal:
            rows = torch.arange(forced.shape[0], device=device).unsqueeze(-1)
            forced = forced | (rows >= forced.shape[0] - 2)
        return forced

    # ---- attending -------------------------------------------------------------------------------------

    @torch.no_grad()
    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Selection | TokenBlocks:
        """The key blocks of every block of queries, or of every query."""
        n, m, b = q.shape[2], k.shape[2], self.hp.block
        weights = self.gate(q, k, key_padding_mask)
        seen, forced = self._seen(n, m, q.device), self._forced(n, m, q.device)
        if key_padding_mask is not None:
            seen = seen & occupied(key_padding_mask, b)[:, None, None]
        seen = seen.expand(weights.shape)
        if self.hp.method == "threshold":
            mask = thr(weights, self.hp.threshold, seen, forced)
            if forced is None:  # a row that nothing is forced into keeps its best block
                mask = mask | topk(weights, 1, seen)
        else:
            mask = topk(weights, self._count(m), seen, forced)
        if self._per_token:
            return TokenBlocks.from_block_mask(mask, b, m)
        return Selection.from_block_mask(mask, b, b, n, m)

    def _count(self, m: int) -> int:
        """Blocks that a row keeps, forced ones among them; at most all."""
        blocks = -(-m // self.hp.block)
        if self.hp.method == "budget":
            return min(blocks, -(-self.hp.budget // self.hp.block))
        share = 1.0 - math.sqrt(1.0 - self.hp.share) if self._causal else self.hp.share
        return max(1, math.floor(share * blocks))

    def consume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: Selection | TokenBlocks,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention over the selected blocks."""
        bias = padding_bias(key_padding_mask)
        if isinstance(selection, TokenBlocks):
            return token_blocks(q, k, v, selection, causal=self._causal, key_bias=bias, backend=self.backend)
        return block_sparse(q, k, v, selection, causal=self._causal, key_bias=bias, backend=self.backend)

    # ---- learning --------------------------------------------------------------------------------------

    def distillation_loss(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """10·KL(G ‖ P_g), the mean over all blocks of the last three quarters of the rows.

        G is the largest weight of dense attention in each block, normalised per row; of a group of heads
        that share a row, the largest of all.
        """
        truth = self._block_maxima(q.detach(), k.detach(), key_padding_mask)
        weights = self.gate(q.detach(), k.detach(), key_padding_mask)
        first = weights.shape[2] // 4
        truth, weights = truth[:, :, first:], weights[:, :, first:]
        log = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
        return LOSS_WEIGHT * (torch.xlogy(truth, truth) - truth * log).mean()

    @torch.no_grad()
    def _block_maxima(self, q: Tensor, k: Tensor, padded: Tensor | None) -> Tensor:
        """G, of the shape of :meth:`gate`; rows that sum to 1, or 0 where nothing is weighed."""
        n, m = q.shape[2], k.shape[2]
        backend = self.backend if self.backend in ("reference", "torch", "triton") else "auto"
        if padded is not None:
            k = k.masked_fill(padded[:, None, :, None], 0.0)
        bias = padding_bias(padded)
        _, lse = flash(q, k, k[..., :1], causal=self._causal, key_bias=bias, backend=backend)
        assert lse is not None  # need_lse is True by default
        rows = 1 if self._per_token else self.hp.block
        largest = block_mass(
            q, k, lse, block_q=rows, block_k=self.hp.block, causal=self._causal, reduce="max", backend=backend
        )
        if self._per_token:
            largest = largest.unflatten(1, (self.num_kv_heads, -1)).amax(2)
        weighed = self._weighed(n, m, q.device)
        if padded is not None:
            weighed = weighed & occupied(padded, self.hp.block)[:, None, None]
        largest = largest.masked_fill(~weighed, 0.0)
        total = largest.sum(-1, keepdim=True)
        return largest / total.masked_fill(total == 0, 1.0)

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]], *, lr: float = 1e-3) -> list[float]:
        """Train the gate on pairs of q (B, H, N, D) and k (B, Hkv, M, D), one Adam step each; the losses."""
        weights = [w for w in (self.gate_q, self.gate_k) if w is not None]
        for w in weights:
            w.requires_grad_(True)
        optimiser = torch.optim.Adam(weights, lr=lr)
        losses = []
        try:
            for q, k in batches:
                optimiser.zero_grad()
                loss = self.distillation_loss(q, k)
                loss.backward()
                optimiser.step()
                losses.append(loss.detach())
        finally:
            for w in weights:
                w.requires_grad_(False)
                w.grad = None
        return [float(loss) for loss in losses]

    # ---- cost ------------------------------------------------------------------------------------------

    def flops(self, n: int, m: int) -> int:
        """The gate, and 4·D for every kept pair; by a threshold for every visible one, a bound."""
        return self._gate_flops(n, m) + 4 * self.num_heads * self.head_dim * self._pairs(n, m)

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return self._gate_flops(n, m) + 4 * self.num_heads * self.head_dim * n * m

    def _gate_flops(self, n: int, m: int) -> int:
        d, width, blocks = self.head_dim, self.hp.gate_dim, -(-m // self.hp.block)
        rows = n if self._per_token else -(-n // self.hp.block)
        heads = self.num_kv_heads if self._per_token else self.num_heads
        queries = 0 if self.gate_q is None else self.num_heads * rows * d
        return 2 * width * (queries + self.gate_k.shape[0] * blocks * 2 * d + heads * rows * blocks)

    def _pairs(self, n: int, m: int) -> int:
        """Pairs that a head keeps."""
        b, kept = self.hp.block, self._count(m)
        if self.hp.method == "threshold":
            kept = -(-m // b)
        if not self._causal:
            return n * min(kept * b, m)
        dense = n if self._per_token else max(0, -(-n // b) - 2) * b  # rows from here on keep everything
        return sum((min(kept - 1, i // b) * b + i % b if i < dense else i) + 1 for i in range(n))

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Pooled tokens and weights of the gate with their order in fp32, the lists, the log-sum-exp."""
        blocks, d = -(-m // self.hp.block), self.head_dim
        rows = n if self._per_token else -(-n // self.hp.block)
        heads = self.num_kv_heads if self._per_token else self.num_heads
        return (
            4 * heads * rows * (5 * blocks + d) + 12 * self.num_kv_heads * blocks * d + 4 * self.num_heads * n
        )


def _frozen(heads: int, inputs: int, outputs: int) -> nn.Parameter:
    """Weights (heads, inputs, outputs) from N(0, 1/inputs), without a gradient."""
    return nn.Parameter(torch.randn(heads, inputs, outputs) / math.sqrt(inputs), requires_grad=False)
