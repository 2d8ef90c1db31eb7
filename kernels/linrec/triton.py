"""The linear recurrence in Triton: chunk states, then outputs; both again in reverse for gradients.

Two kernels rather than one fused loop: all chunks of a head are computed at once, so that a few long
sequences fill a GPU. The states are recomputed in the backward pass; only inputs and o are kept for it.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._tiles import Launch, Target, addressable, row_terms, target
from attnbench.kernels.backends import Unsupported
from attnbench.kernels.linrec import State
from attnbench.kernels.linrec._launch import Inputs, Settings, gradients, outputs, state_gradients, states

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

    Raises Unsupported for a vector gate, ``gv``, a rule other than ``add``, head dims above 256, dtypes other
    than one of fp16, bf16, fp32 for q, k and v, and chunks other than 16, 32, 64. A decay inside a
    chunk is off by at most 2^-24 of the sum of that chunk's gates in log2; a reset (a gate below e^-104) is
    exact.
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
    o, final = LinRec.apply(*map(addressable, (q, k, v, g, beta)), initial, settings)
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
        for launch in (*launches, output):
            launch.run()
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
        last, (dq, dk, dv, dg, dbeta) = gradients(
            inputs, do, inverse, d_den, before, d_before, need_g, need_beta
        )
        for launch in (*launches, *more, last):
            launch.run()
        if q.shape[1] != v.shape[1]:
            dq, dk = (x.unflatten(1, (q.shape[1], -1)).sum(2).to(q.dtype) for x in (dq, dk))
        dg = dg.to(g.dtype) if need_g else None
        dbeta = dbeta.to(beta.dtype) if need_beta else None
        return dq, dk, dv, dg, dbeta, d_initial if need_initial else None, None


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, rule: str, chunk: int
) -> None:
    """Raise Unsupported for what the kernels do not compute."""
    if rule != "add":
        raise Unsupported("linrec/triton rule", repr(rule), "'add'")
    if gv is not None:
        raise Unsupported("linrec/triton gate gv", f"shape {tuple(gv.shape)}", "gv None")
    if g is not None and g.dim() == 4:
        raise Unsupported("linrec/triton gate g", f"shape {tuple(g.shape)}", "None, (H,) or (B, H, N)")
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
    """Every kernel of a forward and a backward pass at head dims 64, 128 and 256, in fp16 and bf16.

    Once with a gate and β and once normalised with a feature map.
    """
    from attnbench.kernels.aot import AotCase

    cases = []
    for dim, dtype, normalize in itertools.product(
        (64, 128, 256), (torch.float16, torch.bfloat16), (False, True)
    ):
        name = f"{'normalized' if normalize else 'gated'} Dv={dim}"
        for launch in _example_launches(dim, dtype, normalize, Target(capability, 132)):
            cases.append(AotCase(name, launch.kernel, launch.args, launch.options | {"grid": (1,)}))
    return cases


def _example_launches(dim: int, dtype: torch.dtype, normalize: bool, target: Target) -> list[Launch]:
    """What a forward and a backward pass launch for grouped heads and a length that no chunk divides."""
    b, groups, h, n = 2, 2, 4, 1000
    q, k = (torch.empty(b, groups, n, dim, dtype=dtype) for _ in range(2))
    v, steps = torch.empty(b, h, n, dim, dtype=dtype), torch.empty(b, h, n)
    settings = Settings("elu1" if normalize else "identity", 1.0, normalize, 1e-6, "add", False, 64)
    inputs = Inputs(q, k, v, *((None, None) if normalize else (steps, steps)), settings, target)
    forward, before, _ = states(inputs, None)
    output, o, den = outputs(inputs, before)
    rows, inverse, d_den = [], None, None
    if normalize:
        launch, inverse, d_den = row_terms(o, o, den, settings.eps, settings.eps_mode)
        rows.append(launch)
    backward, d_before, _ = state_gradients(inputs, o, inverse, d_den, None)
    gated = not normalize
    last, _ = gradients(inputs, o, inverse, d_den, before, d_before, need_dg=gated, need_dbeta=gated)
    return [*forward, output, *rows, *backward, last]
