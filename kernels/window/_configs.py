"""Tiles of the Triton kernels of windows: what registers allow, fitted to a partition.

``python -m attnbench.kernels.aot --op window`` prints what each default takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import triton

from attnbench.kernels.window._maps import GridMap

Kernel = Literal["forward", "backward_q", "backward_kv", "backward_bias"]


@dataclass(frozen=True)
class Config:
    """Stationary rows of a tile, moving columns of a step, warps of a block, stages of the pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


_16_BIT: dict[Kernel, tuple[tuple[Config, ...], ...]] = {
    # One entry for D ≤ 64, ≤ 128 and ≤ 256; the first of each is the default, the others are tried when
    # tuning. Windows are small: 64 rows hold a 7×7 or 8×8 window, and a program has only a few steps.
    "forward": (
        (Config(64, 64, 4, 2), Config(128, 64, 8, 2), Config(64, 64, 4, 3), Config(64, 32, 4, 3),
         Config(32, 64, 4, 2), Config(128, 128, 8, 2)),
        (Config(64, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 3),
         Config(32, 64, 4, 2)),
        (Config(64, 32, 8, 2), Config(32, 32, 4, 2), Config(64, 64, 8, 1)),
    ),
    "backward_q": (
        (Config(64, 64, 4, 2), Config(64, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 32, 4, 2),
         Config(32, 64, 4, 2)),
        (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 4, 2), Config(64, 64, 8, 1)),
        (Config(32, 32, 8, 1), Config(64, 32, 8, 1), Config(32, 32, 4, 1)),
    ),
    "backward_kv": (
        (Config(64, 32, 4, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(128, 32, 8, 2),
         Config(32, 32, 4, 2)),
        (Config(64, 32, 8, 2), Config(64, 32, 8, 1), Config(32, 32, 4, 2), Config(64, 64, 8, 1)),
        (Config(32, 32, 8, 1), Config(32, 16, 8, 1), Config(32, 32, 4, 1)),
    ),
    # One each: the frame, and with it the scratch, goes with the tiles.
    "backward_bias": ((Config(64, 64, 4, 2),), (Config(32, 32, 8, 1),), (Config(32, 32, 8, 1),)),
}  # fmt: skip

_32_BIT_NARROW = (
    (Config(32, 32, 4, 1), Config(64, 32, 8, 1), Config(32, 16, 4, 1)),
    # forward: 32 columns spill for sm_100
    (Config(32, 16, 4, 1), Config(32, 32, 4, 1), Config(64, 32, 8, 1)),
)
"""For D ≤ 64, of the backward kernels and of the forward one."""

_32_BIT: dict[Kernel, tuple[tuple[Config, ...], ...]] = {
    # Exact fp32 products run on the scalar units, unrolled: a larger tile is code and registers, no speed.
    kernel: (
        _32_BIT_NARROW[kernel == "forward"],
        (Config(32, 32, 8, 1), Config(32, 16, 8, 1)),
        (Config(16, 16, 8, 1), Config(32, 16, 8, 1)),
    )
    for kernel in ("forward", "backward_q", "backward_kv", "backward_bias")
}


@lru_cache(maxsize=1024)
def candidates(
    kernel: Kernel, head_dim: int, dtype: torch.dtype, pairs: GridMap, key_biased: bool = False
) -> tuple[Config, ...]:
    """Configurations for D or Dv up to ``head_dim`` and the pairs of a kernel, the default first.

    Tiles get no larger than the partition fills: fewer rows where that costs less (by the model of
    :meth:`GridMap.cost`), no more columns than the box has keys.
    """
    width = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    table = _32_BIT if dtype is torch.float32 else _16_BIT
    options = table[kernel][width]
    if (pairs.rank == 3 or key_biased) and dtype is not torch.float32:
        # three coordinates or a bias more per column of a step: half the columns, spread over more warps, and
        # half the rows where there are two accumulators or a frame beside them
        rows = 128 if kernel in ("forward", "backward_q") else 32
        options = tuple(
            Config(min(rows, option.block_m), min(32, option.block_n), 8, option.num_stages)
            for option in options
        )
    return tuple(dict.fromkeys(_fitted(option, pairs) for option in options))


def _fitted(config: Config, pairs: GridMap) -> Config:
    rows = [config.block_m >> halvings for halvings in range(4) if config.block_m >> halvings >= 16]
    shapes = {count: pairs.choose(count, config.block_n) for count in rows}
    best = min(rows, key=lambda count: pairs.cost(shapes[count], count, config.block_n))
    box = 1
    for axis, size in zip(pairs.axes, shapes[best], strict=True):
        box *= axis.sizes[size][1]
    columns = min(config.block_n, max(16, triton.next_power_of_2(box)))
    warps = config.num_warps if best == config.block_m else max(4, config.num_warps * best // config.block_m)
    return Config(best, columns, warps, config.num_stages)
