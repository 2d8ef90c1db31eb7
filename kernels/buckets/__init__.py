"""Softmax attention inside buckets of sorted tokens: the consumer of hashing and clustering mechanisms.

Tokens are gathered through lists, attend within their bucket and those before it, and are put back; a token
that stands in several buckets gets the merge, or the mean, of what it saw there.
"""

from __future__ import annotations

import math
from typing import Literal

# by name: importing the backend module buckets.torch rebinds the name `torch` in this package
from torch import Tensor

from attnbench.kernels._attention import check_shapes
from attnbench.kernels.backends import Op
from attnbench.kernels.buckets.layout import Buckets

OP = Op(
    "buckets",
    {
        "reference": "attnbench.kernels.buckets.reference:buckets",
        "torch": "attnbench.kernels.buckets.torch:buckets",
        "triton": "attnbench.kernels.buckets.triton:buckets",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)

Combine = Literal["lse", "mean"]

__all__ = ["OP", "Buckets", "Combine", "buckets"]


def buckets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Buckets,
    *,
    causal: bool = False,
    self_score: float | None = None,
    combine: Combine = "lse",
    scale: float | None = None,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that the lists show each query, with s = scale·q kᵀ + key_bias.

    With m_ij the number of times that query i sees key j (``lists.to_multiplicity()``, less what ``causal``
    hides), ``combine="lse"`` computes o_i = Σ_j m_ij exp(s_ij) v_j / Σ_j m_ij exp(s_ij): one softmax over
    everything seen, duplicates counted. ``combine="mean"`` computes one softmax for each entry that holds
    the query, and the plain mean over these entries; one that sees no key counts as 0.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides.
        k: (B, Hkv, M, D) with Hkv dividing H; query head h reads key head ⌊h·Hkv/H⌋.
        v: (B, Hkv, M, Dv); Dv may differ from D.
        lists: which entries see each other, for this N and M; its head axis is 1 or divides H.
        causal: key j is hidden from query i where j > i + M − N.
        self_score: replaces scale·q_i·k_i of a token and itself (j = i), without a gradient. A large
            negative number lets a token attend to itself only where it sees nothing else.
        combine: ``lse`` or ``mean``.
        scale: multiplier of the scores, 1/√D by default.
        key_bias: broadcastable to (B, H, M), added to the scores of a key; −inf removes it. Receives a
            gradient.
        backend: ``auto``, or one of ``OPS["buckets"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q, and lse (B, H, N) in fp32 (fp64 for fp64 inputs), the natural log
        of Σ_j m_ij exp(s_ij). A query that sees no key has o = 0, lse = −inf and zero gradients.

    Raises:
        ValueError: shapes that do not match, or an unknown ``combine``.
        Unsupported: the backend cannot serve a shape or a dtype; nothing else is tried.

    Cost: 2·B·H·P·(D + Dv) FLOPs forward for P pairs of entries in the buckets, 2.5 times that backward. Where
    tokens stand in several entries, 4·B·H·Lq·Dv bytes of partial outputs.
    Source: Kitaev et al., Reformer (arXiv 2001.04451), §2; Roy et al., Routing Transformer
    (arXiv 2003.05997).
    """
    _check(q, k, v, lists)
    if combine not in ("lse", "mean"):
        raise ValueError(f"combine: observed {combine!r}, expected 'lse' or 'mean'")
    return OP.run(
        backend,
        q,
        k,
        v,
        lists,
        causal=causal,
        self_score=self_score,
        combine=combine,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        key_bias=key_bias,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, lists: Buckets) -> None:
    check_shapes(q, k, v)
    b, h, n, _ = q.shape
    m = k.shape[2]
    if (lists.n, lists.m) != (n, m):
        raise ValueError(f"lists: observed N = {lists.n}, M = {lists.m}, expected N = {n}, M = {m}")
    for name, entries in (("queries", lists.queries), ("keys", lists.keys)):
        batch, heads = entries.shape[:2]
        if batch not in (1, b) or h % heads:
            raise ValueError(
                f"lists.{name}: observed B = {batch}, Hs = {heads}, expected 1 or {b}, dividing {h}"
            )
