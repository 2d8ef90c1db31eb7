"""Is the head slower than the base? The rule that decides it, from paired blocks of both.

The unit is the block, a fresh process: samples of one process are correlated, and a test on them calls
identical code different in half of all comparisons. Pure functions; who measures the pairs is not their
business.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from attnbench.results.student import t_cdf, t_quantile


class Verdict(StrEnum):
    """What a comparison of times says."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "same"
    UNCERTAIN = "uncertain"


@dataclass(frozen=True)
class Rule:
    """When a difference is called one.

    ``delta`` is the smallest slow-down that counts, ``equivalence`` the largest difference that is still the
    same (both relative), ``level`` that of the one-sided bounds on the mean log-ratio. ``agreement`` is the
    share of pairs whose sign must be that of the verdict, ``min_pairs`` the fewest that must be left, and
    ``false_discovery`` the share of false alarms among all cases called slower or faster (Benjamini and
    Hochberg 1995).
    """

    delta: float = 0.01
    equivalence: float = 0.02
    level: float = 0.99
    agreement: float = 0.8
    min_pairs: int = 6
    false_discovery: float = 0.05


DEFAULT: Final = Rule()

ONE_SIDED_FLAGS: Final = frozenset({"drift", "power_capped", "thermal", "clock_spread"})
"""Flags of the device's state: on one side of a pair only, they make it a pair of states, not of versions."""


@dataclass(frozen=True)
class Pair:
    """The medians, in µs, of two blocks measured next to one another, and the flags of either.

    ``base_cycles`` and ``head_cycles`` are the same times in cycles of the device's clock, where it was
    recorded.
    """

    base_us: float
    head_us: float
    base_flags: frozenset[str] = frozenset()
    head_flags: frozenset[str] = frozenset()
    base_cycles: float | None = None
    head_cycles: float | None = None

    @property
    def lopsided(self) -> bool:
        """Whether the device was in a flagged state on one side only."""
        return bool((self.base_flags ^ self.head_flags) & ONE_SIDED_FLAGS)


@dataclass(frozen=True)
class Decision:
    """The verdict on one case. ``ratio`` is head over base, ``lo`` and ``hi`` its one-sided bounds.

    ``pairs`` were used and ``dropped`` were lopsided. ``p_slower`` and ``p_faster`` are the one-sided
    p-values of a difference beyond ``delta``. ``reason`` says why a verdict is uncertain, else it is empty.
    """

    verdict: Verdict
    ratio: float | None
    lo: float | None
    hi: float | None
    pairs: int
    dropped: int
    p_slower: float = 1.0
    p_faster: float = 1.0
    reason: str = ""


def decide(pairs: Sequence[Pair], rule: Rule = DEFAULT) -> Decision:
    """The verdict on one case from its pairs, before other cases are looked at.

    With d = log(head) − log(base) of every pair, lo and hi the one-sided t-bounds of its mean: slower if lo >
    δ, faster if hi < −δ, the same if both lie within the equivalence region, else uncertain. The sign of d
    must agree in most pairs, and where cycles are known they must say the same: a time that grew while the
    cycles did not is the clock's doing, not the code's.
    """
    used = [pair for pair in pairs if not pair.lopsided]
    dropped = len(pairs) - len(used)
    if len(used) < max(rule.min_pairs, 2):
        why = f"{len(used)} usable pairs, expected at least {rule.min_pairs}"
        return Decision(Verdict.UNCERTAIN, None, None, None, len(used), dropped, reason=why)
    found = _on(used, rule, cycles=False)
    found = replace(found, dropped=dropped)
    if found.verdict in (Verdict.SLOWER, Verdict.FASTER) and all(_has_cycles(pair) for pair in used):
        by_cycles = _on(used, rule, cycles=True)
        if by_cycles.verdict != found.verdict:
            return _uncertain(found, f"clock, not code: in cycles it is {by_cycles.verdict}")
    return found


def decide_all(cases: Mapping[str, Sequence[Pair]], rule: Rule = DEFAULT) -> dict[str, Decision]:
    """The verdict on every case of a family, with the false discovery rate of the family under control.

    A case is called slower (faster) only if it is by itself and survives the step-up procedure of Benjamini
    and Hochberg over the family; the others become uncertain.
    """
    found = {key: decide(pairs, rule) for key, pairs in cases.items()}
    for verdict, name in ((Verdict.SLOWER, "p_slower"), (Verdict.FASTER, "p_faster")):
        limit = _discovery_limit([getattr(d, name) for d in found.values()], rule.false_discovery)
        for key, decision in found.items():
            p = getattr(decision, name)
            if decision.verdict == verdict and p > limit:
                why = f"{verdict} alone (p = {p:.2g}), not among {len(found)} cases"
                found[key] = _uncertain(decision, why)
    return found


