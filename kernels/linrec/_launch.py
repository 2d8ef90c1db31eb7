"""Launches of the recurrence's kernels: what runs on a device is what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels._tiles import Launch, Target, dot_precision, strided
from attnbench.kernels.linrec._config import Config, candidates, segment_length
from attnbench.kernels.linrec._gradients import gradient_kernel
from attnbench.kernels.linrec._outputs import output_kernel
from attnbench.kernels.linrec._states import carry_kernel, states_kernel
from attnbench.kernels.tuning import pick


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
    """q, k (B, Hg, N, Dk), v (B, H, N, Dv), g, beta and gv or None, their settings, and the target.

    g is (B, H, N) or (B, H, N, Dk), beta (B, H, N), gv (B, H, N, Dv).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    settings: Settings
    target: Target
    gv: Tensor | None = None

    @property
    def logs(self) -> tuple[int, int]:
        """Log-decays of a state over Dk (one under a scalar gate), and these with those over Dv."""
        over_k = 0 if self.g is None else 1 if self.g.dim() == 3 else self.q.shape[-1]
        return over_k, over_k + (0 if self.gv is None else self.v.shape[-1])

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

    def to_inputs(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of q, k (per head of v), v, g and beta as those of the inputs: groups summed, dtypes."""
        dq, dk, dv, dg, dbeta = gradients
        if self.q.shape[1] != self.v.shape[1]:
            dq, dk = (
                None if x is None else x.unflatten(1, (self.q.shape[1], -1)).sum(2).to(self.q.dtype)
                for x in (dq, dk)
            )
        dg = None if dg is None or self.g is None else dg.to(self.g.dtype)
        return dq, dk, dv, dg, None if dbeta is None or self.beta is None else dbeta.to(self.beta.dtype)

    def options(
        self,
        kernel: str,
        build: Callable[[dict[str, Any]], Sequence[Launch]],
        dims: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """Compile-time arguments of ``kernel``: with its default tiles, or with those that tuning found.

        ``build`` makes the launches to time from them; ``dims`` stand for Dk and Dv where they are others.
        """
        dk, dv = dims or (self.q.shape[-1], self.v.shape[-1])
        settings, (b, heads, n, _) = self.settings, self.v.shape
        found = candidates(kernel, dk, dv, settings.chunk, self.q.element_size(), self.target.capability)

        def trial(config: Config) -> Callable[[], None]:
            launches = build(self._constants(config, dk, dv))
            return lambda: run_all(launches)

        sizes = (triton.next_power_of_2(dk), triton.next_power_of_2(dv), n.bit_length())
        key = (self.target.capability, str(self.q.dtype), *sizes, (b * heads).bit_length(), settings.chunk)
        parts = (*self.logs, self.beta is not None, settings.normalize, settings.feature_map)
        config = pick(
            op="linrec",
            kernel=kernel,
            key=(*key, heads // self.q.shape[1], *parts),
            candidates=found,
            launch=trial,
            device=self.v.device,
        )
        return self._constants(config, dk, dv)

    def _constants(self, c: Config, dk: int, dv: int) -> dict[str, Any]:
        return {
            "D": dk,
            "DV": dv,
            "E": self.state_size,
            "L": self.settings.chunk,
            "BK": c.block_k,
            "BV": c.block_v,
            "FEATURE": self.settings.feature_map,
            "REVERSE": self.settings.reverse,
            "PRECISION": dot_precision(self.q.dtype),
            "num_warps": c.num_warps,
            "num_stages": c.num_stages,
        }


def run_all(launches: Sequence[Launch]) -> None:
    """Launch in order."""
    for launch in launches:
        launch.run()


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
    kernel = "states" if inputs.logs[1] <= 1 else "vector_states"

    def build(options: dict[str, Any]) -> tuple[list[Launch], Tensor, Tensor]:
        return _scan_launches(inputs, a, x, weight, d_den, initial, scale, backward, options)

    return build(inputs.options(kernel, lambda options: build(options)[0]))


def _scan_launches(
    inputs: Inputs,
    a: Tensor,
    x: Tensor,
    weight: Tensor | None,
    d_den: Tensor | None,
    initial: Tensor | None,
    scale: float,
    backward: bool,
    options: dict[str, Any],
) -> tuple[list[Launch], Tensor, Tensor]:
    bh, chunks, size = x.shape[0] * x.shape[1], inputs.chunks, inputs.state_size
    decays = dict(zip(("LOGS_K", "LOGS"), inputs.logs, strict=True))
    options = options | decays | {"BACKWARD": backward}
    tiles = triton.cdiv(options["D"], options["BK"]) * triton.cdiv(options["DV"], options["BV"])
    per_segment = segment_length(chunks, bh * tiles, inputs.target.processors)
    segments = triton.cdiv(chunks, per_segment)
    gated = decays["LOGS"] > 0 and segments > 1
    states, ends, logs, end_logs = (
        x.new_empty(bh, *shape, dtype=torch.float32)
        for shape in ((chunks, size), (segments, size), (chunks, decays["LOGS"]), (segments, decays["LOGS"]))
    )
    args = (
        *strided(a, x, inputs.g, inputs.gv, weight),
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
    kept = {name: options[name] for name in ("D", "DV", "E", "LOGS_K", "LOGS", "BACKWARD")}
    options = kept | {"BE": 1024, "num_warps": 4}
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

    def build(options: dict[str, Any]) -> list[Launch]:
        programs = v.shape[0] * v.shape[1] * inputs.chunks * triton.cdiv(v.shape[-1], options["BV"])
        options = options | {"EPS_ADD": settings.eps_mode == "add"}
        return [Launch(output_kernel, (programs,), args, options)]

    (launch,) = build(inputs.options("output", build))
    return launch, o, den


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
    v = inputs.v
    filled = empty_gradients(inputs, need_dg, need_dbeta)
    args = (
        *strided(inputs.q, inputs.k, v, inputs.g, inputs.beta, do),
        *(inverse, d_den, states, d_states, *filled, *inputs.sizes(), inputs.settings.scale),
    )

    def build(options: dict[str, Any]) -> list[Launch]:
        return [Launch(gradient_kernel, (v.shape[0] * v.shape[1] * inputs.chunks,), args, options)]

    (launch,) = build(inputs.options("gradient", build))
    return launch, filled


def empty_gradients(
    inputs: Inputs, need_dg: bool, need_dbeta: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dg, dbeta to be filled; dq and dk per head of v, in fp32 where a group sums them."""
    q, v = inputs.q, inputs.v
    dtype = q.dtype if q.shape[1] == v.shape[1] else torch.float32
    dq, dk = (q.new_empty(*v.shape[:3], q.shape[-1], dtype=dtype) for _ in range(2))
    dg = v.new_empty(inputs.g.shape, dtype=torch.float32) if need_dg and inputs.g is not None else None
    dbeta = v.new_empty(v.shape[:3], dtype=torch.float32) if need_dbeta else None
    return dq, dk, v.new_empty(v.shape), dg, dbeta
