"""Tile shapes of the Triton kernels: those of dense attention, smaller where a list needs registers.

The entries are the largest tiles that ptxas compiles without spilling;
``python -m attnbench.kernels.aot --op block_sparse`` prints what each takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
import triton

from attnbench.kernels.flash._configs import Config, Kernel, matrix_units
from attnbench.kernels.flash._configs import choose as choose_dense

_SMALLER: Mapping[tuple[Kernel, str, int], Config] = {
    # 16-bit numbers, by the largest D: two loops and the addresses of a list take registers.
    ("forward", "mma", 64): Config(128, 64, 8, 3),
    ("backward_kv", "mma", 64): Config(32, 128, 8, 2),
    ("backward_kv", "mma", 128): Config(32, 64, 8, 2),
    ("backward_kv", "wgmma", 128): Config(32, 64, 8, 2),
    ("backward_kv", "tcgen05", 128): Config(32, 64, 8, 2),
    ("backward_kv", "tcgen05", 256): Config(32, 32, 8, 2),
}

_SMALLER_WITH_VECTORS: Mapping[tuple[Kernel, str, int], Config] = {
    ("backward_kv", "mma", 128): Config(32, 32, 8, 2),
}

_SMALLER_32_BIT: Mapping[tuple[Kernel, int], Config] = {
    ("backward_q", 64): Config(32, 16, 8, 2),
    ("backward_q", 128): Config(32, 16, 8, 2),
    ("backward_kv", 128): Config(16, 32, 8, 1),
}


def choose(
    kernel: Kernel,
    capability: int,
    head_dim: int,
    dtype: torch.dtype,
    block_q: int,
    block_k: int,
    vectors: bool,
) -> Config:
    """The tile for D or Dv up to ``head_dim`` and blocks of block_q × block_k.

    ``vectors``: the call has positions or biases, which take registers too.
    """
    size_q, size_k = _fitting(block_q), _fitting(block_k)
    dense = choose_dense(kernel, capability, head_dim, dtype, size_q, size_k, vectors)
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    if dtype is torch.float32:
        most = _SMALLER_32_BIT.get((kernel, width))
    else:
        key = kernel, matrix_units(capability), width
        most = _SMALLER_WITH_VECTORS.get(key) if vectors else None
        most = most or _SMALLER.get(key)
    if most is None:
        return dense
    block_m, block_n = min(dense.block_m, most.block_m), min(dense.block_n, most.block_n)
    whole = (block_m, block_n) == (most.block_m, most.block_n)
    warps = most.num_warps if whole else dense.num_warps
    return Config(block_m, block_n, warps, min(dense.num_stages, most.num_stages))


@lru_cache(maxsize=256)
def candidates(default: Config) -> tuple[Config, ...]:
    """The configurations to tune among, the default first: it with other warps, stages, or half a tile.

    Half a tile divides a block wherever the whole one does.
    """
    fewer_queries = replace(default, block_m=max(16, default.block_m // 2))
    fewer_keys = replace(default, block_n=max(16, default.block_n // 2))
    others = [replace(default, num_warps=12 - default.num_warps)]  # the other one of four and eight
    others += [replace(default, num_stages=max(1, default.num_stages + step)) for step in (-1, 1)]
    others += [fewer_queries, fewer_keys]
    others += [replace(half, num_warps=4) for half in (fewer_queries, fewer_keys)]
    return tuple(dict.fromkeys((default, *others)))


def _fitting(block: int) -> int:
    """The largest tile side, a power of two: one that divides the block if not tiny, else one covering it."""
    divisor = block & -block
    return divisor if divisor >= 32 else max(16, triton.next_power_of_2(block))
