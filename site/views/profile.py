"""All cases of one setting together, without a composite score: coverage, performance profile, geo-mean.

The profile is that of Dolan and Moré (arXiv cs/0102001): for each impl, the share of all cases in which it
is within a factor of the fastest. A case without a measurement counts as never within; nothing is imputed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attnbench.results.aggregate import Summary
from attnbench.site.views.case import Case, baseline
from attnbench.site.views.columns import WITHIN


@dataclass(frozen=True)
class Standing:
    """One impl over all cases of a setting.

    ``statuses`` counts how its planned cases ended, ``within`` has the shares for the factors
    :data:`WITHIN`, ``geo_mean`` is that of × baseline over the common set, None for an impl that was not
    measured in all of it.
    """

    label: str
    statuses: Mapping[str, int]
    within: tuple[float, ...]
    geo_mean: float | None

    @property
    def planned(self) -> int:
        """Cases planned for the impl."""
        return sum(self.statuses.values())

    @property
    def coverage(self) -> float:
        """Share of the planned cases that were measured and correct."""
        return self.statuses.get("ok", 0) / self.planned


@dataclass(frozen=True)
class Setting:
    """Standings of all impls over ``cases``; ``common`` are the cases in which the baseline was measured."""

    cases: tuple[Case, ...]
    common: tuple[Case, ...]
    standings: Mapping[str, Standing]


def setting(cases: Mapping[Case, Sequence[Summary]]) -> Setting:
    """Standings over all given cases, which should differ in workload and length only."""
    fastest = {
        case: min(s.time_us for s in group if s.time_us is not None)
        for case, group in cases.items()
        if any(s.time_us is not None for s in group)
    }
    references = {case: baseline(group) for case, group in cases.items()}
    common = {case: s.time_us for case, s in references.items() if s is not None and s.time_us is not None}
    found: dict[str, dict[Case, Summary]] = {}
    for case, group in cases.items():
        for s in group:
            found.setdefault(s.label, {})[case] = s
    standings = {
        label: Standing(
            label,
            Counter(str(s.status) for s in mine.values()),
            _within({c: s.time_us for c, s in mine.items() if s.time_us is not None}, fastest),
            _geo_mean([(common[c], mine[c].time_us if c in mine else None) for c in common]),
        )
        for label, mine in sorted(found.items())
    }
    return Setting(tuple(cases), tuple(common), standings)


def same_setting(cases: Iterable[Case], chosen: Case, all_workloads: bool) -> list[Case]:
    """Cases that differ from ``chosen`` in length only, or in workload and length."""
    wanted = chosen.setting
    return [c for c in cases if (all_workloads or c.workload == chosen.workload) and c.setting == wanted]


def _within(times: Mapping[Case, float], fastest: Mapping[Case, float]) -> tuple[float, ...]:
    ratios = [time / fastest[case] for case, time in times.items()]
    return tuple(sum(r <= factor for r in ratios) / len(fastest) if fastest else 0.0 for factor in WITHIN)


def _geo_mean(pairs: Sequence[tuple[float, float | None]]) -> float | None:
    """Geometric mean of first over second; None without pairs or when a second is missing."""
    if not pairs or any(time is None for _, time in pairs):
        return None
    return math.exp(math.fsum(math.log(base / time) for base, time in pairs if time) / len(pairs))
