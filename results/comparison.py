"""Two sets of rows set against one another: pairs of blocks, verdicts, and what got worse exactly.

Pure: rows in, a :class:`Comparison` and its tables out. ``attnbench compare`` measures or reads the rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from attnbench.results.compare import (
    DEFAULT,
    Decision,
    Finding,
    Pair,
    Rule,
    Verdict,
    decide_all,
    exact_findings,
)
from attnbench.results.format import NONE, number
from attnbench.results.rows import Row
from attnbench.results.table import Column, Record, Table, table

FailOn = Literal["slower", "uncertain", "incorrect", "missing", "never"]
FAIL_ON: Final[tuple[FailOn, ...]] = ("slower", "uncertain", "incorrect", "missing", "never")


@dataclass(frozen=True)
class CaseComparison:
    """One case on both sides: its key and label, the verdict on its time, and what got worse exactly."""

    key: str
    label: str
    decision: Decision
    findings: tuple[Finding, ...]
    base_us: float | None
    head_us: float | None
    log_ratios: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All cases of two sets of rows. ``only_base`` and ``only_head`` are labels of cases without a partner.

    ``notes`` say what makes the verdicts less certain than they look. ``software_key`` is that of the head.
    """

    cases: tuple[CaseComparison, ...]
    only_base: tuple[str, ...]
    only_head: tuple[str, ...]
    notes: tuple[str, ...]
    software_key: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases of each verdict, in the order of :class:`Verdict`."""
        seen = Counter(case.decision.verdict for case in self.cases)
        return {str(verdict): seen[verdict] for verdict in Verdict}

    @property
    def undecided(self) -> tuple[str, ...]:
        """Keys of the cases that more pairs could decide."""
        return tuple(
            c.key for c in self.cases if c.decision.verdict is Verdict.UNCERTAIN and c.decision.pairs
        )

    def failed(self, fail_on: FailOn) -> bool:
        """Whether the comparison is a failure.

        ``slower``: a case is, or got worse exactly; ``uncertain``: or one may be. ``incorrect``: a case that
        ended well no longer does; ``missing``: one has no partner in the head. Both look at no time.
        """
        if fail_on == "never":
            return False
        if fail_on == "missing":
            return bool(self.only_base)
        if fail_on == "incorrect":
            return any(finding.column == "status" for case in self.cases for finding in case.findings)
        bad = {Verdict.SLOWER} if fail_on == "slower" else {Verdict.SLOWER, Verdict.UNCERTAIN}
        return any(case.findings or case.decision.verdict in bad for case in self.cases)


def compare_rows(
    base: Iterable[Row], head: Iterable[Row], rule: Rule = DEFAULT, *, interleaved: bool = True
) -> Comparison:
    """Compare rows case by case; block b of the base is paired with block b of the head.

    ``interleaved`` says that paired blocks were measured next to one another; where they were not, drift of
    the machine between the two runs is part of the difference, and a note says so.
    """
    before, after = _by_case(base), _by_case(head)
    common = [key for key in before if key in after]
    pairs = {key: _pairs(before[key], after[key]) for key in common}
    timed = {key: found for key, found in pairs.items() if found}
    decisions = decide_all(timed, rule)
    cases = tuple(
        _case(key, before[key], after[key], decisions.get(key, _untimed(before[key], after[key])), pairs[key])
        for key in common
    )
    return Comparison(
        cases,
        tuple(_label(rows) for key, rows in before.items() if key not in after),
        tuple(_label(rows) for key, rows in after.items() if key not in before),
        tuple(_notes(before.values(), after.values(), interleaved)),
        next((row.get("software_key") or "" for rows in after.values() for row in rows), ""),
    )


def _by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case_key"], []).append(row)
    return {key: sorted(group, key=lambda row: row["block"]) for key, group in found.items()}


def _pairs(base: Sequence[Row], head: Sequence[Row]) -> list[Pair]:
    other = {row["block"]: row for row in head if row.get("time_us")}
    return [
        Pair(row["time_us"], other[row["block"]]["time_us"], _flags(row), _flags(other[row["block"]]))
        for row in base
        if row.get("time_us") and row["block"] in other
    ]


def _flags(row: Row) -> frozenset[str]:
    """Names of the flags: a flag may be followed by what was observed."""
    return frozenset(flag.partition(":")[0] for flag in row.get("flags") or ())


def _untimed(base: Sequence[Row], head: Sequence[Row]) -> Decision:
    statuses = f"{_worst(base)} before and {_worst(head)} now"
    return Decision(Verdict.UNCERTAIN, None, None, None, 0, 0, reason=f"no times to compare: {statuses}")


def _worst(rows: Sequence[Row]) -> str:
    return next((str(row["status"]) for row in rows if row["status"] != "ok"), "ok")


def _case(
    key: str, base: Sequence[Row], head: Sequence[Row], decision: Decision, pairs: Sequence[Pair]
) -> CaseComparison:
    failed = [row for row in head if row["status"] != "ok"]
    now = failed[0] if failed else head[0]
    was = next((row for row in base if row["status"] != "ok"), base[0])
    return CaseComparison(
        key,
        _label(base),
        decision,
        tuple(exact_findings(was, now)),
        _middle(base),
        _middle(head),
        tuple(math.log(pair.head_us / pair.base_us) for pair in pairs),
    )


def _middle(rows: Sequence[Row]) -> float | None:
    times = sorted(row["time_us"] for row in rows if row.get("time_us"))
    return times[len(times) // 2] if times else None


def _label(rows: Sequence[Row]) -> str:
    row = rows[0]
    parts = (row["impl"], row["pattern"], row["workload"], f"N={row['n']}", row["dtype"], row["direction"])
    return " · ".join(str(part) for part in parts)


def _notes(base: Iterable[Sequence[Row]], head: Iterable[Sequence[Row]], interleaved: bool) -> list[str]:
    found = []
    if not interleaved:
        found.append("the two sides were not measured in turns: drift of the machine is part of a difference")
    keys = [{row.get("software_key") for rows in side for row in rows} - {None} for side in (base, head)]
    if keys[0] != keys[1]:
        found.append("different environment: hardware or software changed between the two sides")
    return found


# ---- tables --------------------------------------------------------------------------------------------


def tables(found: Comparison) -> list[Table]:
    """The counts of verdicts, the cases that are not the same, and what got worse exactly."""
    counts = [{"verdict": name, "cases": count} for name, count in found.counts.items()]
    notes = [*found.notes]
    if found.only_base:
        notes.append(f"only in the base: {len(found.only_base)}, first {found.only_base[0]}")
    if found.only_head:
        notes.append(f"only in the head: {len(found.only_head)}, first {found.only_head[0]}")
    shown = [table("verdicts", _COUNTS, counts, notes)]
    changed = [_record(case) for case in found.cases if case.decision.verdict is not Verdict.SAME]
    if changed:
        shown.append(table("cases that are not the same", _CASES, changed))
    worse = [
        {"case": case.label, "column": f.column, "base": f.base, "head": f.head, "allowed": f.allowed}
        for case in found.cases
        for f in case.findings
    ]
    if worse:
        shown.append(table("worse, exactly", _FINDINGS, worse))
    return shown


def _record(case: CaseComparison) -> Mapping[str, Any]:
    d = case.decision
    return {
        "verdict": str(d.verdict),
        "case": case.label,
        "base_us": case.base_us,
        "head_us": case.head_us,
        "ratio": d.ratio,
        "lo": d.lo,
        "hi": d.hi,
        "pairs": d.pairs,
        "dropped": d.dropped,
        "reason": d.reason,
    }


def _text(name: str) -> Any:
    return lambda record: str(record[name])


def _value(name: str) -> Any:
    return lambda record: NONE if record[name] is None else number(record[name])


def _bounds(record: Record) -> str:
    return NONE if record["lo"] is None else f"{record['lo']:.3f} … {record['hi']:.3f}"


_COUNTS: Final = (Column("verdict", _text("verdict"), numeric=False), Column("cases", _text("cases")))
_CASES: Final = (
    Column("verdict", _text("verdict"), numeric=False),
    Column("case", _text("case"), numeric=False),
    Column("base µs", _value("base_us")),
    Column("head µs", _value("head_us")),
    Column("head / base", _value("ratio")),
    Column("99 % bounds", _bounds),
    Column("pairs", _text("pairs")),
    Column("reason", _text("reason"), numeric=False),
)
_FINDINGS: Final = tuple(
    Column(name, _text(name), numeric=False) for name in ("case", "column", "base", "head", "allowed")
)
