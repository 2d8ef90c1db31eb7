"""Spans of tokens folded into rows: summaries by maxima, and which of them a query sees."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Axis = Literal["row", "column"]
Side = Literal["all", "upto", "before", "after"]
Partial = tuple[Tensor, Tensor]
"""Output and log-sum-exp of the attention to some of the items."""


class Spans(NamedTuple):
    """Summaries k, v (B, H, R, W, ·) of one span per cell, and where a span has no token, (B or 1, R, W)."""

    k: Tensor
    v: Tensor
    empty: Tensor | None


def row_maximum(x: Tensor, hidden: Tensor | None, gone: Tensor | None) -> Tensor:
    """Maxima over the tokens of each row of x (B, H, R, W, D): (B, H, R, D), 0 for a row without one."""
    if hidden is None or gone is None:
        return x.amax(3)
    maximum = x.masked_fill(hidden[:, None, ..., None], -torch.inf).amax(3)
    return maximum.masked_fill(gone[:, None, :, None], 0.0)


def shifted(x: Tensor, dim: int, side: Side, fill: float) -> Tensor:
    """Every entry of x replaced by its neighbour on ``side`` along ``dim``, by ``fill`` at the edge."""
    size = x.shape[dim]
    edge = torch.full_like(x.narrow(dim, 0, 1), fill)
    if side == "before":
        return torch.cat((edge, x.narrow(dim, 0, size - 1)), dim)
    return torch.cat((x.narrow(dim, 1, size - 1), edge), dim)


def cumulative_maximum(x: Tensor, dim: int, side: Side) -> Tensor:
    """Maxima of the entries up to each one, or from each one on for ``after``."""
    if side == "before":
        return x.cummax(dim).values
    return x.flip(dim).cummax(dim).values.flip(dim)


def spread(x: Tensor, size: int, n: int) -> Tensor:
    """Block summaries x (B, H, blocks, D) at the tokens of the next block, for even blocks: (B, H, n, D).

    The tokens of an even block hold its own summary, which they do not read.
    """
    tokens = x[:, :, ::2].repeat_interleave(2 * size, 2)[:, :, :n]
    missing = n - tokens.shape[2]
    return F.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def folded(part: tuple[Tensor, Tensor | None], dim: int, sizes: tuple[int, int]) -> Partial:
    """The results of :func:`flash` with dimension ``dim`` as two."""
    o, lse = part
    assert lse is not None  # need_lse is True
    return o.unflatten(dim, sizes), lse.unflatten(dim, sizes)


def visible(side: Side, items: int, queries: int, device: torch.device) -> dict[str, Any]:
    """Options of :func:`flash` for ``queries`` queries at each of the places of ``items`` keys."""
    if side == "all":
        return {}
    if side == "upto":
        return {"causal": True}
    if side == "before":
        return {"causal": True, "q_pos": _places(items, queries, -1, device)}
    return {"window": (0, -1), "q_pos": _places(items, queries, 1, device)}


@lru_cache(maxsize=64)  # one tensor per size: the masks that backends keep are found by it
@torch.inference_mode(False)
def _places(items: int, queries: int, offset: int, device: torch.device) -> Tensor:
    place = torch.arange(items, device=device, dtype=torch.int32) + offset
    return place.repeat_interleave(queries)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def tail(cells: int, n: int, device: torch.device) -> Tensor:
    """Which cells have no token, (1, cells)."""
    return (torch.arange(cells, device=device) >= n).unsqueeze(0)
