"""Noncausal linear attention in Triton: partial sums over the keys, then one product per query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._tiles import Launch, Target, addressable, row_terms, target
from attnbench.kernels.backends import Unsupported
from attnbench.kernels.kv_reduce._launch import Problem, Settings

if TYPE_CHECKING:
    from attnbench.kernels.aot import AotCase


def kv_reduce(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    eps_mode: str,
    key_mask: Tensor | None,
) -> Tensor:
    """Compute with the feature map and the division inside the kernels, and sums in fp32.

    Products take operands in the input dtype. Deterministic: every part of the keys has its own partial sum.
    Raises Unsupported for head dims above 256 and for dtypes other than one of fp16, bf16, fp32 for q, k, v.
    """
    if max(q.shape[-1], v.shape[-1]) > 256:
        raise Unsupported("kv_reduce/triton head dims", f"D={q.shape[-1]}, Dv={v.shape[-1]}", "at most 256")
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        raise Unsupported(
            "kv_reduce/triton dtypes of q, k, v",
            ", ".join(sorted(map(str, dtypes))),
            "one of float16, bfloat16, float32",
        )
    settings = Settings(feature_map, scale, normalize, eps, eps_mode)
    return KVReduce.apply(*map(addressable, (q, k, v)), key_mask, settings)


class KVReduce(torch.autograd.Function):
    """o (B, H, N, Dv) of one call. The sums are kept for the backward pass, the features never exist."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, settings: Settings
    ) -> Tensor:
        """Sum over the keys, then read."""
        problem = Problem(q.shape[-1], v.shape[-1], settings, target(q.device))
        o = q.new_empty(*q.shape[:3], problem.dv)
        den = q.new_empty(q.shape[:3], dtype=torch.float32) if settings.normalize else None
        launch, parts = problem.sums(k, v, key_mask, None, None, 1.0)
        launch.run()
        sums = parts.sum(1)
        problem.read(q, None, sums, o, den, settings.scale).run()
        ctx.save_for_backward(q, k, v, key_mask, sums, o if settings.normalize else None, den)
        ctx.problem = problem
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        """The same sums and reads with the roles of queries and keys exchanged."""
        q, k, v, key_mask, sums, o, den = ctx.saved_tensors
        problem, settings, do = ctx.problem, ctx.problem.settings, addressable(do)
        inverse = d_den = None
        scale = settings.scale
        if settings.normalize:
            launch, inverse, d_den = row_terms(o, do, den, settings.eps, settings.eps_mode)
            launch.run()
            scale = 1.0
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        problem.feature_gradient(do, q, None, inverse, d_den, sums, dq, scale).run()
        launch, parts = problem.sums(q, do, None, inverse, d_den, scale)
        launch.run()
        d_sums = parts.sum(1)
        problem.feature_gradient(v, k, key_mask, None, None, d_sums, dk, 1.0).run()
        problem.read(k, key_mask, d_sums, dv, None, 1.0).run()
        return dq, dk, dv, None, None


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel at the usual sizes: normalised, with feature map and key mask, and as plain products."""
    from attnbench.kernels.aot import AotCase

    cases = []
    for dim, dtype, normalize in (
        (64, torch.bfloat16, False),
        (128, torch.bfloat16, True),
        (256, torch.bfloat16, False),
        (64, torch.float16, True),
        (128, torch.float32, False),
    ):
        name = f"{'normalized' if normalize else 'plain'} Dv={dim}"
        for launch in _example_launches(dim, dtype, normalize, Target(capability, 132)):
            cases.append(AotCase(name, launch.kernel, launch.args, launch.options | {"grid": (1,)}))
    return cases


def _example_launches(dim: int, dtype: torch.dtype, normalize: bool, target: Target) -> list[Launch]:
    """What a forward and a backward pass launch for a length that no tile divides, no kernel twice."""
    q, k, v, o = (torch.empty(2, 4, 1000, dim, dtype=dtype) for _ in range(4))
    settings = Settings("elu1" if normalize else "identity", 1.0, normalize, 1e-6, "add")
    mask = torch.zeros(2, 1000, dtype=torch.bool) if normalize else None
    den = torch.empty(2, 4, 1000) if normalize else None
    problem = Problem(dim, dim, settings, target)
    rows, inverse, d_den = [], None, None
    if normalize:
        launch, inverse, d_den = row_terms(o, o, den, settings.eps, settings.eps_mode)
        rows.append(launch)
    forward, parts = problem.sums(k, v, mask, None, None, 1.0)
    backward, _ = problem.sums(q, o, None, inverse, d_den, 1.0)
    sums = parts[:, 0]
    launches = [
        forward,
        problem.read(q, None, sums, o, den, 1.0),
        *rows,
        problem.feature_gradient(o, q, None, inverse, d_den, sums, q, 1.0),
    ]
    if not normalize:
        return launches  # the backward pass launches the same kernels on other tensors
    return [
        *launches,
        backward,
        problem.feature_gradient(v, k, mask, None, None, sums, k, 1.0),
        problem.read(k, mask, sums, v, None, 1.0),
    ]
