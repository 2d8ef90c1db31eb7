"""Dynamic mask attention: values decide which keys are kept, and how much they are favoured."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.sparse._running_kth import running_kth_largest
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import Selection, SharedKeys, block_sparse, gather
from attnbench.kernels.selection import pool, visible

BLOCK = 64
"""Tokens of the blocks that are skipped under CS where no query of them keeps any key: a tile of a GPU."""


class DynamicMaskAttention(Attention):
    """Softmax attention with a learnt bias per key, over the keys with the largest biases."""

    spec = Spec(
        id="dma",
        name="Dynamic mask attention (DMA)",
        family="sparse",
        kind="core",
        paper=Paper("Trainable Dynamic Mask Sparse Attention", 2025, arxiv="2508.02124"),
        upstream="https://github.com/SmallDoges/flash-dmattn",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="A learnt bias from the values ranks the keys; a query keeps the w visible ones with the "
        "largest.",
        formula="o_i = softmax over {j visible, δ_j ≥ τ_i} of (q_i·k_j / √D + δ_j) v_j, δ = A·softplus(W v), "
        "τ_i: the w-th largest visible δ",
        cost="2·M·Hkv²·D FLOPs of biases and 4·H·N·w·D, 4·Hkv·(N + M) bytes of biases and thresholds",
        linear_in_v=False,
        square_heads="the biases are computed from all values by a weight of width Hkv·D",
        grouped_kv=True,
        ops={
            Pattern.NS: ("gather",),
            Pattern.CS: ("block_sparse",),
            Pattern.NC: ("gather",),
            Pattern.CC: ("gather",),
        },
        hyper=(
            Hyper("top_w", 2048, "keys w that a query keeps"),
            Hyper("share", None, "keep ⌈share·M⌉ keys instead"),
            Hyper(
                "keep",
                "topk",
                "topk: the w largest visible biases; relu: the positive ones, be there any or not; "
                "global_topk: the w largest of all keys, which under CS reads the future, as upstream does",
                choices=("topk", "relu", "global_topk"),
            ),
        ),
        test_hyper={"top_w": 3},
        deviations=(
            "Under CS the w largest biases are those of the keys up to the query: upstream ranks all keys "
            "first, which leaks the future and leaves few keys to the first queries (keep='global_topk').",
            "Equal biases at the threshold are all kept under CS; elsewhere, where all queries of a head "
            "share one list, the lower keys are.",
            "The mask is not rounded to blocks, and biases are computed in fp32 at least.",
        ),
    )

    def setup(self) -> None:
        """Create A (Hkv), drawn from N(0, 0.02²), and W (Hkv·D → Hkv) without bias."""
        hp = self.hp
        if hp.top_w < 1 or (hp.share is not None and not 0 < hp.share <= 1):
            raise UsageError(
                f"dma: observed top_w={hp.top_w}, share={hp.share}, expected at least 1 and 0 < share <= 1"
            )
        self.amplitude = nn.Parameter(0.02 * torch.randn(self.num_kv_heads))
        self.importance = nn.Linear(self.num_kv_heads * self.head_dim, self.num_kv_heads, bias=False)

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
        """Attend to the keys that the biases of v keep: q (B, H, N, D), k and v (B, Hkv, M, D)."""
        biases = self.biases(v)
        if key_padding_mask is not None:
            biases = biases.masked_fill(key_padding_mask.unsqueeze(1), -math.inf)
        per_head = biases.repeat_interleave(q.shape[1] // k.shape[1], 1)
        if self.pattern is not Pattern.CS:
            keys = self.shared_keys(biases.detach(), q.shape[2])
            return gather(q, k, v, keys, key_bias=per_head, backend=self.backend)[0]
        thresholds = self.thresholds(biases.detach())
        return block_sparse(
            q,
            k,
            v,
            _living_blocks(biases.detach(), thresholds),
            causal=True,
            key_bias=per_head,
            row_threshold=thresholds.repeat_interleave(q.shape[1] // k.shape[1], 1),
            backend=self.backend,
        )[0]

    def biases(self, v: Tensor) -> Tensor:
        """δ (B, Hkv, M) = A·softplus(W v), with all heads of v (B, Hkv, M, D) side by side; fp32 at least."""
        wide = torch.promote_types(v.dtype, torch.float32)
        drive = F.linear(self.join(v).to(wide), self.importance.weight.to(wide))
        return self.amplitude.to(wide).unsqueeze(-1) * F.softplus(drive).transpose(1, 2)

    def kept(self, m: int) -> int:
        """w, out of m keys."""
        wanted = self.hp.top_w if self.hp.share is None else math.ceil(self.hp.share * m)
        return min(int(wanted), m)

    @torch.no_grad()
    def shared_keys(self, biases: Tensor, n: int) -> SharedKeys:
        """The one list of keys of each key head that all n queries attend to; −∞ is no key."""
        m = biases.shape[-1]
        if self.hp.keep == "relu":
            return SharedKeys.from_mask(biases > 0, n)
        best = biases.sort(dim=-1, descending=True, stable=True)
        width = self.kept(m)
        keys = best.indices[..., :width].masked_fill(best.values[..., :width] == -math.inf, -1)
        return SharedKeys.from_indices(keys, n, m)

    @torch.no_grad()
    def thresholds(self, biases: Tensor) -> Tensor:
        """τ (B, Hkv, N) under CS: the least bias that a query keeps, −∞ where it keeps all it sees."""
        m = biases.shape[-1]
        if self.hp.keep == "relu":
            return torch.full_like(biases, torch.finfo(biases.dtype).tiny)
        if self.hp.keep == "global_topk":
            least = biases.sort(dim=-1, descending=True).values[..., self.kept(m) - 1 : self.kept(m)]
            return least.expand(biases.shape)
        return running_kth_largest(biases, self.kept(m))

    def flops(self, n: int, m: int) -> int:
        """The biases, and 4·D for every kept pair; with keep='relu' for every visible one, a bound."""
        kept = m if self.hp.keep == "relu" else self.kept(m)
        pairs = sum(min(kept, i + 1) for i in range(n)) if self.pattern is Pattern.CS else n * kept
        return self._bias_flops(m) + 4 * self.num_heads * pairs * self.head_dim

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return self._bias_flops(m) + 4 * self.num_heads * n * m * self.head_dim

    def _bias_flops(self, m: int) -> int:
        return 2 * m * self.num_kv_heads**2 * self.head_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Biases and thresholds in fp32 with their order, the values as fp32, and copies of the kept keys."""
        kv, d = self.num_kv_heads, self.head_dim
        copies = 0 if self.pattern is Pattern.CS else 2 * self.kept(m) * d * itemsize
        return kv * (m * (16 + 4 * d) + 4 * n + copies) + 4 * self.num_heads * (n + m)


def _living_blocks(biases: Tensor, thresholds: Tensor) -> Selection:
    """Visible blocks whose largest bias reaches the threshold of the first query of a block of queries.

    Thresholds do not fall along the queries, so that no later query keeps a key of another block.
    """
    n, m = thresholds.shape[-1], biases.shape[-1]
    best = pool(biases.unsqueeze(-1), BLOCK, "max").squeeze(-1)
    alive = best.unsqueeze(-2) >= thresholds[..., ::BLOCK].unsqueeze(-1)
    mask = alive & visible(n, m, BLOCK, BLOCK, True, biases.device)
    return Selection.from_block_mask(mask, BLOCK, BLOCK, n, m)
