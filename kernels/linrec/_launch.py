"""Launches of the recurrence's kernels: what runs on a device is what is compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from attnbench.kernels._tiles import Launch, Target, dot_precision, strided
from attnbench.kernels.linrec._config import config, segment_length
from attnbench.kernels.linrec._gradients import gradient_kernel
from attnbench.kernels.linrec._outputs import output_kernel
from attnbench.kernels.linrec._states import carry_kernel, states_kernel


@dataclass(frozen=True)
class Settings:
    """The options of one call that are not tensors."""

    feature_map: str
    scale: float
    normalize: bool
    eps: float
    eps_mode: str
    reverse: bool
    chunk: int


@dataclass(frozen=True)
class Inputs:
    """q, k (B, Hg, N, Dk), v (B, H, N, Dv), g and beta (B, H, N) or None, their settings, and the target."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    settings: Settings
    target: Target

    @property
    def state_size(self) -> int:
        """Floats of one state: S, then z when normalised."""
        dk = self.q.shape[-1]
        return dk * self.v.shape[-1] + (dk if self.settings.normalize else 0)

    @property
    def chunks(self) -> int:
        """Chunks of a head."""
        return triton.cdiv(self.v.shape[2], self.settings.chunk)

    def sizes(self) -> tuple[int, int, int, int]:
        """Runtime integers of every kernel: heads, groups of q and k, steps, chunks."""
        return self.v.shape[1], self.q.shape[1], self.v.shape[2], self.chunks

    def options(self, kernel: str) -> dict[str, object]:
        """Compile-time arguments of ``kernel``."""
        dk, dv, chunk = self.q.shape[-1], self.v.shape[-1], self.settings.chunk
        c = config(kernel, dk, dv, chunk, self.q.element_size(), self.target.capability)
        return {
            "D": dk,
            "DV": dv,
            "E": self.state_size,
            "L": chunk,
            "BK": c.block_k,
            "BV": c.block_v,
            "FEATURE": self.settings.feature_map,
            "REVERSE": self.settings.reverse,
            "PRECISION": dot_precision(self.q.dtype),
            "num_warps": c.num_warps,
            "num_stages": c.num_stages,
        }


def states(inputs: Inputs, initial: Tensor | None) -> tuple[list[Launch], Tensor, Tensor]:
    """Launches that fill the states before every chunk (B·H, NT, E) and the final state (B·H, E), in fp32."""
    return _scan(inputs, inputs.k, inputs.v, inputs.beta, None, initial, 1.0, backward=False)


def state_gradients(
    inputs: Inputs, do: Tensor, inverse: Tensor | None, d_den: Tensor | None, d_final: Tensor | None
) -> tuple[list[Launch], Tensor, Tensor]:
    """As :func:`states` for the gradients of the states after every chunk and of the initial state."""
    scale = 1.0 if inputs.settings.normalize else inputs.settings.scale
    return _scan(inputs, inputs.q, do, inverse, d_den, d_final, scale, backward=True)


def _scan(
    inputs: Inputs,
    a: Tensor,
    x: Tensor,
    weight: Tensor | None,
    d_den: Tensor | None,
    initial: Tensor | None,
    scale: float,
    backward: bool,
) -> tuple[list[Launch], Tensor, Tensor]:
    bh, chunks, size = x.shape[0] * x.shape[1], inputs.chunks, inputs.state_size
    options = inputs.options("states") | {"BACKWARD": backward}
    tiles = triton.cdiv(options["D"], options["BK"]) * triton.cdiv(options["DV"], options["BV"])
    per_segment = segment_length(chunks, bh * tiles, inputs.target.processors)
    segments = triton.cdiv(chunks, per_segment)
    gated = inputs.g is not None and segments > 1
    states, ends, logs, end_logs = (
        x.new_empty(bh, *shape, dtype=torch.float32)
        for shape in ((chunks, size), (segments, size), (chunks,), (segments,))
    )
    args = (
        *strided(a, x, inputs.g, weight),
        *(d_den, initial, states, ends, logs if gated else None, end_logs if gated else None),
        *(*inputs.sizes(), per_segment, segments, scale),
    )
    launches = [Launch(states_kernel, (bh * segments * tiles,), args, options)]
    if segments == 1:
        return launches, states, ends.squeeze(1)
    final = torch.empty_like(ends[:, 0])
    args = (
        states,
        ends,
        *((logs, end_logs) if gated else (None, None)),
        final,
        chunks,
        per_segment,
        segments,
    )
    options = {"E": size, "BE": 1024, "BACKWARD": backward, "num_warps": 4}
    grid = (bh * segments * triton.cdiv(size, 1024),)
    return [*launches, Launch(carry_kernel, grid, args, options)], states, final


def outputs(inputs: Inputs, states: Tensor) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch that fills o (B, H, N, Dv), and den (B, H, N) in fp32 when normalised."""
    v, settings = inputs.v, inputs.settings
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    den = v.new_empty(v.shape[:3], dtype=torch.float32) if settings.normalize else None
    args = (
        *strided(inputs.q, inputs.k, v, inputs.g, inputs.beta),
        *(states, o, den, *inputs.sizes(), settings.scale, settings.eps),
    )
    options = inputs.options("output") | {"EPS_ADD": settings.eps_mode == "add"}
    tiles = triton.cdiv(v.shape[-1], options["BV"])
    return Launch(output_kernel, (v.shape[0] * v.shape[1] * inputs.chunks * tiles,), args, options), o, den


def gradients(
    inputs: Inputs,
    do: Tensor,
    inverse: Tensor | None,
    d_den: Tensor | None,
    states: Tensor,
    d_states: Tensor,
    need_dg: bool,
    need_dbeta: bool,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """The launch that fills dq, dk, dv, dg, dbeta; dq and dk per head, in fp32 where a group sums them."""
    q, v = inputs.q, inputs.v
    b, h, n, dv_size = v.shape
    dtype = q.dtype if q.shape[1] == h else torch.float32
    dq, dk = (q.new_empty(b, h, n, q.shape[-1], dtype=dtype) for _ in range(2))
    dv = v.new_empty(b, h, n, dv_size)
    dg = v.new_empty(b, h, n, dtype=torch.float32) if need_dg else None
    d_beta = v.new_empty(b, h, n, dtype=torch.float32) if need_dbeta else None
    args = (
        *strided(q, inputs.k, v, inputs.g, inputs.beta, do),
        *(inverse, d_den, states, d_states, dq, dk, dv, dg, d_beta, *inputs.sizes(), inputs.settings.scale),
    )
    options = inputs.options("gradient")
    return Launch(gradient_kernel, (b * h * inputs.chunks,), args, options), (dq, dk, dv, dg, d_beta)
