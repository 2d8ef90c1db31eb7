"""Tile sizes and launch parameters of the kernels of noncausal linear attention, in one table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import triton


@dataclass(frozen=True)
class Config:
    """Tiles of rows, D and Dv (powers of two ≥ 16, the least a dot takes), warps and pipeline stages."""

    block_n: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int


def config(kernel: str, d: int, dv: int, itemsize: int) -> Config:
    """The configuration of ``sums``, ``read`` or ``feature_gradient`` for head dims and element size."""
    if itemsize == 4:
        # A dot of fp32 tiles is three tf32 products, before Hopper with operands in registers: small tiles.
        table = {
            "sums": Config(32, 64, 64, 8, 2),
            "read": Config(64, 32, 64, 8, 2),
            "feature_gradient": Config(64, 64, 32, 8, 2),
        }
    else:
        table = {
            # All the time goes to loads of k and v: three stages keep them in flight, and one tile of
            # Dv = 128 reads k once for it.
            "sums": Config(64, 64, 128, 8, 3),
            # 128 rows share one read of the sums; the loop over tiles has one or two turns: no deep pipeline.
            "read": Config(128, 64, 64, 8, 2),
            "feature_gradient": Config(128, 64, 64, 8, 2),
        }
    chosen = table[kernel]
    return Config(
        chosen.block_n,
        min(chosen.block_k, max(16, triton.next_power_of_2(d))),
        min(chosen.block_v, max(16, triton.next_power_of_2(dv))),
        chosen.num_warps,
        chosen.num_stages,
    )


@lru_cache(maxsize=256)
def candidates(kernel: str, d: int, dv: int, itemsize: int) -> tuple[Config, ...]:
    """The configurations to tune among, the default first: it with other warps, stages, or half a tile."""
    default = config(kernel, d, dv, itemsize)
    halves = [
        replace(default, block_n=max(16, default.block_n // 2)),
        replace(default, block_k=max(16, default.block_k // 2)),
        replace(default, block_v=max(16, default.block_v // 2)),
    ]
    others = [replace(default, num_warps=4)]
    others += [replace(default, num_stages=default.num_stages + step) for step in (-1, 1)]
    others += [*halves, replace(halves[0], num_warps=4)]
    return tuple(dict.fromkeys((default, *others)))


def split_length(blocks: int, programs: int, processors: int) -> int:
    """Blocks of keys that one program sums, so that four programs fill a processor.

    ``programs`` is the number without a split. No split is shorter than 4 blocks: each costs one write and
    one read of the sums.
    """
    splits = max(1, min(4 * processors // programs, blocks // 4))
    return -(-blocks // splits)
