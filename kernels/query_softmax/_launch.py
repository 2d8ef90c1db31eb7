"""From tensors and options to launches, as values: what runs is what is compiled ahead of time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels._tiles import Launch, Target, dot_precision, strided
from attnbench.kernels.query_softmax._configs import Config, Kernel, candidates, split_count
from attnbench.kernels.query_softmax._kernels import backward_kv, backward_q, mix, owners
from attnbench.kernels.tuning import pick

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Settings:
    """Options of a call that are not tensors; ``eps`` is of the weights, ``eps_mass`` of the denominator."""

    hard: bool
    normalize: bool
    eps: float
    eps_mass: float
    scale: float


@dataclass(frozen=True)
class Call:
    """The inputs of one call; the mask expanded to (B, H, N, M)."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    mask: Tensor | None
    settings: Settings
    target: Target

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
        """B·H."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def dv(self) -> int:
        """Width of the values; without values that of the keys, so that the kernels have one."""
        return self.q.shape[3] if self.v is None else self.v.shape[3]

    def config(self, kernel: Kernel) -> Config:
        """The default configuration, or the one that tuning found."""
        d = max(self.q.shape[3], self.dv)
        options = candidates(kernel, self.n, self.m, d, self.q.dtype.itemsize, self.target.capability)
        # the splits of a trial have to fit its memory, and the tile must hold all queries or not: only
        # the kernels whose outputs do not depend on the tile are timed
        if kernel in ("mix", "backward_q"):
            return options[0]
        key = (self.target.capability, str(self.q.dtype), triton.next_power_of_2(d), self.n.bit_length())
        return pick(
            op="query_softmax",
            kernel=kernel,
            key=(*key, self.m.bit_length(), self.heads.bit_length(), self.settings.hard),
            candidates=options,
            launch=lambda config: self._trial(kernel, config),
            device=self.q.device,
        )

    def _trial(self, kernel: Kernel, config: Config) -> Any:
        owner = self.empty_owner().zero_()
        if kernel == "owners":
            launch = self.owners(owner, config)
        else:
            rows = torch.zeros(self.q.shape[:3], device=self.q.device)
            num = None if self.v is None else torch.zeros_like(rows).unsqueeze(-1).repeat(1, 1, 1, self.dv)
            dk, dv = torch.empty_like(self.k), None if self.v is None else torch.empty_like(self.v)
            delta = torch.empty(self.k.shape[:3], device=self.q.device)
            launch = self.backward_kv(owner, num, rows, delta, dk.contiguous(), dv, config)
        return lambda: launch.run()

    def empty_owner(self) -> Tensor:
        """(B, H, M): log-sum-exps in log 2, fp32, or with ``hard`` queries, int32."""
        dtype = torch.int32 if self.settings.hard else torch.float32
        return torch.empty(self.k.shape[:3], device=self.q.device, dtype=dtype)

    def splits(self, kernel: Kernel) -> tuple[int, int]:
        """Parts of the keys, and key tiles of a part."""
        config = self.config(kernel)
        tiles = triton.cdiv(self.m, config.block_m)
        programs = self.heads * triton.cdiv(self.n, config.block_n)
        per_split = max(1, triton.cdiv(tiles, split_count(tiles, programs, self.target.processors)))
        return max(1, triton.cdiv(tiles, per_split)), per_split

    @property
    def whole(self) -> bool:
        """Whether one tile of ``mix`` holds all queries, so that it finds the owners of its keys itself."""
        return self.n <= self.config("mix").block_n

    def _constants(self, config: Config) -> dict[str, Any]:
        d = self.q.shape[3]
        return {
            "D": d,
            "BD": max(16, triton.next_power_of_2(d)),
            "BN": config.block_n,
            "BM": config.block_m,
            "PRECISION": dot_precision(self.q.dtype),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def _values(self) -> dict[str, int]:
        return {"DV": self.dv, "BDV": max(16, triton.next_power_of_2(self.dv))}

    def owners(self, owner: Tensor, config: Config | None = None) -> Launch:
        """Write the owner of every key."""
        config = config or self.config("owners")
        tiles = triton.cdiv(self.m, config.block_m)
        args = (*strided(self.q, self.k, self.mask), owner, self.q.shape[1], self.n, self.m, tiles)
        constants = self._constants(config) | {"HARD": self.settings.hard}
        return Launch(owners, (self.heads * tiles,), (*args, self.settings.scale * LOG2E), constants)

    def mix(self, owner: Tensor, o: Tensor | None, mass: Tensor) -> Launch:
        """Write o (B, H, splits, N, Dv) and mass (B, H, splits, N), and the owners if ``whole``."""
        config = self.config("mix")
        tiles = triton.cdiv(self.n, config.block_n)
        splits, per_split = self.splits("mix")
        args = (*strided(self.q, self.k, self.v, self.mask), owner, o, mass, self.q.shape[1], self.n, self.m)
        args += (tiles, splits, per_split, self.settings.scale * LOG2E)
        args += (self.settings.eps, self.settings.eps_mass)
        constants = self._constants(config) | self._values()
        constants |= {"HARD": self.settings.hard, "WHOLE": self.whole}
        constants |= {"NORMALIZE": self.settings.normalize and splits == 1}
        return Launch(mix, (self.heads * tiles * splits,), args, constants)

    def backward_kv(
        self,
        owner: Tensor,
        d_num: Tensor | None,
        d_mass: Tensor,
        delta: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        config: Config | None = None,
    ) -> Launch:
        """Write contiguous dk, dv and delta (B, H, M); with ``hard`` only dv."""
        config = config or self.config("backward_kv")
        tiles = triton.cdiv(self.m, config.block_m)
        args = (*strided(self.q, self.k, self.v, self.mask), owner, d_num, d_mass, delta, dk, dv)
        args += (self.q.shape[1], self.n, self.m, tiles, self.settings.scale, self.settings.scale * LOG2E)
        constants = self._constants(config) | self._values() | {"HARD": self.settings.hard}
        return Launch(backward_kv, (self.heads * tiles,), (*args, self.settings.eps), constants)

    def backward_q(
        self, owner: Tensor, d_num: Tensor | None, d_mass: Tensor, delta: Tensor, dq: Tensor
    ) -> Launch:
        """Write dq (B, H, splits, N, D)."""
        config = self.config("backward_q")
        tiles = triton.cdiv(self.n, config.block_n)
        splits, per_split = self.splits("backward_q")
        args = (*strided(self.q, self.k, self.v, self.mask), owner, d_num, d_mass, delta, dq)
        args += (self.q.shape[1], self.n, self.m, tiles, splits, per_split)
        args += (self.settings.scale, self.settings.scale * LOG2E)
        constants = self._constants(config) | self._values()
        return Launch(backward_q, (self.heads * tiles * splits,), args, constants)
