"""Which keys a neighborhood lists for which queries: window, stride, dilation and causality per axis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from attnbench.kernels.window._maps import AxisMap, GridMap, grid_map

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Neighborhood:
    """The neighborhood of each query of a grid of rank r ≤ 3; all tuples have r entries.

    On an axis with dilation d, the positions of one residue modulo d form a class of L positions, numbered
    u = ⌊p/d⌋; queries see keys of their class only. Groups of ``stride`` queries share the window of their
    leader. A window at a border is moved inside, so that it always has ``window`` keys:

        leader = min(⌊u/stride⌋·stride + ⌊stride/2⌋, L − 1), first = clamp(leader − ⌊window/2⌋, 0, L − window)

    A causal axis has leader = min(⌊u/stride⌋·stride + stride − 1, L − 1) and the keys from
    max(leader − window + 1, 0) to u itself. A key is visible iff every axis agrees.
    """

    window: Axes
    stride: Axes
    dilation: Axes
    causal: tuple[bool, ...]

    def __post_init__(self) -> None:
        rank = len(self.window)
        for name in ("window", "stride", "dilation", "causal"):
            axes = getattr(self, name)
            if not 1 <= rank <= 3 or len(axes) != rank:
                raise ValueError(f"{name}: observed {axes}, expected one entry for each of 1 to 3 axes")
            if name != "causal" and min(axes) < 1:
                raise ValueError(f"{name}: observed {axes}, expected numbers of at least 1")
        if any(t > w for t, w in zip(self.stride, self.window, strict=True)):
            raise ValueError(f"stride: observed {self.stride}, expected at most the window {self.window}")

    @classmethod
    def of(
        cls,
        window: Axes,
        *,
        stride: Axes | None = None,
        dilation: Axes | None = None,
        causal: tuple[bool, ...] | None = None,
    ) -> Neighborhood:
        """With the usual defaults: stride 1, dilation 1, no causal axis."""
        rank = len(window)
        return cls(
            tuple(window),
            tuple(stride or (1,) * rank),
            tuple(dilation or (1,) * rank),
            tuple(causal or (False,) * rank),
        )

    def clipped(self, grid: Axes) -> Neighborhood:
        """The same with windows, then strides, cut to what fits this grid: window·dilation ≤ grid.

        Raises ValueError where the dilation alone exceeds an axis.
        """
        self._check_rank(grid)
        if any(d > g for d, g in zip(self.dilation, grid, strict=True)):
            raise ValueError(f"dilation: observed {self.dilation}, expected at most the grid {tuple(grid)}")
        window = tuple(min(w, g // d) for w, g, d in zip(self.window, grid, self.dilation, strict=True))
        stride = tuple(min(t, w) for t, w in zip(self.stride, window, strict=True))
        return Neighborhood(window, stride, self.dilation, self.causal)

    def check(self, grid: Axes) -> None:
        """Raise ValueError where a window, with its dilation, does not fit the grid."""
        self._check_rank(grid)
        if any(w * d > g for w, d, g in zip(self.window, self.dilation, grid, strict=True)):
            raise ValueError(
                f"window·dilation: observed {self.window}·{self.dilation}, expected at most the grid "
                f"{tuple(grid)}; clipped(grid) gives a neighborhood that fits"
            )

    def _check_rank(self, grid: Axes) -> None:
        if len(grid) != len(self.window):
            raise ValueError(f"grid: observed {tuple(grid)}, expected {len(self.window)} axes as the windows")

    @property
    def table(self) -> Axes:
        """Entries per axis of a table of relative position biases: 2·window − 1."""
        return tuple(2 * w - 1 for w in self.window)

    @property
    def bias_shift(self) -> Axes:
        """What is added to u_query − u_key to index the table."""
        return tuple(w - 1 for w in self.window)

    def intervals(self, axis: int, u: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """First key and end of the window of queries u of a class of ``length`` positions."""
        w, t = self.window[axis], self.stride[axis]
        group = u // t * t
        if self.causal[axis]:
            leader = np.minimum(group + t - 1, length - 1)
            return np.maximum(leader - w + 1, 0), u + 1
        leader = np.minimum(group + t // 2, length - 1)
        first = np.clip(leader - w // 2, 0, length - w)
        return first, first + w

    def on(self, grid: Axes) -> GridMap:
        """The neighborhoods of this grid, as the kernels take them; made once and kept."""
        self.check(grid)
        return _on(self, tuple(grid))


@lru_cache(maxsize=256)
def _on(pattern: Neighborhood, grid: Axes) -> GridMap:
    axes = []
    for axis, length in enumerate(grid):

        def intervals(u: np.ndarray, keys: int, axis: int = axis) -> tuple[np.ndarray, np.ndarray]:
            return pattern.intervals(axis, u, keys)

        axes.append(AxisMap.of_classes(length, length, pattern.dilation[axis], intervals))
    return grid_map(axes)
