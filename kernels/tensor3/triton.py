"""The Triton backend of :func:`attnbench.kernels.tensor3`: checks, autograd and cases to compile.

One online softmax over all pairs of keys, and backward kernels that compute the scores again: neither the
scores nor the M1·M2 products of keys are ever stored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._attention import check_tensors
from attnbench.kernels._tiles import Launch, Target, addressable, target
from attnbench.kernels.aot import AotCase
from attnbench.kernels.tensor3._launch import Call, KeySet, empty_rows


def tensor3(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    causal: bool,
    scale: float,
    mask1: Tensor | None,
    mask2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse in B·H·N·(Dv + 2) memory; products q ∘ k1 are rounded to the input dtype.

    Raises Unsupported for another dtype, tensors of several dtypes or devices, or D or Dv beyond 256.
    """
    tensors = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    check_tensors("tensor3", tensors)
    return _Tensor3.apply(*map(addressable, tensors.values()), mask1, mask2, causal, scale)


class _Tensor3(torch.autograd.Function):
    """o and lse of one call, and the gradients of q, k1, k2, v1 and v2."""

    @staticmethod
    def forward(ctx, q, k1, k2, v1, v2, mask1, mask2, causal, scale):
        call = _call(q, k1, k2, v1, v2, mask1, mask2, causal, scale)
        o = torch.empty(*q.shape[:3], v1.shape[3], device=q.device, dtype=q.dtype)
        lse, lse_log2 = empty_rows(q), empty_rows(q)
        _run(call.forward(o, lse, lse_log2))
        ctx.save_for_backward(q, k1, k2, v1, v2, mask1, mask2, o, lse_log2)
        ctx.options = causal, scale
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_lse):
        *inputs, o, lse_log2 = ctx.saved_tensors
        q, k1, k2, v1, v2 = inputs[:5]
        if do is None and d_lse is None:
            return (None,) * 9
        call = _call(*inputs, *ctx.options)
        do = torch.zeros_like(o) if do is None else addressable(do)
        delta = (do.float() * o.float()).sum(-1)
        if d_lse is not None:
            delta = delta - d_lse
        grads = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k1, k2, v1, v2)]
        dq, dk1, dk2, dv1, dv2 = grads
        needs = ctx.needs_input_grad
        if needs[0]:
            _run(call.backward_q(do, lse_log2, delta, dq))
        if needs[1] or needs[3]:
            _run(call.backward_set(False, do, lse_log2, delta, dk1, dv1))
        if needs[2] or needs[4]:
            _run(call.backward_set(True, do, lse_log2, delta, dk2, dv2))
        return *(grad if need else None for grad, need in zip(grads, needs, strict=False)), *(None,) * 4


def _call(q, k1, k2, v1, v2, mask1, mask2, causal: bool, scale: float) -> Call:
    return Call(q, KeySet(k1, v1, mask1), KeySet(k2, v2, mask2), causal, scale, target(q.device))


def _run(launch: Launch) -> None:
    if launch.grid[0]:
        launch.run()


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel at the usual sizes in bf16, in fp16 causal with masks, and in fp32."""
    cases = []
    for dtype, d, causal in (
        (torch.bfloat16, 64, False),
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 256, False),
        (torch.float16, 128, True),
        (torch.float32, 64, False),
    ):
        q, k = torch.empty(1, 2, 200, d, dtype=dtype), torch.empty(1, 2, 250, d, dtype=dtype)
        mask = torch.zeros(1, 250, dtype=torch.bool) if causal else None
        keys, rows = KeySet(k, k, mask), torch.empty(1, 2, 200)
        call = Call(q, keys, keys, causal, 0.1, Target(capability, 132))
        for launch in (
            call.forward(q, rows, rows),
            call.backward_q(q, rows, rows, q),
            call.backward_set(False, q, rows, rows, k, k),
        ):
            name = "causal with masks" if causal else "full"
            cases.append(AotCase(name, launch.kernel, launch.args, launch.options | {"grid": (1,)}))
    return cases
