"""SageAttention's own kernels as a backend of :func:`attnbench.kernels.flash_int8`."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.kernels.backends import Unsupported


def sage(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    smooth_k: bool,
    block_q: int,
    block_k: int,
    key_padding_mask: Tensor | None,
    blocks: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute with ``sageattn_qk_int8_pv_fp16_triton`` of sageattention, the kernel of version 1.

    It takes no mask but a causal one that starts at the first key, has blocks of 128 and 64 rows and
    multiplies p v in fp16 whatever the dtype of v. Raises Unsupported otherwise.
    """
    d, dv = q.shape[-1], v.shape[-1]
    for what, observed, expected, fine in (
        ("dtype", q.dtype, "float16 or bfloat16", q.dtype in (torch.float16, torch.bfloat16)),
        ("head dim", (d, dv), "equal and at most 128", d == dv <= 128),
        ("blocks of rows", (block_q, block_k), "(128, 64)", (block_q, block_k) == (128, 64)),
        ("key_padding_mask", "given", "none", key_padding_mask is None),
        ("blocks", "given", "none", blocks is None),
        ("causal lengths", (q.shape[2], k.shape[2]), "N = M", not causal or q.shape[2] == k.shape[2]),
    ):
        if not fine:
            raise Unsupported(f"flash_int8/sage {what}", observed, expected)
    from sageattention import sageattn_qk_int8_pv_fp16_triton

    result = sageattn_qk_int8_pv_fp16_triton(
        q,
        k,
        v,
        tensor_layout="HND",
        quantization_backend="triton",
        is_causal=causal,
        sm_scale=scale,
        smooth_k=smooth_k,
        return_lse=need_lse,
    )
    return (result[0], result[1]) if need_lse else (result, None)
