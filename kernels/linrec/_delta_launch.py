"""Launches of the delta rule's kernels, and the autograd function that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._tiles import Launch, addressable, strided, target
from attnbench.kernels.linrec._delta import delta_states_kernel, inverse_kernel
from attnbench.kernels.linrec._delta_gradients import (
    delta_gradient_kernel,
    delta_local_kernel,
    delta_state_gradients_kernel,
)
from attnbench.kernels.linrec._launch import Inputs, Settings, empty_gradients, outputs, run_all


def delta_states(
    inputs: Inputs, initial: Tensor | None
) -> tuple[list[Launch], Tensor, Tensor, Inputs, Tensor]:
    """Launches that fill T (B·H, NT, L, L), the states before every chunk and the final one, and the writes.

    The writes come as the v, without β, of inputs whose outputs under ``add`` are those of the delta rule.
    """
    k, v, chunk = inputs.k, inputs.v, inputs.settings.chunk
    heads = v.shape[0] * v.shape[1]
    inverse = k.new_empty(heads, inputs.chunks, chunk, chunk)
    before = v.new_empty(heads, inputs.chunks, inputs.state_size, dtype=torch.float32)
    final = v.new_empty(heads, inputs.state_size, dtype=torch.float32)
    written = v.new_empty(v.shape)
    sides = strided(inputs.g, inputs.beta)
    args = (*strided(k), *sides, inverse, *inputs.sizes())
    first = _tuned(inputs, "inverse", inverse_kernel, args, _per_chunk)
    args = (*strided(k, v), *sides, inverse, initial, before, written, final, *inputs.sizes())
    second = _tuned(inputs, "delta_states", delta_states_kernel, args, _per_column)
    return [first, second], before, final, replace(inputs, v=written, beta=None), inverse


def _tuned(
    inputs: Inputs,
    name: str,
    kernel: Any,
    args: tuple[Any, ...],
    programs: Callable[[Inputs, dict[str, Any]], int],
) -> Launch:
    """The launch of ``kernel`` with the tiles that stand, or were tuned, under ``name``."""

    def build(options: dict[str, Any]) -> list[Launch]:
        return [Launch(kernel, (programs(inputs, options),), args, options)]

    (launch,) = build(inputs.options(name, build))
    return launch


def _per_chunk(inputs: Inputs, options: dict[str, Any]) -> int:
    return inputs.v.shape[0] * inputs.v.shape[1] * inputs.chunks


def _per_column(inputs: Inputs, options: dict[str, Any]) -> int:
    return inputs.v.shape[0] * inputs.v.shape[1] * -(-options["DV"] // options["BV"])


def delta_gradients(
    inputs: Inputs,
    do: Tensor,
    written: Tensor,
    inverse: Tensor,
    before: Tensor,
    d_final: Tensor | None,
    need_dg: bool,
    need_dbeta: bool,
) -> tuple[list[Launch], tuple[Tensor | None, ...]]:
    """Launches that fill dq, dk, dv, dg, dbeta and the gradient of the initial state, after the states'."""
    q, k, v, scale = inputs.q, inputs.k, inputs.v, inputs.settings.scale
    adjoint = v.new_empty(v.shape)
    d_states, d_initial = torch.empty_like(before), torch.empty_like(before[:, 0])
    args = (*strided(q, k, inputs.g, do), adjoint, *inputs.sizes(), scale)
    local = _tuned(inputs, "delta_local", delta_local_kernel, args, _per_chunk)
    args = (
        *strided(q, k, inputs.g, inputs.beta, do),
        *(inverse, d_final, adjoint, d_states, d_initial, *inputs.sizes(), scale),
    )
    back = _tuned(inputs, "delta_state_gradients", delta_state_gradients_kernel, args, _per_column)
    gradients = empty_gradients(inputs, need_dg, need_dbeta)
    args = (
        *strided(q, k, v, inputs.g, inputs.beta, do),
        *(written, adjoint, before, d_states, *gradients, *inputs.sizes(), scale),
    )
    last = _tuned(inputs, "delta_gradient", delta_gradient_kernel, args, _per_chunk)
    return [local, back, last], (*gradients, d_initial)


class DeltaRule(torch.autograd.Function):
    """o (B, H, N, Dv) and the final flat state (B·H, E) under the delta rule; gradients through both."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor | None,
        initial: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        """Inverses, then states and writes, then outputs."""
        inputs = Inputs(q, k, v, g, beta, settings, target(q.device))
        launches, before, final, written, _ = delta_states(inputs, initial)
        output, o, _ = outputs(written, before)
        run_all((*launches, output))
        ctx.save_for_backward(q, k, v, g, beta, initial)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        """The states and writes again, their gradients, then every chunk's inputs."""
        q, k, v, g, beta, initial = ctx.saved_tensors
        inputs = Inputs(q, k, v, g, beta, ctx.settings, target(q.device))
        do = torch.zeros_like(v) if do is None else addressable(do)
        d_final = None if d_final is None else d_final.contiguous()
        need_g, need_beta, need_initial = ctx.needs_input_grad[3:6]
        launches, before, _, written, inverse = delta_states(inputs, initial)
        more, gradients = delta_gradients(inputs, do, written.v, inverse, before, d_final, need_g, need_beta)
        run_all((*launches, *more))
        *per_step, d_initial = gradients
        return *inputs.to_inputs(per_step), d_initial if need_initial else None, None
