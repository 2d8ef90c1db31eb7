"""Softmax attention along one axis of a grid: all lines at once, as batch and heads of dense attention.

Axes that vary more slowly than the line's become batch, axes that vary faster become heads: tokens in
row-major order then need no transposed copy, whatever the axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnbench.kernels import flash, padding_bias


@dataclass(frozen=True)
class Lines:
    """The lines along ``axis`` of ``grid``.

    ``heads_outer`` says that heads vary more slowly than tokens in memory, (B, H, N, D) as allocated, and
    join the batch; else they vary faster, (B, N, H, D) as projections leave them, and stay heads.
    """

    grid: tuple[int, ...]
    axis: int
    heads_outer: bool

    @property
    def _order(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes of (B, H, *grid) that make the batch, and those that make the heads."""
        slow = tuple(range(2, 2 + self.axis))
        fast = tuple(range(3 + self.axis, 2 + len(self.grid)))
        return ((0, 1, *slow), fast) if self.heads_outer else ((0, *slow), (*fast, 1))

    def fold(self, x: Tensor) -> Tensor:
        """(B, H, N, D) → (batch, heads, length of a line, D)."""
        batch, heads = self._order
        cells = x.unflatten(2, self.grid).permute(*batch, *heads, 2 + self.axis, -1)
        if not heads:
            cells = cells.unsqueeze(len(batch))
        return cells.flatten(len(batch), -3).flatten(0, len(batch) - 1)

    def unfold(self, x: Tensor, b: int, h: int) -> Tensor:
        """(batch, heads, length of a line, D) → (B, H, *grid, D), a view."""
        batch, heads = self._order
        sizes = (b, h, *self.grid)
        cells = x.unflatten(0, [sizes[i] for i in batch])
        place = len(batch)
        cells = cells.unflatten(place, [sizes[i] for i in heads]) if heads else cells.squeeze(place)
        order = (*batch, *heads, 2 + self.axis)
        return cells.permute(*(order.index(i) for i in range(len(order))), -1)


def line_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, ...],
    axis: int,
    padded: Tensor | None = None,
    need_lse: bool = False,
    backend: str,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of q (B, H, N, D) on k, v (B, H, N, ·) of the same line along ``axis``.

    Args:
        q: tokens on ``grid`` in row-major order, as k and v.
        k: keys.
        v: values.
        grid: sides of the grid, with product N.
        axis: the axis along which a line runs.
        padded: (B, N), True where a key is padding.
        need_lse: whether the log-sum-exp is wanted.
        backend: of :func:`attnbench.kernels.flash`.
        **options: others of ``flash``, by position on the line.

    Returns:
        o (B, H, *grid, Dv), strided, and lse (B, H, *grid) or None.

    Cost: 2·B·H·N·G·(D + Dv) FLOPs for a line of G tokens.
    """
    b, h, n, _ = q.shape
    lines = Lines(grid, axis, heads_outer=q.stride(1) > q.stride(2))
    bias = padding_bias(padded)
    if bias is not None:
        bias = lines.fold(bias.expand(b, h, n).unsqueeze(-1)).squeeze(-1)
    o, lse = flash(
        lines.fold(q), lines.fold(k), lines.fold(v),
        key_bias=bias, need_lse=need_lse, backend=backend, **options,
    )  # fmt: skip
    return lines.unfold(o, b, h), None if lse is None else lines.unfold(lse.unsqueeze(-1), b, h).squeeze(-1)
