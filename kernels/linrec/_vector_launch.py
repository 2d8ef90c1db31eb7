"""Launches of the kernels for gates that differ over a dimension, and their autograd function."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._tiles import Launch, addressable, row_terms, strided, target
from attnbench.kernels.linrec._launch import (
    Inputs,
    Settings,
    empty_gradients,
    run_all,
    state_gradients,
    states,
)
from attnbench.kernels.linrec._vector import vector_output_kernel, vector_scores_kernel
from attnbench.kernels.linrec._vector_gradients import vector_gradient_kernel


def vector_scores(inputs: Inputs) -> tuple[Launch, Tensor]:
    """The launch that fills P = φ(q) φ(k)ᵀ under g, (B·H, NT, L, L) in fp32, 0 for s after r."""
    return _scores(inputs, inputs.q, inputs.k, inputs.g, inputs.settings.feature_map)


def _scores(
    inputs: Inputs, a: Tensor, b: Tensor, g: Tensor | None, feature_map: str
) -> tuple[Launch, Tensor]:
    heads, chunk = inputs.v.shape[0] * inputs.v.shape[1], inputs.settings.chunk
    scores = a.new_empty(heads, inputs.chunks, chunk, chunk, dtype=torch.float32)
    _, _, n, chunks = inputs.sizes()
    args = (*strided(a, b, g), scores, inputs.v.shape[1], a.shape[1], n, chunks)

    def build(options: dict[str, Any]) -> list[Launch]:
        kept = {name: value for name, value in options.items() if name not in ("DV", "E", "BV")}
        return [Launch(vector_scores_kernel, (heads * chunks,), args, kept | {"FEATURE": feature_map})]

    (launch,) = build(inputs.options("vector_scores", build, (a.shape[-1], b.shape[-1])))
    return launch, scores


def vector_outputs(inputs: Inputs, scores: Tensor, before: Tensor) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch that fills o (B, H, N, Dv), and den (B, H, N) in fp32 when normalised."""
    v, settings = inputs.v, inputs.settings
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    den = v.new_empty(v.shape[:3], dtype=torch.float32) if settings.normalize else None
    args = (
        *strided(inputs.q, v, inputs.g, inputs.gv, inputs.beta),
        *(scores, before, o, den, *inputs.sizes(), settings.scale, settings.eps),
    )

    def build(options: dict[str, Any]) -> list[Launch]:
        programs = before.shape[0] * before.shape[1] * triton.cdiv(v.shape[-1], options["BV"])
        options = options | {"EPS_ADD": settings.eps_mode == "add"}
        return [Launch(vector_output_kernel, (programs,), args, options)]

    (launch,) = build(inputs.options("vector_output", build))
    return launch, o, den


