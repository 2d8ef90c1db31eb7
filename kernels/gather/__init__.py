"""Softmax attention over listed keys: a list per query, or one list for all queries of a head.

The consumer of per-query top-k, learned connectivity and token pruning.
"""

from __future__ import annotations

import math

# by name: importing the backend module gather.torch rebinds the name `torch` in this package
from torch import Tensor

from attnbench.kernels.backends import Op
from attnbench.kernels.token_blocks import check
from attnbench.kernels.token_selection import SharedKeys, TokenKeys

OP = Op(
    "gather",
    {
        "reference": "attnbench.kernels.gather.reference:gather",
        "torch": "attnbench.kernels.gather.torch:gather",
        "triton": "attnbench.kernels.gather.triton:gather",
        "flex": "attnbench.kernels.gather.peers:flex",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenKeys | SharedKeys,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention o = softmax(scale·q kᵀ + key_bias) v over the keys that a list names.

    Key j is visible to query i iff it is in the list of i (:class:`TokenKeys`) or of its head
    (:class:`SharedKeys`) and, with ``causal``, j ≤ i + M − N.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides.
        k: (B, Hkv, M, D) with Hkv dividing H; query head h reads key head ⌊h·Hkv/H⌋.
        v: (B, Hkv, M, Dv); Dv may differ from D.
        selection: the lists, for this N and M. The gradient reaches listed keys alone, not the choice.
        causal: whether keys after i + M − N are hidden (the last query sees the last key).
        scale: multiplier of the scores, 1/√D by default.
        key_bias: broadcastable to (B, H, M), added to the scores of a key; −inf removes it. Receives a
            gradient.
        backend: ``auto``, or one of ``OPS["gather"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q, and lse (B, H, N) in fp32 (fp64 for fp64 inputs), the natural
        log-sum-exp of the visible scores. A row that sees no key has o = 0, lse = −inf and zero gradients.

    Raises:
        ValueError: shapes that do not match.
        Unsupported: the backend cannot serve a shape, a dtype or an option; nothing else is tried.

    Cost: 2·B·H·N·K·(D + Dv) FLOPs forward for lists of K keys, 2.5 times that backward. A list per query
    reads N·K·(D + Dv) numbers of keys and values per head without reuse; a shared list copies K·(D + Dv).
    Source: Gupta et al., Memory-efficient Transformers via Top-k Attention (arXiv 2106.06899).
    """
    check(q, k, v, selection)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return OP.run(backend, q, k, v, selection, causal=causal, scale=scale, key_bias=key_bias)
