"""Attention of others as a backend of :func:`attnbench.kernels.token_blocks`: flex with a BlockMask.

A tile is computed where one of its queries selects one of its keys, and masked inside by the lists. The
BlockMask is built on the first call with a selection and kept as long as it lives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench.kernels.backends import Unsupported
from attnbench.kernels.flash.peers import flex_function
from attnbench.kernels.selection import Selection
from attnbench.kernels.token_selection import SharedKeys, TokenBlocks, TokenKeys

AnySelection = TokenBlocks | TokenKeys | SharedKeys

_BLOCK_MASKS: WeakKeyDictionary[AnySelection, dict[tuple[bool, int], Any]] = WeakKeyDictionary()
TILE = 128
"""Queries and keys of flex's default tiles."""


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenBlocks,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute with ``flex_attention``: compiled on CUDA, as its eager definition on CPU.

    Keeps a mask of N·Tk bits, as bytes, per head of lists. Raises Unsupported on CPU when a gradient is
    required: flex has no backward pass there.
    """
    given = (q, k, v)
    return masked_flex("token_blocks", *given, selection, causal=causal, scale=scale, key_bias=key_bias)


def masked_flex(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: AnySelection,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse with ``flex_attention`` under the lists of any of the selections."""
    from torch.nn.attention.flex_attention import AuxRequest

    given = [x for x in (q, k, v, key_bias) if x is not None]
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise Unsupported(f"{op}/flex on CPU", "inputs that require gradients", "a forward pass, or CUDA")
    o, aux = flex_function(q.device.type)(
        q,
        k,
        v,
        score_mod=_score_mod(key_bias, q.shape, k.shape[2]),
        block_mask=block_mask(selection, causal, q.shape[1]),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return o, aux.lse


def _score_mod(key_bias: Tensor | None, shape: torch.Size, m: int) -> Callable[..., Tensor] | None:
    if key_bias is None:
        return None
    bias = key_bias.expand(*shape[:2], m)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[b, h, j]

    return add_bias


def block_mask(selection: AnySelection, causal: bool, heads: int) -> Any:
    """The BlockMask of a selection for a number of query heads."""
    masks = _BLOCK_MASKS.setdefault(selection, {})
    if (causal, heads) not in masks:
        with torch.inference_mode(False), torch.no_grad():  # a mask that is kept must serve training, too
            masks[causal, heads] = _build(selection, causal, heads)
    return masks[causal, heads]


def _build(selection: AnySelection, causal: bool, heads: int) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    n, m = selection.n, selection.m
    chosen, block_k = _choices(selection)
    chosen = chosen.contiguous()
    batch, list_heads, rows = chosen.shape[:3]
    group = heads // list_heads
    offset = m - n

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = chosen[b % batch, h // group, i % rows, j // block_k]
        return seen & (j <= i + offset) if causal else seen

    tiles = _tiles(chosen, block_k, n, m, causal).repeat_interleave(group, 1)
    lists = Selection.from_block_mask(tiles, TILE, TILE, n, m)
    return BlockMask.from_kv_blocks(
        lists.counts,
        lists.indices.clamp(min=0),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(n, m),
    )


def _choices(selection: AnySelection) -> tuple[Tensor, int]:
    """(B, Hs, N or 1, blocks) bool, what a query selects, and the keys of a block."""
    if isinstance(selection, SharedKeys):
        return selection.key_mask.unsqueeze(2), 1
    lists = selection.blocks if isinstance(selection, TokenKeys) else selection
    return lists.block_mask, lists.block_k


def _tiles(chosen: Tensor, block_k: int, n: int, m: int, causal: bool) -> Tensor:
    """(B, Hs, ⌈N/128⌉, ⌈M/128⌉) bool: tiles in which some query selects a key that it may see."""
    query_tiles = -(-n // TILE)
    if chosen.shape[2] == 1:
        rows = chosen.expand(-1, -1, query_tiles, -1)
    else:
        rows = F.pad(chosen, (0, 0, 0, -n % TILE)).unflatten(2, (-1, TILE)).any(3)
    keys = rows.repeat_interleave(block_k, 3)[..., :m]
    if causal:
        last = torch.arange(1, query_tiles + 1, device=keys.device).mul(TILE).clamp(max=n) - 1 + (m - n)
        keys = keys & (torch.arange(m, device=keys.device) <= last[:, None])
    return F.pad(keys, (0, -m % TILE)).unflatten(3, (-1, TILE)).any(4)
