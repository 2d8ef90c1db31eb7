"""S2-Attention: every head keeps the recent blocks and its own vertical stripe of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Pattern, Spec
from attnbench.impls.sparse._density import keys_at
from attnbench.impls.sparse._static_blocks import StaticBlocks
from attnbench.impls.spec import Hyper, Paper


class S2Attention(StaticBlocks):
    """Softmax attention over a local band of blocks and, for each key head, every stride-th other block."""

    spec = Spec(
        id="s2_attention",
        name="S2-Attention",
        family="sparse",
        kind="core",
        paper=Paper(
            "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads", 2024, arxiv="2407.17678"
        ),
        upstream="https://github.com/linxihui/dkernel",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Heads share the context out among them: each keeps the near blocks and a stripe of the "
        "far ones.",
        formula="CS: block (I, J) is kept iff J ≤ I and (I − J < L or (J + h·step + offset) mod stride = 0), "
        "step = max(1, ⌊stride / Hkv⌋)",
        cost="4·D·H·b²·Σ_I (L + (I − L)/stride) FLOPs, 4·H·N bytes",
        permutation_invariant=False,
        grouped_kv=True,
        selection="softmax",
        ops=("block_sparse",),
        hyper=(
            Hyper("block", 64, "tokens b of a block"),
            Hyper("local_blocks", 16, "near blocks L, with the query's own; on each side in NS"),
            Hyper("stride", 8, "blocks from one of a stripe to the next"),
            Hyper("offset", 0, "shift of all stripes, in blocks"),
            Hyper("dense_heads", 0, "key heads, the last ones, that keep everything"),
            Hyper(
                "hetero_ns",
                False,
                "NS: stripes that differ from head to head, as under CS; the release has the same for all",
            ),
        ),
        test_hyper={"block": 4, "local_blocks": 1, "stride": 2},
        padding="blocks are counted in positions, which dropping a key shifts",
        deviations=(
            "NC and CC are ours: no band, for there is no diagonal, but the stripes; a head whose stripe "
            "lies beyond the last block keeps that one.",
            "Mixing with dense layers is the model's matter: build those layers from softmax.",
        ),
    )

    def setup(self) -> None:
        """Refuse sizes without meaning."""
        hp = self.hp
        if min(hp.block, hp.local_blocks, hp.stride) < 1 or not 0 <= hp.dense_heads <= self.num_kv_heads:
            raise UsageError(
                f"s2_attention: observed block={hp.block}, local_blocks={hp.local_blocks}, "
                f"stride={hp.stride}, dense_heads={hp.dense_heads}, expected positive sizes and at most "
                f"{self.num_kv_heads} dense heads"
            )

    @classmethod
    def at_density(cls, density: float, n: int, m: int, pattern: Pattern) -> Mapping[str, Any]:
        """A stride, and a band of half the density, so that both have their share."""
        block = int(cls.spec.default("block"))
        near = max(1, round(keys_at(density / 2, n, m, pattern) / block))
        blocks = -(-m // block)
        far = max(density - near / blocks, 1 / blocks)
        return {"local_blocks": near, "stride": max(1, round(1 / far))}

    def block_mask(self, n: int, m: int) -> Tensor:
        """Band and stripes, (Hkv, Tq, Tk)."""
        hp = self.hp
        rows, cols = -(-n // hp.block), -(-m // hp.block)
        heads = torch.arange(self.num_kv_heads)[:, None, None]
        shift = heads * max(1, hp.stride // self.num_kv_heads)
        i, j = torch.arange(rows)[:, None] + (cols - rows), torch.arange(cols)[None, :]
        if self.pattern.cross:
            kept = ((j + shift + hp.offset) % hp.stride == 0).expand(-1, rows, -1)
            kept = kept | (~kept.any(-1, keepdim=True) & (j == cols - 1))
        elif self.pattern is Pattern.CS:
            kept = (i - j < hp.local_blocks) | ((j + shift + hp.offset) % hp.stride == 0)
        else:
            beyond = ((i - j).abs() - hp.local_blocks + 1).clamp(min=0)
            kept = (beyond == 0) | ((beyond + (shift if hp.hetero_ns else 0 * shift)) % hp.stride == 0)
        return kept | (heads >= self.num_kv_heads - hp.dense_heads)
