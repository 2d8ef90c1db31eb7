"""The linear recurrence in Triton: chunk states, then outputs; both again in reverse for gradients.

Two kernels rather than one fused loop: all chunks of a head are computed at once, so that a few long
sequences fill a GPU. The states are recomputed in the backward pass; only inputs and o are kept for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._tiles import Target, addressable, row_terms, target
from attnbench.kernels.backends import Unsupported
from attnbench.kernels.linrec import State
from attnbench.kernels.linrec._delta_launch import DeltaRule
from attnbench.kernels.linrec._launch import (
    Inputs,
    Settings,
    gradients,
    outputs,
    run_all,
    state_gradients,
    states,
)
from attnbench.kernels.linrec._vector_launch import VectorGates

if TYPE_CHECKING:
    from attnbench.kernels.aot import AotCase


def linrec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None,
    gv: Tensor | None,
    beta: Tensor | None,
    rule: str,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    eps_mode: str,
    initial_state: State | None,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, State]:
    """Compute with products in the input dtype, accumulators, gates and states in fp32.

    Raises Unsupported for a vector gate or ``gv`` under the delta rule, head dims above 256, dtypes other
    than one of fp16, bf16, fp32 for q, k and v, and chunks other than 16, 32, 64. A decay of a scalar gate
    inside a chunk is off by at most 2^-24 of the sum of that chunk's gates in log2; a reset (a gate below
    e^-104) is exact. Under a vector gate or ``gv`` the L×L scores pass through memory in fp32, N·L·4 bytes a
    head, twice in the backward pass.
    """
    _check(q, k, v, g, gv, rule, chunk)
    b, h, _, dv = v.shape
    dk = q.shape[-1]
    if g is not None and g.dim() == 1:
        g = g.detach().view(1, h, 1).expand(v.shape[:3])
    initial = None
    if initial_state is not None:
        initial = initial_state.s.float().reshape(b * h, dk * dv)
        if normalize:
            z = initial.new_zeros(b * h, dk) if initial_state.z is None else initial_state.z.float()
            initial = torch.cat((initial, z.reshape(b * h, dk)), 1)
        initial = initial.contiguous()
    settings = Settings(feature_map, scale, normalize, eps, eps_mode, reverse, chunk)
    if gv is not None or (g is not None and g.dim() == 4):
        if g is not None and g.dim() == 3:
            g = g.unsqueeze(-1).expand(*g.shape, dk)
        o, final = VectorGates.apply(*map(addressable, (q, k, v, g, gv, beta)), initial, settings)
    else:
        function = DeltaRule if rule == "delta" else LinRec
        o, final = function.apply(*map(addressable, (q, k, v, g, beta)), initial, settings)
    s = final[:, : dk * dv].reshape(b, h, dk, dv)
    return o, State(s, final[:, dk * dv :].reshape(b, h, dk) if normalize else None)


class LinRec(torch.autograd.Function):
    """o (B, H, N, Dv) and the final flat state (B·H, E) of one call; gradients through both."""

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
        """States before every chunk, then outputs."""
        inputs = Inputs(q, k, v, g, beta, settings, target(q.device))
        launches, before, final = states(inputs, initial)
        output, o, den = outputs(inputs, before)
        run_all((*launches, output))
        ctx.save_for_backward(q, k, v, g, beta, initial, o if settings.normalize else None, den)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        """The states again and their gradients, then every chunk's inputs."""
        q, k, v, g, beta, initial, o, den = ctx.saved_tensors
        settings = ctx.settings
        inputs = Inputs(q, k, v, g, beta, settings, target(q.device))
        do = torch.zeros_like(v) if do is None else addressable(do)
        d_final = None if d_final is None else d_final.contiguous()
        launches, before, _ = states(inputs, initial)
        inverse = d_den = None
        if settings.normalize:
            launch, inverse, d_den = row_terms(o, do, den, settings.eps, settings.eps_mode)
            launches.append(launch)
        more, d_before, d_initial = state_gradients(inputs, do, inverse, d_den, d_final)
        need_g, need_beta, need_initial = ctx.needs_input_grad[3:6]
        last, filled = gradients(inputs, do, inverse, d_den, before, d_before, need_g, need_beta)
        run_all((*launches, *more, last))
        return *inputs.to_inputs(filled), d_initial if need_initial else None, None


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, rule: str, chunk: int
) -> None:
    """Raise Unsupported for what the kernels do not compute."""
    if rule == "delta" and gv is not None:
        raise Unsupported("linrec/triton gate gv under the delta rule", "gv given", "gv None")
    if rule == "delta" and g is not None and g.dim() == 4:
        observed = f"shape {tuple(g.shape)}"
        raise Unsupported("linrec/triton gate g under the delta rule", observed, "None, (H,) or (B, H, N)")
    if max(q.shape[-1], v.shape[-1]) > 256:
        raise Unsupported("linrec/triton head dims", f"Dk={q.shape[-1]}, Dv={v.shape[-1]}", "at most 256")
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        raise Unsupported(
            "linrec/triton dtypes of q, k, v",
            ", ".join(sorted(map(str, dtypes))),
            "one of float16, bfloat16, float32",
        )
    if chunk not in (16, 32, 64):
        raise Unsupported("linrec/triton chunk", chunk, "16, 32 or 64: a longer one leaves the registers")


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel of a forward and a backward pass, with all the gradients that a family of them has."""
    from attnbench.kernels.aot import AotCase
    from attnbench.kernels.linrec._examples import EXAMPLES, example_launches

    cases = []
    for family, dim, dtype, kernels in EXAMPLES:
        for launch in example_launches(family, dim, dtype, Target(capability, 132)):
            name = launch.kernel.fn.__name__.removesuffix("_kernel")
            if kernels is None or name in kernels:
                options = launch.options | {"grid": (1,)}
                cases.append(AotCase(f"{family} Dv={dim}", launch.kernel, launch.args, options))
    return cases
