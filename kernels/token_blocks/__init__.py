"""Softmax attention over the key blocks that every single query lists for itself.

The consumer of mechanisms that choose blocks per token (MoBA, NSA, VMoBA, SeerAttention while decoding).
"""

from __future__ import annotations

import math

# by name: importing the backend module token_blocks.torch rebinds the name `torch` in this package
from torch import Tensor

from attnbench.kernels._attention import check_shapes
from attnbench.kernels.backends import Op
from attnbench.kernels.token_selection import SharedKeys, TokenBlocks, TokenKeys

OP = Op(
    "token_blocks",
    {
        "reference": "attnbench.kernels.token_blocks.reference:token_blocks",
        "torch": "attnbench.kernels.token_blocks.torch:token_blocks",
        "triton": "attnbench.kernels.token_blocks.triton:token_blocks",
        "flex": "attnbench.kernels.token_blocks.peers:flex",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def token_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenBlocks,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention o = softmax(scale·q kᵀ + key_bias) v over the key blocks that each query lists.

    Key j is visible to query i iff its block is in the list of i and, with ``causal``, j ≤ i + M − N.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides.
        k: (B, Hkv, M, D) with Hkv dividing H; query head h reads key head ⌊h·Hkv/H⌋.
        v: (B, Hkv, M, Dv); Dv may differ from D.
        selection: the lists, for this N and M. Keys of lists that heads of a key head share are read once.
        causal: whether keys after i + M − N are hidden (the last query sees the last key).
        scale: multiplier of the scores, 1/√D by default.
        key_bias: broadcastable to (B, H, M), added to the scores of a key; −inf removes it. Receives a
            gradient. One that differs from head to head costs the reuse of keys by the heads of a key head.
        backend: ``auto``, or one of ``OPS["token_blocks"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q, and lse (B, H, N) in fp32 (fp64 for fp64 inputs), the natural
        log-sum-exp of the visible scores. A row that sees no key has o = 0, lse = −inf and zero gradients.

    Raises:
        ValueError: shapes that do not match.
        Unsupported: the backend cannot serve a shape, a dtype or an option; nothing else is tried.

    Cost: 2·B·H·P·(D + Dv) FLOPs forward for P pairs in the listed blocks, 2.5 times that backward.
    Source: Lu et al., MoBA, §2.3 (arXiv 2502.13189): blocks gather their queries, partial results merge by
    lse; Yuan et al., Native Sparse Attention, §3.4 (arXiv 2502.11089): the heads of a query share its list.
    """
    check(q, k, v, selection)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return OP.run(backend, q, k, v, selection, causal=causal, scale=scale, key_bias=key_bias)


def check(q: Tensor, k: Tensor, v: Tensor, selection: TokenBlocks | TokenKeys | SharedKeys) -> None:
    """Raise ValueError where shapes do not match each other or the selection."""
    check_shapes(q, k, v)
    b, h, n, _ = q.shape
    m = k.shape[2]
    batch, heads = selection.indices.shape[:2]
    if (selection.n, selection.m) != (n, m) or batch not in (1, b) or h % heads:
        observed = f"N = {selection.n}, M = {selection.m}, B = {batch}, Hs = {heads}"
        raise ValueError(
            f"selection: observed {observed}, expected N = {n}, M = {m}, B = 1 or {b}, Hs dividing {h}"
        )
