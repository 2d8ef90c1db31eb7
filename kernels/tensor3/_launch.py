"""From tensors and options to launches, as values: what runs is what is compiled ahead of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels._tiles import Launch, Target, dot_precision, strided
from attnbench.kernels.tensor3._configs import Config, Kernel, candidates
from attnbench.kernels.tensor3._kernels import backward_q, backward_set, forward
from attnbench.kernels.tuning import pick

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class KeySet:
    """One of the two sets: keys (B, H, M, D), values (B, H, M, Dv) and a mask (B, M)."""

    k: Tensor
    v: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Call:
    """The inputs of one call."""

    q: Tensor
    first: KeySet
    second: KeySet
    causal: bool
    scale: float
    target: Target

    @property
    def heads(self) -> int:
        """B·H."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def n(self) -> int:
        """Number of queries."""
        return self.q.shape[2]

    def _launch(self, kernel: Kernel, rows: int, keys: int, build: Callable[[Config], Launch]) -> Launch:
        """The launch with the default configuration, or with the one that tuning found."""
        d = max(self.q.shape[3], self.first.v.shape[3])
        sizes = (triton.next_power_of_2(d), self.n.bit_length(), rows.bit_length(), keys.bit_length())
        config = pick(
            op="tensor3",
            kernel=kernel,
            key=(self.target.capability, str(self.q.dtype), *sizes, self.heads.bit_length(), self.causal),
            candidates=candidates(kernel, rows, keys, d, self.q.dtype.itemsize),
            launch=lambda config: build(config).run,
            device=self.q.device,
        )
        return build(config)

    def _constants(self, config: Config) -> dict[str, Any]:
        d, dv = self.q.shape[3], self.first.v.shape[3]
        return {
            "D": d,
            "DV": dv,
            "BD": max(16, triton.next_power_of_2(d)),
            "BDV": max(16, triton.next_power_of_2(dv)),
            "BR": config.block_rows,
            "BK": config.block_keys,
            "CAUSAL": self.causal,
            "PRECISION": dot_precision(self.q.dtype),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def _inputs(self, x: KeySet, y: KeySet) -> tuple[Any, ...]:
        return strided(self.q, x.k, y.k, x.v, y.v, x.mask, y.mask)

    def _sizes(self, x: KeySet, y: KeySet, tiles: int) -> tuple[int, ...]:
        return self.q.shape[1], self.n, x.k.shape[2], y.k.shape[2], tiles

    def forward(self, o: Tensor, lse: Tensor, lse_log2: Tensor) -> Launch:
        """Write o and both lse (B, H, N)."""
        x, y = self.first, self.second

        def build(config: Config) -> Launch:
            tiles = triton.cdiv(self.n, config.block_rows)
            args = (*self._inputs(x, y), *strided(o), lse, lse_log2, *self._sizes(x, y, tiles))
            constants = self._constants(config)
            return Launch(forward, (self.heads * tiles,), (*args, self.scale * LOG2E), constants)

        return self._launch("forward", self.n, y.k.shape[2], build)

    def backward_q(self, do: Tensor, lse_log2: Tensor, delta: Tensor, dq: Tensor) -> Launch:
        """Write dq, contiguous."""
        x, y = self.first, self.second

        def build(config: Config) -> Launch:
            tiles = triton.cdiv(self.n, config.block_rows)
            args = (*self._inputs(x, y), *strided(do), lse_log2, delta, dq, *self._sizes(x, y, tiles))
            args += (self.scale, self.scale * LOG2E)
            return Launch(backward_q, (self.heads * tiles,), args, self._constants(config))

        return self._launch("backward_q", self.n, y.k.shape[2], build)

    def backward_set(
        self, second: bool, do: Tensor, lse_log2: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
    ) -> Launch:
        """Write the gradients of the first or the second set, contiguous."""
        x, y = (self.second, self.first) if second else (self.first, self.second)

        def build(config: Config) -> Launch:
            tiles = triton.cdiv(x.k.shape[2], config.block_rows)
            args = (*self._inputs(x, y), *strided(do), lse_log2, delta, dk, dv, *self._sizes(x, y, tiles))
            args += (self.scale, self.scale * LOG2E)
            return Launch(backward_set, (self.heads * tiles,), args, self._constants(config))

        return self._launch("backward_set", x.k.shape[2], y.k.shape[2], build)


def empty_rows(q: Tensor) -> Tensor:
    """(B, H, N) in fp32."""
    return torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
