"""The tables of the site computed a second time, from plain rows: what a browser shows must equal this.

Nothing here calls the code that the site is made with.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from attnbench.results.rows import Row

T_975: Final = {2: 4.302652729911275, 7: 2.3646242510102993}
"""Quantiles of Student's t for the numbers of blocks in the rows, by degrees of freedom."""

BASELINES: Final = ("softmax/sdpa_flash", "softmax/sdpa_math", "softmax/torch", "softmax/reference")
FACTORS: Final = (1.0, 1.1, 1.5, 2.0, 5.0, 10.0)


class Case(NamedTuple):
    """What all rows of one table share, under the names of the address."""

    gpu: str
    dtype: str
    dir: str
    pattern: str
    workload: str
    n: str
    scope: str
    sw: str
    seed: str

    @property
    def fragment(self) -> str:
        return "&".join(f"{name}={value}" for name, value in self._asdict().items())

    @property
    def setting(self) -> Case:
        """What cases share that are ranked together over all workloads and lengths."""
        return self._replace(workload="", n="")


@dataclass(frozen=True)
class Line:
    """One impl on one case. ``values`` has every number by its key, None where there is none."""

    label: str
    status: str
    reason: str
    rank: str
    facets: Mapping[str, str]
    values: Mapping[str, float | None]

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def label_of(row: Row) -> str:
    hyper = json.loads(row["hyper"])
    return " ".join([row["impl"], *(f"{name}={value}" for name, value in sorted(hyper.items()))])


def case_of(row: Row) -> Case:
    size = str(row["n"]) if row["n"] == row["m"] else f"{row['n']}x{row['m']}"
    names = ("device", "dtype", "direction", "pattern", "workload")
    return Case(*(row[k] for k in names), size, row["scope"], row["software_key"], str(row["seed"]))


def tables(rows: Iterable[Row], numbers: Iterable[str]) -> dict[Case, dict[str, Line]]:
    """Case → label → what its line must say; ``numbers`` are columns of the schema to compute."""
    blocks: dict[Case, dict[str, list[Row]]] = {}
    for row in rows:
        if row["scope"] != "task":
            blocks.setdefault(case_of(row), {}).setdefault(label_of(row), []).append(row)
    newest = {
        case: {label: _newest(group) for label, group in found.items()} for case, found in blocks.items()
    }
    names = tuple(numbers)
    return {case: _table(case, newest, names) for case in newest}


# ---- inside --------------------------------------------------------------------------------------------

Groups = Mapping[Case, Mapping[str, list[Row]]]


def _newest(group: list[Row]) -> list[Row]:
    """The blocks of the run measured last."""
    run = max(group, key=lambda row: row["started_at"])["run_id"]
    return [row for row in group if row["run_id"] == run]


def _failed(group: list[Row]) -> Row | None:
    return next((row for row in group if row["status"] != "ok"), None)


def _time(group: list[Row]) -> float | None:
    return None if _failed(group) else statistics.median(row["time_us"] for row in group)


def _table(case: Case, everything: Groups, numbers: tuple[str, ...]) -> dict[str, Line]:
    groups = everything[case]
    times = {label: time for label, group in groups.items() if (time := _time(group)) is not None}
    intervals = {label: _interval(groups[label]) for label in times}
    base = next((times[name] for name in BASELINES if name in times), None)
    order = sorted(times, key=lambda label: (times[label], label))
    found = {}
    for label, group in groups.items():
        failed, row = _failed(group), group[0]
        values: dict[str, float | None] = {name: _median(group, name, failed) for name in numbers}
        values |= _standing(label, case, everything)
        values["time_us"] = times.get(label)
        values["ratio"] = base / times[label] if base and label in times else None
        values["rank"] = order.index(label) + 1 if label in times else None
        values["blocks"] = len(group)
        found[label] = Line(
            label,
            failed["status"] if failed else "ok",
            failed["reason"] if failed else "",
            _rank(intervals[label], intervals.values()) if label in times else "–",
            {
                "family": row["family"],
                "softmax": "exact" if row["exact"] else "approximate",
                "backend": row["backend"],
                "status": failed["status"] if failed else "ok",
            },
            values,
        )
    return found


def _median(group: list[Row], name: str, failed: Row | None) -> float | None:
    if failed or (name.startswith("approx_err") and group[0]["exact"]):
        return None
    known = [float(row[name]) for row in group if row.get(name) is not None]
    return statistics.median(known) if known else None


def _interval(group: list[Row]) -> tuple[float, float]:
    """95 % interval of the block medians, on their logarithms."""
    logs = [math.log(row["time_us"]) for row in group]
    half = T_975[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(statistics.mean(logs) - half), math.exp(statistics.mean(logs) + half)


def _rank(own: tuple[float, float], others: Iterable[tuple[float, float]]) -> str:
    """Best and worst rank that the intervals leave open."""
    known = list(others)
    best = 1 + sum(hi < own[0] for _, hi in known)
    last = sum(lo <= own[1] for lo, _ in known)
    return str(best) if best == last else f"{best}–{last}"


def _standing(label: str, case: Case, everything: Groups) -> dict[str, float | None]:
    inside = [groups for other, groups in everything.items() if other.setting == case.setting]
    planned = [groups[label] for groups in inside if label in groups]
    measured = [
        {name: time for name, group in groups.items() if (time := _time(group)) is not None}
        for groups in inside
    ]
    measured = [times for times in measured if times]
    ratios = [times[label] / min(times.values()) for times in measured if label in times]
    gains = [
        math.log(base / times[label]) if label in times else None
        for times in measured
        if (base := next((times[name] for name in BASELINES if name in times), None))
    ]
    known = [gain for gain in gains if gain is not None]
    return {
        "coverage": sum(_failed(group) is None for group in planned) / len(planned),
        **{f"within_{factor:g}": sum(r <= factor for r in ratios) / len(measured) for factor in FACTORS},
        "geo_mean": math.exp(statistics.mean(known)) if known and len(known) == len(gains) else None,
    }


def counts(lines: Iterable[Line]) -> Counter[str]:
    return Counter(line.status for line in lines)
