"""Softmax mass of every pair of a block of queries and a block of keys, without the attention map.

What oracles select by, what recall is measured with and what learned selectors are trained towards.
"""

from __future__ import annotations

import math

# by name: importing the backend module block_mass.torch rebinds the name `torch` in this package
from torch import Tensor

from attnbench.kernels.backends import Op

OP = Op(
    "block_mass",
    {
        "reference": "attnbench.kernels.block_mass.reference:block_mass",
        "torch": "attnbench.kernels.block_mass.torch:block_mass",
        "triton": "attnbench.kernels.block_mass.triton:block_mass",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    causal: bool = False,
    reduce: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """Reduce exp(scale·q_i·k_j − lse_i) over the visible pairs (i, j) of each pair of blocks.

    With the lse of dense attention the terms are its weights: the sums of a query block add up to its
    number of queries that see a key.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides.
        k: (B, Hkv, M, D) with Hkv dividing H; query head h reads key head ⌊h·Hkv/H⌋.
        lse: (B, H, N), as :func:`attnbench.kernels.flash` returns it; a row with −inf has no mass.
        block_q: queries of a block; the last may have fewer.
        block_k: keys of a block; the last may have fewer.
        scale: multiplier of the scores, 1/√D by default.
        causal: key j is visible to query i iff j ≤ i + M − N.
        reduce: ``sum`` or ``max``.
        backend: ``auto``, or one of ``OPS["block_mass"].backends``.

    Returns:
        (B, H, ⌈N / block_q⌉, ⌈M / block_k⌉) in fp32 (fp64 for fp64 inputs), 0 where no pair is visible.

    Raises:
        ValueError: shapes that do not match, or an unknown reduction.
        Unsupported: the backend cannot serve a shape or a dtype, or (``triton``) a gradient is asked for.

    Cost: 2·B·H·P·D FLOPs for P visible pairs.
    Source: the block statistics of AdaSpa (sum, arXiv 2502.21079) and SeerAttention (max, arXiv 2410.13276).
    """
    b, h, n, d = q.shape
    if k.shape != (b, k.shape[1], k.shape[2], d) or h % k.shape[1] or lse.shape != (b, h, n):
        shapes = " and ".join(str(tuple(x.shape)) for x in (q, k, lse))
        raise ValueError(f"q, k, lse: observed {shapes}, expected (B, H, N, D), (B, Hkv, M, D), (B, H, N)")
    if reduce not in ("sum", "max"):
        raise ValueError(f"reduce: observed {reduce!r}, expected 'sum' or 'max'")
    if min(block_q, block_k) < 1:
        raise ValueError(f"block_q, block_k: observed {block_q}, {block_k}, expected positive numbers")
    return OP.run(
        backend,
        q,
        k,
        lse,
        block_q=block_q,
        block_k=block_k,
        scale=1.0 / math.sqrt(d) if scale is None else scale,
        causal=causal,
        reduce=reduce,
    )
