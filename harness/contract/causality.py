"""Checks of causal self attention: nothing from the future, everything from the past."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.harness.contract.instance import Instance, Shape
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable
from attnbench.harness.contract.probe import Probe, same
from attnbench.impls.spec import Pattern

POSITIONS = (0, 1, 7, 15, 16, 17, 31, 32, 35, 47, 63, 64, 65, 100, 127, 128)
SLOW_POSITIONS = (0, 15, 16, 33, 63, 64, 127)
PASTS = (0, 2, 17)


def _not_causal_self(probe: Probe) -> NotApplicable | None:
    if probe.target.pattern is Pattern.CS:
        return None
    return NotApplicable(f"pattern {probe.target.pattern} is not causal self attention")


def _louder(tokens: Tensor) -> Tensor:
    """Other tokens, five times larger: a maximum over all tokens moves with them."""
    generator = torch.Generator().manual_seed(99)
    drawn = torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
    return 5.0 * drawn.to(tokens.device, tokens.dtype)


def _positions(probe: Probe, length: int) -> list[int]:
    return [p for p in probe.fewer(POSITIONS, SLOW_POSITIONS, "positions") if p < length - 1]


def strict_causality(probe: Probe) -> NotApplicable | None:
    """Other tokens after position i leave outputs up to i as they were, for many i and two lengths."""
    other = _not_causal_self(probe)
    if other is not None:
        return other
    if probe.spec.causality != "strict":
        return NotApplicable(f"Spec.causality is {probe.spec.causality}: see frozen_selection_causality")
    for length in probe.lengths():
        for dtype in probe.dtypes:
            instance = probe.build(Shape(length, length), dtype=dtype)
            _unmoved(probe, instance, length, {})
    return None


def frozen_selection_causality(probe: Probe) -> NotApplicable | None:
    """With the selection of the first inputs frozen, other tokens after i leave outputs up to i alone."""
    other = _not_causal_self(probe)
    if other is not None:
        return other
    if probe.spec.causality != "selection_leaky":
        return NotApplicable(f"Spec.causality is {probe.spec.causality}: see strict_causality")
    for length in probe.lengths():
        for dtype in probe.dtypes:
            instance = probe.build(Shape(length, length), dtype=dtype)
            _unmoved(probe, instance, length, {"selection": instance.selection()})
    return None


def _unmoved(probe: Probe, instance: Instance, length: int, options: dict[str, object]) -> None:
    before = instance(**options)
    for position in _positions(probe, length):
        after = instance(*instance.with_future(position, _louder), **options)
        kept = slice(0, position + 1)
        what = f"N = {length}: outputs 0..{position} after changing tokens {position + 1}..{length - 1}"
        same(after[..., kept, :], before[..., kept, :], what)


def accumulation(probe: Probe) -> NotApplicable | None:
    """Changing past values changes later outputs: a causal form that reads only its own token fails."""
    other = _not_causal_self(probe)
    if other is not None:
        return other
    length = probe.lengths()[0]
    instance = probe.build(Shape(length, length))
    before = instance()
    for position in PASTS:
        past = slice(0, position + 1)

        def other_past(x: Tensor, past: slice = past) -> Tensor:
            x[..., past, :] += 3.0
            return x

        after = instance(*instance.changed(instance.key_side[-1:], other_past))
        moved = (after - before)[..., position + 1 :, :].abs().max().item()
        if not moved > 1e-6 * before.abs().max().item():
            raise CheckFailed(
                f"outputs after {position} moved by {moved:.3g} when values 0..{position} changed by 3",
                "outputs that depend on past values",
            )
    return None


CHECKS = (strict_causality, frozen_selection_causality, accumulation)
