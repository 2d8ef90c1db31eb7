"""From tensors and options to launches, as values: what runs is what is compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels._tiles import Launch
from attnbench.kernels.selective_scan._configs import Config, carry_block
from attnbench.kernels.selective_scan._device import Extent, Order, Parameter, Tokens
from attnbench.kernels.selective_scan._gradients import gradients
from attnbench.kernels.selective_scan._outputs import outputs
from attnbench.kernels.selective_scan._states import carry, chunk_states

MAX_OFFSET = 2**31 - 1


@dataclass(frozen=True)
class Settings:
    """Options of a call that are not tensors."""

    softplus: bool
    reverse: bool
    segment: int


@dataclass(frozen=True)
class Gradients:
    """What the backward kernel writes; sums still come in parts, one for each program that adds to them."""

    du: Tensor
    d_delta: Tensor
    dz: Tensor | None
    d_rates: Tensor  # (B, K, chunks, Ns, E)
    db: Tensor  # (B, K, blocks, N, Ns)
    dc: Tensor
    d_skip: Tensor | None  # (B, K, chunks, E)
    d_bias: Tensor | None


@dataclass(frozen=True)
class Call:
    """The inputs of one call, every tensor with its dimension of directions; order in int32."""

    u: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    skip: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    order: Tensor | None
    settings: Settings
    config: Config

    @property
    def chunks(self) -> int:
        """Number of chunks of steps."""
        return triton.cdiv(self.u.shape[2], self.config.length)

    @property
    def blocks(self) -> int:
        """Number of blocks of channels."""
        return triton.cdiv(self.u.shape[3], self.config.block_e)

    @property
    def programs(self) -> int:
        """Chunks × blocks of channels × directions × batch."""
        return self.u.shape[0] * self.u.shape[1] * self.chunks * self.blocks

    @property
    def _extent(self) -> Extent:
        _, k, n, e = self.u.shape
        return Extent(k, n, e, self.chunks, self.blocks)

    def _constants(self, *tensors: Tensor | None) -> dict[str, Any]:
        """Compile-time constants; ``tensors`` beside the inputs whose offsets inside a sequence count."""
        read = (self.u, self.delta, self.b, self.c, self.z, *tensors)
        return {
            "NS": self.a.shape[-1],
            "L": self.config.length,
            "BLOCK_E": self.config.block_e,
            "SOFTPLUS": self.settings.softplus,
            "REVERSE": self.settings.reverse,
            "FAR": any(x is not None and _reach(x) > MAX_OFFSET for x in read),
            "num_warps": self.config.num_warps,
        }

    def empty_states(self) -> Tensor:
        """Memory of the states between chunks, (B, K, chunks + 1, Ns, E) in fp32."""
        batch, k, _, e = self.u.shape
        shape = (batch, k, self.chunks + 1, self.a.shape[-1], e)
        return torch.empty(shape, device=self.u.device, dtype=torch.float32)

    def empty_sums(self) -> Tensor:
        """Memory of ΣΔ of every chunk, (B, K, chunks, E) in fp32."""
        batch, k, _, e = self.u.shape
        return torch.empty(batch, k, self.chunks, e, device=self.u.device, dtype=torch.float32)

    def empty_gradients(self) -> Gradients:
        """Memory of what :meth:`gradients` writes."""
        batch, k, n, e = self.u.shape
        ns = self.a.shape[-1]

        def parts(*shape: int) -> Tensor:
            return torch.empty(batch, k, *shape, device=self.u.device, dtype=torch.float32)

        return Gradients(
            torch.empty(self.u.shape, device=self.u.device, dtype=self.u.dtype),
            torch.empty(self.u.shape, device=self.u.device, dtype=self.delta.dtype),
            None if self.z is None else torch.empty(self.u.shape, device=self.u.device, dtype=self.z.dtype),
            parts(self.chunks, ns, e),
            parts(self.blocks, n, ns),
            parts(self.blocks, n, ns),
            None if self.skip is None else parts(self.chunks, e),
            None if self.bias is None else parts(self.chunks, e),
        )

    def states(self, sums: Tensor, states: Tensor) -> list[Launch]:
        """Fill ``sums`` and, from the initial state in slot 0, all slots of ``states``."""
        return [self._chunk_states(self.u, self.b, sums, states, False), self._carry(sums, states, False)]

    def state_gradients(self, do: Tensor, sums: Tensor, d_states: Tensor) -> list[Launch]:
        """Fill all slots of ``d_states`` from the gradient of the final state in the last one."""
        return [self._chunk_states(do, self.c, sums, d_states, True), self._carry(sums, d_states, True)]

    def _chunk_states(
        self, x: Tensor, column: Tensor, sums: Tensor, states: Tensor, gradient: bool
    ) -> Launch:
        args = (_tokens(x), _tokens(self.delta), _parameter(self.bias), _tokens(self.z) if gradient else None)
        args += (_parameter(self.a), _tokens(column), _order(self.order), self._extent, sums, states)
        constants = self._constants(x) | {"GRADIENT": gradient}
        return Launch(chunk_states, (self.programs,), args, constants)

    def _carry(self, sums: Tensor, states: Tensor, gradient: bool) -> Launch:
        batch, k, _, e = self.u.shape
        width = self.a.shape[-1] * e
        block_c, block_x = carry_block(width)
        args = (_parameter(self.a), sums, states, self._extent)
        constants = {
            "NS": self.a.shape[-1],
            "BLOCK_C": block_c,
            "BLOCK_X": block_x,
            "GRADIENT": gradient,
            "num_warps": block_x // 32,
        }
        return Launch(carry, (batch * k * triton.cdiv(width, block_x),), args, constants)

    def outputs(self, states: Tensor, y: Tensor) -> Launch:
        """Write y (B, K, N, E) from the states between chunks."""
        args = (_tokens(self.u), _tokens(self.delta), _parameter(self.bias), _tokens(self.z))
        args += (_parameter(self.a), _tokens(self.b), _tokens(self.c), _parameter(self.skip))
        args += (_order(self.order), self._extent, states, _tokens(y))
        constants = self._constants(y) | {"SEGMENT": self.settings.segment}
        return Launch(outputs, (self.programs,), args, constants)

    def gradients(self, do: Tensor, states: Tensor, d_states: Tensor, out: Gradients) -> Launch:
        """Write every gradient from the gradient of y, the states between chunks and their gradients."""
        args = (_tokens(self.u), _tokens(self.delta), _parameter(self.bias), _tokens(self.z))
        args += (_parameter(self.a), _tokens(self.b), _tokens(self.c), _parameter(self.skip))
        args += (_order(self.order), self._extent, states, d_states, _tokens(do))
        args += (_tokens(out.du), _tokens(out.d_delta), _tokens(out.dz))
        args += (out.d_rates, out.db, out.dc, out.d_skip, out.d_bias)
        constants = self._constants(do, out.du) | {"SEGMENT": self.settings.segment}
        return Launch(gradients, (self.programs,), args, constants)


def _reach(x: Tensor) -> int:
    """The largest offset inside one sequence, in elements."""
    return sum((size - 1) * abs(stride) for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True))


def _tokens(x: Tensor | None) -> Tokens | None:
    return None if x is None else Tokens(x, *x.stride())


def _parameter(x: Tensor | None) -> Parameter | None:
    return None if x is None else Parameter(x, *x.stride(), *(0,) * (3 - x.dim()))


def _order(x: Tensor | None) -> Order | None:
    return None if x is None else Order(x, *x.stride())
