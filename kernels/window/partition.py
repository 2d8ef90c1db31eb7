"""Which keys a window lists for which queries: a partition of the axes of a grid, as numbers.

One description covers block, shifted, haloed, overlapping, strided and rescaled windows. Tokens are the
row-major order of the grid and are never copied into windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from attnbench.kernels.window._maps import AxisMap, GridMap, grid_map

Axes = tuple[int, ...]
Border = Literal["cut", "clamp"]


@dataclass(frozen=True)
class Partition:
    """Cells of queries on a grid of rank r ≤ 3 and the window of keys of each; all tuples have r entries.

    On an axis with dilation d, the positions of one residue modulo d form a class of their own, numbered
    u = ⌊p/d⌋; queries see keys of their class only. Cell ⌊(u − shift)/window⌋ = c of queries sees the
    ``key_window`` keys from c·key_step + key_offset on (``cut``: those that exist; ``clamp``: the window is
    moved inside first). A key is visible iff every axis agrees.

    Use :meth:`block` and :meth:`strided`; the constructor is for windows that move over keys of another
    resolution, where ``key_step`` differs from ``window``.
    """

    window: Axes
    key_window: Axes
    key_step: Axes
    key_offset: Axes
    shift: Axes
    dilation: Axes
    border: Border = "cut"

    def __post_init__(self) -> None:
        for name in ("window", "key_window", "key_step", "key_offset", "shift", "dilation"):
            axes, least = getattr(self, name), 1 if name in ("window", "key_window", "dilation") else None
            if name == "key_step":
                least = 0  # 0: every cell sees the same window; negative steps would reverse the cells
            if not 1 <= len(axes) <= 3 or len(axes) != len(self.window):
                raise ValueError(f"{name}: observed {axes}, expected one number for each of 1 to 3 axes")
            if least is not None and min(axes) < least:
                raise ValueError(f"{name}: observed {axes}, expected numbers of at least {least}")
        if self.border not in ("cut", "clamp"):
            raise ValueError(f"border: observed {self.border!r}, expected 'cut' or 'clamp'")

    @classmethod
    def block(
        cls,
        window: Axes,
        *,
        halo: Axes | None = None,
        shift: Axes | None = None,
        dilation: Axes | None = None,
    ) -> Partition:
        """Adjacent windows, moved by ``shift``; their keys are the window and ``halo`` keys around it.

        Swin (arXiv 2103.14030): shift. HaloNet (2103.12731) and HAT's overlapping windows (2205.04437): halo.
        CrossFormer's long-distance groups of g tokens at interval I (2108.00154): window g, dilation I.
        """
        zeros = (0,) * len(window)
        halo, shift = halo or zeros, shift or zeros
        return cls(
            window=tuple(window),
            key_window=tuple(w + 2 * h for w, h in zip(window, halo, strict=True)),
            key_step=tuple(window),
            key_offset=tuple(s - h for s, h in zip(shift, halo, strict=True)),
            shift=tuple(shift),
            dilation=tuple(dilation) if dilation else (1,) * len(window),
        )

    @classmethod
    def strided(cls, grid: Axes, tokens: Axes) -> Partition:
        """Groups of ``tokens`` tokens per axis spread over the whole grid, at distance ⌈grid/tokens⌉.

        MaxViT's grid attention (arXiv 2204.01697).
        """
        return cls.block(tokens, dilation=tuple(-(-g // t) for g, t in zip(grid, tokens, strict=True)))

    @property
    def table(self) -> Axes:
        """Entries per axis of a table of relative position biases: window + key_window − 1."""
        return tuple(w + e - 1 for w, e in zip(self.window, self.key_window, strict=True))

    @property
    def bias_shift(self) -> Axes:
        """What is added to u_query − u_key to index the table.

        Raises ValueError where the difference does not determine the entry: clamped or rescaled windows.
        """
        if self.border != "cut" or self.key_step != self.window:
            raise ValueError(
                f"bias: observed border {self.border!r} and key_step {self.key_step}, expected windows that "
                f"are cut at the border and move with the queries by {self.window}"
            )
        return tuple(
            o - s + e - 1 for o, s, e in zip(self.key_offset, self.shift, self.key_window, strict=True)
        )

    def intervals(self, axis: int, u: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """First key and end of the window of queries u of a class that has ``length`` keys."""
        cell = (u - self.shift[axis]) // self.window[axis]
        lo = cell * self.key_step[axis] + self.key_offset[axis]
        width = self.key_window[axis]
        if self.border == "clamp":
            lo = np.clip(lo, 0, max(0, length - width))
        hi = np.clip(lo + width, 0, length)
        return np.clip(lo, 0, hi), hi

    def on(self, grid: Axes, grid_kv: Axes) -> GridMap:
        """The partition of these grids, as the kernels take it; made once and kept."""
        return _on(self, tuple(grid), tuple(grid_kv))


@lru_cache(maxsize=256)
def _on(partition: Partition, grid: Axes, grid_kv: Axes) -> GridMap:
    axes = []
    for axis, (length, key_length) in enumerate(zip(grid, grid_kv, strict=True)):
        dilation = partition.dilation[axis]

        def intervals(u: np.ndarray, keys: int, axis: int = axis) -> tuple[np.ndarray, np.ndarray]:
            return partition.intervals(axis, u, keys)

        axes.append(AxisMap.of_classes(length, key_length, dilation, intervals))
    return grid_map(axes)
