"""Contiguous copies of the keys, values and biases that a shared list names."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.kernels.token_blocks._units import units
from attnbench.kernels.token_selection import SharedKeys


def listed(
    k: Tensor, v: Tensor, selection: SharedKeys, key_bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Copy k (B, U, K, D), v (B, U, K, Dv), bias (B, U or H, K) or None, and keys (B, U, K) int64 of units.

    The bias hides what is beyond the end of a list. A list names a key once, so every gradient is the sum of
    one number and zeros: the backward scatter is the same in every order.
    """
    b, kv_heads, m = k.shape[:3]
    count = units(heads, kv_heads, selection.indices.shape[1]).count
    index, live = (_per_unit(x, b, count) for x in (selection.indices.clamp(min=0).long(), selection.live))
    keys, values = (_rows(x, index) for x in (k, v))
    bias = None
    if key_bias is not None:
        wide = units(heads, count, *key_bias.shape[-2:-1]).count
        at, shown = (_per_unit(x, b, wide) for x in (index, live))
        full = key_bias.expand(b, heads, m) if key_bias.shape[-2:-1] > (1,) else key_bias.expand(b, wide, m)
        bias = full.gather(2, at).masked_fill(~shown, -math.inf)
    elif selection.counts is not None:
        bias = torch.zeros(live.shape, device=k.device).masked_fill_(~live, -math.inf)
    return keys, values, bias, index


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, U, K, D): the rows ``index`` (B, U, K) of x (B, Hkv, M, D); U/Hkv lists read a head, uncopied."""
    kv_heads, m, d = x.shape[1:]
    lists = index.unflatten(1, (kv_heads, -1))
    heads = x.unsqueeze(2).expand(-1, -1, lists.shape[2], m, d)
    return heads.gather(3, lists.unsqueeze(-1).expand(*lists.shape, d)).flatten(1, 2)


def _per_unit(x: Tensor, b: int, count: int) -> Tensor:
    """(B or 1, heads, ...) as (B, count, ...)."""
    return x.repeat_interleave(count // x.shape[1], 1).expand(b, *(-1,) * (x.dim() - 1))
