"""The Triton backend of :func:`attnbench.kernels.query_softmax`: checks, autograd and cases to compile.

Where one tile holds all queries, one kernel reads keys and values once; beyond, a first kernel finds what
each key needs to know of all queries. The N×M map never exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._attention import check_tensors
from attnbench.kernels._tiles import Launch, Target, addressable, target
from attnbench.kernels.aot import AotCase
from attnbench.kernels.query_softmax._launch import Call, Settings


def query_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    hard: bool,
    normalize: bool,
    eps: float,
    eps_mode: str,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Compute o, mass and index with sums in fp32, and in an order that does not change.

    Raises Unsupported for another dtype, tensors of several dtypes or devices, or D or Dv beyond 256.
    """
    given = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    check_tensors("query_softmax", given)
    in_weights = eps_mode == "weight"
    settings = Settings(hard, normalize, eps if in_weights else 0.0, 0.0 if in_weights else eps, scale)
    if hard:
        q, k = q.detach(), k.detach()
    inputs = [None if x is None else addressable(x) for x in (q, k, v)]
    o, mass, index = _QuerySoftmax.apply(*inputs, mask, settings)
    return o, mass, index


class _QuerySoftmax(torch.autograd.Function):
    """o, mass and index of one call; gradients of o and mass in q, k and v, with ``hard`` of o in v."""

    @staticmethod
    def forward(ctx, q, k, v, mask, settings):
        call = Call(q, k, v, mask, settings, target(q.device))
        owner = call.empty_owner()
        splits, _ = call.splits("mix")
        shape = (*q.shape[:2], splits, q.shape[2])
        mass = torch.empty(shape, device=q.device, dtype=torch.float32)
        o = None
        if v is not None:
            dtype = q.dtype if splits == 1 else torch.float32
            o = torch.empty(*shape, v.shape[3], device=q.device, dtype=dtype)
        _run([*([] if call.whole else [call.owners(owner)]), call.mix(owner, o, mass)], q)
        if splits == 1:
            mass, o = mass.squeeze(2), None if o is None else o.squeeze(2)
        else:
            mass, o = mass.sum(2), None if o is None else o.sum(2)
            if o is not None:
                o = (o * _share(mass, settings).unsqueeze(-1)).to(q.dtype)
        index = owner if settings.hard else None
        if settings.hard:
            ctx.mark_non_differentiable(index, mass)
        ctx.save_for_backward(q, k, v, mask, owner, o if settings.normalize else None, mass)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return o, mass, index

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_mass, _):
        q, k, v, mask, owner, o, mass = ctx.saved_tensors
        settings = ctx.settings
        if do is None and d_mass is None:
            return (None,) * 5
        call = Call(q, k, v, mask, settings, target(q.device))
        d_num = None
        d_mass = torch.zeros_like(mass) if d_mass is None else d_mass
        if v is not None:
            d_num = torch.zeros(*mass.shape, v.shape[3], device=q.device) if do is None else do.float()
            share = _share(mass, settings).unsqueeze(-1)
            if settings.normalize and do is not None:
                d_mass = d_mass - (d_num * o).sum(-1) * share.squeeze(-1)
            d_num = (d_num * share).contiguous()
        d_mass = d_mass.contiguous()
        dv = None if v is None else torch.empty(v.shape, device=q.device, dtype=v.dtype)
        if settings.hard:
            _run([call.backward_kv(owner, d_num, d_mass, None, None, dv)], q)
            return None, None, dv, None, None
        dk = torch.empty(k.shape, device=q.device, dtype=k.dtype)
        delta = torch.empty(k.shape[:3], device=q.device, dtype=torch.float32)
        launches = [call.backward_kv(owner, d_num, d_mass, delta, dk, dv)]
        dq = None
        if ctx.needs_input_grad[0]:
            splits, _ = call.splits("backward_q")
            dtype = q.dtype if splits == 1 else torch.float32
            dq = torch.empty(*q.shape[:2], splits, *q.shape[2:], device=q.device, dtype=dtype)
            launches.append(call.backward_q(owner, d_num, d_mass, delta, dq))
        _run(launches, q)
        if dq is not None:
            dq = dq.squeeze(2) if dq.shape[2] == 1 else dq.sum(2).to(q.dtype)
        return dq, dk, dv, None, None


def _share(mass: Tensor, settings: Settings) -> Tensor:
    """What the sums are multiplied by: 1 / (mass + eps), 0 where that is 1/0, or 1."""
    if not settings.normalize:
        return torch.ones_like(mass)
    den = mass + settings.eps_mass
    return torch.where(den == 0, 0.0, 1.0 / den.masked_fill(den == 0, 1.0))


def _run(launches: list[Launch], q: Tensor) -> None:
    """Launch in order on the device of q."""
    with torch.cuda.device_of(q):
        for launch in launches:
            if launch.grid[0]:
                launch.kernel[launch.grid](*launch.args, **launch.options)


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel: few queries in bf16 at the usual sizes, many in fp16 with a mask, and fp32."""
    cases = []
    for dtype, n, d, hard in (
        (torch.bfloat16, 8, 64, False),
        (torch.bfloat16, 100, 128, False),
        (torch.bfloat16, 128, 256, True),
        (torch.float16, 1000, 128, False),
        (torch.float32, 8, 64, False),
    ):
        q, k = torch.empty(2, 2, n, d, dtype=dtype), torch.empty(2, 2, 1000, d, dtype=dtype)
        mask = torch.zeros(2, 2, n, 1000, dtype=torch.bool) if dtype is torch.float16 else None
        settings = Settings(hard, True, 1e-8, 0.0, 0.1)
        call = Call(q, k, k, mask, settings, Target(capability, 132))
        name = f"{'arg-max' if hard else 'softmax'} of {n}"
        for launch in _example_launches(call):
            cases.append(AotCase(name, launch.kernel, launch.args, launch.options | {"grid": (1,)}))
    return cases


def _example_launches(call: Call) -> list[Any]:
    """What a forward and a backward pass of the call launch."""
    owner, rows = call.empty_owner(), torch.empty(call.q.shape[:3])
    wide = torch.empty(*rows.shape, call.dv)
    launches = [] if call.whole else [call.owners(owner)]
    launches += [call.mix(owner, call.q, rows), call.backward_kv(owner, wide, rows, rows, call.k, call.k)]
    return launches if call.settings.hard else [*launches, call.backward_q(owner, wide, rows, rows, call.q)]
