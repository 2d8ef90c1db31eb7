"""Checks of the backends and of gradients against the reference in fp64.

The yard-stick is the reference in the dtype under test: an output may be off by twice what a plain
implementation is off by, a gradient by three times (:mod:`attnbench.harness.accuracy`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from attnbench.harness.accuracy import gate
from attnbench.harness.contract.instance import Shape
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable
from attnbench.harness.contract.probe import LIMITS, Probe, Size
from attnbench.harness.contract.shapes import HARD_SCALE
from attnbench.kernels.backends import available

VANISHING = 1e-12
"""A gradient in fp64 this small beside the largest one is zero in exact arithmetic."""

LONG = 130
"""A length beyond one tile of 128 and two chunks of 64."""


def _sizes(probe: Probe) -> Sequence[Size]:
    """The pattern's sizes and a long one."""
    return (*probe.sizes(), (LONG, LONG + 15) if probe.crossed else (LONG, LONG))


def _no_reference(probe: Probe) -> NotApplicable | None:
    if probe.target.backend == "reference":
        return NotApplicable("the reference backend is the definition itself")
    if "reference" not in probe.target.mechanism.backends(probe.target.pattern):
        return NotApplicable("Spec.backends has no reference to compare with")
    return None


def agrees_with_reference(probe: Probe) -> NotApplicable | None:
    """The fp32 output is within twice the error of the fp32 reference, measured from the fp64 reference."""
    other = _no_reference(probe)
    if other is not None:
        return other

    def check(size: Size) -> None:
        instance = probe.build(Shape(*size, batch=_batch(probe, size)), dtype=torch.float32)
        truth, yard = (probe.as_reference(instance, d)() for d in (torch.float64, torch.float32))
        _gated([instance()], [truth], [yard], size)

    sizes = _sizes(probe)
    few = (probe.sizes()[0], probe.sizes()[-1])
    probe.served(probe.fewer(sizes, few, "N, M"), check, "N, M")
    return None


def _batch(probe: Probe, size: Size) -> int:
    """Two batch elements; one where the programs of a second cost seconds and show nothing new."""
    return 1 if size[0] == LONG or (probe.slow and size == probe.sizes()[-1]) else 2


def agrees_in_half(probe: Probe) -> NotApplicable | None:
    """The fp16 and bf16 outputs are within twice the error of the reference in the same dtype."""
    other = _no_reference(probe)
    if other is not None:
        return other
    size = probe.sizes()[-1]
    served = [
        dtype
        for dtype in (torch.float16, torch.bfloat16)
        if available(probe.target.backend, probe.target.device, dtype)
    ]
    if not served:
        return NotApplicable(f"backend {probe.target.backend} serves neither fp16 nor bf16 here")

    def check(dtype: torch.dtype) -> None:
        instance = probe.build(Shape(*size), dtype=dtype)
        truth, yard = (probe.as_reference(instance, d)() for d in (torch.float64, dtype))
        _gated([instance()], [truth], [yard], size)

    probe.served(served, check, "dtype")
    return None


def gradients_agree(probe: Probe) -> NotApplicable | None:
    """fp32 gradients of all inputs are within three times the error of those of the fp32 reference."""
    other = _no_reference(probe)
    if other is not None:
        return other

    def check(size: Size) -> None:
        instance = probe.build(Shape(*size, batch=_batch(probe, size)), dtype=torch.float32)
        output = instance()
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        upstream = upstream.to(output.device)
        truth, yard = (
            probe.as_reference(instance, d).gradients(upstream) for d in (torch.float64, torch.float32)
        )
        _gated(*_substantial(instance.gradients(upstream), truth, yard, size), size)

    sizes = _sizes(probe)
    probe.served(probe.fewer(sizes, probe.sizes()[-1:], "N, M"), check, "N, M")
    return None


