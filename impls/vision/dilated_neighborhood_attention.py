"""Dilated neighborhood attention: neighborhoods among the tokens at multiples of a distance. DiNAT."""

from __future__ import annotations

from attnbench.errors import UsageError
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import Axes, per_axis
from attnbench.impls.vision.neighborhood_attention import (
    ALIGNED,
    CAUSAL,
    PADDING,
    WINDOW,
    NeighborhoodAttention,
)

WIDEST = "widest"


class DilatedNeighborhoodAttention(NeighborhoodAttention):
    """Neighborhood attention inside each class of positions that are equal modulo the dilation."""

    spec = Spec(
        id="dilated_neighborhood_attention",
        name="Dilated neighborhood attention (DiNA)",
        family="vision",
        kind="core",
        paper=Paper("Dilated Neighborhood Attention Transformer", 2022, arxiv="2209.15001"),
        upstream="https://github.com/SHI-Labs/NATTEN",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Neighborhood attention over every d-th token: as many keys, spread over the whole grid.",
        formula="keys j with p_j ≡ p_i mod d on every axis, and u_j in the neighborhood of u_i, u = ⌊p/d⌋",
        cost="4·N·Πw·C FLOPs, 4·H·N bytes",
        permutation_invariant=False,
        grouped_kv=True,
        grid_ranks=(1, 2, 3),
        lengths="aligned",
        ops=("neighborhood",),
        hyper=(
            WINDOW,
            Hyper(
                "dilation",
                WIDEST,
                "distance d of keys, one number or one per axis, reduced to what fits; widest: ⌊G/w⌋",
            ),
            Hyper(
                "phase",
                1,
                "0: local, dilation 1; 1: dilated. Layers of a stack alternate",
                choices=(0, 1),
            ),
            CAUSAL,
            Hyper("rpb", False, "add a learned bias per head and relative position, as DiNAT's models do"),
        ),
        test_hyper={"window": 2, "dilation": 2},
        padding=PADDING,
        deviations=(
            "A window larger than the grid is cut to it and a dilation reduced until w·d ≤ G; upstream "
            "refuses both.",
            "The classes of positions of an axis that d does not divide differ in length by one; each has "
            "neighborhoods of its own length.",
            ALIGNED,
        ),
    )

    def setup(self) -> None:
        """Refuse a dilation that is neither a word nor numbers."""
        super().setup()
        if isinstance(self.hp.dilation, str) and self.hp.dilation != WIDEST:
            raise UsageError(
                f"{self.spec.id}: observed dilation={self.hp.dilation!r}, expected {WIDEST!r}, one number, "
                "or one per axis"
            )
        if isinstance(self.hp.dilation, int):
            per_axis(self.spec, "dilation", self.hp.dilation, 1)

    def dilation(self, grid: Axes, window: Axes) -> Axes:
        """1 in phase 0; in phase 1 the one given, or the largest that fits."""
        if self.hp.phase == 0:
            return (1,) * len(grid)
        if self.hp.dilation == WIDEST:
            return tuple(g // w for g, w in zip(grid, window, strict=True))
        return per_axis(self.spec, "dilation", self.hp.dilation, len(grid))
