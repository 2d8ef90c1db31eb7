"""From tensors and a grid map to launches: tables of tiles, views and compile-time constants of each kernel.

A launch is a value, so that the ahead-of-time compilation builds exactly what a call on a GPU would launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from attnbench.kernels import tuning
from attnbench.kernels.window._backward import backward_kv, backward_q, row_terms
from attnbench.kernels.window._bias import backward_bias
from attnbench.kernels.window._configs import Config, Kernel, candidates
from attnbench.kernels.window._device import Heads, Table, View, Walk
from attnbench.kernels.window._forward import forward
from attnbench.kernels.window._maps import GridMap, Tiles

LOG2E = math.log2(math.e)
PARTIAL_BYTES = 2**26
"""Scratch for the gradient of a bias, at most, unless one share alone needs more."""
PROGRAMS = 512
"""Programs that the gradient of a bias is split into: some for each multiprocessor of any GPU."""
Axes = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """A kernel with its one-dimensional grid, run-time arguments and compile-time constants."""

    kernel: Any
    blocks: int
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self) -> None:
        """Launch on the current device, unless there is nothing to compute."""
        if self.blocks:
            self.kernel[(self.blocks,)](*self.args, **self.constants)


@dataclass(frozen=True, eq=False)
class Plan:
    """Tiles of one side of a grid map and their tables on a device.

    ``table`` (5, Σ tiles of an axis) holds class, first row, rows, first of the box and its extent; ``rows``
    (2, Σ lengths) the first moving coordinate that each position sees, and how many.
    """

    tiles: tuple[Tiles, ...]
    table: Tensor
    rows: Tensor

    @property
    def count(self) -> int:
        """Tiles of the grid."""
        return math.prod(each.table.shape[1] for each in self.tiles)

    @property
    def even(self) -> bool:
        """Whether all rows of a tile see its whole box."""
        return all(each.even for each in self.tiles)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def plan(pairs: GridMap, rows: int, columns: int, device: torch.device) -> Plan:
    """The cheapest tiles of at most ``rows`` for steps of ``columns``; built and uploaded once."""
    tiles = pairs.tiles(pairs.choose(rows, columns))
    table = np.concatenate([each.table for each in tiles], 1)
    intervals = np.concatenate([np.stack([axis.lo, axis.hi - axis.lo]) for axis in pairs.axes], 1)
    made = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)) for x in (table, intervals))
    return Plan(tiles, *(x.to(device) for x in made))


@dataclass(frozen=True)
class Bias:
    """The table flattened to (H, entries), its axes padded to three, and what indexes it."""

    table: Tensor
    sizes: Axes
    shift: Axes


@dataclass(frozen=True)
class Call:
    """The inputs of one call; the bias of keys expanded to (B, H, M)."""

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Bias | None
    key_bias: Tensor | None
    pairs: GridMap
    causal: bool
    scale: float
    capability: int

    @property
    def n(self) -> int:
        """Number of queries."""
        return self.q.shape[2]

    @property
    def m(self) -> int:
        """Number of keys."""
        return self.k.shape[2]

    @property
    def heads(self) -> Heads:
        """Query heads and the size of their groups."""
        return Heads(self.q.shape[1], self.q.shape[1] // self.k.shape[1])

    def forward(self, o: Tensor, lse: Tensor, lse_log2: Tensor) -> Launch:
        """Write o, lse and, for the backward kernels, lse in log 2."""

        def launch(config: Config) -> Launch:
            walk, constants = self._walk(self.pairs, config, self.n, self.m, (self.q, self.k, self.v, o))
            args = (_view(self.q), _view(self.k), _view(self.v), _view(o), lse, lse_log2, self._table)
            args += (_view(self.key_bias), walk, self.heads, self.scale * LOG2E)
            return Launch(forward, self._blocks(walk), args, constants)

        return self._picked("forward", self.pairs, launch)

    def row_terms(
        self, do: Tensor, o: Tensor, d_lse: Tensor | None, lse_log2: Tensor, delta: Tensor
    ) -> Launch:
        """Write delta."""
        dv = self.v.shape[3]
        block_d = max(16, triton.next_power_of_2(dv))
        block_m = 4096 // block_d
        tiles = triton.cdiv(self.n, block_m)
        args = (_view(do), _view(o), _view(d_lse), lse_log2, delta, self.heads, self.n, tiles)
        constants = {"D": dv, "BLOCK_D": block_d, "BLOCK_M": block_m, "LONG": _long(do, o)}
        constants |= {"num_warps": 4, "num_stages": 1}
        return Launch(row_terms, tiles * math.prod(self.q.shape[:2]), args, constants)

    def backward_q(self, do: Tensor, lse_log2: Tensor, delta: Tensor, dq: Tensor) -> Launch:
        """Write dq."""

        def launch(config: Config) -> Launch:
            near = (self.q, self.k, self.v, do, dq)
            walk, constants = self._walk(self.pairs, config, self.n, self.m, near)
            args = (_view(self.q), _view(self.k), _view(self.v), _view(do), _view(dq), lse_log2, delta)
            args += (self._table, _view(self.key_bias), walk, self.heads, self.scale * LOG2E, self.scale)
            return Launch(backward_q, self._blocks(walk), args, constants)

        return self._picked("backward_q", self.pairs, launch)

    def backward_kv(
        self, do: Tensor, lse_log2: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, d_key_bias: Tensor | None
    ) -> Launch:
        """Write dk, dv and, where it is given, the gradient (B, Hkv, M) of the key bias in fp32."""
        pairs = self.pairs.transposed

        def launch(config: Config) -> Launch:
            near = (self.q, self.k, self.v, do, dk, dv)
            walk, constants = self._walk(pairs, config, self.m, self.n, near)
            args = (_view(self.q), _view(self.k), _view(self.v), _view(do), _view(dk), _view(dv))
            args += (lse_log2, delta, self._table, _view(self.key_bias), _view(d_key_bias), walk, self.heads)
            args += (self.scale * LOG2E, self.scale)
            blocks = self._blocks(walk) // self.heads.group
            return Launch(backward_kv, blocks, args, constants)

        return self._picked("backward_kv", pairs, launch)

    def backward_bias(self, do: Tensor, lse_log2: Tensor, delta: Tensor) -> BiasGradient:
        """The first stage of the gradient of the table, and what the second needs."""
        config = candidates(
            "backward_bias", self._head_dim, self.q.dtype, self.pairs, self.key_bias is not None
        )[0]
        walk, constants = self._walk(self.pairs, config, self.n, self.m, (self.q, self.k, self.v, do))
        tiles = plan(self.pairs, config.block_m, config.block_n, self.q.device)
        frames = [each.frame for each in tiles.tiles]
        back = tuple(start for start, _ in frames)
        frame = tuple(width for _, width in frames)
        for axis, width in enumerate(frame, start=1):
            constants[f"FRAME{axis}"] = width
            del constants[f"BOX{axis}"]
        chunks = triton.cdiv(math.prod(frame), config.block_n)
        units, heads = self.q.shape[0] * tiles.count, self.q.shape[1]
        share_bytes = 4 * heads * config.block_m * chunks * config.block_n
        splits = max(1, min(units, PROGRAMS // (heads * chunks), PARTIAL_BYTES // share_bytes))
        shape = (heads, splits, config.block_m, chunks * config.block_n)
        partial = torch.empty(shape, device=self.q.device, dtype=torch.float32)
        args = (_view(self.q), _view(self.k), _view(self.v), _view(do), partial, lse_log2, delta)
        args += (self._table, _view(self.key_bias), walk, self.heads, units, splits, chunks, back)
        launch = Launch(backward_bias, heads * chunks * splits, (*args, self.scale * LOG2E), constants)
        shape3 = tuple(each.size for each in tiles.tiles)
        return BiasGradient(launch, partial, shape3, back, frame, self.bias)

    @property
    def _head_dim(self) -> int:
        return max(self.q.shape[3], self.v.shape[3])

    @property
    def _table(self) -> Table | None:
        if self.bias is None:
            return None
        _, size2, size3 = self.bias.sizes
        a, b, c = self.bias.shift
        return Table(self.bias.table, self.bias.table.shape[1], size2, size3, (a * size2 + b) * size3 + c)

    def _blocks(self, walk: Walk) -> int:
        return math.prod(self.q.shape[:2]) * walk.tiles1 * walk.tiles2 * walk.tiles3

    def _picked(self, kernel: Kernel, pairs: GridMap, launch: Callable[[Config], Launch]) -> Launch:
        options = candidates(kernel, self._head_dim, self.q.dtype, pairs, self.key_bias is not None)
        shape = tuple((axis.length, axis.key_length, axis.dilation) for axis in pairs.axes)
        work = triton.next_power_of_2(max(1, math.prod(self.q.shape[:2])))
        key = (
            self.capability, str(self.q.dtype), triton.next_power_of_2(self._head_dim), shape, pairs.pairs(),
            work, self.bias is not None, self.key_bias is not None, self.causal,
        )  # fmt: skip
        config = tuning.pick(
            op=self.op,
            kernel=kernel,
            key=key,
            candidates=options,
            launch=lambda config: launch(config).run,
            device=self.q.device,
        )
        return launch(config)

    def _walk(
        self, pairs: GridMap, config: Config, stationary: int, moving: int, tensors: tuple[Tensor, ...]
    ) -> tuple[Walk, dict[str, Any]]:
        """Where the tiles of a configuration lie, and the constants of its kernel."""
        made = plan(pairs, config.block_m, config.block_n, self.q.device)
        counts = [each.table.shape[1] for each in made.tiles]
        dilations = [axis.dilation for axis in pairs.axes]
        walk = Walk(
            made.table, made.rows, *counts, *pairs.grid, *pairs.grid_kv[1:], *dilations, stationary, moving
        )
        d, dv = self.q.shape[3], self.v.shape[3]
        constants = {
            "D": d,
            "DV": dv,
            "BLOCK_D": max(16, triton.next_power_of_2(d)),
            "BLOCK_DV": max(16, triton.next_power_of_2(dv)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "TILE2": made.tiles[1].size,
            "TILE3": made.tiles[2].size,
            "BOX1": made.tiles[0].box,
            "BOX2": made.tiles[1].box,
            "BOX3": made.tiles[2].box,
            "EVEN": made.even,
            "RANK": pairs.rank,
            "CAUSAL": self.causal,
            "LONG": _long(*tensors),
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        return walk, constants


@dataclass(frozen=True)
class BiasGradient:
    """The launch that fills ``partial`` (H, splits, rows, frame), and the sums that follow it."""

    launch: Launch
    partial: Tensor
    tile: Axes
    back: Axes
    frame: Axes
    bias: Bias

    def table(self) -> Tensor:
        """The gradient of the table, (H, entries) fp32, once the launch has run."""
        summed = self.partial.sum(1)
        index, valid = _frame_index(
            self.tile, self.back, self.frame, self.bias.sizes, self.bias.shift, summed.shape[2], summed.device
        )
        # a sum per entry over the queries of a tile: gathers, in one order, where a scatter would be atomic
        return torch.stack([(head.flatten()[index] * valid).sum(-1) for head in summed])


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _frame_index(
    tile: Axes, back: Axes, frame: Axes, sizes: Axes, shift: Axes, pitch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where the pair of each entry and query of a tile lies in a frame of ``pitch`` columns, if it does."""
    columns, valid = [], []
    for size, extent, start, width, offset in zip(sizes, tile, back, frame, shift, strict=True):
        entry, i = np.arange(size)[:, None], np.arange(extent)[None]
        j = i + start + offset - entry
        columns.append(np.clip(j, 0, width - 1))
        valid.append((j >= 0) & (j < width))

    def joined(parts: list[np.ndarray], combine: Callable[[Any, Any, int], Any]) -> np.ndarray:
        x, y, z = parts
        x, y, z = x[:, None, None, :, None, None], y[:, None, None, :, None], z[:, None, None, :]
        return combine(combine(x, y, 1), z, 2).reshape(math.prod(sizes), -1)

    column = joined(columns, lambda x, y, axis: x * frame[axis] + y)
    index = np.arange(column.shape[1])[None] * pitch + column
    exists = joined(valid, lambda x, y, axis: x & y)
    return torch.from_numpy(index).to(device), torch.from_numpy(exists).to(device)


def _view(x: Tensor | None) -> View | None:
    if x is None:
        return None
    return View(x, *x.stride(), *(0,) * (4 - x.dim()))


def _long(*tensors: Tensor) -> bool:
    """Whether an offset inside one head exceeds 32 bits."""
    return any(
        (x.shape[2] - 1) * x.stride(2) + (x.shape[3] - 1) * x.stride(3) >= 2**31 for x in tensors if x.numel()
    )
