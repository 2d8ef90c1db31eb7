"""From tensors and options to launches: views, tile counts and compile-time constants of each kernel.

A launch is a value, so that the ahead-of-time compilation builds exactly what a call on a GPU would launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels import tuning
from attnbench.kernels.flash._backward import backward_kv, backward_q, row_terms
from attnbench.kernels.flash._configs import Config, Kernel, candidates, choose
from attnbench.kernels.flash._device import Extent, Lists, Relative, Score, TableSums, Tests, View
from attnbench.kernels.flash._forward import forward
from attnbench.kernels.flash._tile_lists import Along, packed, tile_lists
from attnbench.kernels.flash.mask import Mask, RelativeBias

LOG2E = math.log2(math.e)


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
    """The inputs of one call, biases and sink expanded to (B, H, M), (B, H, N, M) and (B, H, N).

    With a mask, it is all that is said about visibility. The table of the relative bias is in fp32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None
    bias: Tensor | None
    sink: Tensor | None
    q_pos: Tensor | None
    options: Options
    capability: int
    mask: Mask | None = None
    rel_bias: RelativeBias | None = None

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

    @property
    def _relative(self) -> Relative | None:
        if self.rel_bias is None:
            return None
        table = self.rel_bias.table
        stride = table.stride(0) if table.shape[0] > 1 else 0
        return Relative(table, stride, table.shape[1], self.rel_bias.q_code, self.rel_bias.k_code)

    @property
    def _clauses(self) -> tuple[tuple[int, ...], ...] | None:
        return None if self.mask is None else packed(self.mask, self.n, self.m).clauses

    def _tests(self) -> Tests | None:
        """The tests of the mask as (B, H, tokens, T), whatever it is shared by."""
        if self.mask is None:
            return None
        code, low, high, _ = packed(self.mask, self.n, self.m)
        b, h = self.q.shape[:2]
        return Tests(*(view(x.expand(-1, b, h, -1).permute(1, 2, 3, 0)) for x in (code, low, high)))

    def _lists(self, config: Config, along: Along) -> Lists | None:
        """The tiles that the mask leaves of a loop ``along`` the keys, or along the queries of key heads."""
        if self.mask is None:
            return None
        b, heads = self.q.shape[0], (self.q if along == "keys" else self.k).shape[1]
        group = 1 if along == "keys" else self.q.shape[1] // heads
        lists = tile_lists(self.mask, self.n, self.m, config.block_m, config.block_n, along, group)
        return Lists(*(view(x.expand(b, heads, -1, -1)) for x in lists))

    def _config(self, kernel: Kernel) -> Config:
        d = max(self.q.shape[3], self.v.shape[3])
        return choose(kernel, self.capability, d, self.q.dtype, self.n, self.m, *self._extras)

    @property
    def _extras(self) -> tuple[bool, bool]:
        """Whether pairs have biases, and the tests of a mask, which both take registers."""
        return self.bias is not None or self.rel_bias is not None, self.mask is not None

    def _tuned(self, kernel: Kernel, build: Callable[[Config], Launch], repeatable: bool = True) -> Launch:
        """The launch in the configuration that is tuned for such calls, or in the default one."""
        default = self._config(kernel)
        widths = (max(16, triton.next_power_of_2(x.shape[3])) for x in (self.q, self.v))
        lengths = (triton.next_power_of_2(max(x, 1)) for x in (self.n, self.m))
        options = self.options.left is None, self.options.right is None, self.options.softcap > 0
        group = self.q.shape[1] // self.k.shape[1]
        config = tuning.pick(
            op="flash",
            kernel=kernel,
            key=(self.capability, str(self.q.dtype), *widths, *lengths, group, *options, *self._extras),
            candidates=candidates(default) if repeatable else (default,),
            launch=lambda config: build(config).run,
            device=self.q.device,
        )
        return build(config)

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

    @property
    def _plain(self) -> bool:
        """Whether nothing but a multiplier stands between q·k and exp2."""
        biases = self.key_bias, self.bias, self.rel_bias
        return self.options.softcap <= 0 and all(x is None for x in biases)

    def forward(self, o: Tensor, lse: Tensor, lse_log2: Tensor) -> Launch:
        """Write o, lse and, for the backward kernels, lse in log 2."""
        return self._tuned("forward", lambda config: self._forward(config, o, lse, lse_log2))

    def _forward(self, config: Config, o: Tensor, lse: Tensor, lse_log2: Tensor) -> Launch:
        tiles = triton.cdiv(self.n, config.block_m)
        constants = self._constants(config) | {
            "RAW": self._plain and self.options.scale > 0,
            "UNEVEN": self.m % config.block_n != 0,
            "CLAUSES": self._clauses,
        }
        args = (view(self.q), view(self.k), view(self.v), view(o), lse, lse_log2)
        args += (view(self.key_bias), view(self.bias), self._relative, view(self.sink), self.q_pos)
        args += (self._tests(), self._lists(config, "keys"), self._extent, self._score, tiles)
        return Launch(forward, tiles * self.heads, args, constants)

    def row_terms(self, do: Tensor, o: Tensor, d_lse: Tensor | None, terms: RowTerms) -> Launch:
        """Write the other terms from lse in log 2."""
        dv = self.v.shape[3]
        block_d = max(16, triton.next_power_of_2(dv))
        block_m = 4096 // block_d
        tiles = triton.cdiv(self.n, block_m)
        args = (view(do), view(o), view(d_lse), view(self.sink))
        args += (terms.lse_log2, terms.delta, terms.gate, terms.d_sink, self._extent, tiles)
        constants = {"D": dv, "BLOCK_D": block_d, "BLOCK_M": block_m, "num_warps": 4, "num_stages": 1}
        return Launch(row_terms, tiles * self.heads, args, constants)

    def backward_q(
        self, do: Tensor, terms: RowTerms, dq: Tensor, d_bias: Tensor | None, d_table: TableSums | None = None
    ) -> Launch:
        """Write dq and, where they are given zeroed, the gradients of the biases of pairs.

        That of the dense one is (B, H, N, M) in fp32.
        """
        # sums are added to: what is timed more than once would be added more than once
        return self._tuned(
            "backward_q",
            lambda config: self._backward_q(config, do, terms, dq, d_bias, d_table),
            repeatable=d_table is None,
        )

    def _backward_q(
        self,
        config: Config,
        do: Tensor,
        terms: RowTerms,
        dq: Tensor,
        d_bias: Tensor | None,
        d_table: TableSums | None,
    ) -> Launch:
        tiles = triton.cdiv(self.n, config.block_m)
        args = (view(self.q), view(self.k), view(self.v), view(do), view(dq))
        args += (terms.lse_log2, terms.delta, terms.gate)
        args += (view(self.key_bias), view(self.bias), self._relative, view(d_bias), d_table, self.q_pos)
        args += (self._tests(), self._lists(config, "keys"), self._extent, self._score, tiles)
        constants = self._constants(config)
        constants |= {"UNEVEN": self.m % config.block_n != 0, "CLAUSES": self._clauses}
        return Launch(backward_q, tiles * self.heads, args, constants)

    def backward_kv(
        self, do: Tensor, terms: RowTerms, dk: Tensor, dv: Tensor, d_key_bias: Tensor | None
    ) -> Launch:
        """Write dk, dv and, where it is given, the gradient (B, Hkv, M) of the key bias in fp32."""
        return self._tuned(
            "backward_kv", lambda config: self._backward_kv(config, do, terms, dk, dv, d_key_bias)
        )

    def _backward_kv(
        self, config: Config, do: Tensor, terms: RowTerms, dk: Tensor, dv: Tensor, d_key_bias: Tensor | None
    ) -> Launch:
        tiles = triton.cdiv(self.m, config.block_n)
        args = (view(self.q), view(self.k), view(self.v), view(do), view(dk), view(dv))
        args += (terms.lse_log2, terms.delta, terms.gate)
        args += (view(self.key_bias), view(d_key_bias), view(self.bias), self._relative)
        args += (self.q_pos, self._query_ranges(config.block_n), self._tests())
        args += (self._lists(config, "queries"), self._extent, self._score, tiles)
        constants = self._constants(config)
        constants |= {"UNEVEN": self.n % config.block_m != 0, "CLAUSES": self._clauses}
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


def view(x: Tensor | None) -> View | None:
    """A tensor of up to four dimensions with its strides, as the kernels take it."""
    if x is None:
        return None
    return View(x, *x.stride(), *(0,) * (4 - x.dim()))
