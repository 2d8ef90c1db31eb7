"""From tensors and options to launches: views, tile counts and compile-time constants of each kernel.

A launch is a value, so that the ahead-of-time compilation builds exactly what a call on a GPU would launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels.flash._backward import backward_kv, backward_q, row_terms
from attnbench.kernels.flash._configs import Config, Kernel, choose
from attnbench.kernels.flash._device import Extent, Score, View
from attnbench.kernels.flash._forward import forward

LOG2E = math.log2(math.e)
MAX_STRIDE = 2**22
"""Offsets inside a tile are 32-bit: 256 rows or columns of this stride stay below 2³¹."""


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


@dataclass(frozen=True)
class Options:
    """Options of a call without tensors; a window side that is None is unbounded, causal is right = 0."""

    left: int | None
    right: int | None
    scale: float
    softcap: float


@dataclass(frozen=True)
class Call:
    """The inputs of one call, biases and sink expanded to (B, H, M), (B, H, N, M) and (B, H, N)."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None
    bias: Tensor | None
    sink: Tensor | None
    q_pos: Tensor | None
    options: Options
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
    def heads(self) -> int:
        """B·H, the query heads of the whole batch."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def _extent(self) -> Extent:
        h, kv_heads = self.q.shape[1], self.k.shape[1]
        return Extent(self.n, self.m, h, h // kv_heads, self.options.left, self.options.right)

    @property
    def _score(self) -> Score:
        scale, cap = self.options.scale, self.options.softcap
        if cap > 0:
            return Score(scale / cap, cap * LOG2E, scale)
        return Score(scale * LOG2E, None, scale)

    def _config(self, kernel: Kernel) -> Config:
        d = max(self.q.shape[3], self.v.shape[3])
        return choose(kernel, self.capability, d, self.q.dtype, self.n, self.m, self.bias is not None)

    def _constants(self, config: Config) -> dict[str, Any]:
        d, dv = self.q.shape[3], self.v.shape[3]
        return {
            "D": d,
            "DV": dv,
            "BLOCK_D": max(16, triton.next_power_of_2(d)),
            "BLOCK_DV": max(16, triton.next_power_of_2(dv)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def forward(self, o: Tensor, lse: Tensor, lse_log2: Tensor) -> Launch:
        """Write o, lse and, for the backward kernels, lse in log 2."""
        config = self._config("forward")
        tiles = triton.cdiv(self.n, config.block_m)
        plain = self.options.softcap <= 0 and self.key_bias is None and self.bias is None
        constants = self._constants(config) | {
            "RAW": plain and self.options.scale > 0,
            "UNEVEN": self.m % config.block_n != 0,
        }
        args = (_view(self.q), _view(self.k), _view(self.v), _view(o), lse, lse_log2)
        args += (_view(self.key_bias), _view(self.bias), _view(self.sink), self.q_pos)
        args += (self._extent, self._score, tiles)
        return Launch(forward, tiles * self.heads, args, constants)

    def row_terms(self, do: Tensor, o: Tensor, d_lse: Tensor | None, terms: RowTerms) -> Launch:
        """Write the other terms from lse in log 2."""
        dv = self.v.shape[3]
        block_d = max(16, triton.next_power_of_2(dv))
        block_m = 4096 // block_d
        tiles = triton.cdiv(self.n, block_m)
        args = (_view(do), _view(o), _view(d_lse), _view(self.sink))
        args += (terms.lse_log2, terms.delta, terms.gate, terms.d_sink, self._extent, tiles)
        constants = {"D": dv, "BLOCK_D": block_d, "BLOCK_M": block_m, "num_warps": 4, "num_stages": 1}
        return Launch(row_terms, tiles * self.heads, args, constants)

    def backward_q(self, do: Tensor, terms: RowTerms, dq: Tensor, d_bias: Tensor | None) -> Launch:
        """Write dq and, where it is given zeroed, the dense gradient (B, H, N, M) of the bias in fp32."""
        config = self._config("backward_q")
        tiles = triton.cdiv(self.n, config.block_m)
        args = (_view(self.q), _view(self.k), _view(self.v), _view(do), _view(dq))
        args += (terms.lse_log2, terms.delta, terms.gate)
        args += (_view(self.key_bias), _view(self.bias), _view(d_bias), self.q_pos)
        args += (self._extent, self._score, tiles)
        constants = self._constants(config) | {"UNEVEN": self.m % config.block_n != 0}
        return Launch(backward_q, tiles * self.heads, args, constants)

    def backward_kv(
        self, do: Tensor, terms: RowTerms, dk: Tensor, dv: Tensor, d_key_bias: Tensor | None
    ) -> Launch:
        """Write dk, dv and, where it is given, the gradient (B, Hkv, M) of the key bias in fp32."""
        config = self._config("backward_kv")
        tiles = triton.cdiv(self.m, config.block_n)
        args = (_view(self.q), _view(self.k), _view(self.v), _view(do), _view(dk), _view(dv))
        args += (terms.lse_log2, terms.delta, terms.gate)
        args += (_view(self.key_bias), _view(d_key_bias), _view(self.bias))
        args += (self.q_pos, self._query_ranges(config.block_n), self._extent, self._score, tiles)
        constants = self._constants(config) | {"UNEVEN": self.n % config.block_m != 0}
        return Launch(backward_kv, tiles * self.k.shape[0] * self.k.shape[1], args, constants)

    def _query_ranges(self, block_n: int) -> Tensor | None:
        """Per key tile the queries where some, all, all, some of its keys are seen, as (4, tiles) int32."""
        if self.q_pos is None:
            return None
        left, right = self.options.left, self.options.right
        first = torch.arange(0, self.m, block_n, device=self.q.device, dtype=torch.int32)
        last = (first + (block_n - 1)).clamp_(max=self.m - 1)
        ranges = torch.zeros(4, len(first), device=self.q.device, dtype=torch.int32)
        ranges[2:] = self.n
        if right is not None:
            wanted = torch.stack([first, last]) - right
            ranges[:2] = torch.searchsorted(self.q_pos, wanted, out_int32=True)
        if left is not None:
            wanted = torch.stack([first, last]) + left
            ranges[2:] = torch.searchsorted(self.q_pos, wanted, out_int32=True, right=True)
        return ranges


@dataclass(frozen=True)
class RowTerms:
    """What the backward kernels know of a query, (B, H, N) fp32; gate and d_sink only with a sink."""

    lse_log2: Tensor
    delta: Tensor
    gate: Tensor | None
    d_sink: Tensor | None


def _view(x: Tensor | None) -> View | None:
    if x is None:
        return None
    return View(x, *x.stride(), *(0,) * (4 - x.dim()))


@lru_cache
def capability(device: torch.device) -> int:
    """Compute capability such as 90; Ampere's where Triton interprets and there is no GPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
