"""How a score moves along a dial of its task: length, number of pairs, depth of a needle.

Tasks name such metrics ``accuracy@n=512`` or ``accuracy@n=512,depth=3``; here the names become curves.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attnbench.results import stats
from attnbench.results.scores import LengthGeneralisation, length_generalisation
from attnbench.results.seeds import Score

_NAME = re.compile(r"(?P<metric>[^@]+)@(?P<dial>\w+)=(?P<value>\d+)")


@dataclass(frozen=True)
class DialPoint:
    """The mean over seeds at one setting of the dial, with its 95 % interval (None below three seeds)."""

    x: int
    value: float
    lo: float | None
    hi: float | None


@dataclass(frozen=True)
class DialCurve:
    """One mechanism on one task: ``metric`` against ``dial``. ``trained`` is the setting of training."""

    task: str
    pattern: str
    preset: str
    metric: str
    dial: str
    label: str
    control: bool
    trained: int | None
    points: tuple[DialPoint, ...]


def curves(tables: Iterable[Sequence[Score]]) -> list[DialCurve]:
    """Every curve of one dial that the scores hold; settings of two dials at once are left to a matrix."""
    return [curve for table in tables for score in table for curve in _curves(score)]


def _curves(score: Score) -> Iterable[DialCurve]:
    found: dict[tuple[str, str], list[DialPoint]] = {}
    for name, values in score.metrics.items():
        match = _NAME.fullmatch(name)
        if match:
            place = (match["metric"], match["dial"])
            found.setdefault(place, []).append(_point(int(match["value"]), values))
    for (metric, dial), points in sorted(found.items()):
        yield DialCurve(
            task=score.task,
            pattern=score.pattern,
            preset=score.preset,
            metric=metric,
            dial=dial,
            label=score.label,
            control=score.control,
            trained=score.n if dial == "n" else None,
            points=tuple(sorted(points, key=lambda p: p.x)),
        )


def _point(x: int, values: Sequence[float]) -> DialPoint:
    around = stats.t_interval(values)
    lo, hi = around if around else (None, None)
    return DialPoint(x, statistics.fmean(values), lo, hi)


def generalisation(curve: DialCurve, better: str) -> LengthGeneralisation | None:
    """Loss at shorter and longer inputs than trained; None without a score at the training length."""
    by_length: Mapping[int, float] = {p.x: p.value for p in curve.points}
    trained = curve.trained
    if curve.dial != "n" or trained is None or trained not in by_length or min(by_length.values()) <= 0:
        return None
    return length_generalisation(by_length, trained, "lower" if better == "lower" else "higher")
