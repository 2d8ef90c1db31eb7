"""Tile shapes and splits of the Triton kernels: the default, and what may be faster.

Defaults are the largest tiles that ptxas compiles without spilling;
``python -m attnbench.kernels.aot --op few_query`` prints what each takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
import triton

from attnbench.kernels.flash._configs import Config

__all__ = ["Config", "Kernel", "candidates", "resident_keys", "resident_rows", "split"]

Kernel = Literal["forward", "forward_resident", "backward_q", "backward_kv", "backward_resident"]

_16_BIT: Mapping[Kernel, tuple[Config, Config, Config]] = {
    # One entry for D ≤ 64, ≤ 128 and ≤ 256. block_m counts packed rows, block_n keys.
    "forward": (Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 32, 8, 2)),
    "forward_resident": (Config(64, 128, 8, 2), Config(64, 128, 8, 1), Config(32, 64, 8, 1)),
    "backward_q": (Config(64, 64, 8, 2), Config(64, 64, 8, 1), Config(32, 32, 8, 1)),
    "backward_kv": (Config(32, 128, 8, 2), Config(32, 64, 8, 1), Config(32, 32, 8, 1)),
    "backward_resident": (Config(64, 32, 8, 2), Config(64, 32, 8, 1), Config(32, 32, 8, 1)),
}

_32_BIT: Mapping[Kernel, tuple[Config, Config, Config]] = {
    "forward": (Config(32, 32, 8, 2), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
    "forward_resident": (Config(16, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1)),
    "backward_q": (Config(32, 16, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 8, 1)),
    "backward_kv": (Config(16, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    "backward_resident": (Config(32, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}

MIN_SPLIT = 256
"""Fewer keys or rows in a split cost more in the merge than they save."""


def _width(head_dim: int) -> int:
    return 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2


def _default(kernel: Kernel, head_dim: int, dtype: torch.dtype, biased: bool) -> Config:
    config = (_32_BIT if dtype is torch.float32 else _16_BIT)[kernel][_width(head_dim)]
    if not biased or kernel not in ("forward", "backward_q", "backward_kv"):
        return config
    # a bias comes with an address for every pair, and so does its gradient
    return replace(config, block_n=max(16, config.block_n // 2))


def resident_keys(head_dim: int, dtype: torch.dtype, biased: bool) -> tuple[int, int]:
    """Up to how many keys one tile holds all of them: in the forward pass, and in the backward pass."""
    return (
        _default("forward_resident", head_dim, dtype, biased).block_n,
        _default("backward_kv", head_dim, dtype, biased).block_n,
    )


def resident_rows(head_dim: int, dtype: torch.dtype, biased: bool) -> int:
    """Up to how many packed rows one tile of the backward pass holds all of them."""
    return _default("backward_resident", head_dim, dtype, biased).block_m


@lru_cache(maxsize=1024)
def candidates(
    kernel: Kernel, head_dim: int, dtype: torch.dtype, rows: int, keys: int, biased: bool
) -> tuple[Config, ...]:
    """Tiles for D or Dv up to ``head_dim``, the default first, none wider than so many rows and keys.

    ``biased``: the call has a bias of pairs.
    """
    default = _default(kernel, head_dim, dtype, biased)
    others: list[Config] = []
    if dtype is not torch.float32 and _width(head_dim) < 2:
        m, n = default.block_m, default.block_n
        sizes = [(m, n)]
        if kernel in ("forward", "backward_q", "backward_resident"):  # the keys are walked
            sizes += [(m, 2 * n), (m, n // 2)]
        if kernel in ("forward_resident", "backward_kv"):  # the rows are walked
            sizes += [(2 * m, n), (max(16, m // 2), n)]
        others = [Config(*size, warps, stages) for size in sizes for warps in (4, 8) for stages in (1, 3)]
    fitted = (_fitted(config, rows, keys) for config in (default, *others[:11]))
    return tuple(dict.fromkeys(fitted))


def _fitted(config: Config, rows: int, keys: int) -> Config:
    block_m = min(config.block_m, max(16, triton.next_power_of_2(rows)))
    block_n = min(config.block_n, max(16, triton.next_power_of_2(keys)))
    return Config(block_m, block_n, config.num_warps, config.num_stages)


def split(length: int, block: int, programs: int, processors: int) -> tuple[int, int]:
    """How many splits of ``length``, and how long each is, to keep a GPU busy that has ``programs`` without.

    Two programs a processor, splits of whole blocks, none shorter than MIN_SPLIT.
    """
    wanted = max(1, min(2 * processors // max(programs, 1), length // MIN_SPLIT))
    each = max(block, triton.cdiv(triton.cdiv(length, wanted), block) * block)
    return max(1, triton.cdiv(length, each)), each
