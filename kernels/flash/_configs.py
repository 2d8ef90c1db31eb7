"""Tile shapes of the Triton kernels, by kernel, architecture, head dimension and width of the numbers.

One table and one function choose them. The entries are the largest tiles that ptxas compiles without
spilling; ``python -m attnbench.kernels.aot --op flash`` prints what each takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import triton

Kernel = Literal["forward", "backward_q", "backward_kv"]


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps of a block, and stages of the software pipeline of its loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


_16_BIT: Mapping[tuple[Kernel, str], tuple[Config, Config, Config]] = {
    # One entry for D ≤ 64, ≤ 128 and ≤ 256. Eight warps throughout: with four, the accumulators of a
    # 128-row tile spill at D = 128 (sm_80) and the 64×64 tiles at D = 256 (sm_90).
    # mma.sync (sm_8x, sm_120): every entry fits the 99 KiB of shared memory of a GeForce.
    ("forward", "mma"): (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(64, 32, 8, 2)),
    ("backward_q", "mma"): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 1)),
    ("backward_kv", "mma"): (Config(64, 128, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 1)),
    # wgmma (sm_90) wants 64 rows per four warps. dk, dv and two score tiles are four accumulators: only
    # 32 queries at a time leave registers for the addresses.
    ("forward", "wgmma"): (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
    ("backward_q", "wgmma"): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
    ("backward_kv", "wgmma"): (Config(32, 128, 8, 3), Config(32, 128, 8, 2), Config(32, 32, 8, 1)),
    # tcgen05 (sm_100, sm_103) keeps accumulators in tensor memory: larger tiles fit the registers.
    ("forward", "tcgen05"): (Config(128, 128, 8, 3), Config(128, 128, 8, 2), Config(128, 64, 8, 2)),
    ("backward_q", "tcgen05"): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
    ("backward_kv", "tcgen05"): (Config(64, 128, 8, 2), Config(64, 128, 8, 2), Config(32, 64, 8, 2)),
}

_32_BIT: Mapping[Kernel, tuple[Config, Config, Config]] = {
    # Exact fp32 products run on the scalar units, unrolled: a larger tile is code and registers, no speed.
    "forward": (Config(32, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 2)),
    "backward_q": (Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(16, 16, 8, 2)),
    "backward_kv": (Config(32, 32, 8, 2), Config(16, 32, 8, 2), Config(16, 16, 8, 2)),
}

_BIASED: Mapping[str, Mapping[Kernel, tuple[int, int]]] = {
    # A bias tile comes with a 64-bit address per pair: smaller tiles, and two stages, pay for it.
    "mma": {"forward": (64, 64), "backward_q": (32, 64), "backward_kv": (16, 64)},
    "wgmma": {"forward": (64, 64), "backward_q": (32, 64), "backward_kv": (16, 64)},
    "tcgen05": {"forward": (64, 64), "backward_q": (32, 64), "backward_kv": (32, 64)},
}

_CAPPED: Mapping[tuple[str, Kernel, str, int], Config] = {
    # Where biases or the tests of a mask take one register too many, by the place of D in the first table.
    ("masked", "forward", "mma", 1): Config(128, 32, 8, 3),
    ("masked", "forward", "tcgen05", 1): Config(128, 64, 8, 2),
    ("masked", "backward_kv", "mma", 0): Config(64, 64, 8, 2),
    ("biased", "backward_kv", "mma", 0): Config(16, 32, 4, 2),
}


def matrix_units(capability: int) -> str:
    """The matrix instructions of an architecture, which decide about the tiles."""
    if capability == 90:
        return "wgmma"
    return "tcgen05" if 100 <= capability < 120 else "mma"


@lru_cache(maxsize=1024)
def choose(
    kernel: Kernel,
    capability: int,
    head_dim: int,
    dtype: torch.dtype,
    n: int,
    m: int,
    biased: bool,
    masked: bool = False,
) -> Config:
    """The tile for D or Dv up to ``head_dim``, no larger than the next power of two of n queries, m keys.

    ``biased``: the pairs have biases; ``masked``: they have the tests of a mask.
    """
    width = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    wide = dtype is torch.float32
    units = matrix_units(capability)
    config = (_32_BIT[kernel] if wide else _16_BIT[kernel, units])[width]
    block_m, block_n, num_warps, stages = config.block_m, config.block_n, config.num_warps, config.num_stages
    if biased:
        most_m, most_n = _BIASED[units][kernel]
        block_m, block_n = min(block_m, most_m), min(block_n, most_n)
        stages = min(stages, 2)
    for extra, present in (("biased", biased), ("masked", masked)):
        most = _CAPPED.get((extra, kernel, units, width)) if present and not wide else None
        if most is not None:
            block_m, block_n = min(block_m, most.block_m), min(block_n, most.block_n)
            num_warps, stages = min(num_warps, most.num_warps), min(stages, most.num_stages)
    short_m = min(block_m, max(16, triton.next_power_of_2(n)))
    short_n = min(block_n, max(16, triton.next_power_of_2(m)))
    if not wide:  # the warps split the rows of the accumulators: half the rows are work for half the warps
        rows, all_rows = (short_n, block_n) if kernel == "backward_kv" else (short_m, block_m)
        num_warps = max(4, num_warps * rows // all_rows)
    return Config(short_m, short_n, num_warps, stages)


@lru_cache(maxsize=256)
def candidates(default: Config) -> tuple[Config, ...]:
    """The configurations to tune among, the default first: it and smaller tiles, by warps and stages."""
    m, n, warps, stages = default.block_m, default.block_n, default.num_warps, default.num_stages
    tiles = [(m, n), (m // 2, n), (m, n // 2)]
    others = [Config(m, n, warps, stages + step) for step in (-1, 1) if stages + step > 0]
    others += [
        Config(a, b, w, s)
        for a, b in tiles
        if min(a, b) >= 16
        for w in (4, 8)
        for s in {stages, max(stages, 3)}
    ]
    return tuple(dict.fromkeys((default, *others)))[:12]
