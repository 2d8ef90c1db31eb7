"""Which entries of the lists need a mask inside their block, and lists ordered by it."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.kernels.selection import Selection


def partition(selection: Selection, leading: Tensor) -> tuple[Tensor, Tensor]:
    """Indices with the ``leading`` entries first, the order kept otherwise, and how many those are."""
    live, width = selection.live, selection.indices.shape[-1]
    leading = leading & live
    split = leading.sum(-1, keepdim=True)
    slot = torch.where(leading, leading.cumsum(-1) - 1, split + (live & ~leading).cumsum(-1) - 1)
    slot = torch.where(live, slot, width)
    padded = selection.indices.new_full((*live.shape[:3], width + 1), -1)
    indices = padded.scatter_(-1, slot, selection.indices)[..., :width].contiguous()
    return indices, split.squeeze(-1).int()


def unmasked_blocks(selection: Selection, causal: bool) -> Tensor:
    """Per block of queries, the number of leading key blocks that all its queries see whole, (Tq,).

    By default positions; a last key block with fewer than block_k keys is never whole.
    """
    sel = selection
    if not causal:
        return torch.full((sel.query_blocks,), sel.m // sel.block_k, device=sel.counts.device)
    first = torch.arange(0, sel.n, sel.block_q, device=sel.counts.device) + (sel.m - sel.n)
    return (first + 1).clamp(0, sel.m) // sel.block_k


def entries_below(selection: Selection, bound: Tensor) -> Tensor:
    """How many entries of each list are below the bound (T,) of its block, (B, Hs, T) int32."""
    below = (selection.indices < bound[:, None]) & selection.live
    return below.sum(-1, dtype=torch.int32)
