"""Tile shapes of the kernels: rows that stay, keys that stream, warps, stages of the pipeline of loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton

Kernel = Literal["forward", "backward_q", "backward_set"]


@dataclass(frozen=True)
class Config:
    """Rows that a program owns, keys of the inner loop, warps, and stages of the pipeline of its loads."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


def candidates(kernel: Kernel, rows: int, keys: int, head_dim: int, itemsize: int) -> tuple[Config, ...]:
    """Configurations for so many rows and keys and D, Dv up to ``head_dim``; the default first.

    A program holds its rows and their products with one key twice, in fp32 and as operands, besides
    accumulators of the same shape: rows are few at large head dims.
    """
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    if itemsize == 2:
        most_rows, most_keys = {64: (64, 64), 128: (32, 64), 256: (16, 32)}[width]
    else:
        most_rows, most_keys = {64: (32, 32), 128: (16, 32), 256: (16, 16)}[width]
    if kernel == "backward_set":
        most_keys = max(16, most_keys // 2)
    elif kernel == "backward_q" and itemsize == 4:
        most_rows, most_keys = 16, 16
    block_rows = min(most_rows, max(16, triton.next_power_of_2(rows)))
    block_keys = min(most_keys, max(16, triton.next_power_of_2(keys)))
    shapes = (
        (block_rows, block_keys, 8, 2),
        (block_rows, block_keys, 4, 2),
        (block_rows, block_keys, 8, 1),
        (block_rows, max(16, block_keys // 2), 4, 3),
        (max(16, block_rows // 2), block_keys, 4, 2),
    )
    return tuple(dict.fromkeys(Config(*shape) for shape in shapes))
