"""The Triton backend of :func:`attnbench.kernels.gather`: two operations that it reduces to.

A list per query is a list of blocks of one key; a shared list leaves dense attention over a copy of its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.kernels._attention import check_tensors
from attnbench.kernels.aot import AotCase
from attnbench.kernels.backends import Unsupported
from attnbench.kernels.block_sparse.triton import block_sparse
from attnbench.kernels.flash import flash
from attnbench.kernels.gather._shared import listed
from attnbench.kernels.selection import Selection
from attnbench.kernels.token_blocks import triton as by_token
from attnbench.kernels.token_selection import SharedKeys, TokenKeys

KEY_BLOCK = 128
"""Keys of a block where causality masks copied keys by their positions."""


def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenKeys | SharedKeys,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse from the listed keys alone; once differentiable in q, k, v and the key bias.

    A list per query costs the backward pass up to 1.5·M fp32 parts of dk and dv per heads that share a list;
    a shared list the copies of its keys and values. Raises Unsupported for a dtype other than fp16, bf16 and
    fp32, D or Dv beyond 256, or a selection on another device.
    """
    check_tensors("gather", {"q": q, "k": k, "v": v})
    if selection.indices.device != q.device:
        raise Unsupported("gather/triton selection", selection.indices.device, f"{q.device} as q")
    if isinstance(selection, TokenKeys):
        return by_token.token_blocks(q, k, v, selection.blocks, causal=causal, scale=scale, key_bias=key_bias)
    keys, values, bias, index = listed(k, v, selection, key_bias, q.shape[1])
    if bias is not None:
        bias = bias.repeat_interleave(q.shape[1] // bias.shape[1], 1)
    if not causal:
        return flash(q, keys, values, scale=scale, key_bias=bias, need_lse=True, backend="triton")
    n, m = q.shape[2], k.shape[2]
    return block_sparse(
        q,
        keys,
        values,
        _every_block(n, index.shape[2], q.device),
        causal=True,
        q_pos=torch.arange(n, device=q.device) + (m - n),
        k_pos=index.repeat_interleave(q.shape[1] // index.shape[1], 1),
        scale=scale,
        key_bias=bias,
        row_threshold=None,
    )


def _every_block(n: int, keys: int, device: torch.device) -> Selection:
    blocks = -(-n // KEY_BLOCK), -(-keys // KEY_BLOCK)
    mask = torch.ones(1, 1, *blocks, dtype=torch.bool, device=device)
    return Selection.from_block_mask(mask, KEY_BLOCK, KEY_BLOCK, n, keys)


def aot_cases(capability: int) -> list[AotCase]:
    """The kernels of ``token_blocks`` for blocks of one key; those of a shared list are other operations'."""
    sizes = {torch.bfloat16: (64, 128, 256), torch.float32: (128,)}
    return by_token.aot_kernels(
        [
            by_token.aot_call(capability, dtype, d, d, 1, 1, "query")
            for dtype, dims in sizes.items()
            for d in dims
        ]
    )
