"""Tile shapes of the kernels: steps of a chunk, channels of a block, warps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton

MAX_SEGMENT = 32
"""A segment lies in one chunk, and a chunk in the registers of its threads."""


@dataclass(frozen=True)
class Config:
    """Steps of a chunk and channels of a block, powers of two, and warps of a block."""

    length: int
    block_e: int
    num_warps: int


def candidates(direction: Literal["forward", "backward"], e: int, segment: int) -> tuple[Config, ...]:
    """Configurations for E channels, the default first: the largest tiles that ptxas compiles without spills.

    A short chunk means more states between chunks, a narrow block short rows of memory. ``backward`` keeps
    twice as many tiles in registers; below 32 channels, several threads share the steps of a channel.
    """
    if segment > 1:  # two more scans are alive
        length = max(16, segment)
        shapes = ((length, 256 // length), (length, 512 // length))
        if direction == "backward":
            shapes = ((length, 128 // length), (length, 256 // length))
    else:
        shapes = ((32, 32), (16, 32)) if direction == "forward" else ((16, 16), (8, 32))
    found = []
    for length, width in shapes:
        for warps in (1, 2, 4):
            config = Config(length, width * warps, warps)
            if config not in found and (warps == 1 or width * warps < 2 * e):
                found.append(config)
    return tuple(found)


def carry_block(width: int) -> tuple[int, int]:
    """Chunks and state components of one tile of the scan over chunks: loads in flight against programs."""
    return 16, min(64, max(32, triton.next_power_of_2(width)))
