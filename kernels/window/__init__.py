"""Softmax attention inside windows of a grid: batches of small query and key windows as an index map.

Serves every mechanism that partitions a grid. A window of queries may see a larger, overlapping, shifted,
strided or rescaled window of keys; no partitioned copy of a tensor is made.
"""

from __future__ import annotations

import math

# by name: importing the backend module window.torch rebinds the name `torch` in this package
from torch import Tensor

from attnbench.kernels._attention import check_shapes
from attnbench.kernels.backends import Op
from attnbench.kernels.window.partition import Partition

__all__ = ["OP", "Partition", "window"]

OP = Op(
    "window",
    {
        "reference": "attnbench.kernels.window.reference:window",
        "torch": "attnbench.kernels.window.torch:window",
        "triton": "attnbench.kernels.window.triton:window",
        "flex": "attnbench.kernels.window.peers:flex",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition,
    *,
    grid: tuple[int, ...],
    grid_kv: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention o = softmax(scale·q kᵀ + bias + key_bias) v over the keys of each query's window.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides. Token n is
            the n-th cell of ``grid`` in row-major order; N may end before the grid does (a folded sequence).
        k: (B, Hkv, M, D) with Hkv dividing H; query head h reads key head ⌊h·Hkv/H⌋. Tokens of ``grid_kv``.
        v: (B, Hkv, M, Dv); Dv may differ from D.
        partition: which queries see which keys; windows at a border are cut, nothing need divide the grid.
        grid: lengths of the 1 to 3 axes of the queries.
        grid_kv: lengths of the axes of the keys, by default ``grid``.
        bias: (H, *partition.table), the relative position bias: entry (u_query − u_key + bias_shift) of
            every axis is added to the score of a pair. Needs ``grid_kv`` = ``grid``.
        key_bias: broadcastable to (B, H, M), added to the scores of a key; −inf removes it.
        causal: key j is visible to query i only if j ≤ i in row-major order. Needs ``grid_kv`` = ``grid``.
        scale: multiplier of the scores, 1/√D by default.
        backend: ``auto``, or one of ``OPS["window"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q, and lse (B, H, N) in fp32 (fp64 for fp64 inputs), the natural
        log-sum-exp of the visible scores, with gradients through both, to q, k, v and both biases. A query
        that sees no key has o = 0, lse = −inf and zero gradients.

    Raises:
        ValueError: shapes, grids or a table that do not match.
        Unsupported: the backend cannot serve a shape, a dtype or an option; nothing else is tried.

    Cost: 2·B·H·P·(D + Dv) FLOPs forward for P visible pairs, N·Π key_window of them away from borders, and
    2.5 times that backward; B·H·N·4 bytes of lse.
    Source: Liu et al., Swin Transformer (arXiv 2103.14030); Vaswani et al., HaloNet (arXiv 2103.12731).
    """
    grid = tuple(grid)
    grid_kv = grid if grid_kv is None else tuple(grid_kv)
    _check(q, k, v, partition, grid, grid_kv)
    if grid != grid_kv and (causal or bias is not None):
        raise ValueError(
            f"grid_kv with {'causal' if causal else 'bias'}: observed {grid_kv}, expected the grid {grid}"
        )
    if bias is not None:
        _ = partition.bias_shift  # raises where the difference of positions names no entry
        if tuple(bias.shape) != (q.shape[1], *partition.table):
            raise ValueError(
                f"bias: observed {tuple(bias.shape)}, expected (H, *table) = {(q.shape[1], *partition.table)}"
            )
    return OP.run(
        backend,
        q,
        k,
        v,
        partition,
        grid=grid,
        grid_kv=grid_kv,
        bias=bias,
        key_bias=key_bias,
        causal=causal,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
    )


def _check(
    q: Tensor, k: Tensor, v: Tensor, partition: Partition, grid: tuple[int, ...], grid_kv: tuple[int, ...]
) -> None:
    check_shapes(q, k, v)
    n, m = q.shape[2], k.shape[2]
    for name, axes, tokens in (("grid", grid, n), ("grid_kv", grid_kv, m)):
        if len(axes) != len(partition.window):
            raise ValueError(f"{name}: observed {axes}, expected {len(partition.window)} axes as the windows")
        if min(axes) < 1 or tokens > math.prod(axes):
            raise ValueError(f"{name}: observed {axes}, expected positive lengths that hold {tokens} tokens")
