"""From a mask to the tiles that a kernel visits: once per mask and tile shape, on the device, without a wait.

A tile is empty where, for each clause, the extremes of some test exclude each other, and whole where those of
every test of one clause imply it. Both are sufficient conditions; between them the kernels test the pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from attnbench.kernels.flash.mask import HIGHEST, NONE, Mask

T = TypeVar("T")
Along = Literal["keys", "queries"]


class PackedMask(NamedTuple):
    """The tests of a mask, int32: code (T, B or 1, H or 1, M), low and high with N; and the clauses."""

    code: Tensor
    low: Tensor
    high: Tensor
    clauses: tuple[tuple[int, ...], ...]


class TileLists(NamedTuple):
    """The tiles to visit: first those that are seen wholly, then those seen in part, each in ascending order.

    indices (B or 1, H or 1, T, T') int32, of which counts[..., 1] are valid and the first counts[..., 0]
    whole; counts (B or 1, H or 1, T, 2) int32.
    """

    indices: Tensor
    counts: Tensor


def packed(mask: Mask, n: int, m: int) -> PackedMask:
    """The metadata of a mask for n queries and m keys, laid out for the kernels; made once per mask."""
    return _once(mask, ("packed", n, m), lambda: _packed(mask, n, m))


def tile_lists(
    mask: Mask, n: int, m: int, block_m: int, block_n: int, along: Along, group: int = 1
) -> TileLists:
    """The tiles of a loop along the keys, for each tile of queries, or along the queries, for each of keys.

    Made once per mask and tile shape. With ``group``, the query heads of a key head share one list: a tile is
    skipped where all of them skip it, and whole where it is for all. Takes 4 bytes a pair of tiles.
    """
    key = ("tiles", n, m, block_m, block_n, along, group)
    return _once(mask, key, lambda: _tile_lists(packed(mask, n, m), block_m, block_n, along, group))


def _once(mask: Mask, key: tuple[Any, ...], build: Callable[[], T]) -> T:
    if key not in mask.cache:
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training, too
            mask.cache[key] = build()
    return mask.cache[key]


def _packed(mask: Mask, n: int, m: int) -> PackedMask:
    shape = mask.shape(n, m)
    code = torch.stack([test.code.expand(*shape, m) for test in mask.tests])
    low = torch.stack([test.low.expand(*shape, n) for test in mask.tests])
    high = torch.stack([test.high.expand(*shape, n) for test in mask.tests])
    return PackedMask(code, low, high, mask.indices)


def _tile_lists(mask: PackedMask, block_m: int, block_n: int, along: Along, group: int) -> TileLists:
    some, every = _seen(mask, block_m, block_n)
    if along == "queries":
        some, every = some.transpose(-1, -2), every.transpose(-1, -2)
        if some.shape[1] > 1:
            some, every = some.unflatten(1, (-1, group)).any(2), every.unflatten(1, (-1, group)).all(2)
    length, block = (mask.code.shape[-1], block_n) if along == "keys" else (mask.low.shape[-1], block_m)
    every = every.clone()
    if length % block:  # only the masked loop looks for the end of the sequence
        every[..., -1] = False
    order = torch.where(every, 0, torch.where(some, 1, 2)).to(torch.uint8).sort(dim=-1, stable=True).indices
    counts = torch.stack([every.sum(-1), some.sum(-1)], -1)
    return TileLists(order.to(torch.int32).contiguous(), counts.to(torch.int32))


def _seen(mask: PackedMask, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """Which tiles may show some pair and which show every pair, (B or 1, H or 1, Tq, Tk) each."""
    present = torch.where(mask.code == NONE, HIGHEST, mask.code)
    least, least_present = _least(mask.code, block_n)[..., None, :], _least(present, block_n)[..., None, :]
    most = _most(mask.code, block_n)[..., None, :]
    lows = _least(mask.low, block_m)[..., None], _most(mask.low, block_m)[..., None]
    highs = _least(mask.high, block_m)[..., None], _most(mask.high, block_m)[..., None]
    some = every = torch.zeros((), dtype=torch.bool, device=most.device)
    for clause in mask.clauses:
        clause_some = clause_every = torch.ones((), dtype=torch.bool, device=most.device)
        for t in clause:
            clause_some = clause_some & (most[t] >= lows[0][t]) & (least_present[t] <= highs[1][t])
            clause_every = clause_every & (least[t] >= lows[1][t]) & (most[t] <= highs[0][t])
        some, every = some | clause_some, every | clause_every
    return some, every & some


def _least(x: Tensor, block: int) -> Tensor:
    """The least value in each tile."""
    return _tiles(x, block, HIGHEST).amin(-1)


def _most(x: Tensor, block: int) -> Tensor:
    """The greatest value in each tile."""
    return _tiles(x, block, NONE).amax(-1)


def _tiles(x: Tensor, block: int, filling: int) -> Tensor:
    missing = -x.shape[-1] % block
    return torch.nn.functional.pad(x, (0, missing), value=filling).unflatten(-1, (-1, block))
