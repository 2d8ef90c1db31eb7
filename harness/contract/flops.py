"""The check of stated FLOPs against torch's counter."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from attnbench.harness.contract.instance import Shape
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable
from attnbench.harness.contract.probe import Probe

TOLERANCE = 0.02


def flops_match_counter(probe: Probe) -> NotApplicable | None:
    """The FLOPs formula is within 2 % of what torch's FlopCounterMode counts for one batch element."""
    spec = probe.spec
    if not spec.flops_backend:
        return NotApplicable(f"Spec.flops_note: {spec.flops_note}")
    if probe.target.backend != spec.flops_backend:
        return NotApplicable(f"Spec.flops_backend is {spec.flops_backend}: counted there")
    for n, m in probe.cost_sizes():
        counted, stated = count(probe, n, m)
        if not abs(stated - counted) <= TOLERANCE * counted:
            raise CheckFailed(f"N, M = {n, m}: counted_flops() {stated}", f"{counted} as counted, within 2 %")
    return None


def count(probe: Probe, n: int, m: int) -> tuple[int, int]:
    """FLOPs of one batch element with N queries and M keys: as torch counts them, as the formula says."""
    instance = probe.build(Shape(n, m))
    counter = FlopCounterMode(display=False)
    with counter:
        instance()
    return counter.get_total_flops(), instance.module.cost("counted_flops", n, m, **instance.grids())


CHECKS = (flops_match_counter,)