def _on(pairs: Sequence[Pair], rule: Rule, *, cycles: bool) -> Decision:
    d = [_log_ratio(pair, cycles) for pair in pairs]
    k, mean = len(d), statistics.fmean(d)
    error = statistics.stdev(d) / math.sqrt(k)
    reach = t_quantile(rule.level, k - 1) * error
    lo, hi = mean - reach, mean + reach
    delta, same = math.log1p(rule.delta), math.log1p(rule.equivalence)
    decision = Decision(
        Verdict.UNCERTAIN,
        math.exp(mean),
        math.exp(lo),
        math.exp(hi),
        k,
        0,
        p_slower=_p_above(mean - delta, error, k),
        p_faster=_p_above(-mean - delta, error, k),
    )
    verdict = Verdict.UNCERTAIN
    if lo > delta:
        verdict = Verdict.SLOWER
    elif hi < -delta:
        verdict = Verdict.FASTER
    elif -same < lo and hi < same:
        verdict = Verdict.SAME
    else:
        return replace(decision, reason=f"between {math.exp(lo) - 1:+.1%} and {math.exp(hi) - 1:+.1%}")
    agreeing = sum(1 for x in d if x * mean > 0)
    if verdict != Verdict.SAME and agreeing < rule.agreement * k:
        return replace(
            decision, reason=f"{verdict} in {agreeing} of {k} pairs, expected {rule.agreement:.0%}"
        )
    return replace(decision, verdict=verdict)


def _log_ratio(pair: Pair, cycles: bool) -> float:
    if cycles:
        assert pair.head_cycles is not None
        assert pair.base_cycles is not None
        return math.log(pair.head_cycles / pair.base_cycles)
    return math.log(pair.head_us / pair.base_us)


def _has_cycles(pair: Pair) -> bool:
    return pair.base_cycles is not None and pair.head_cycles is not None


def _p_above(excess: float, error: float, k: int) -> float:
    """One-sided p-value of a mean that exceeds its null by ``excess`` with standard error ``error``."""
    if error == 0.0:
        return 0.0 if excess > 0 else 1.0
    return 1.0 - t_cdf(excess / error, k - 1)


def _discovery_limit(p_values: Sequence[float], rate: float) -> float:
    """Largest p-value that the step-up procedure rejects; 0 when it rejects none."""
    ordered = sorted(p_values)
    passing = [p for i, p in enumerate(ordered, 1) if p <= rate * i / len(ordered)]
    return max(passing, default=0.0)


def _uncertain(decision: Decision, reason: str) -> Decision:
    return replace(decision, verdict=Verdict.UNCERTAIN, reason=reason)


# ---- what is compared exactly --------------------------------------------------------------------------

EXACT: Final[Mapping[str, float]] = {
    "mem_peak_bytes": 0.01,
    "mem_saved_bytes": 0.01,
    "n_launches": 0.01,
    "flops": 0.01,
    "err_ratio": 0.5,
}
"""Columns that need no statistics, and the relative increase that is a finding."""


@dataclass(frozen=True)
class Finding:
    """A column that got worse by more than it may, or a case that no longer ends well."""

    column: str
    base: Any
    head: Any
    allowed: str


def exact_findings(base: Mapping[str, Any], head: Mapping[str, Any]) -> list[Finding]:
    """What got worse between two rows of one case, apart from time.

    A status that was ok and is not; memory, launches, FLOPs and error that grew beyond :data:`EXACT`; kernels
    that are launched now and were not. A value that either side lacks is not compared.
    """
    if base.get("status") == "ok" and head.get("status") != "ok":
        return [Finding("status", "ok", head.get("status"), "ok")]
    found = []
    for column, allowed in EXACT.items():
        before, after = base.get(column), head.get(column)
        if before is not None and after is not None and after > before * (1 + allowed):
            found.append(Finding(column, before, after, f"at most +{allowed:.0%}"))
    if base.get("kernels") and head.get("kernels"):
        added = sorted(set(head["kernels"]) - set(base["kernels"]))
        if added:
            found.append(Finding("kernels", base["kernels"], head["kernels"], f"not {', '.join(added)}"))
    return found
