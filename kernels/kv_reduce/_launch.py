"""Launches of the kernels of noncausal linear attention: what runs is what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels._tiles import Launch, Target, dot_precision, strided
from attnbench.kernels.kv_reduce._config import Config, candidates, split_length
from attnbench.kernels.kv_reduce._kernels import feature_gradient_kernel, read_kernel, sums_kernel
from attnbench.kernels.tuning import pick


@dataclass(frozen=True)
class Settings:
    """The options of one call that are not tensors."""

    feature_map: str
    scale: float
    normalize: bool
    eps: float
    eps_mode: str


@dataclass(frozen=True)
class Problem:
    """What all launches of one call share: head dims, settings and target."""

    d: int
    dv: int
    settings: Settings
    target: Target

    @property
    def size(self) -> int:
        """Floats of the sums of one (batch, head): KV, then z when normalised."""
        return self.d * self.dv + (self.d if self.settings.normalize else 0)

    def options(self, kernel: str, rows: Tensor, build: Callable[[dict[str, Any]], Launch]) -> dict[str, Any]:
        """Compile-time arguments of ``kernel`` over ``rows`` (B, H, N, ·): its default tiles or tuned ones.

        ``build`` makes the launch to time from them.
        """
        b, heads, n, _ = rows.shape
        sizes = triton.next_power_of_2(self.d), triton.next_power_of_2(self.dv), n.bit_length()
        key = (self.target.capability, str(rows.dtype), *sizes, (b * heads).bit_length())
        config = pick(
            op="kv_reduce",
            kernel=kernel,
            key=(*key, self.settings.feature_map, self.settings.normalize),
            candidates=candidates(kernel, self.d, self.dv, rows.dtype.itemsize),
            launch=lambda config: build(self._constants(config, rows.dtype)).run,
            device=rows.device,
        )
        return self._constants(config, rows.dtype)

    def _constants(self, c: Config, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "D": self.d,
            "DV": self.dv,
            "E": self.size,
            "BN": c.block_n,
            "BK": c.block_k,
            "BV": c.block_v,
            "FEATURE": self.settings.feature_map,
            "PRECISION": dot_precision(dtype),
            "num_warps": c.num_warps,
            "num_stages": c.num_stages,
        }

    def sums(
        self,
        a: Tensor,
        x: Tensor,
        mask: Tensor | None,
        inverse: Tensor | None,
        d_den: Tensor | None,
        scale: float,
    ) -> tuple[Launch, Tensor]:
        """The launch that fills scale·Σ φ(a) xᵀ and Σ φ(a), in parts (B·H, splits, E) to be added."""

        def build(options: dict[str, Any]) -> tuple[Launch, Tensor]:
            return self._sums(a, x, mask, inverse, d_den, scale, options)

        return build(self.options("sums", a, lambda options: build(options)[0]))

    def _sums(
        self,
        a: Tensor,
        x: Tensor,
        mask: Tensor | None,
        inverse: Tensor | None,
        d_den: Tensor | None,
        scale: float,
        options: dict[str, Any],
    ) -> tuple[Launch, Tensor]:
        b, heads, n, _ = a.shape
        tiles = triton.cdiv(self.d, options["BK"]) * triton.cdiv(self.dv, options["BV"])
        blocks = triton.cdiv(n, options["BN"])
        per_split = split_length(blocks, b * heads * tiles, self.target.processors)
        splits = triton.cdiv(blocks, per_split)
        parts = a.new_empty(b * heads, splits, self.size, dtype=torch.float32)
        args = (*strided(a, x, mask), inverse, d_den, parts, heads, n, blocks, per_split, splits, scale)
        return Launch(sums_kernel, (b * heads * splits * tiles,), args, options), parts

    def read(
        self, a: Tensor, mask: Tensor | None, sums: Tensor, out: Tensor, den: Tensor | None, scale: float
    ) -> Launch:
        """The launch that fills ``out`` = φ(a) KV: scaled, or divided by the den it fills where given."""
        b, heads, n, _ = a.shape

        def build(options: dict[str, Any]) -> Launch:
            options = options | {"EPS_ADD": self.settings.eps_mode == "add"}
            blocks = triton.cdiv(n, options["BN"])
            args = (*strided(a, mask), sums, out, den, heads, n, blocks, scale, self.settings.eps)
            programs = b * heads * blocks * triton.cdiv(self.dv, options["BV"])
            return Launch(read_kernel, (programs,), args, options)

        return build(self.options("read", a, build))

    def feature_gradient(
        self,
        x: Tensor,
        u: Tensor,
        mask: Tensor | None,
        inverse: Tensor | None,
        d_den: Tensor | None,
        sums: Tensor,
        out: Tensor,
        scale: float,
    ) -> Launch:
        """The launch that fills ``out``: dq from x = dO, or dk from x = v; u is the feature map's input."""
        b, heads, n, _ = u.shape

        def build(options: dict[str, Any]) -> Launch:
            blocks = triton.cdiv(n, options["BN"])
            args = (*strided(x, u, mask), inverse, d_den, sums, out, heads, n, blocks, scale)
            programs = b * heads * blocks * triton.cdiv(self.d, options["BK"])
            return Launch(feature_gradient_kernel, (programs,), args, options)

        return build(self.options("feature_gradient", u, build))
