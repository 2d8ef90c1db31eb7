"""From tensors to launches: how rows and keys are packed, tiled and split.

A launch is a value, so that the ahead-of-time compilation builds exactly what a call on a GPU would launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels._tiles import Target, target
from attnbench.kernels.few_query._backward import (
    backward_kv,
    backward_q,
    backward_resident,
    row_terms,
    sum_splits,
)
from attnbench.kernels.few_query._configs import (
    Config,
    Kernel,
    candidates,
    resident_keys,
    resident_rows,
    split,
)
from attnbench.kernels.few_query._device import Biases, Extent, Grid
from attnbench.kernels.few_query._forward import forward, forward_resident, merge
from attnbench.kernels.flash._launch import LOG2E, Launch, view
from attnbench.kernels.tuning import pick

_KERNELS: dict[Kernel, Any] = {
    "forward": forward,
    "forward_resident": forward_resident,
    "backward_q": backward_q,
    "backward_kv": backward_kv,
    "backward_resident": backward_resident,
}


@dataclass(frozen=True)
class Plan:
    """One kernel of a call, its tile, and how the launch is cut."""

    kernel: Kernel
    config: Config
    grid: Grid


@dataclass(frozen=True)
class Call:
    """The inputs of one call; biases expanded: of keys to (B, H, M), the same for a group, of pairs."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None
    bias: Tensor | None
    causal: bool
    scale: float
    target: Target

    @property
    def extent(self) -> Extent:
        """Lengths and heads."""
        h, n = self.q.shape[1:3]
        kv_heads, m = self.k.shape[1:3]
        return Extent(n, m, n * (h // kv_heads), h // kv_heads, kv_heads)

    @property
    def heads(self) -> int:
        """B·Hkv, the key heads of the whole batch."""
        return self.k.shape[0] * self.k.shape[1]

    @property
    def width(self) -> int:
        """The larger of D and Dv, which decides about the tiles."""
        return max(self.q.shape[3], self.v.shape[3])

    @property
    def most_keys(self) -> tuple[int, int]:
        """How many keys one tile holds at most: in the forward, and in the backward pass."""
        return resident_keys(self.width, self.q.dtype, self.bias is not None)

    @property
    def keys_resident(self) -> tuple[bool, bool]:
        """Whether one tile holds all keys: in the forward, and in the backward pass."""
        forward_keys, backward_keys = self.most_keys
        return 0 < self.extent.m <= forward_keys, 0 < self.extent.m <= backward_keys

    @property
    def rows_resident(self) -> bool:
        """Whether one tile of the backward pass holds all rows of a key head."""
        return 0 < self.extent.rows <= resident_rows(self.width, self.q.dtype, self.bias is not None)

    def candidates(self, kernel: Kernel) -> tuple[Config, ...]:
        """Tiles for this call, the default first."""
        extent, biased = self.extent, self.bias is not None
        return candidates(kernel, self.width, self.q.dtype, extent.rows, extent.m, biased)

    def plan(self, kernel: Kernel, launch: Callable[[Plan], Callable[[], object]]) -> Plan:
        """The tile and the splits of a kernel; ``launch`` gives what to time where tuning is on."""
        extent = self.extent
        choices = self.candidates(kernel)
        width = max(16, triton.next_power_of_2(self.width))
        sizes = (_bucket(extent.rows), _bucket(extent.m), _bucket(self.heads))
        key = (self.target.capability, str(self.q.dtype), width, *sizes, self.bias is not None)
        config = pick("few_query", kernel, key, choices, lambda c: launch(self.cut(kernel, c)), self.q.device)
        return self.cut(kernel, config)

    def cut(self, kernel: Kernel, config: Config) -> Plan:
        """Tiles of the side that a program holds, splits of the side that it walks."""
        extent = self.extent
        tiles = 1
        walked, block = extent.m, config.block_n
        if kernel in ("forward", "backward_q"):
            tiles = triton.cdiv(extent.rows, config.block_m)
        if kernel == "backward_kv":
            tiles = triton.cdiv(extent.m, config.block_n)
        if kernel in ("forward_resident", "backward_kv"):
            walked, block = extent.rows, config.block_m
        splits, length = split(walked, block, tiles * self.heads, self.target.processors)
        return Plan(kernel, config, Grid(tiles, splits, length))

    def launch(self, plan: Plan, outputs: tuple[Any, ...], *, backward: bool = False) -> Launch:
        """The launch of a plan that writes ``outputs``, which come after q, k and v among its arguments."""
        config, grid = plan.config, plan.grid
        args = (view(self.q), view(self.k), view(self.v), *outputs)
        args += (Biases(view(self.key_bias), view(self.bias)), self.extent, grid)
        args += (self.scale, self.scale * LOG2E) if backward else (self.scale * LOG2E,)
        d, dv = self.q.shape[3], self.v.shape[3]
        constants = {
            "D": d,
            "DV": dv,
            "BLOCK_D": max(16, triton.next_power_of_2(d)),
            "BLOCK_DV": max(16, triton.next_power_of_2(dv)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "CAUSAL": self.causal,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        if plan.kernel != "forward_resident":
            constants["SPLIT"] = grid.splits > 1
        return Launch(_KERNELS[plan.kernel], grid.tiles * grid.splits * self.heads, args, constants)

    def merge(self, parts_o: Tensor, parts_lse: Tensor, o: Tensor, lse: Tensor, lse_log2: Tensor) -> Launch:
        """Write o and lse from those of the splits."""
        h, n = self.q.shape[1:3]
        args = (parts_o, parts_lse, view(o), lse, lse_log2, parts_o.shape[0], h, n)
        constants = {"DV": o.shape[3], **_row_constants("BLOCK_DV", o.shape[3])}
        return Launch(merge, self.q.shape[0] * h * n, args, constants)

    def row_terms(
        self, do: Tensor, o: Tensor, d_lse: Tensor | None, lse_log2: Tensor, delta: Tensor
    ) -> Launch:
        """Write delta = do·o − d_lse."""
        block_d = max(16, triton.next_power_of_2(o.shape[3]))
        block_t = min(max(16, 4096 // block_d), max(16, triton.next_power_of_2(self.extent.rows)))
        grid = Grid(triton.cdiv(self.extent.rows, block_t), 1, 0)
        args = (view(do), view(o), view(d_lse), lse_log2, delta, self.extent, grid)
        constants = {"DV": o.shape[3], "BLOCK_DV": block_d, "BLOCK_T": block_t, "num_warps": 4}
        return Launch(row_terms, grid.tiles * self.heads, args, constants | {"num_stages": 1})


def sum_of(parts: Tensor, out: Tensor) -> Launch:
    """The launch that writes to ``out`` (B, heads, n, D) the sum of parts (splits, B, heads, n, D)."""
    b, heads, n, d = out.shape
    constants = {"D": d, **_row_constants("BLOCK_D", d)}
    return Launch(sum_splits, b * heads * n, (parts, view(out), parts.shape[0], heads, n), constants)


def _row_constants(block: str, width: int) -> dict[str, int]:
    """Constants of a kernel with one row a program; ``block`` names the one for the row's width."""
    block_d = max(16, triton.next_power_of_2(width))
    return {block: block_d, "BLOCK_S": max(4, 2048 // block_d), "num_warps": 4, "num_stages": 1}


@lru_cache
def here(device: torch.device) -> Target:
    """The target of a device, looked up once."""
    return target(device)


def _bucket(size: int) -> int:
    return triton.next_power_of_2(max(size, 1))
