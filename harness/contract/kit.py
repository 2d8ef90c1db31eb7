"""Runs the checks on a target and turns whatever happens into outcomes: no check can stop the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from attnbench.errors import unknown_name
from attnbench.harness.contract import (
    algebra,
    causality,
    cross,
    declared,
    flops,
    gradients,
    padding,
    selection,
    shapes,
    state,
)
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable, Outcome, Status
from attnbench.harness.contract.probe import Probe, Target
from attnbench.kernels.backends import OWN, Unsupported, available


@dataclass(frozen=True)
class Check:
    """One check: its name, what it demands in a sentence, and the function that demands it.

    ``computes`` is False for a check that reads declarations only.
    """

    name: str
    sentence: str
    function: Callable[[Probe], NotApplicable | None]
    computes: bool = True


_COMPUTING = (shapes, causality, cross, algebra, padding, selection, gradients, flops, state)

ON_EVERY_RANK = {
    "output_shape",
    "finite_on_hard_inputs",
    "strict_causality",
    "frozen_selection_causality",
    "cc_poison",
    "query_separable",
    "row_sums",
    "exactness",
    "padding_is_unseen",
    "selection_is_attended",
    "agrees_with_reference",
    "gradients_agree",
    "gradcheck",
    "flops_match_counter",
}
"""Checks in which the shape of a grid counts: they run for every rank of grids, the others for the least."""

DIFFERENTIATING = {"gradcheck", "gradients_agree", "finite_gradients", "parameters_learn"}
"""Checks that need a backward pass."""

COMPARING = {"agrees_with_reference", "gradients_agree"}
"""Checks that compute with a backend whose own properties are not in question.

These are Triton in its interpreter, where every launch costs tens of milliseconds, and other libraries. The
reference passes all others on every rank of grids; these say that outputs and gradients are those of the
reference. On a GPU Triton is checked like our other backends."""


def checks() -> list[Check]:
    """Every check, in the order in which they run: declarations, then shapes, then what needs them right."""
    return [
        *(_check(function, computes=False) for function in declared.CHECKS),
        *(_check(function, computes=True) for module in _COMPUTING for function in module.CHECKS),
    ]


def run_kit(target: Target, only: Collection[str] | None = None) -> list[Outcome]:
    """Outcomes of all checks, or of those named in ``only``, on one target.

    A backend that cannot run here at all gives the single outcome ``available``, not applicable, with the
    reason. The global random state is as before afterwards. Raises UsageError for an unknown name in
    ``only``.
    """
    known = checks()
    for name in only or ():
        if name not in [check.name for check in known]:
            raise unknown_name("check", name, [check.name for check in known])
    support = available(target.backend, target.device)
    if not support:
        return [Outcome("available", "not applicable", support.reason)]
    devices = [torch.cuda.current_device()] if target.device == "cuda" else []
    with torch.random.fork_rng(devices):
        return [_run(check, target) for check in known if only is None or check.name in only]


def _check(function: Callable[[Probe], NotApplicable | None], *, computes: bool) -> Check:
    sentence = (function.__doc__ or "").strip().partition("\n")[0]
    return Check(function.__name__, sentence, function, computes)


def _run(check: Check, target: Target) -> Outcome:
    def outcome(status: Status, detail: str) -> Outcome:
        return Outcome(check.name, status, detail, check.computes)

    if target.mechanism.spec.forward_only and check.name in DIFFERENTIATING:
        return outcome("not applicable", f"no backward pass: {target.mechanism.spec.forward_only}")
    ranks = sorted(target.mechanism.spec.grid_ranks)
    compared = Probe(target, ranks[0]).slow or target.backend not in OWN
    if compared and check.computes and check.name not in COMPARING:
        return outcome("not applicable", "covered by agreement with the reference")
    if compared or check.name not in ON_EVERY_RANK:
        ranks = ranks[:1]
    found: list[tuple[Status, str]] = []
    for rank in ranks:
        status, detail = _on_rank(check, target, rank)
        found.append((status, f"grids of rank {rank}: {detail}" if rank > 1 and detail else detail))
        if status == "failed":
            return outcome(status, found[-1][1])
    if all(status == "not applicable" for status, _ in found):
        return outcome("not applicable", found[0][1])
    return outcome("passed", "; ".join(dict.fromkeys(detail for _, detail in found if detail)))


def _on_rank(check: Check, target: Target, rank: int) -> tuple[Status, str]:
    """What a check says on grids of one rank, and its detail."""
    probe = Probe(target, rank)
    try:
        exempt = check.function(probe)
    except CheckFailed as failure:
        return "failed", str(failure)
    except Unsupported as why:
        # the reference is the definition: nothing may be beyond it
        return "failed" if target.backend == "reference" else "not applicable", str(why)
    except Exception as error:  # what a mechanism raises is its failure, and the next check must still run
        return "failed", _described(error)
    if exempt is not None:
        return "not applicable", exempt.reason
    return "passed", "; ".join(probe.notes)


def _described(error: Exception) -> str:
    """Type, message and innermost place of an exception, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
