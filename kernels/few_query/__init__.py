"""Softmax attention of few queries over a long memory, or of many queries over few keys; also decoding.

A kernel with one program per query tile leaves a GPU idle when there are few of them: here the keys are
split too, and partial results merge by log-sum-exp. Pooling, latents, prototypes and agents stand on it.
"""

from __future__ import annotations

import math

# by name: importing the backend module few_query.torch rebinds the name `torch` in this package
from torch import Tensor

from attnbench.kernels._attention import check_shapes
from attnbench.kernels.backends import Op

OP = Op(
    "few_query",
    {
        "reference": "attnbench.kernels.few_query.reference:few_query",
        "torch": "attnbench.kernels.few_query.torch:few_query",
        "triton": "attnbench.kernels.few_query.triton:few_query",
        "sdpa_math": "attnbench.kernels.few_query.peers:sdpa_math",
        "sdpa_flash": "attnbench.kernels.few_query.peers:sdpa_flash",
        "sdpa_efficient": "attnbench.kernels.few_query.peers:sdpa_efficient",
        "sdpa_cudnn": "attnbench.kernels.few_query.peers:sdpa_cudnn",
        "flex": "attnbench.kernels.few_query.peers:flex",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def few_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    bias: Tensor | None = None,
    need_lse: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention o = softmax(s) v with s = scale·q kᵀ + bias + key_bias, for N ≪ M or M ≪ N.

    The same function as :func:`attnbench.kernels.flash` with fewer options, computed for lopsided shapes;
    any N and M are allowed. The unnormalised Σ_j exp(s_ij) v_j is exp(lse)·o.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides.
        k: (B, Hkv, M, D) with Hkv dividing H; query head h reads key head ⌊h·Hkv/H⌋. The N·H/Hkv queries of
            a key head share its tiles, so that a decoding step reads each key once.
        v: (B, Hkv, M, Dv); Dv may differ from D.
        causal: key j is visible to query i iff j ≤ i + M − N (the last query sees the last key).
        scale: multiplier of the scores, 1/√D by default.
        key_bias: broadcastable to (B, H, M), added to the scores of a key; −inf removes it (padding).
        bias: broadcastable to (B, H, N, M), added to the scores. Both biases receive gradients.
        need_lse: False lets a peer that cannot return lse serve the call; lse is then None.
        backend: ``auto``, or one of ``OPS["few_query"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q, and lse (B, H, N) in fp32 (fp64 for fp64 inputs), the natural
        log-sum-exp of the visible scores. A row that sees no key has o = 0, lse = −inf and zero gradients.

    Raises:
        ValueError: shapes that do not match.
        Unsupported: the backend cannot serve a shape, a dtype or an option; nothing else is tried.

    Cost: 2·B·H·N·M·(D + Dv) FLOPs forward, 2.5 times that backward; bound by reading k and v once where
    N·H/Hkv is small, by reading q and writing o where M is.
    Source: Dao et al., Flash-Decoding (2023); Milakov and Gimelshein, online softmax (arXiv 1805.02867).
    """
    check_shapes(q, k, v)
    return OP.run(
        backend,
        q,
        k,
        v,
        causal=causal and q.shape[2] > 1,  # a lone query is the last one and sees every key
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        key_bias=key_bias,
        bias=bias,
        need_lse=need_lse,
    )
