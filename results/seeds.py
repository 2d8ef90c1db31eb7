"""Scores of tasks: the metric of a trained model over its seeds, as mean and interval."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from attnbench.results import stats
from attnbench.results.aggregate import Summary, rank_ranges, worst
from attnbench.results.schema import Status

SAME_SCORE: Final = ("device", "preset", "suite", "pattern", "workload", "n", "m", "dtype")


@dataclass(frozen=True)
class Score:
    """One mechanism on one task.

    ``value`` is the mean over seeds, ``lo`` and ``hi`` its 95 % t-interval (None below three seeds), ``sd``
    the standard deviation over seeds.

    ``metrics`` holds every metric of the evaluation by name, its values over the seeds in their order; a
    metric that was not finite at some seed is left out of it. ``check_softmax`` and ``check_no_mixing`` are
    the limits that the task states for its preset, None where it states none.

    ``status`` is the worst over seeds; with a seed that failed there is no mean, for the seeds that came
    through are no fair sample. ``best`` and ``last`` are the ranks that the intervals leave open, None for
    controls and without an interval.
    """

    task: str
    pattern: str
    label: str
    device: str
    preset: str
    software_key: str
    control: bool
    metric: str
    better: str
    status: Status
    statuses: dict[str, int]
    reason: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    value: float | None
    lo: float | None
    hi: float | None
    sd: float | None
    params: int | None
    params_softmax: int | None
    steps: int | None
    train_s: float | None
    tokens_per_s: float | None
    data: str
    fingerprints: tuple[tuple[int, str], ...]
    started_at: str
    suite: str = ""
    n: int | None = None
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    check_softmax: float | None = None
    check_no_mixing: float | None = None
    best: int | None = None
    last: int | None = None


def scores(summaries: Iterable[Summary]) -> list[list[Score]]:
    """One list for each task, pattern, preset, device and software: its scores, best first, failures last.

    Only summaries of scope ``task`` count.
    """
    tables: dict[tuple[Any, ...], dict[str, list[Summary]]] = {}
    for s in summaries:
        if s.get("scope") == "task":
            where = (*(s.get(name) for name in SAME_SCORE), s.software_key, s.measurement_version)
            tables.setdefault(where, {}).setdefault(s.label, []).append(s)
    return [_ranked([_score(group) for group in by_label.values()]) for by_label in tables.values()]


def mixed_data(scores: Iterable[Score]) -> tuple[int, ...]:
    """Seeds at which the scores were computed on different data and must not be compared."""
    seen: dict[int, set[str]] = {}
    for score in scores:
        for seed, fingerprint in score.fingerprints:
            seen.setdefault(seed, set()).add(fingerprint)
    return tuple(sorted(seed for seed, found in seen.items() if len(found) > 1))


def _score(group: Sequence[Summary]) -> Score:
    by_seed = sorted(group, key=lambda s: s.get("seed") or 0)
    status = worst(s.status for s in by_seed)
    values = tuple(float(s.get("metric_value")) for s in by_seed) if status == Status.OK else ()
    interval = stats.t_interval(values)
    first = by_seed[0]
    return Score(
        task=_known(by_seed, "task") or first.get("suite"),
        pattern=first.get("pattern"),
        label=first.label,
        device=first.get("device"),
        preset=first.get("preset"),
        software_key=first.software_key,
        control=bool(_known(by_seed, "control")) or first.get("family") == "control",
        metric=_known(by_seed, "metric") or "",
        better=_known(by_seed, "metric_better") or "",
        status=status,
        statuses=dict(Counter(str(s.status) for s in by_seed)),
        reason=next((s.reason for s in by_seed if s.status == status), ""),
        seeds=tuple(s.get("seed") or 0 for s in by_seed),
        values=values,
        value=statistics.fmean(values) if values else None,
        lo=interval[0] if interval else None,
        hi=interval[1] if interval else None,
        sd=statistics.stdev(values) if len(values) > 1 else None,
        params=_known(by_seed, "params"),
        params_softmax=_known(by_seed, "params_softmax"),
        steps=_known(by_seed, "steps"),
        train_s=_middle(by_seed, "train_s"),
        tokens_per_s=_middle(by_seed, "tokens_per_s"),
        data=_known(by_seed, "data") or "",
        fingerprints=tuple(
            (s.get("seed") or 0, s.get("data_fingerprint")) for s in by_seed if s.get("data_fingerprint")
        ),
        started_at=max(s.started_at for s in by_seed),
        suite=first.get("suite") or "",
        n=_known(by_seed, "n"),
        metrics=_metrics(by_seed) if values else {},
        check_softmax=_known(by_seed, "check_softmax"),
        check_no_mixing=_known(by_seed, "check_no_mixing"),
    )


def _metrics(by_seed: Sequence[Summary]) -> dict[str, tuple[float, ...]]:
    found = [json.loads(s.get("metrics") or "{}") for s in by_seed]
    complete = [name for name in found[0] if all(row.get(name) is not None for row in found)]
    return {name: tuple(float(row[name]) for row in found) for name in complete}


def _ranked(found: Sequence[Score]) -> list[Score]:
    """Best first by the metric's own direction; controls stand where their value puts them, unranked."""
    sign = -1.0 if any(score.better == "higher" for score in found) else 1.0
    ordered = sorted(
        found, key=lambda s: (s.value is None, sign * s.value if s.value is not None else 0.0, s.label)
    )
    ranges = rank_ranges([_interval(score, sign) for score in ordered])
    return [
        replace(score, best=around[0], last=around[1]) if around else score
        for score, around in zip(ordered, ranges, strict=True)
    ]


def _interval(score: Score, sign: float) -> tuple[float, float] | None:
    if score.control or score.lo is None or score.hi is None:
        return None
    ends = sorted((sign * score.lo, sign * score.hi))
    return ends[0], ends[1]


def _known(group: Sequence[Summary], name: str) -> Any:
    return next((s.get(name) for s in group if s.get(name) is not None), None)


def _middle(group: Sequence[Summary], name: str) -> float | None:
    known = [float(s.get(name)) for s in group if s.get(name) is not None]
    return stats.quantile(known, 0.5) if known else None
