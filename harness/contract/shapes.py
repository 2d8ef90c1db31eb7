"""Checks of what comes out at all: shapes, dtypes, finite numbers, and inputs left as they were."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.harness.contract.instance import Face, Instance, Shape
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable
from attnbench.harness.contract.probe import Probe, Size, same
from attnbench.impls.case import fold
from attnbench.kernels.backends import available

HARD_SCALE = 30.0
"""Multiplier of the queries that makes softmax nearly one-hot and an unstabilised exponential overflow."""


def _faces(probe: Probe) -> tuple[Face, ...]:
    return ("attend", "forward") if probe.face == "attend" else ("forward",)


def _well_formed(instance: Instance, output: Tensor) -> None:
    x, shape = instance.inputs[0], instance.shape
    expected: tuple[int, ...] = (shape.batch, shape.n, shape.width)
    if instance.face == "attend":
        expected = (shape.batch, shape.heads, shape.n, shape.value_dim)
    for what, got, want in (
        ("shape", tuple(output.shape), expected),
        ("dtype", output.dtype, x.dtype),
        ("device", output.device, x.device),
    ):
        if got != want:
            raise CheckFailed(f"{instance.face} at {shape}: {what} {got}", str(want))


def output_shape(probe: Probe) -> None:
    """The output of attend and of forward has the shape, dtype and device of the contract, at every size."""

    def check(size: Size) -> None:
        for face in _faces(probe):
            for dtype in probe.dtypes:
                instance = probe.build(Shape(*size, batch=2), dtype=dtype, face=face)
                _well_formed(instance, instance())

    probe.served(probe.fewer(probe.sizes(), probe.sizes()[:3], "N, M"), check, "N, M")


def other_widths(probe: Probe) -> None:
    """Values may be wider than keys unless Spec.square_heads; there may be fewer key than query heads."""
    n, m = probe.sizes()[1]

    def check(shape: Shape) -> None:
        for face in _faces(probe):
            if face == "attend" or shape.value_dim == shape.head_dim:
                instance = probe.build(shape, face=face)
                _well_formed(instance, instance())

    shapes = [Shape(n, m, batch=2, heads=4, kv_heads=2)]
    if probe.spec.square_heads:
        probe.note("Spec.square_heads: no wider values")
    else:
        shapes.append(Shape(n, m, batch=2, value_dim=12))
    probe.served(shapes, check, "shape")


def half_precision(probe: Probe) -> NotApplicable | None:
    """fp16 and bf16 inputs give finite outputs of their own dtype, where the backend serves them."""
    n, m = probe.sizes()[1]
    dtypes = [
        dtype
        for dtype in (torch.float16, torch.bfloat16)
        if available(probe.target.backend, probe.target.device, dtype)
    ]
    if not dtypes:
        return NotApplicable(f"backend {probe.target.backend} serves neither fp16 nor bf16 here")

    def check(dtype: torch.dtype) -> None:
        instance = probe.build(Shape(n, m), dtype=dtype)
        output = instance()
        _well_formed(instance, output)
        _finite(output, f"{dtype}")

    probe.served(dtypes, check, "dtype")
    return None


def finite_on_hard_inputs(probe: Probe) -> None:
    """Outputs stay finite with queries 30 times larger, with one token and with lengths nothing divides."""

    def check(size: Size) -> None:
        instance = probe.build(Shape(*size), dtype=torch.float32)
        _finite(instance(), f"N, M = {size}")
        hard = instance.changed((0,), lambda x: x * HARD_SCALE)
        _finite(instance(*hard), f"N, M = {size}, first input times {HARD_SCALE:g}")
        alike = instance.changed(range(instance.mains), torch.zeros_like)
        _finite(instance(*alike), f"N, M = {size}, all inputs zero")

    probe.served(probe.fewer(probe.sizes(), probe.sizes()[:2], "N, M"), check, "N, M")


def strided_inputs(probe: Probe) -> None:
    """Inputs with other strides (a transposed view) give the result of contiguous ones."""
    n, m = probe.sizes()[1]
    instance = probe.build(Shape(n, m))
    strided = tuple(
        x.transpose(1, -1).contiguous().transpose(1, -1) if x.dim() > 2 else x for x in instance.inputs
    )
    same(instance(*strided), instance(), "output on strided inputs")


def ignores_a_grid(probe: Probe) -> NotApplicable | None:
    """A mechanism on plain sequences takes the grid that its tokens lie on, and makes nothing of it."""
    if probe.spec.on_grid:
        return NotApplicable(f"Spec.grid_ranks {probe.spec.grid_ranks}")
    n, m = probe.sizes()[-1]
    for face in _faces(probe):
        instance = probe.build(Shape(n, m), face=face)
        same(instance(grid=fold(n, 2, (2,))), instance(), f"{face} with a grid")
    return None


def inputs_not_mutated(probe: Probe) -> None:
    """The call leaves its inputs as they were."""
    n, m = probe.sizes()[1]
    instance = probe.build(Shape(n, m))
    before = [x.clone() for x in instance.inputs]
    with torch.no_grad():
        instance.differentiable(*instance.inputs)
    for i, (x, old) in enumerate(zip(instance.inputs, before, strict=True)):
        if not torch.equal(x, old):
            moved = (x.double() - old.double()).abs().max().item()
            raise CheckFailed(
                f"input {instance.slots[i].name} changed by up to {moved:.3g}", "unchanged inputs"
            )


def _finite(output: Tensor, when: str) -> None:
    bad = int((~output.isfinite()).sum())
    if bad:
        raise CheckFailed(f"{bad} of {output.numel()} outputs not finite at {when}", "finite outputs")


CHECKS = (
    output_shape,
    other_widths,
    half_precision,
    finite_on_hard_inputs,
    strided_inputs,
    ignores_a_grid,
    inputs_not_mutated,
)
