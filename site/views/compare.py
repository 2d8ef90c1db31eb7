"""Two runs, impls or devices set against one another, with the verdicts of ``attnbench compare``.

The rule is that of :mod:`attnbench.results.compare`; here rows are chosen and given the key under which they
meet, and the outcome is put in order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from attnbench.results.aggregate import Summary
from attnbench.results.compare import DEFAULT, ONE_SIDED_FLAGS, Verdict
from attnbench.results.comparison import CaseComparison, Comparison, compare_rows
from attnbench.results.format import NONE, number
from attnbench.results.rows import Row
from attnbench.results.stats import t_interval
from attnbench.site.views.words import DTYPE_WORDS, pattern_words

Kind = Literal["run", "impl", "gpu"]
KINDS: Final[Mapping[Kind, str]] = {"run": "two runs", "impl": "two impls", "gpu": "two devices"}
SIGNS: Final[Mapping[str, tuple[str, str]]] = {
    "faster": ("▼", "faster"),
    "slower": ("▲", "slower"),
    "same": ("≈", "same"),
    "uncertain": ("?", "undecided"),
}
"""Verdict → symbol and word; colour is the third sign and never alone."""

CASE: Final = ("pattern", "workload", "n", "m", "dtype", "direction", "scope", "seed")
COLUMNS: Final = ("case", "impl", "run", "block", "us", "flags", "started", "status")
SHOWN: Final = 200
"""Cases in the first table; the script shows all."""


@dataclass(frozen=True)
class Line:
    """One case of a comparison: ``change`` is head over base, by the rule or else of the medians."""

    verdict: str
    sign: str
    word: str
    case: str
    base: str
    head: str
    change: float | None
    ratio: str
    bounds: str
    pairs: int
    reason: str


@dataclass(frozen=True)
class Result:
    """A comparison as the page shows it, largest changes first; ``notes`` make verdicts less certain."""

    kind: Kind
    a: str
    b: str
    counts: tuple[tuple[str, str, str, int], ...]
    lines: tuple[Line, ...]
    findings: tuple[tuple[str, str, str, str, str], ...]
    only_a: int
    only_b: int
    notes: tuple[str, ...]


def between(rows: Iterable[Row], kind: Kind, a: str, b: str, device: str = "") -> Comparison:
    """Compare two runs by id, two impls (labels) on one ``device``, or all impls on two devices.

    Rows of tasks have no time and are left out. Of impls and devices, the newest run of each case counts.
    """
    timed = [row for row in rows if row.get("scope") != "task"]
    if kind == "run":
        base, head = ([r for r in timed if r["run_id"] == name] for name in (a, b))
        return compare_rows(base, head, interleaved=False)
    names: tuple[str, ...] = ("device", *CASE) if kind == "impl" else ("impl", "hyper", *CASE)
    if kind == "impl":
        here = [row for row in timed if not device or row["device"] == device]
        base, head = ([r for r in here if label_of(r) == name] for name in (a, b))
    else:
        base, head = ([r for r in timed if r["device"] == name] for name in (a, b))
    return compare_rows(_rekeyed(base, names), _rekeyed(head, names), interleaved=False)


def result(found: Comparison, kind: Kind, a: str, b: str) -> Result:
    """A comparison in words and in order."""
    lines = sorted((_line(case) for case in found.cases), key=_by_change)
    return Result(
        kind=kind,
        a=a,
        b=b,
        counts=tuple((name, *SIGNS[name], found.counts[name]) for name in SIGNS),
        lines=tuple(lines),
        findings=tuple(
            (case.label, f.column, _plain(f.base), _plain(f.head), f.allowed)
            for case in found.cases
            for f in case.findings
        ),
        only_a=len(found.only_base),
        only_b=len(found.only_head),
        notes=found.notes,
    )


def default_pair(rows: Sequence[Row]) -> tuple[str, str] | None:
    """The two newest runs of one device that have a case in common, older first; None without such."""
    started: dict[str, str] = {}
    keys: dict[str, set[str]] = {}
    for row in rows:
        if row.get("scope") != "task":
            run = row["run_id"]
            started[run] = min(started.get(run, "~"), str(row["started_at"]))
            keys.setdefault(run, set()).add(row["case_key"])
    newest = sorted(started, key=lambda run: (started[run], run), reverse=True)
    for at, b in enumerate(newest):
        for a in newest[at + 1 :]:
            if keys[a] & keys[b]:
                return a, b
    return None


def label_of(row: Row) -> str:
    """The impl of a row with its hyper-parameters, as :attr:`Summary.label` has it."""
    hyper = json.loads(row.get("hyper") or "{}")
    return " ".join([str(row["impl"]), *(f"{name}={value}" for name, value in sorted(hyper.items()))])


def content(rows: Iterable[Row]) -> dict[str, Any]:
    """The timed rows of one device, column by column, for the script: times with all their digits.

    ``flags`` are those that make a pair lopsided; ``us`` is null where a row has no time, ``status`` empty
    where it is ok.
    """
    cases: dict[str, int] = {}
    impls: dict[str, int] = {}
    runs: dict[str, int] = {}
    facts: list[dict[str, str]] = []
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for row in rows:
        run = runs.setdefault(row["run_id"], len(runs))
        if run == len(facts):
            facts.append({"id": row["run_id"], "date": "~", "software": row["software_key"]})
        facts[run]["date"] = min(facts[run]["date"], str(row["started_at"]))
        values = (
            cases.setdefault(json.dumps([row.get(name) for name in CASE]), len(cases)),
            impls.setdefault(label_of(row), len(impls)),
            run,
            row["block"],
            row.get("time_us"),
            _lopsided(row),
            str(row["started_at"]),
            "" if row["status"] == "ok" else str(row["status"]),
        )
        for name, value in zip(COLUMNS, values, strict=True):
            columns[name].append(value)
    return {
        "fields": CASE,
        "cases": [json.loads(key) for key in cases],
        "impls": list(impls),
        "runs": facts,
        "columns": columns,
    }


def rule() -> dict[str, Any]:
    """The numbers of the rule, for the script."""
    return asdict(DEFAULT)


# ---- inside --------------------------------------------------------------------------------------------


def _rekeyed(rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """The rows of the newest run of each case, under a key of the named columns."""
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        by_key.setdefault(json.dumps([row.get(name) for name in names]), []).append(row)
    found = []
    for key, group in by_key.items():
        last = max(group, key=lambda row: (str(row["started_at"]), row["run_id"]))["run_id"]
        found += [{**row, "case_key": key} for row in group if row["run_id"] == last]
    return found


def _line(case: CaseComparison) -> Line:
    d = case.decision
    medians = case.head_us / case.base_us if case.base_us and case.head_us else None
    change = medians if d.ratio is None else d.ratio
    sign, word = SIGNS[str(d.verdict)]
    half = None if d.lo is None or d.hi is None else (d.hi - d.lo) / 2
    bounds = NONE if d.lo is None or d.hi is None else f"{d.lo:.3f} – {d.hi:.3f}"
    return Line(
        verdict=str(d.verdict),
        sign=sign,
        word=word,
        case=case.label,
        base=number(case.base_us, digits=4),
        head=number(case.head_us, digits=4),
        change=change,
        ratio=number(change, half),
        bounds=_orientation(case.log_ratios) if d.lo is None else bounds,
        pairs=d.pairs,
        reason=d.reason,
    )


def _orientation(log_ratios: Sequence[float]) -> str:
    """The 95 % interval of too few pairs for a verdict: for orientation, in brackets."""
    around = t_interval(log_ratios)
    return NONE if around is None else f"({math.exp(around[0]):.3f} – {math.exp(around[1]):.3f})"


def _by_change(line: Line) -> tuple[Any, ...]:
    decided = line.verdict in (str(Verdict.SLOWER), str(Verdict.FASTER))
    size = abs(math.log(line.change)) if line.change else -1.0
    return (not decided, -size, line.case)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return number(value, digits=4) if isinstance(value, int | float) else str(value)


def _lopsided(row: Row) -> str:
    """Flags of the device's state, by name; two rows that differ here make no fair pair."""
    names = {flag.partition(":")[0] for flag in row.get("flags") or ()}
    return " ".join(sorted(names & ONE_SIDED_FLAGS))


def case_words(row: Row | Summary) -> str:
    """A case in words, without its impl and device."""
    size = f"N={row.get('n')}" + ("" if row.get("m") in (None, row.get("n")) else f" M={row.get('m')}")
    dtype = DTYPE_WORDS.get(str(row.get("dtype")), str(row.get("dtype")))
    words = (pattern_words(str(row.get("pattern"))), str(row.get("workload")), size, dtype)
    return " · ".join((*words, str(row.get("direction"))))
