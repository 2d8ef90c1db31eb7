"""What the mechanisms share that choose blocks of keys by position alone: one selection for each length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, Pattern, SparseAttention, causal_pairs
from attnbench.kernels import Selection, block_sparse, padding_bias
from attnbench.kernels.selection import visible


class StaticBlocks(SparseAttention):
    """Softmax attention over the blocks that :meth:`block_mask` names; under CS also j ≤ i + M − N."""

    def block_mask(self, n: int, m: int) -> Tensor:
        """(Hs, Tq, Tk) bool on the CPU, Hs dividing the heads: the blocks that each block of queries reads.

        Blocks of ``self.hp.block`` tokens, the last of either side perhaps shorter. What causality hides is
        removed by the caller.
        """
        raise UsageError(f"{self.spec.id} does not state its blocks: override block_mask(n, m)")

    def selection(self, n: int, m: int, device: torch.device) -> Selection:
        """The lists for N queries and M keys, built once for each length and device."""
        if not hasattr(self, "_selections"):
            self._selections: dict[tuple[int, int, torch.device], Selection] = {}
        found = self._selections.get((n, m, device))
        if found is None:
            b = self.hp.block
            cpu = torch.device("cpu")
            mask = self.block_mask(n, m) & visible(n, m, b, b, self.pattern is Pattern.CS, cpu)
            found = Selection.from_block_mask(mask.unsqueeze(0).to(device), b, b, n, m)
            self._selections[n, m, device] = found
        return found

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Selection:
        """The selection of this length; nothing depends on q and k but their shapes."""
        return self.selection(q.shape[2], k.shape[2], q.device)

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
        """2·D for the score and 2·D for the value of every kept pair of every head."""
        causal = self.pattern is Pattern.CS
        return (
            4 * self.head_dim * kept_pairs(self.selection(n, m, torch.device("cpu")), self.num_heads, causal)
        )

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return 4 * self.num_heads * n * m * self.head_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exp, fp32, kept for the backward."""
        return 4 * self.num_heads * n


def kept_pairs(selection: Selection, heads: int, causal: bool) -> int:
    """Pairs of tokens that ``heads`` heads keep, exactly, for one batch element."""
    n, m = selection.n, selection.m
    allowed = causal_pairs(n, m) if causal else n * m
    return round(float(selection.density(causal)) * heads * allowed)
