"""Generalized neighborhood attention: groups of queries share a neighborhood, which fills tiles. GNA."""

from __future__ import annotations

from attnbench.errors import UsageError
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import Axes, at_rank, axes_by_rank, per_axis
from attnbench.impls.vision.neighborhood_attention import ALIGNED, CAUSAL, PADDING, NeighborhoodAttention

WINDOWS = {1: (192,), 2: (24, 24), 3: (12, 12, 12)}
"""Sides of a window by the rank of the grid: a third of each axis holds 64 queries, a tile of a kernel."""


class GeneralizedNeighborhoodAttention(NeighborhoodAttention):
    """Neighborhood attention whose windows advance ``stride`` queries at a time."""

    spec = Spec(
        id="generalized_neighborhood_attention",
        name="Generalized neighborhood attention (GNA)",
        family="vision",
        kind="core",
        paper=Paper(
            "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
            2025,
            arxiv="2504.16922",
        ),
        upstream="https://github.com/SHI-Labs/NATTEN",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="The t queries of a group share one window: between neighborhoods (t = 1) and "
        "blocks (t = w).",
        formula="the neighborhood of the leader of i, min(⌊u_i/t⌋·t + ⌊t/2⌋, L − 1); causal axes: "
        "max(leader − w + 1, 0) ≤ u_j ≤ u_i, leader = min(⌊u_i/t⌋·t + t − 1, L − 1)",
        cost="4·N·Πw·C FLOPs, 4·H·N bytes",
        permutation_invariant=False,
        grouped_kv=True,
        grid_ranks=(1, 2, 3),
        lengths="aligned",
        ops=("neighborhood",),
        hyper=(
            Hyper(
                "window",
                None,
                "keys w that a query sees per axis, one number or one per axis, at most the grid; None: "
                "192 of a sequence, 24×24 of an image, 12×12×12 of a video",
            ),
            Hyper(
                "stride",
                None,
                "queries t that share a window, one number or one per axis, at most w; None: ⌊w/3⌋, so that "
                "a group sees itself and the groups next to it; 1 is neighborhood attention",
            ),
            Hyper("dilation", 1, "distance of keys, one number or one per axis, reduced to what fits"),
            CAUSAL,
        ),
        test_hyper={"window": 4, "stride": 2},
        padding=PADDING,
        deviations=(
            "A window or a stride larger than the grid is cut to it and a dilation reduced until w·d ≤ G; "
            "upstream refuses them.",
            ALIGNED,
            "The defaults are ours, for shorter axes than the paper's, whose settings suit its models: "
            "80×80 with stride 16×16 at 256×256 (FLUX), 18×24×24 with 16×8×8 at 30×48×80 (HunyuanVideo). "
            "`attnbench estimate` counts the tiles of any.",
        ),
    )

    default_windows = WINDOWS

    def setup(self) -> None:
        """Refuse a stride that is larger than the window on grids of every rank."""
        self.prepare(biased=False)
        thirds = {rank: tuple(max(1, w // 3) for w in sides) for rank, sides in self.windows.items()}
        self.strides = axes_by_rank(self.spec, "stride", self.hp.stride, thirds)
        if isinstance(self.hp.dilation, int):
            per_axis(self.spec, "dilation", self.hp.dilation, 1)
        ranks = sorted(set(self.windows) & set(self.strides))
        if ranks and not any(self._fits(rank) for rank in ranks):
            self.stride(ranks[0])

    def _fits(self, rank: int) -> bool:
        return all(t <= w for t, w in zip(self.strides[rank], self.windows[rank], strict=True))

    def dilation(self, grid: Axes, window: Axes) -> Axes:
        """Distance of the keys of a window, per axis."""
        return per_axis(self.spec, "dilation", self.hp.dilation, len(grid))

    def stride(self, rank: int) -> Axes:
        """Queries that share a window, per axis. UsageError where they are more than its keys."""
        stride = at_rank(self.spec, "stride", self.strides, rank)
        if not self._fits(rank):
            raise UsageError(
                f"{self.spec.id}: observed stride={stride}, window={self.windows[rank]}, expected strides of "
                "at most the window"
            )
        return stride
