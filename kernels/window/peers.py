"""Attention of others as a backend of :func:`attnbench.kernels.window`: flex with a block mask.

Tokens stay in row-major order, so a window touches as many blocks as its rows do. Masks are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnbench.kernels.backends import Unsupported
from attnbench.kernels.flash.peers import flex_function
from attnbench.kernels.window._maps import GridMap
from attnbench.kernels.window.partition import Partition

Axes = tuple[int, ...]


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition,
    *,
    grid: Axes,
    grid_kv: Axes,
    bias: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute with ``flex_attention``: compiled on CUDA, as its eager definition on CPU.

    The windows are a block mask, built from all N·M pairs on the first call with a partition, grid and
    device; biases are a score function. Raises Unsupported on CPU when a gradient is required: flex has no
    backward pass there.
    """
    shift = None if bias is None else partition.bias_shift
    return flex_attend(
        "window", q, k, v, partition.on(grid, grid_kv), bias=bias, bias_shift=shift, key_bias=key_bias,
        causal=causal, scale=scale,
    )  # fmt: skip


def flex_attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: GridMap,
    *,
    bias: Tensor | None,
    bias_shift: Axes | None,
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the pairs of a grid map; ``op`` names the operation in errors."""
    from torch.nn.attention.flex_attention import AuxRequest

    given = [x for x in (q, k, v, bias, key_bias) if x is not None]
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise Unsupported(f"{op}/flex on CPU", "inputs that require gradients", "a forward pass, or CUDA")
    o, aux = flex_function(q.device.type)(
        q,
        k,
        v,
        score_mod=_score_mod(pairs, bias, bias_shift, key_bias, (*q.shape[:2], k.shape[2])),
        block_mask=_block_mask(pairs, q.shape[2], k.shape[2], causal, q.device),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return o, aux.lse


def _coordinates(token: Tensor, grid: Axes) -> tuple[Tensor, Tensor, Tensor]:
    rest = token // grid[2]
    return rest // grid[1], rest % grid[1], token % grid[2]


def _score_mod(
    pairs: GridMap,
    bias: Tensor | None,
    bias_shift: Axes | None,
    key_bias: Tensor | None,
    shape: tuple[int, int, int],
) -> Callable[..., Tensor] | None:
    if bias is None and key_bias is None:
        return None
    keys = None if key_bias is None else key_bias.expand(shape)
    if bias is not None:
        front = 3 - (bias.dim() - 1)
        sizes, shift = (1,) * front + tuple(bias.shape[1:]), (0,) * front + tuple(bias_shift)
        table = bias.flatten(1)
        dilation = [axis.dilation for axis in pairs.axes]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if bias is not None:
            index = 0
            ends = zip(_coordinates(i, pairs.grid), _coordinates(j, pairs.grid_kv), strict=True)
            for a, (p, r) in enumerate(ends):
                entry = p // dilation[a] - r // dilation[a] + shift[a]
                index = index * sizes[a] + entry.clamp(0, sizes[a] - 1)  # hidden pairs have no entry
            score = score + table[h, index]
        if keys is not None:
            score = score + keys[b, h, j]
        return score

    return score_mod


@lru_cache(maxsize=32)
def _block_mask(pairs: GridMap, n: int, m: int, causal: bool, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    with torch.inference_mode(False), torch.no_grad():  # a mask that is kept must serve training, too
        ends = [[torch.from_numpy(x).to(device) for x in (axis.lo, axis.hi)] for axis in pairs.axes]
        dilation = [axis.dilation for axis in pairs.axes]

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = j <= i if causal else j >= 0
            places = zip(_coordinates(i, pairs.grid), _coordinates(j, pairs.grid_kv), strict=True)
            for (lo, hi), d, (p, r) in zip(ends, dilation, places, strict=True):
                seen = seen & (p % d == r % d) & (lo[p] <= r // d) & (r // d < hi[p])
            return seen

        return create_block_mask(visible, None, None, n, m, device=device)
