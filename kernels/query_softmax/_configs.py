"""Tile shapes of the kernels: queries and keys of a tile, warps, stages of the pipeline of loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton

Kernel = Literal["owners", "mix", "backward_kv", "backward_q"]


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps of a block, and stages of the software pipeline of its loads."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


def candidates(
    kernel: Kernel, n: int, m: int, head_dim: int, itemsize: int, capability: int
) -> tuple[Config, ...]:
    """Configurations for N queries, M keys and D, Dv up to ``head_dim``; the default first.

    The scores of a tile, its weights and an accumulator of (block, head_dim) live together in registers. Few
    queries are one tile: then a softmax over them is one reduction.
    """
    backward = kernel in ("backward_kv", "backward_q")
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    most_n, most_m = {64: (64, 64), 128: (64, 32), 256: (32, 32)}[width]
    if backward or itemsize == 4:
        most_n, most_m = min(most_n, 32), min(most_m, 64 if width == 64 and itemsize == 2 else 32)
    if kernel == "backward_kv" and width > 64:  # dk and dv side by side
        most_n, most_m = 16, 32
    block_n = min(most_n, max(16, triton.next_power_of_2(n)))
    block_m = min(most_m, max(16, triton.next_power_of_2(m)))
    warps = 8 if backward or width > 64 else 4
    if kernel == "backward_kv" and width == 128 and itemsize == 2 and capability < 90:
        warps = 4  # with eight, ptxas for sm_80 holds itself to 128 registers and spills
    found = [Config(block_n, block_m, warps, 2)]
    for shape in (
        (block_n, block_m, 4, 3),
        (block_n, max(16, block_m // 2), 4, 2),
        (block_n, block_m, 8, 1),
        (max(16, block_n // 2), block_m, 4, 2),
    ):
        config = Config(*shape)
        if config not in found:
            found.append(config)
    return tuple(found)


def split_count(tiles: int, programs: int, processors: int) -> int:
    """Parts that the keys are divided into, so that four programs fill a processor.

    ``programs`` is their number without parts, ``tiles`` that of key tiles; no part is shorter than 4 tiles.
    """
    return max(1, min(4 * processors // max(1, programs), tiles // 4))
