"""BigBird: blocks of a window, of both ends of the sequence and at random."""

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


class BigBird(StaticBlocks):
    """Softmax attention over the neighbouring blocks, the first and last one, and r random ones per row."""

    spec = Spec(
        id="bigbird",
        name="BigBird",
        family="sparse",
        kind="core",
        paper=Paper(
            "Big Bird: Transformers for Longer Sequences", 2020, arxiv="2007.14062", venue="NeurIPS 2020"
        ),
        upstream="https://github.com/google-research/bigbird",
        patterns=(Pattern.NS, Pattern.CS),
        summary="Sparse blocks: a window, global ones at both ends, and a few drawn once for each head and "
        "row.",
        formula="blocks of row I: {0, T − 1} ∪ {I − 1, I, I + 1} ∪ R_h(I), |R_h(I)| = r; rows 0 and T − 1: "
        "all",
        cost="4·H·N·(5 + r)·b·D FLOPs and two dense block rows, 4·H·N bytes",
        permutation_invariant=False,
        grouped_kv=True,
        selection="softmax",
        ops=("block_sparse",),
        hyper=(
            Hyper("block", 64, "tokens b of a block"),
            Hyper("num_random", 3, "random blocks r of a row"),
            Hyper("seed", 0, "seed of the random blocks, which stay the same in training and use"),
        ),
        test_hyper={"block": 4, "num_random": 1},
        padding="blocks are counted in positions, which dropping a key shifts",
        deviations=(
            "Random blocks are drawn among those not yet in the row; the release's may coincide with "
            "others and then count twice, and for some lengths come from a prefix only.",
            "Any length: the last block may be short.",
            "CS is ours: blocks up to the diagonal, the first block global, random ones among the earlier. "
            "The last block is not global there, or the outputs of a prefix would depend on where it ends.",
        ),
    )

    def setup(self) -> None:
        """Refuse sizes without meaning."""
        if self.hp.block < 1 or self.hp.num_random < 0:
            raise UsageError(
                f"bigbird: observed block={self.hp.block}, num_random={self.hp.num_random}, "
                "expected at least 1 and 0"
            )

    @classmethod
    def at_density(cls, density: float, n: int, m: int, pattern: Pattern) -> Mapping[str, Any]:
        """As many random blocks as the density leaves room for beside the window and the global ones."""
        block = int(cls.spec.default("block"))
        fixed = 3 if pattern is Pattern.CS else 5
        return {"num_random": max(0, round(keys_at(density, n, m, pattern) / block) - fixed)}

    def block_mask(self, n: int, m: int) -> Tensor:
        """Window, global and random blocks, (H, Tq, Tk)."""
        causal = self.pattern is Pattern.CS
        rows, cols = -(-n // self.hp.block), -(-m // self.hp.block)
        i, j = torch.arange(rows)[:, None] + (cols - rows), torch.arange(cols)[None, :]
        fixed = ((i - j).abs() <= 1) | (j == 0)
        if not causal:
            fixed = fixed | (j == cols - 1) | (i == 0) | (i == cols - 1)
        allowed = j <= i if causal else torch.ones(rows, cols, dtype=torch.bool)
        free = allowed & ~fixed
        draw = _draws(self.num_heads, rows, cols, self.hp.seed).masked_fill(~free, -1)
        order = draw.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(cols).expand(order.shape))
        return fixed | (free & (rank < self.hp.num_random))


def _draws(heads: int, rows: int, cols: int, seed: int) -> Tensor:
    """A number ≥ 0 for each head, row and column that depends on these and the seed only, not on the length.

    The mixing steps of SplitMix64 (Steele et al., OOPSLA 2014), on signed integers.
    """
    h, i, j = torch.arange(heads)[:, None, None], torch.arange(rows)[:, None], torch.arange(cols)
    x = ((h * 1_000_003 + i) * 1_000_003 + j) * 1_000_003 + seed
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) & (2**63 - 1)
