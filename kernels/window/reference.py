"""The definition of :func:`attnbench.kernels.window`: a dense mask and a dense bias from the formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.kernels.window.partition import Partition

Axes = tuple[int, ...]


def coordinates(grid: Axes, n: int, device: torch.device) -> list[Tensor]:
    """Position on each axis of the first n tokens of a grid in row-major order, (n,) each."""
    token = torch.arange(n, device=device)
    found = []
    for length in reversed(grid):
        found.append(token % length)
        token = token // length
    return found[::-1]


def visible(partition: Partition, grid: Axes, grid_kv: Axes, n: int, m: int, device: torch.device) -> Tensor:
    """The mask, bool (N, M), axis by axis."""
    mask = torch.ones(n, m, dtype=torch.bool, device=device)
    queries, keys = coordinates(grid, n, device), coordinates(grid_kv, m, device)
    for a, (p, j) in enumerate(zip(queries, keys, strict=True)):
        d = partition.dilation[a]
        p, j = p[:, None], j[None, :]
        cell = torch.div(p // d - partition.shift[a], partition.window[a], rounding_mode="floor")
        first = cell * partition.key_step[a] + partition.key_offset[a]
        if partition.border == "clamp":
            length = torch.div(grid_kv[a] - p % d + d - 1, d, rounding_mode="floor")  # keys of the class
            first = torch.minimum(first, length - partition.key_window[a]).clamp(min=0)
        u = j // d
        mask &= (p % d == j % d) & (first <= u) & (u < first + partition.key_window[a])
    return mask


def dense_bias(
    table: Tensor, shift: Axes, dilation: Axes, grid: Axes, n: int, m: int, mask: Tensor
) -> Tensor:
    """The bias of every pair, (H, N, M): −inf where the mask is False, elsewhere the table's entry."""
    index = torch.zeros(n, m, dtype=torch.long, device=table.device)
    queries, keys = coordinates(grid, n, table.device), coordinates(grid, m, table.device)
    for a, (p, j) in enumerate(zip(queries, keys, strict=True)):
        delta = (p // dilation[a])[:, None] - (j // dilation[a])[None, :] + shift[a]
        index = index * table.shape[1 + a] + delta.clamp(0, table.shape[1 + a] - 1)
    return table.flatten(1)[:, index].masked_fill(~mask, -math.inf)


def window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition,
    *,
    grid: Axes,
    grid_kv: Axes,
    bias: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse from the N×M score matrix; every gradient is autograd's."""
    n, m = q.shape[2], k.shape[2]
    mask = visible(partition, grid, grid_kv, n, m, q.device)
    if causal:
        mask &= torch.arange(m, device=q.device) <= torch.arange(n, device=q.device)[:, None]
    if bias is None:
        dense = torch.zeros(n, m, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    else:
        dense = dense_bias(bias, partition.bias_shift, partition.dilation, grid, n, m, mask)
    return masked_softmax(q, k, v, dense, key_bias, scale)


def masked_softmax(
    q: Tensor, k: Tensor, v: Tensor, dense: Tensor, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention with a dense bias, broadcastable to (B, H, N, M), whose −inf hide a pair."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scale * (q @ k.transpose(-1, -2)) + dense.to(q.dtype)
    if key_bias is not None:
        scores = scores + key_bias.to(q.dtype).unsqueeze(-2)
    statistics = scores.double() if scores.dtype is torch.float64 else scores.float()
    # an empty row must have zero gradients: it is set to finite scores first and to o = 0, lse = -inf last
    empty = torch.isneginf(statistics).all(-1)
    statistics = statistics.masked_fill(empty.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(statistics, -1)
    weights = torch.exp(statistics - lse.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0)
    return weights.to(v.dtype) @ v, lse.masked_fill(empty, -math.inf)