def gradcheck(probe: Probe) -> NotApplicable | None:
    """fp64 gradients of the reference equal finite differences."""
    if probe.target.backend != "reference":
        return NotApplicable("finite differences are taken on the reference backend")
    n, m = (3, 4) if probe.crossed else (4, 4)
    instance = probe.build(Shape(n, m), dtype=torch.float64)
    try:
        torch.autograd.gradcheck(instance.differentiable, instance.leaves(), fast_mode=True)
    except GradcheckError as error:
        raise CheckFailed(" ".join(str(error).split()), "gradients equal to finite differences") from None
    return None


def finite_gradients(probe: Probe) -> None:
    """Input gradients stay finite with queries 30 times larger, with one token and with zero inputs."""
    n, m = probe.sizes()[1]
    instance = probe.build(Shape(n, m), dtype=torch.float32)
    hard = instance.changed((0,), lambda x: x * HARD_SCALE)
    zero = instance.changed(range(instance.mains), torch.zeros_like)
    one = probe.build(Shape(*probe.sizes()[0]), dtype=torch.float32)
    for inputs, base, when in (
        (hard, instance, f"first input times {HARD_SCALE:g}"),
        (zero, instance, "zero inputs"),
        (one.inputs, one, "one token"),
    ):
        gradients = replace(base, inputs=inputs).gradients()[1:]
        for i, gradient in zip(base.differentiated, gradients, strict=True):
            bad = int((~gradient.isfinite()).sum())
            if bad:
                raise CheckFailed(
                    f"{bad} gradients of {base.slots[i].name} not finite at {when}", "finite gradients"
                )


def parameters_learn(probe: Probe) -> NotApplicable | None:
    """In training mode every parameter of the layer receives a finite gradient."""
    n, m = probe.sizes()[1]
    instance = probe.build(Shape(n, m), dtype=torch.float32, face="forward")
    instance.module.train()
    named = dict(instance.module.named_parameters())
    if not named:
        return NotApplicable("the layer has no parameter")
    instance.differentiable().square().sum().backward()
    missing = [name for name, p in named.items() if p.requires_grad and p.grad is None]
    if missing:
        raise CheckFailed(f"no gradient for {', '.join(missing)}", "a gradient for every parameter")
    bad = [name for name, p in named.items() if p.grad is not None and not p.grad.isfinite().all()]
    if bad:
        raise CheckFailed(f"gradient not finite for {', '.join(bad)}", "finite gradients")
    return None


def _substantial(
    got: Sequence[Tensor], truth: Sequence[Tensor], yard: Sequence[Tensor], size: Size
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The output and the gradients without those that vanish in exact arithmetic.

    With one key the softmax is 1 and the queries have no gradient: what is left is rounding, which has no
    relative error. CheckFailed where it is not small beside the other gradients either.
    """
    sizes = [x.double().square().mean().sqrt().item() for x in truth[1:]]
    vanishing = [i for i, rms in enumerate(sizes, start=1) if rms <= VANISHING * max(sizes)]
    for i in vanishing:
        largest = got[i].abs().max().item()
        if not largest <= LIMITS[torch.float32] * max(sizes):
            raise CheckFailed(f"N, M = {size}: gradient {i} up to {largest:.3g}", "0 up to rounding")
    kept = [i for i in range(len(truth)) if i not in vanishing]
    return [got[i] for i in kept], [truth[i] for i in kept], [yard[i] for i in kept]


def _gated(got: Sequence[Tensor], truth: Sequence[Tensor], yard: Sequence[Tensor], size: Size) -> None:
    """CheckFailed with the words of the correctness gate of measurements, when it refuses."""
    verdict = gate(got, got, truth, yard)
    if verdict.wrong:
        raise CheckFailed(f"N, M = {size}: {verdict.wrong}", "what the fp64 reference computes")


CHECKS = (
    agrees_with_reference,
    agrees_in_half,
    gradients_agree,
    gradcheck,
    finite_gradients,
    parameters_learn,
)
