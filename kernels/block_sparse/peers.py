"""Attention of others as a backend of :func:`attnbench.kernels.block_sparse`: flex with a BlockMask.

The BlockMask is built from the lists on the first call with a selection and kept as long as it lives.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attnbench.kernels.backends import Unsupported
from attnbench.kernels.block_sparse._blocks import unmasked_blocks
from attnbench.kernels.flash.peers import _score_mod, flex_function
from attnbench.kernels.selection import Selection

_BLOCK_MASKS: WeakKeyDictionary[Selection, dict[tuple[bool, int], Any]] = WeakKeyDictionary()
TILE = 128
"""flex's default tiles on CUDA divide blocks of this size."""


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    key_bias: Tensor | None,
    row_threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute with ``flex_attention``: compiled on CUDA, as its eager definition on CPU.

    Raises Unsupported for positions and thresholds, on CPU when a gradient is required (flex has no backward
    pass there), and on CUDA for blocks that its tiles do not divide.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    for option, x in (("q_pos", q_pos), ("k_pos", k_pos), ("row_threshold", row_threshold)):
        if x is not None:
            raise Unsupported(
                f"block_sparse/flex {option}", "given", "none: the block mask is kept by selection"
            )
    given = [x for x in (q, k, v, key_bias) if x is not None]
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise Unsupported(
            "block_sparse/flex on CPU", "inputs that require gradients", "a forward pass, or CUDA"
        )
    blocks = selection.block_q, selection.block_k
    if q.device.type == "cuda" and any(block % TILE for block in blocks):
        raise Unsupported("block_sparse/flex on CUDA", f"blocks of {blocks}", f"multiples of {TILE}")
    o, aux = flex_function(q.device.type)(
        q,
        k,
        v,
        score_mod=_score_mod(q.shape, k.shape[2], 0.0, key_bias, None),
        block_mask=_block_mask(selection, causal, q.shape[1]),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return o, aux.lse


def _block_mask(selection: Selection, causal: bool, heads: int) -> Any:
    masks = _BLOCK_MASKS.setdefault(selection, {})
    if (causal, heads) not in masks:
        with torch.inference_mode(False), torch.no_grad():  # a mask that is kept must serve training, too
            masks[causal, heads] = _build(selection, causal, heads)
    return masks[causal, heads]


def _build(selection: Selection, causal: bool, heads: int) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    sel = selection
    blocks = sel.block_mask.repeat_interleave(heads // sel.counts.shape[1], 1)
    whole = torch.arange(sel.key_blocks, device=blocks.device) < unmasked_blocks(sel, causal)[:, None]
    lists = [
        Selection.from_block_mask(part, sel.block_q, sel.block_k, sel.n, sel.m)
        for part in (blocks & ~whole, blocks & whole)
    ]
    offset = sel.m - sel.n
    eager = (
        blocks.device.type == "cpu"
    )  # flex's eager definition looks at the function alone, not at the lists

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i + offset if causal else j >= 0
        if eager:
            seen = seen & blocks[b % blocks.shape[0], h, i // sel.block_q, j // sel.block_k]
        return seen

    return BlockMask.from_kv_blocks(
        *(x for part in lists for x in (part.counts, part.indices.clamp(min=0))),
        BLOCK_SIZE=(sel.block_q, sel.block_k),
        mask_mod=visible,
        seq_lengths=(sel.n, sel.m),
    )
