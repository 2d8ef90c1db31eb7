"""What ranks exchange, differentiably where a gradient must find its way back. All ranks take part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is."""

    rank: int
    size: int


def rotate(tensors: Sequence[Tensor], ranks: Ranks) -> Callable[[], list[Tensor]]:
    """Start to pass tensors on to the next rank; the result waits for those of the rank before.

    What is computed between the two calls overlaps with the transfer. Not differentiable.
    """
    if ranks.size == 1:
        return lambda: list(tensors)
    after, before = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    sent = [x.contiguous() for x in tensors]
    received = [torch.empty_like(x) for x in sent]
    transfers = [dist.P2POp(dist.isend, x, after, tag=i) for i, x in enumerate(sent)]
    transfers += [dist.P2POp(dist.irecv, x, before, tag=i) for i, x in enumerate(received)]
    works = dist.batch_isend_irecv(transfers)

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        return received

    return wait


def gather(x: Tensor, ranks: Ranks) -> list[Tensor]:
    """The x of every rank, in the order of ranks. Not differentiable."""
    if ranks.size == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(ranks.size)]
    dist.all_gather(parts, x.contiguous())
    return parts


class _Gather(torch.autograd.Function):
    """(P, *x.shape): x of every rank; a gradient goes back to the rank that it is of, and is summed there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return torch.stack(gather(x, ranks))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _swapped(grad, ctx.ranks).sum(0), None


class _Swap(torch.autograd.Function):
    """y[s] on rank r is x[r] of rank s: a transposition over the ranks, which is its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _swapped(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _swapped(grad, ctx.ranks), None


class _Sum(torch.autograd.Function):
    """The sum of x over the ranks before this one (``causal``), or over all; gradients flow the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, causal: bool) -> Tensor:
        ctx.ranks, ctx.causal = ranks, causal
        return _total(gather(x, ranks)[: ranks.rank if causal else None], x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = gather(grad, ctx.ranks)
        return _total(parts[ctx.ranks.rank + 1 :] if ctx.causal else parts, grad), None, None


def gathered(x: Tensor, ranks: Ranks) -> Tensor:
    """(P, *x.shape): x of every rank. Its gradient is summed over the ranks that used it."""
    return _Gather.apply(x, ranks)


def swapped(x: Tensor, ranks: Ranks) -> Tensor:
    """X (P, ...) with x[s] sent to rank s; returns what the ranks sent here, (P, ...)."""
    return _Swap.apply(x, ranks)


def summed(x: Tensor, ranks: Ranks, *, causal: bool) -> Tensor:
    """The sum of x over all ranks, or over those before this one."""
    return _Sum.apply(x, ranks, causal)


def _swapped(x: Tensor, ranks: Ranks) -> Tensor:
    if ranks.size == 1:
        return x.clone()
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous())
    return received


def _total(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(parts)).sum(0) if parts else torch.zeros_like(like)


__all__ = ["Ranks", "gather", "gathered", "rotate", "summed", "swapped"]
