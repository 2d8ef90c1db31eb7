"""Which impl to use for one case: the fastest that was measured and is near enough to exact attention.

Pure: rows in, answers out. Only measured rows are used. A length that was not measured is said to be missing,
with the nearest that were; nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from attnbench.errors import UsageError, unknown_name
from attnbench.results.aggregate import Summary, newest, summarise
from attnbench.results.format import TIME_UNITS, common_unit, interval, number, scientific
from attnbench.results.rows import Row
from attnbench.results.table import Column, Record, Table, table

INPUTS: Final = ("recorded", "structured", "gaussian")
"""Kinds of inputs that the distance to exact attention is measured on."""

DTYPES: Final[Mapping[str, str]] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp64": "float64",
}
SINGLE_BLOCK: Final = "preliminary: a single block, so nothing is said of ties"


@dataclass(frozen=True)
class Question:
    """What is asked for. ``m`` 0 means as many keys as queries; an empty ``device`` or ``workload`` any one.

    ``max_error`` bounds the RMS distance to exact softmax attention on ``inputs``; exact mechanisms have 0.
    """

    pattern: str
    n: int
    dtype: str
    device: str = ""
    m: int = 0
    direction: str = "fwd"
    scope: str = "op"
    workload: str = ""
    max_error: float = float("inf")
    inputs: str = "recorded"


@dataclass(frozen=True)
class Candidate:
    """An impl that may be used: its time with interval (None below three blocks), and its error, if known.

    ``tied`` says that its interval overlaps that of the fastest, so that the data do not tell them apart.
    """

    label: str
    time_us: float
    lo_us: float | None
    hi_us: float | None
    error: float | None
    blocks: int
    flags: tuple[str, ...]
    tied: bool = False


@dataclass(frozen=True)
class Answer:
    """The answer for one workload, device and software.

    ``candidates`` are those within the bound, fastest first: the first is the pick, the second the runner-up.
    ``rejected`` has every other impl with the reason. ``nearest`` has measured lengths around a missing one.
    ``reason`` is one sentence.
    """

    device: str
    workload: str
    software_key: str
    measured: str
    candidates: tuple[Candidate, ...]
    rejected: tuple[tuple[str, str], ...]
    nearest: tuple[int, ...]
    reason: str

    @property
    def best(self) -> Candidate | None:
        """The pick; None where the data cannot tell."""
        return self.candidates[0] if self.candidates else None

    @property
    def runner_up(self) -> Candidate | None:
        """The second fastest; None where there is none."""
        return self.candidates[1] if len(self.candidates) > 1 else None

    def plain(self) -> dict[str, Any]:
        """The answer as values that JSON has."""
        chosen = {
            "best": None if self.best is None else asdict(self.best),
            "runner_up": None if self.runner_up is None else asdict(self.runner_up),
        }
        return {**chosen, **asdict(self), "tied": [c.label for c in self.candidates if c.tied]}


def pick(rows: Iterable[Row], question: Question) -> list[Answer]:
    """One answer for every workload that was measured under the question, each with its newest software.

    Raises UsageError for a scope, pattern, dtype, device or workload that no row has, naming those that rows
    have, and where no device is named and rows have several.
    """
    seen: set[str] = set()
    current, _ = newest(summarise(_of_scope(rows, question.scope, seen)))
    if not current:
        others = ", ".join(sorted(seen)) or "none"
        raise UsageError(
            f"--scope {question.scope}: observed rows of the scopes {others}, expected some of scope "
            f"{question.scope}; measure them with `attnbench run` and name its folder"
        )
    asked = _resolved(current, question)
    same = [s for s in current if all(s.get(name) == value for name, value in asked.items())]
    if not same:
        raise UsageError(f"no row has {_words(asked)} together; leave one of them out or measure it")
    groups: dict[tuple[str, str], list[Summary]] = {}
    for s in same:
        groups.setdefault((s.get("device"), s.get("workload")), []).append(s)
    return [_answer(_newest_stack(groups[key]), question) for key in sorted(groups)]


def _of_scope(rows: Iterable[Row], scope: str, seen: set[str]) -> Iterator[Row]:
    """The rows of one scope; the scopes of all go into ``seen``."""
    for row in rows:
        seen.add(str(row.get("scope")))
        if row.get("scope") == scope:
            yield row


def to_table(answer: Answer, question: Question) -> Table:
    """The candidates of an answer, then what was rejected; the reason is its first note."""
    unit = common_unit((c.time_us for c in answer.candidates), TIME_UNITS)
    best = answer.best
    records = [
        {"place": at, **asdict(c), "times": None if best is None else c.time_us / best.time_us}
        for at, c in enumerate(answer.candidates, 1)
    ]
    columns = (
        Column("", lambda r: _place(r), numeric=False),
        Column("impl", lambda r: r["label"], numeric=False),
        Column(f"time {unit.name}", lambda r: number(r["time_us"] / unit.size, _half(r, unit.size))),
        Column(f"95 % interval {unit.name}", lambda r: interval(r["lo_us"], r["hi_us"], unit)),
        Column("× the pick", lambda r: number(r["times"])),
        Column(f"error, {question.inputs}", lambda r: "0" if r["error"] == 0.0 else scientific(r["error"])),
        Column("flags", lambda r: ", ".join(_names(r["flags"])), numeric=False),
    )
    notes = [answer.reason, *(f"not {label}: {why}" for label, why in answer.rejected)]
    return table(_title(answer, question), columns, records, notes)


# ---- inside --------------------------------------------------------------------------------------------


def _resolved(current: Sequence[Summary], question: Question) -> dict[str, str]:
    """Columns and the values that the question fixes, checked against what rows have."""
    asked = {
        "pattern": question.pattern.upper(),
        "dtype": DTYPES.get(question.dtype, question.dtype),
        "direction": question.direction,
        "device": question.device,
        "workload": question.workload,
    }
    for name, value in asked.items():
        known = {str(s.get(name)) for s in current}
        if value and value not in known:
            raise unknown_name(name, value, known, "Only what was measured can be picked from.")
    devices = sorted({str(s.get("device")) for s in current})
    if not question.device and len(devices) > 1:
        raise UsageError(f"--gpu: observed none, expected one of {', '.join(devices)}, which all have rows")
    return {name: value for name, value in asked.items() if value}


def _newest_stack(group: Sequence[Summary]) -> list[Summary]:
    """The summaries of the software and method measured last: times of two are not comparable."""
    last = max(group, key=lambda s: s.started_at)
    stack = (last.software_key, last.measurement_version)
    return [s for s in group if (s.software_key, s.measurement_version) == stack]


def _answer(group: Sequence[Summary], question: Question) -> Answer:
    m = question.m or question.n
    here = [s for s in group if (s.get("n"), s.get("m") or s.get("n")) == (question.n, m)]
    candidates, rejected = _sorted_out(here, question)
    return Answer(
        device=str(group[0].get("device")),
        workload=str(group[0].get("workload")),
        software_key=group[0].software_key,
        measured=max(s.started_at for s in here or group)[:10],
        candidates=tuple(candidates),
        rejected=tuple(rejected),
        nearest=() if here else _nearest(group, question.n),
        reason=_reason(candidates, question) if here else _missing(group, question),
    )


def _sorted_out(here: Sequence[Summary], question: Question) -> tuple[list[Candidate], list[tuple[str, str]]]:
    candidates: list[Candidate] = []
    rejected: list[tuple[str, str]] = []
    for s in sorted(here, key=lambda s: (s.time_us or 0.0, s.label)):
        error = 0.0 if s.get("exact") else s.get(f"approx_err_{question.inputs}")
        if not s.ok or s.time_us is None:
            rejected.append((s.label, f"{s.status}: {s.reason}"))
        elif error is None and question.max_error < float("inf"):
            rejected.append((s.label, f"its error on {question.inputs} inputs was not measured"))
        elif error is not None and error > question.max_error:
            rejected.append((s.label, f"error {number(error, digits=2)} above {question.max_error:g}"))
        else:
            candidates.append(Candidate(s.label, s.time_us, s.lo_us, s.hi_us, error, s.blocks, s.flags))
    return _with_ties(candidates), rejected


def _with_ties(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Mark those that the fastest is tied with, itself included when there is another."""
    if not candidates or candidates[0].hi_us is None:
        return list(candidates)
    limit = candidates[0].hi_us
    overlap = [c.lo_us is not None and c.lo_us <= limit for c in candidates]
    several = sum(overlap) > 1
    return [replace(c, tied=several and tied) for c, tied in zip(candidates, overlap, strict=True)]


