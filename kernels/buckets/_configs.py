"""Tile shapes of the Triton kernels: the default, and what may be faster.

Defaults are the largest tiles that ptxas compiles without spilling;
``python -m attnbench.kernels.aot --op buckets`` prints what each takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
import triton

from attnbench.kernels.flash._configs import Config, Kernel

_16_BIT: Mapping[Kernel, tuple[Config, Config, Config]] = {
    # One entry for D ≤ 64, ≤ 128 and ≤ 256. Every row has an address of its own, which takes registers.
    "forward": (Config(64, 64, 4, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 1)),
    "backward_q": (Config(64, 64, 4, 2), Config(64, 32, 8, 1), Config(32, 32, 8, 1)),
    "backward_kv": (Config(32, 64, 4, 2), Config(32, 64, 8, 2), Config(32, 32, 8, 1)),
}

_32_BIT: Mapping[Kernel, tuple[Config, Config, Config]] = {
    "forward": (Config(32, 32, 8, 1), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
    "backward_q": (Config(32, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    "backward_kv": (Config(16, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}

_ALTERNATIVES = (Config(128, 64, 8, 2), Config(64, 128, 8, 2), Config(64, 64, 8, 3), Config(64, 64, 4, 1),
                 Config(64, 32, 8, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2),
                 Config(32, 32, 4, 2))  # fmt: skip
"""Other shapes of 16-bit tiles for D ≤ 128; beyond, and in fp32, only the defaults fit."""


@lru_cache(maxsize=1024)
def candidates(
    kernel: Kernel, head_dim: int, dtype: torch.dtype, query_chunk: int, key_chunk: int, crowded: bool
) -> tuple[Config, ...]:
    """Tiles for D or Dv up to ``head_dim``, the default first, none wider than chunks of this size.

    ``key_chunk`` counts all entries that a bucket sees, for they are one range. ``crowded``: the call has
    labels or a bias, which take registers too.
    """
    width = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    if dtype is torch.float32:
        return (_fitted(_32_BIT[kernel][width], query_chunk, key_chunk),)
    default = _16_BIT[kernel][width]
    if crowded:
        default = replace(default, num_warps=8)
    others = _ALTERNATIVES if width < 2 else ()
    return tuple(dict.fromkeys(_fitted(config, query_chunk, key_chunk) for config in (default, *others)))


def _fitted(config: Config, query_chunk: int, key_chunk: int) -> Config:
    block_m = min(config.block_m, max(16, triton.next_power_of_2(query_chunk)))
    block_n = min(config.block_n, max(16, triton.next_power_of_2(key_chunk)))
    return Config(block_m, block_n, config.num_warps, config.num_stages)
