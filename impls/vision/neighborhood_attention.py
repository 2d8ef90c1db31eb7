"""Neighborhood attention: each query sees a window around it that borders move inside. NAT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import (
    Axes,
    PerRank,
    aligned_grid,
    at_rank,
    axes_by_rank,
    count_pairs,
    grid_of,
    position_tables,
)
from attnbench.kernels import Neighborhood, flash, merge, neighborhood, padding_bias
from attnbench.kernels.neighborhood import reference

WINDOWS = {1: (256,), 2: (7, 7), 3: (8, 8, 8)}
"""Sides of a window by the rank of the grid; 7×7 is the paper's."""

WINDOW = Hyper(
    "window",
    None,
    "keys w that a query sees per axis, one number or one per axis, at most the grid; None: 256 of a "
    "sequence, 7×7 of an image, 8×8×8 of a video",
)
CAUSAL = Hyper(
    "causal",
    None,
    "axes, one bool or one per axis, on which no key is after the query; None: none under NS and NC, all "
    "under CS and CC, which need all",
)
PADDING = "neighborhoods are counted in positions, which dropping a key shifts"
ALIGNED = (
    "CS and CC have every axis causal, which is stricter than row-major order. Under NC and CC token n of x "
    "lies on token n of the context."
)


class NeighborhoodAttention(Attention):
    """Softmax attention over the w nearest keys of each axis; also the base of its generalisations."""

    spec = Spec(
        id="neighborhood_attention",
        name="Neighborhood attention (NA)",
        family="vision",
        kind="core",
        paper=Paper("Neighborhood Attention Transformer", 2022, arxiv="2204.07143", venue="CVPR 2023"),
        upstream="https://github.com/SHI-Labs/NATTEN",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Each query attends to a window around it, moved inside at borders so that all see as many "
        "keys.",
        formula="o_i = softmax over {j : s_i ≤ p_j < s_i + w on every axis} of q_i·k_j/√D, "
        "s_i = clamp(p_i − ⌊w/2⌋, 0, G − w); causal axes: max(p_i − w + 1, 0) ≤ p_j ≤ p_i",
        cost="4·N·Πw·C FLOPs, 4·H·N bytes",
        permutation_invariant=False,
        grouped_kv=True,
        grid_ranks=(1, 2, 3),
        lengths="aligned",
        ops=("neighborhood",),
        hyper=(
            WINDOW,
            CAUSAL,
            Hyper("rpb", False, "add a learned bias per head and relative position, as the models of NAT do"),
        ),
        test_hyper={"window": 3},
        padding=PADDING,
        deviations=(
            "A window larger than the grid is cut to it; upstream refuses it.",
            ALIGNED,
        ),
    )

    default_windows: ClassVar[Mapping[int, Axes]] = WINDOWS

    def setup(self) -> None:
        """Check the axes and create the tables."""
        self.prepare(biased=self.hp.rpb)

    def prepare(self, *, biased: bool) -> None:
        """Read the window and the causal axes; ``biased``: create tables (H, 2w − 1, …)."""
        self.windows = axes_by_rank(self.spec, "window", self.hp.window, self.default_windows)
        given = self.hp.causal
        if self.pattern.causal and given is not None and not _all(given):
            raise UsageError(
                f"{self.spec.id} under {self.pattern}: observed causal={given}, expected every axis causal"
            )
        self.tables: PerRank | None = None
        if biased:
            shapes = {rank: tuple(2 * w - 1 for w in sides) for rank, sides in self.windows.items()}
            self.tables = position_tables(self.num_heads, shapes)

    def neighborhood(self, grid: Axes) -> Neighborhood:
        """The neighborhoods of a grid: windows, dilations and strides that fit it."""
        sides = at_rank(self.spec, "window", self.windows, len(grid))
        window = tuple(min(w, g) for w, g in zip(sides, grid, strict=True))
        dilation = tuple(
            max(1, min(d, g // w)) for d, g, w in zip(self.dilation(grid, window), grid, window, strict=True)
        )
        stride = tuple(min(t, w) for t, w in zip(self.stride(len(grid)), window, strict=True))
        return Neighborhood(window, stride, dilation, self._causal(len(grid)))

    def dilation(self, grid: Axes, window: Axes) -> Axes:
        """Distance of the keys of a window, per axis."""
        return (1,) * len(grid)

    def stride(self, rank: int) -> Axes:
        """Queries that share a window, per axis."""
        return (1,) * rank

    def _causal(self, rank: int) -> tuple[bool, ...]:
        given = self.pattern.causal if self.hp.causal is None else self.hp.causal
        axes = (given,) * rank if isinstance(given, bool) else tuple(map(bool, given))
        if len(axes) != rank:
            raise UsageError(
                f"{self.spec.id} on a grid of rank {rank}: observed causal={given}, expected one bool, or "
                f"{rank}"
            )
        return axes

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        extra_kv: tuple[Tensor, Tensor] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Neighborhood attention of q (B, H, N, D) over k, v (B, Hkv, N, ·) on one grid.

        ``extra_kv``, k (B, Hkv, P, D) and v (B, Hkv, P, Dv), are keys off the grid, such as registers or a
        prompt: every query sees them in the same softmax.
        """
        return self.attend_lse(
            q, k, v, grid=grid, key_padding_mask=key_padding_mask, extra_kv=extra_kv, **inputs
        )[0]

    def attend_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        extra_kv: tuple[Tensor, Tensor] | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`attend`, with the log-sum-exp (B, H, N), by which attention to further keys is merged."""
        sides = aligned_grid(self.spec, grid, q, k)
        o, lse = neighborhood(
            q,
            k,
            v,
            self.neighborhood(sides),
            grid=sides,
            bias=self._bias(sides),
            key_bias=padding_bias(key_padding_mask),
            backend=self.backend,
        )
        if extra_kv is None:
            return o, lse
        more, more_lse = flash(q, *extra_kv, backend=self.backend)
        assert more_lse is not None  # need_lse is the default
        return merge(o, lse, more, more_lse)

    def _bias(self, grid: Axes) -> Tensor | None:
        """The table of this grid: of a window cut to the grid the entries around offset 0."""
        if self.tables is None:
            return None
        table = self.tables.at(len(grid))
        for axis, w in enumerate(self.neighborhood(grid).window, start=1):
            table = table.narrow(axis, table.shape[axis] // 2 - (w - 1), 2 * w - 1)
        return table

    def visible(self, n: int, m: int, device: torch.device, *, grid: Grid = None) -> Tensor:
        """The mask, bool (N, N)."""
        sides = grid_of(self.spec, grid, n)
        return reference.visible(self.neighborhood(sides), sides, n, device)

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """2·D for the score and 2·D for the value of every visible pair."""
        sides = grid_of(self.spec, grid, n)
        return 4 * self.embed_dim * count_pairs(self.neighborhood(sides).on(sides))

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return 4 * self.embed_dim * n * m

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exp, fp32, kept for the backward."""
        return 4 * self.num_heads * n


def _all(causal: bool | tuple[bool, ...]) -> bool:
    return causal if isinstance(causal, bool) else all(causal)