def vector_gradients(
    inputs: Inputs,
    do: Tensor,
    scores: Tensor,
    inverse: Tensor | None,
    d_den: Tensor | None,
    before: Tensor,
    d_before: Tensor,
    need_dg: bool,
    need_dbeta: bool,
    need_dgv: bool,
) -> tuple[list[Launch], tuple[Tensor | None, ...], Tensor | None]:
    """Launches that fill dq, dk, dv, dg, the parts of dbeta by tiles of Dk (tiles, B, H, N), and dgv."""
    q, k, v, g, gv, settings = inputs.q, inputs.k, inputs.v, inputs.g, inputs.gv, inputs.settings
    dk_size, dv_size, feature = q.shape[-1], v.shape[-1], settings.feature_map
    first, d_scores = _scores(inputs, do, v, gv, "identity")
    dq, dk, dv, dg, _ = empty_gradients(inputs, need_dg, need_dbeta=False)
    dgv = v.new_empty(v.shape, dtype=torch.float32) if need_dgv else None
    heads, groups, n, chunks = inputs.sizes()
    scale = 1.0 if settings.normalize else settings.scale

    def launch(
        options: dict[str, Any],
        tensors: tuple[Tensor | None, ...],
        normalizer: Tensor | None,
        square: tuple[Tensor, Tensor | None],
        filled: tuple[Tensor | None, ...],
        sides: tuple[int, int],
    ) -> Launch:
        options = {"DX" if name == "DV" else name: value for name, value in options.items()}
        args = (*strided(*tensors, inputs.beta), inverse, normalizer, *square, before, d_before)
        args += (*filled, heads, *sides, n, chunks, scale)
        programs = before.shape[0] * chunks * triton.cdiv(options["D"], options["BK"])
        return Launch(vector_gradient_kernel, (programs,), args, options)

    def keys(options: dict[str, Any]) -> tuple[Launch, Tensor | None]:
        parts = triton.cdiv(dk_size, options["BK"])
        dbeta = v.new_empty(parts, *v.shape[:3], dtype=torch.float32) if need_dbeta else None
        options = options | {"FEATURE_X": "identity", "SD": dv_size, "SX": 1}
        tensors, filled = (q, k, do, v, g, gv), (dq, dk, dg, dbeta)
        return launch(options, tensors, d_den, (d_scores, scores), filled, (groups, heads)), dbeta

    def values(options: dict[str, Any]) -> Launch:
        options = options | {"FEATURE": "identity", "FEATURE_X": feature, "SD": 1, "SX": dv_size}
        tensors, filled = (do, v, q, k, gv, g), (None, dv, dgv, None)
        return launch(options, tensors, None, (scores, None), filled, (heads, groups))

    second, dbeta = keys(inputs.options("vector_gradient", lambda options: [keys(options)[0]]))
    dims = dv_size, dk_size
    third = values(inputs.options("vector_gradient", lambda options: [values(options)], dims))
    launches = [first, second, third]
    return launches, (dq, dk, dv, dg, dbeta), dgv


class VectorGates(torch.autograd.Function):
    """o (B, H, N, Dv) and the final flat state (B·H, E) under vector gates; gradients through both."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        gv: Tensor | None,
        beta: Tensor | None,
        initial: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        """Scores and states, then outputs."""
        inputs = Inputs(q, k, v, g, beta, settings, target(q.device), gv)
        first, scores = vector_scores(inputs)
        launches, before, final = states(inputs, initial)
        output, o, den = vector_outputs(inputs, scores, before)
        run_all((first, *launches, output))
        ctx.save_for_backward(q, k, v, g, gv, beta, initial, o if settings.normalize else None, den)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scores and states again and their gradients, then both sides of every chunk."""
        q, k, v, g, gv, beta, initial, o, den = ctx.saved_tensors
        settings = ctx.settings
        inputs = Inputs(q, k, v, g, beta, settings, target(q.device), gv)
        do = torch.zeros_like(v) if do is None else addressable(do)
        d_final = None if d_final is None else d_final.contiguous()
        first, scores = vector_scores(inputs)
        launches, before, _ = states(inputs, initial)
        inverse = d_den = None
        if settings.normalize:
            launch, inverse, d_den = row_terms(o, do, den, settings.eps, settings.eps_mode)
            launches.append(launch)
        more, d_before, d_initial = state_gradients(inputs, do, inverse, d_den, d_final)
        need_g, need_gv, need_beta, need_initial = ctx.needs_input_grad[3:7]
        last, filled, dgv = vector_gradients(
            inputs, do, scores, inverse, d_den, before, d_before, need_g, need_beta, need_gv
        )
        run_all((first, *launches, *more, *last))
        *others, dbeta = filled
        dbeta = None if dbeta is None else dbeta.sum(0)
        dq, dk, dv, dg, dbeta = inputs.to_inputs([*others, dbeta])
        dgv = None if dgv is None or gv is None else dgv.to(gv.dtype)
        return dq, dk, dv, dg, dgv, dbeta, d_initial if need_initial else None, None
