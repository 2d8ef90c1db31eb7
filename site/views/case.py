"""One case, all impls: who is fastest by how much, what the intervals leave open, and who has no number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from attnbench.results.aggregate import Summary, rank
from attnbench.results.schema import MEASUREMENT_VERSION
from attnbench.site.views.words import DIRECTION_WORDS, DTYPE_WORDS, pattern_words

BASELINES: Final = ("softmax/sdpa_flash", "softmax/sdpa_math", "softmax/torch", "softmax/reference")
"""The impl that times are compared with: the first of these that was measured on the same case."""


@dataclass(frozen=True, order=True)
class Case:
    """What all impls of one table share. ``stack`` is the software and the version of the method.

    ``seed`` is that of inputs and weights.
    """

    device: str
    dtype: str
    direction: str
    scope: str
    workload: str
    pattern: str
    n: int
    m: int
    seed: int
    stack: str

    @property
    def setting(self) -> tuple[object, ...]:
        """All of the case but its workload and lengths: cases of one setting are drawn together."""
        return self.device, self.dtype, self.direction, self.scope, self.pattern, self.seed, self.stack

    @property
    def size(self) -> str:
        """Queries, or queries × keys where these differ: ``4096``, ``1x4096``."""
        return str(self.n) if self.n == self.m else f"{self.n}x{self.m}"

    @property
    def title(self) -> str:
        """The case in words, without device and software."""
        length = f"N = {self.n}" if self.n == self.m else f"N = {self.n}, M = {self.m}"
        words = DIRECTION_WORDS.get(self.direction, self.direction)
        return f"{self.workload}, {pattern_words(self.pattern)}, {length}, {words}, {self.scope}"

    @property
    def dtype_words(self) -> str:
        """``bf16`` for ``bfloat16``."""
        return DTYPE_WORDS.get(self.dtype, self.dtype)


@dataclass(frozen=True)
class Entry:
    """One impl on one case.

    ``position`` orders the measured ones, ``best`` and ``last`` are the ranks that the intervals leave open;
    ``ratio`` is the baseline's time over this one. All are None without a measurement, ``best`` and ``last``
    also without an interval.
    """

    summary: Summary
    position: int | None
    best: int | None
    last: int | None
    baseline: bool
    ratio: float | None

    @property
    def rank(self) -> str:
        """``3``, ``2–4`` for a tie, ``~5`` for a place by value alone, ``–`` for none."""
        if self.position is None:
            return "–"
        if self.best is None:
            return f"~{self.position}"
        return str(self.best) if self.best == self.last else f"{self.best}–{self.last}"

    @property
    def half_width_us(self) -> float | None:
        """Half of the 95 % interval between blocks, else of that within the one block there is."""
        s = self.summary
        lo = s.lo_us if s.lo_us is not None else s.get("time_lo_us")
        hi = s.hi_us if s.hi_us is not None else s.get("time_hi_us")
        return None if not s.ok or lo is None or hi is None else (hi - lo) / 2


def case_of(s: Summary) -> Case:
    """The case that a summary of an operation or a layer belongs to."""
    values = {f.name: s.get(f.name) for f in fields(Case) if f.name != "stack"}
    version = "" if s.measurement_version == MEASUREMENT_VERSION else f"~v{s.measurement_version}"
    values["m"] = values["n"] if values["m"] is None else values["m"]
    values["direction"] = values["direction"] or "fwd"
    values["seed"] = values["seed"] or 0
    return Case(**values, stack=s.software_key + version)


def by_case(current: Iterable[Summary]) -> dict[Case, list[Summary]]:
    """Summaries of operations and layers by their case, in the order of the cases."""
    groups: dict[Case, list[Summary]] = {}
    for s in current:
        groups.setdefault(case_of(s), []).append(s)
    return {case: groups[case] for case in sorted(groups)}


def entries(group: Sequence[Summary]) -> list[Entry]:
    """All impls of one case: the measured ones by time, then the others by status and name."""
    reference = baseline(group)
    ranked = rank(group)
    measured = {id(r.summary) for r in ranked}
    others = sorted((s for s in group if id(s) not in measured), key=lambda s: (s.status, s.label))
    return [
        *(
            Entry(r.summary, r.position, r.lo, r.hi, r.summary is reference, _ratio(r.summary, reference))
            for r in ranked
        ),
        *(Entry(s, None, None, None, s is reference, None) for s in others),
    ]


def ranked(cases: Mapping[Case, Sequence[Summary]]) -> dict[Case, list[Entry]]:
    """The entries of every case: what tables, slices and curves are made from."""
    return {case: entries(group) for case, group in cases.items()}


def baseline(group: Iterable[Summary]) -> Summary | None:
    """The summary that the others of a case are compared with; None when no baseline was measured."""
    measured = {s.impl: s for s in group if s.ok and s.get("hyper") in (None, "{}")}
    return next((measured[name] for name in BASELINES if name in measured), None)


def default(cases: Mapping[Case, Sequence[Summary]]) -> Case | None:
    """The case to show first; None without any.

    Accelerators come before CPUs, cases with a baseline before others, then the one with the most measured
    impls, and of equal ones the forward pass and the longest.
    """

    def order(case: Case) -> tuple[Any, ...]:
        measured = sum(s.ok for s in cases[case])
        known = baseline(cases[case]) is not None
        return (case.device != "cpu", known, measured, case.direction == "fwd", case.n, case)

    return max(cases, key=order, default=None)


def _ratio(s: Summary, reference: Summary | None) -> float | None:
    if reference is None or not reference.time_us or not s.time_us:
        return None
    return reference.time_us / s.time_us
