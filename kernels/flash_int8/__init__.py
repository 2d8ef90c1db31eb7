"""Dense attention with INT8 scores: what quantised kernels for inference compute, as one operation."""

from __future__ import annotations

import math

# by name: importing the backend module flash_int8.torch rebinds the name `torch` in this package
from torch import Tensor, is_grad_enabled

from attnbench.kernels._attention import check_shapes
from attnbench.kernels.backends import Op, Unsupported

OP = Op(
    "flash_int8",
    {
        "reference": "attnbench.kernels.flash_int8.reference:flash_int8",
        "torch": "attnbench.kernels.flash_int8.torch:flash_int8",
        "triton": "attnbench.kernels.flash_int8.triton:flash_int8",
        "sage": "attnbench.kernels.flash_int8.peers:sage",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)

BLOCKS = (16, 32, 64, 128)
"""Rows that can share a scale: the tiles of the kernels."""


def flash_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    block_q: int = 128,
    block_k: int = 64,
    key_padding_mask: Tensor | None = None,
    blocks: Tensor | None = None,
    need_lse: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of which q kᵀ is a product of 8-bit integers; p v stays in 16-bit floats.

    With k̂ = k − mean_j k (or k) and q̂ = q·scale·log₂e, rows are quantised in blocks of ``block_q`` queries
    and ``block_k`` keys of a head: a = max|x|/127 in fp32 over the block, ints = x/a rounded half away from
    zero. The scores are s = a_q·a_k·(int32 product), the weights 2^s normalised. Scales and the mean see the
    whole sequence, so that causality is strict up to the error of quantisation only.

    Args:
        q: (B, H, N, D), fp16, bf16 or fp32, any strides, D ≤ 256.
        k: (B, Hkv, M, D) with Hkv dividing H.
        v: (B, Hkv, M, Dv); multiplied in its dtype, fp32 in fp16.
        causal: key j is visible to query i iff j ≤ i + M − N.
        scale: 1/√D by default.
        smooth_k: subtract the mean of the keys of a head, which shifts every score of a row by the same
            number: the softmax is the same, and a channel that is large in all keys no longer takes the range
            of an int.
        block_q, block_k: rows of a scale, each one of 16, 32, 64, 128.
        key_padding_mask: (B, M) bool, True removes the key, also from scales and mean.
        blocks: (B or 1, H or 1, ⌈N/block_q⌉, ⌈M/block_k⌉) bool, True where a block of scores is computed.
        need_lse: False lets a peer leave it out.
        backend: ``auto``, or one of ``OPS["flash_int8"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q and lse (B, H, N) in fp32: the natural log-sum-exp of the quantised
        scores with the shift of ``smooth_k`` added back, that is of the scores of the original keys up to
        quantisation. A row without keys has o = 0 and lse = −inf.

    Raises:
        ValueError: shapes or block sizes that do not match the above.
        Unsupported: a gradient is required (rounding has no derivative to train with), or the backend cannot
            serve the call.

    Error: |q̂ − a_q·int| ≤ a_q/2 elementwise and the same for k, hence a score in units of log 2 is off by at
    most D·(a_q·max|k̂| + a_k·max|q̂|)/2 + D·a_q·a_k/4.
    Cost: 2·B·H·P·(D + Dv) operations for P visible pairs, those of D at the rate of INT8; a pass over q and
    k.
    Source: Zhang et al., SageAttention (arXiv 2410.02367); with ``blocks`` the quantised part of
    PAROAttention (arXiv 2506.16054).
    """
    _check(q, k, v, block_q, block_k, key_padding_mask, blocks)
    if is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise Unsupported("flash_int8", "inputs that require gradients", "a forward pass: it is quantised")
    return OP.run(
        backend,
        q,
        k,
        v,
        causal=causal,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        smooth_k=smooth_k,
        block_q=block_q,
        block_k=block_k,
        key_padding_mask=key_padding_mask,
        blocks=blocks,
        need_lse=need_lse,
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_q: int,
    block_k: int,
    key_padding_mask: Tensor | None,
    blocks: Tensor | None,
) -> None:
    check_shapes(q, k, v)
    b, h, n, _ = q.shape
    m = k.shape[2]
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block not in BLOCKS:
            raise ValueError(f"{name}: observed {block}, expected one of {', '.join(map(str, BLOCKS))}")
    if key_padding_mask is not None and key_padding_mask.shape != (b, m):
        raise ValueError(f"key_padding_mask: observed {tuple(key_padding_mask.shape)}, expected {(b, m)}")
    if blocks is not None:
        tiles = -(-n // block_q), -(-m // block_k)
        if blocks.dim() != 4 or blocks.shape[2:] != tiles or not {*blocks.shape[:2]} <= {1, b, h}:
            raise ValueError(f"blocks: observed {tuple(blocks.shape)}, expected (B or 1, H or 1, *{tiles})")
