"""Which tokens a rank has, and how a sequence is split and put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnbench.harness.parallel.suite import Layout


def positions(n: int, size: int, layout: Layout) -> Tensor:
    """(P, N/P) int64: the positions of each rank's tokens, ascending. N is a multiple of P, or of 2P."""
    if layout == "contiguous":
        return torch.arange(n).view(size, -1)
    parts = torch.arange(n).view(2 * size, -1)
    return torch.cat((parts[:size], parts[size:].flip(0)), 1)


def shard(x: Tensor, rank: int, size: int, layout: Layout) -> Tensor:
    """The part of x (B, H, N, D) that ``rank`` has."""
    return x[:, :, positions(x.shape[2], size, layout)[rank].to(x.device)].contiguous()


def unshard(parts: Sequence[Tensor], layout: Layout) -> Tensor:
    """X (B, H, N, D) from the parts of all ranks."""
    whole = torch.cat(list(parts), 2)
    order = positions(whole.shape[2], len(parts), layout).flatten().argsort()
    return whole[:, :, order.to(whole.device)]