def _reason(candidates: Sequence[Candidate], question: Question) -> str:
    bound = "" if question.max_error == float("inf") else f" with an error of at most {question.max_error:g}"
    if not candidates:
        return f"no impl was measured here{bound}: every one was rejected"
    best = candidates[0]
    tied = [c.label for c in candidates if c.tied]
    if tied:
        return f"a tie{bound}: the intervals of {', '.join(tied)} overlap, the data do not tell them apart"
    if len(candidates) == 1:
        return f"{best.label} is the only impl{bound}"
    second = candidates[1]
    times = second.time_us / best.time_us
    lead = f"{best.label} is the fastest{bound}, {times:.3g} times as fast as {second.label}"
    certain = best.hi_us is not None and second.lo_us is not None
    return f"{lead}; their intervals do not overlap" if certain else f"{lead}; {SINGLE_BLOCK}"


def _missing(group: Sequence[Summary], question: Question) -> str:
    keys = f", M={question.m}" if question.m and question.m != question.n else ""
    near = _nearest(group, question.n)
    return (
        f"the data cannot tell: nothing was measured at N={question.n}{keys}; nearest lengths measured: "
        f"{', '.join(map(str, near))}. Nothing is extrapolated: ask for one of them, or measure this one"
    )


def _nearest(group: Sequence[Summary], n: int) -> tuple[int, ...]:
    """The longest length below and the shortest above, as far as there are such."""
    lengths = sorted({int(s.get("n")) for s in group})
    below = [x for x in lengths if x < n][-1:]
    above = [x for x in lengths if x > n][:1]
    return tuple([*below, *above] or lengths[:1])


def _words(asked: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in asked.items())


def _title(answer: Answer, q: Question) -> str:
    size = f"N={q.n}" + (f" M={q.m}" if q.m and q.m != q.n else "")
    dtype = DTYPES.get(q.dtype, q.dtype)
    names = (answer.device, answer.workload, q.pattern.upper(), dtype, q.direction, size)
    return " · ".join([*names, f"measured {answer.measured}"])


def _place(r: Record) -> str:
    word = {1: "pick", 2: "runner-up"}.get(r["place"], "")
    return f"{word} (tie)".strip() if r["tied"] else word


def _half(r: Record, size: float) -> float | None:
    return None if r["lo_us"] is None or r["hi_us"] is None else (r["hi_us"] - r["lo_us"]) / 2 / size


def _names(flags: Iterable[str]) -> list[str]:
    return sorted({flag.partition(":")[0] for flag in flags})
