"""The torch backend of :func:`attnbench.kernels.window`: gather tiles of queries and their boxes of keys.

A cell of queries becomes one row of a batch, with the keys that any of its queries sees; scores exist for
those pairs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from attnbench.kernels._attention import scaled_scores, softmax_product
from attnbench.kernels.window._maps import GridMap
from attnbench.kernels.window.partition import Partition

Axes = tuple[int, ...]
CHUNK_SCORES = 2**25
"""Scores computed at a time, 128 MiB in fp32; without gradients no more than that exist at once."""
ROWS, COLUMNS = 64, 16
"""Queries of a tile at most, and what the boxes of keys are rounded to when tiles are compared."""


def window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition,
    *,
    grid: Axes,
    grid_kv: Axes,
    bias: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse for any dtype and option; autograd gives every gradient."""
    shift = None if bias is None else partition.bias_shift
    return attend(
        q, k, v, partition.on(grid, grid_kv), bias=bias, bias_shift=shift, key_bias=key_bias,
        causal=causal, scale=scale,
    )  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: GridMap,
    *,
    bias: Tensor | None,
    bias_shift: Axes | None,
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the pairs of a grid map, tiles of queries as a batch.

    For gradients it holds B·H·P scores and weights and B·H·P/64·(D + Dv) gathered keys and values, for P
    pairs in the boxes of tiles of up to 64 queries.
    """
    b, h, n, _ = q.shape
    groups = h // k.shape[1]
    boxes = _boxes(pairs, n, k.shape[2], causal, q.device)
    if bias is not None:
        entries = _entries(pairs, tuple(bias.shape[1:]), tuple(bias_shift), q.device)
        bias = bias.flatten(1)
    if key_bias is not None:
        key_bias = key_bias.expand(b, h, k.shape[2])
    tiles, rows = boxes.queries.shape
    chunk = max(1, CHUNK_SCORES // (b * h * rows * boxes.keys.shape[1]))
    parts = []
    for start in range(0, tiles, chunk):
        at = torch.arange(start, min(start + chunk, tiles), device=q.device)
        queries, keys = boxes.queries[at].clamp(min=0), boxes.keys[at].clamp(min=0)
        qt, kt, vt = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        if groups > 1:
            kt, vt = kt.repeat_interleave(groups, 1), vt.repeat_interleave(groups, 1)
        scores = scaled_scores(qt.flatten(0, 1), kt.flatten(0, 1), scale).unflatten(0, (b, h))
        if bias is not None:
            scores = scores + bias[:, _joined(entries, at, torch.add)].to(scores.dtype)
        if key_bias is not None:
            scores = scores + key_bias[:, :, keys].unsqueeze(-2).to(scores.dtype)
        scores = scores.masked_fill(~boxes.visible(at), -math.inf)
        o, lse = softmax_product(scores.flatten(0, 1), vt.flatten(0, 1), None)
        parts.append((o.reshape(b, h, -1, v.shape[3]), lse.reshape(b, h, -1)))
    o, lse = (torch.cat(x, 2).index_select(2, boxes.back) for x in zip(*parts, strict=True))
    return o, lse


@dataclass(frozen=True, eq=False)
class _Boxes:
    """Tokens of the queries of each tile, (tiles, rows), and of its keys, (tiles, columns); −1 where none.

    ``back`` (N,) is the place of a token among the flattened tiles; ``seen`` has the pairs of each axis,
    (tiles_a, rows_a, columns_a).
    """

    queries: Tensor
    keys: Tensor
    back: Tensor
    seen: tuple[Tensor, ...]
    causal: bool

    def visible(self, at: Tensor) -> Tensor:
        """The pairs of some tiles, bool (chunk, rows, columns)."""
        queries, keys = self.queries[at].unsqueeze(2), self.keys[at].unsqueeze(1)
        mask = _joined(self.seen, at, torch.logical_and) & (queries >= 0) & (keys >= 0)
        return mask & (keys <= queries) if self.causal else mask


def _joined(axes: tuple[Tensor, ...], at: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine (tiles_a, rows_a, columns_a) of three axes for some tiles into (chunk, rows, columns)."""
    x, y, z = axes
    x = x[at // (len(y) * len(z))][:, :, None, None, :, None, None]
    y = y[at // len(z) % len(y)][:, None, :, None, None, :, None]
    z = z[at % len(z)][:, None, None, :, None, None, :]
    return combine(combine(x, y), z).flatten(4, 6).flatten(1, 3)


def _tiles(pairs: GridMap) -> list[dict[str, np.ndarray]]:
    """Per axis, of each tile and its box: coordinates in the class, positions, −1 where there is none."""
    found = []
    for axis, tiles in zip(pairs.axes, pairs.tiles(pairs.choose(ROWS, COLUMNS)), strict=True):
        residue, first, count, lo, extent = (field[:, None].astype(np.int64) for field in tiles.table)
        i, j = np.arange(tiles.size)[None], np.arange(tiles.box)[None]
        u, key_u = first + i, lo + j
        position = np.where(i < count, residue + axis.dilation * u, -1)
        key = np.where(j < extent, residue + axis.dilation * key_u, -1)
        found.append({"u": u, "key_u": key_u, "position": position, "key": key})
    return found


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _boxes(pairs: GridMap, n: int, m: int, causal: bool, device: torch.device) -> _Boxes:
    tiles = _tiles(pairs)
    queries = _tokens([each["position"] for each in tiles], pairs.grid, n)
    keys = _tokens([each["key"] for each in tiles], pairs.grid_kv, m)
    live = queries >= 0
    back = np.zeros(n, np.int64)
    back[queries[live]] = np.flatnonzero(live)
    seen = []
    for axis, each in zip(pairs.axes, tiles, strict=True):
        lo, hi = (x[each["position"]][:, :, None] for x in (axis.lo, axis.hi))
        seen.append((lo <= each["key_u"][:, None]) & (each["key_u"][:, None] < hi))
    upload = [torch.from_numpy(x).to(device) for x in (queries, keys, back, *seen)]
    return _Boxes(*upload[:3], tuple(upload[3:]), causal)


def _tokens(axes: list[np.ndarray], grid: Axes, n: int) -> np.ndarray:
    """(tiles, members) tokens from positions (tiles_a, members_a) on each axis; −1 where there is none."""
    x, y, z = axes
    x = x[:, None, None, :, None, None]
    y = y[:, None, None, :, None]
    z = z[:, None, None, :]
    token = (x * grid[1] + y) * grid[2] + z
    live = (x >= 0) & (y >= 0) & (z >= 0) & (token < n)
    return np.where(live, token, -1).reshape(math.prod(token.shape[:3]), -1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _entries(pairs: GridMap, sizes: Axes, shift: Axes, device: torch.device) -> tuple[Tensor, ...]:
    """What each axis adds to the entry of a pair in the flattened table, (tiles_a, rows_a, columns_a)."""
    sizes, shift = (1,) * (3 - len(sizes)) + sizes, (0,) * (3 - len(shift)) + shift
    found = []
    for a, each in enumerate(_tiles(pairs)):
        entry = np.clip(each["u"][:, :, None] - each["key_u"][:, None] + shift[a], 0, sizes[a] - 1)
        found.append(torch.from_numpy(entry * math.prod(sizes[a + 1 :])).to(device))
    return tuple(found)
