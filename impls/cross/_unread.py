"""Gradients of zero for inputs that an output does not depend on smoothly: choices, placeholders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Unread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, *unread: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in unread]
        return o.view_as(o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        wanted = ctx.needs_input_grad[1:]
        return (do, *(x if needed else None for x, needed in zip(zeros, wanted, strict=True)))


def with_zero_gradient(o: Tensor, *unread: Tensor) -> Tensor:
    """Return o with the gradient zero, and not none, for each of ``unread``.

    What an arg-max was taken over has derivative zero wherever it has one; an optimiser, a harness or
    ``torch.autograd.grad`` asking for it should get that, and not an error about an unused tensor.
    """
    o_with_grad: Tensor = _Unread.apply(o, *unread)
    return o_with_grad
