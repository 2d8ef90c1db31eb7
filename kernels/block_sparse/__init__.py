"""Softmax attention over the key blocks that a Selection lists for each block of queries.

The consumer of every mechanism that selects blocks, whatever selects them: fixed patterns, pooled scores,
permuted sequences, oracles.
"""

from __future__ import annotations

import math

# by name: importing the backend module block_sparse.torch rebinds the name `torch` in this package
from torch import Tensor

from attnbench.kernels._attention import check_shapes
from attnbench.kernels.backends import Op
from attnbench.kernels.selection import Selection

OP = Op(
    "block_sparse",
    {
        "reference": "attnbench.kernels.block_sparse.reference:block_sparse",
        "torch": "attnbench.kernels.block_sparse.torch:block_sparse",
        "triton": "attnbench.kernels.block_sparse.triton:block_sparse",
        "flex": "attnbench.kernels.block_sparse.peers:flex",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    causal: bool = False,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention o = softmax(scale·q kᵀ + key_bias) v over the keys that the selection keeps.

    Key j is visible to query i iff its block is in the list of i's block, and, with ``causal``,
    k_pos_j ≤ q_pos_i, and, with ``row_threshold``, key_bias_j ≥ row_threshold_i.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides.
        k: (B, Hkv, M, D) with Hkv dividing H; query head h reads key head ⌊h·Hkv/H⌋.
        v: (B, Hkv, M, Dv); Dv may differ from D.
        selection: the lists, for this N and M. Any block sizes; multiples of 64 fill the tiles of a GPU.
        causal: whether positions hide keys.
        q_pos: integers broadcastable to (B, H, N): positions of the queries on the axis of the keys, by
            default i + M − N (the last query sees the last key). In any order.
        k_pos: integers broadcastable to (B, H, M): positions of the keys, by default j. In any order.
        scale: multiplier of the scores, 1/√D by default.
        key_bias: broadcastable to (B, H, M), added to the scores of a key; −inf removes it. Receives a
            gradient.
        row_threshold: broadcastable to (B, H, N), needs ``key_bias``. Compared, never differentiated.
        backend: ``auto``, or one of ``OPS["block_sparse"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q, and lse (B, H, N) in fp32 (fp64 for fp64 inputs), the natural
        log-sum-exp of the visible scores. A row that sees no key has o = 0, lse = −inf and zero gradients.

    Raises:
        ValueError: shapes that do not match, or a threshold without a bias.
        Unsupported: the backend cannot serve a shape, a dtype or an option; nothing else is tried.

    Cost: 2·B·H·P·(D + Dv) FLOPs forward for P pairs in the selected blocks, 2.5 times that backward.
    Source: Dao et al., FlashAttention, §3.3 (arXiv 2205.14135); the backward pass walks the transposed lists.
    """
    _check(q, k, v, selection)
    if row_threshold is not None and key_bias is None:
        raise ValueError(
            "row_threshold: observed no key_bias, expected the key_bias that it is compared with"
        )
    return OP.run(
        backend,
        q,
        k,
        v,
        selection,
        causal=causal,
        q_pos=q_pos if causal else None,
        k_pos=k_pos if causal else None,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        key_bias=key_bias,
        row_threshold=None if row_threshold is None else row_threshold.detach(),
    )


def _check(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> None:
    check_shapes(q, k, v)
    b, h, n, _ = q.shape
    m = k.shape[2]
    batch, heads = selection.counts.shape[:2]
    if (selection.n, selection.m) != (n, m) or batch not in (1, b) or h % heads:
        observed = f"N = {selection.n}, M = {selection.m}, B = {batch}, Hs = {heads}"
        raise ValueError(
            f"selection: observed {observed}, expected N = {n}, M = {m}, B = 1 or {b}, Hs dividing {h}"
        )
