"""Tile shapes of the Triton kernels and the order in which they walk the lists.

Defaults are the largest tiles that ptxas compiles without spilling;
``python -m attnbench.kernels.aot --op token_blocks`` prints what each takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
import triton

from attnbench.kernels.flash._configs import Config

Kernel = Literal["forward", "backward_q", "backward_kv"]
Order = Literal["query", "key"]
ORDERS: tuple[Order, ...] = ("query", "key")

_16_BIT: Mapping[Kernel, tuple[Config, Config, Config]] = {
    # One entry for D ≤ 64, ≤ 128 and ≤ 256. Rows are gathered one by one: a 64-bit address for each.
    "forward": (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    "backward_q": (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
    "backward_kv": (Config(32, 64, 8, 2), Config(32, 64, 8, 1), Config(32, 32, 8, 1)),
}

_32_BIT: Mapping[Kernel, tuple[Config, Config, Config]] = {
    # Exact fp32 products run on the scalar units, unrolled: a larger tile is code and registers, no speed.
    "forward": (Config(32, 32, 8, 1), Config(16, 16, 8, 2), Config(16, 16, 8, 1)),
    "backward_q": (Config(32, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    "backward_kv": (Config(32, 32, 8, 1), Config(16, 32, 8, 2), Config(16, 16, 8, 1)),
}

_CACHE_SPEED = 3.0
"""Bandwidth of the second-level cache over that of memory, about: an estimate, not a measurement of ours."""


def candidates(
    kernel: Kernel, order: Order, head_dim: int, dtype: torch.dtype, rows: int, block_k: int, width: int
) -> tuple[Config, ...]:
    """Tiles for D or Dv up to ``head_dim``, units of ``rows`` heads, blocks of block_k, lists of ``width``.

    In the order of queries a tile has the rows of one query, and its keys run through the list.
    """
    table = (_32_BIT if dtype is torch.float32 else _16_BIT)[kernel]
    default = table[0 if head_dim <= 64 else 1 if head_dim <= 128 else 2]
    keys = _fitting(block_k, block_k if order == "key" or kernel == "backward_kv" else block_k * width)
    whole = replace(default, block_n=min(default.block_n, keys))
    if kernel != "backward_kv" and order == "query":
        m = max(16, triton.next_power_of_2(rows))
        # few rows: their accumulators are small, and four warps share the work on the keys; the unrolled
        # products of fp32 spill with four
        few = m <= 16 and dtype is not torch.float32
        whole = replace(whole, block_m=m, num_warps=4 if few else 8)
    others = [
        replace(whole, num_warps=12 - whole.num_warps),
        replace(whole, num_stages=3 - min(whole.num_stages, 2)),
        replace(whole, block_n=max(16, whole.block_n // 2)),
    ]
    if order == "key" or kernel == "backward_kv":
        others.append(replace(whole, block_m=max(16, triton.next_power_of_2(rows), whole.block_m // 2)))
    return tuple(dict.fromkeys([whole, *others]))


def most_rows(head_dim: int, dtype: torch.dtype) -> int:
    """The largest unit that every default tile holds."""
    if dtype is torch.float32:
        return 16
    return 64 if head_dim <= 128 else 32


def choose_order(
    *,
    n: int,
    width: int,
    key_blocks: int,
    block_k: int,
    d: int,
    dv: int,
    rows: int,
    itemsize: int,
    queries: int,
    processors: int,
    most: int,
) -> Order:
    """Whether to walk the lists query by query or key block by key block, from the traffic per row and entry.

    In the order of queries ``rows`` heads share the keys that they read. In the order of keys about as many
    rows share them as choose a block, up to the ``most`` of a tile, but the rows are read again and their
    parts written and merged in fp32. Keys come from the cache mostly, parts go to memory. Fewer ``queries``
    in the batch than ``processors`` leave the order of queries without work for all of them; blocks smaller
    than a tile have no use of the other.
    """
    if queries < processors and block_k >= 16:
        return "key"
    shared = min(most, max(rows, n * width * rows // key_blocks))
    keys = block_k * (d + dv) * itemsize / _CACHE_SPEED
    parts = d * itemsize + 8 * dv
    return "key" if keys / rows > keys / shared + parts else "query"


def _fitting(block: int, places: int) -> int:
    """The largest tile of keys: one that divides the block if not tiny, else one that covers the places."""
    divisor = block & -block
    return divisor if divisor >= 32 else max(16, triton.next_power_of_2(places))
