"""Launch shapes of the Triton kernels: the tile of keys is a block of them, that of queries at most one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Queries of a tile, warps of a block, and stages of the software pipeline of its loads."""

    block_m: int
    num_warps: int
    num_stages: int


def candidates(head_dim: int, block_q: int, block_k: int) -> tuple[Config, ...]:
    """The default first: the largest tile of queries of which the accumulator and scores fit the registers.

    ``head_dim`` is the larger of D and Dv.
    """
    most = 64 if head_dim > 128 else 128
    rows = [rows for rows in (128, 64, 32, 16) if rows <= min(block_q, most)]
    stages = 2 if head_dim > 128 or block_k == 128 else 3
    default = Config(rows[0], 8 if rows[0] >= 64 and block_k >= 32 else 4, stages)
    others = (Config(block_m, warps, s) for block_m in rows[:2] for warps in (4, 8) for s in (2, 3, 4))
    return tuple(dict.fromkeys((default, *others)))
