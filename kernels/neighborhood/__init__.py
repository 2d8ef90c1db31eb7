"""Softmax attention over neighborhoods of a grid: a window per axis around each query, strided or dilated.

The window is moved inside at the borders of the grid, so that every query sees as many keys; sliding windows
that are cut there are another pattern.
"""

from __future__ import annotations

import math

# by name: importing the backend module neighborhood.torch rebinds the name `torch` in this package
from torch import Tensor

from attnbench.kernels.backends import Op
from attnbench.kernels.neighborhood.pattern import Neighborhood

__all__ = ["OP", "Neighborhood", "neighborhood"]

OP = Op(
    "neighborhood",
    {
        "reference": "attnbench.kernels.neighborhood.reference:neighborhood",
        "torch": "attnbench.kernels.neighborhood.torch:neighborhood",
        "triton": "attnbench.kernels.neighborhood.triton:neighborhood",
        "flex": "attnbench.kernels.neighborhood.peers:flex",
        "natten": "attnbench.kernels.neighborhood.peers:natten",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Neighborhood,
    *,
    grid: tuple[int, ...],
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention o = softmax(scale·q kᵀ + bias + key_bias) v over the neighborhood of each query.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides. Token n is
            the n-th cell of ``grid`` in row-major order; N may end before the grid does (a folded sequence).
        k: (B, Hkv, N, D) with Hkv dividing H; query head h reads key head ⌊h·Hkv/H⌋.
        v: (B, Hkv, N, Dv); Dv may differ from D.
        pattern: which queries see which keys. Its window times its dilation must fit the grid.
        grid: lengths of the 1 to 3 axes.
        bias: (H, *pattern.table), the relative position bias: entry u_query − u_key + window − 1 of every
            axis is added to the score of a pair.
        key_bias: broadcastable to (B, H, N), added to the scores of a key; −inf removes it.
        scale: multiplier of the scores, 1/√D by default.
        backend: ``auto``, or one of ``OPS["neighborhood"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q, and lse (B, H, N) in fp32 (fp64 for fp64 inputs), the natural
        log-sum-exp of the visible scores, with gradients through both, to q, k, v and both biases (``natten``
        has none through lse). A query that sees no key has o = 0, lse = −inf and zero gradients.

    Raises:
        ValueError: shapes, a grid or a table that do not match, or a window that does not fit.
        Unsupported: the backend cannot serve a shape, a dtype or an option; nothing else is tried.

    Cost: 2·B·H·N·Π window·(D + Dv) FLOPs forward without causal axes, 2.5 times that backward; B·H·N·4
    bytes of lse.
    Source: Hassani et al., Neighborhood Attention (arXiv 2204.07143), Dilated (2209.15001), Generalized
    (2504.16922).
    """
    grid = tuple(grid)
    _check(q, k, v, pattern, grid)
    if bias is not None and tuple(bias.shape) != (q.shape[1], *pattern.table):
        raise ValueError(
            f"bias: observed {tuple(bias.shape)}, expected (H, *table) = {(q.shape[1], *pattern.table)}"
        )
    return OP.run(
        backend,
        q,
        k,
        v,
        pattern,
        grid=grid,
        bias=bias,
        key_bias=key_bias,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, pattern: Neighborhood, grid: tuple[int, ...]) -> None:
    b, h, n, d = q.shape
    kv_heads = k.shape[1]
    if k.shape != (b, kv_heads, n, d) or v.shape[:3] != k.shape[:3] or h % kv_heads:
        shapes = " and ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"q, k, v: observed {shapes}, expected (B, H, N, D), (B, Hkv, N, D), (B, Hkv, N, Dv)"
        )
    pattern.check(grid)
    if n > math.prod(grid):
        raise ValueError(f"grid: observed {grid}, expected lengths that hold {n} tokens")
