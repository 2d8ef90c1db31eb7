"""One mechanism: what is known of it, where it was measured, how exact it is, and why it failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attnbench.results.aggregate import Summary
from attnbench.results.format import NONE, number
from attnbench.site.views.case import Case, Entry, case_of
from attnbench.site.views.curves import CurveTable, Failures, curve_tables, failures
from attnbench.site.views.words import DTYPE_WORDS, STATUS_ORDER

ERRORS: Final = (
    ("err_rms", "error", "relative to the fp64 truth"),
    ("err_ratio", "ratio", "× that of a plain reference in the same dtype"),
    ("grad_err_ratio", "gradient ratio", "the same for the gradients"),
    ("approx_err_recorded", "off softmax, recorded", "distance to softmax attention on recorded inputs"),
    ("approx_err_structured", "structured", "the same on structured inputs"),
    ("approx_err_gaussian", "gaussian", "the same on gaussian inputs"),
    ("density", "density", "share of the pairs that are kept"),
    ("recall_mean", "recall", "softmax mass on the kept keys"),
)


@dataclass(frozen=True)
class Accuracy:
    """The largest errors of one impl under one pattern and dtype, over ``cases`` measured cases."""

    label: str
    pattern: str
    dtype: str
    cases: int
    values: tuple[float | None, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Effort:
    """What one impl costs beside its time: compilation, launches, kernels and configurations."""

    label: str
    device: str
    statuses: tuple[int, ...]
    compile_s: str
    launches: str
    kernels: tuple[str, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Mechanism:
    """Everything that the page of a mechanism shows.

    ``info`` is its entry of the catalogue, empty if unknown.
    """

    id: str
    info: Mapping[str, Any]
    family: str
    exact: bool
    devices: tuple[str, ...]
    curves: tuple[tuple[str, str, tuple[CurveTable, ...]], ...]
    accuracy: tuple[Accuracy, ...]
    efforts: tuple[Effort, ...]
    failures: tuple[Failures, ...]


def mechanism(
    name: str, info: Mapping[str, Any], ranked: Mapping[Case, Sequence[Entry]], tasks: Iterable[Summary]
) -> Mechanism:
    """The view of ``name``, from the entries of every case and the summaries of all tasks."""
    own = [e.summary for group in ranked.values() for e in group if e.summary.get("mechanism") == name]
    trained = [s for s in tasks if s.get("mechanism") == name]
    tables: dict[tuple[str, str], list[CurveTable]] = {}
    for table in sorted(curve_tables(ranked, name), key=lambda t: (t.case.device == "cpu", t.case)):
        tables.setdefault((table.case.device, table.case.dtype_words), []).append(table)
    return Mechanism(
        id=name,
        info=info,
        family=str((own or trained)[0].get("family")),
        exact=any(s.get("exact") for s in own),
        devices=tuple(sorted({str(s.get("device")) for s in (*own, *trained)})),
        curves=tuple((device, dtype, tuple(found)) for (device, dtype), found in tables.items()),
        accuracy=tuple(_accuracies(own)),
        efforts=tuple(_efforts(own)),
        failures=tuple(failures((*own, *trained), _case_words)),
    )


def _case_words(s: Summary) -> str:
    if s.get("scope") == "task":
        return f"{s.get('task') or s.get('suite')} {s.get('pattern')} seed {s.get('seed')}"
    case = case_of(s)
    where = (case.device, case.dtype_words, case.workload, case.pattern)
    return " ".join((*where, case.size, case.direction, case.scope))


def _accuracies(own: Iterable[Summary]) -> list[Accuracy]:
    groups: dict[tuple[str, str, str], list[Summary]] = {}
    for s in own:
        if s.ok:
            dtype = str(s.get("dtype"))
            groups.setdefault((s.label, str(s.get("pattern")), DTYPE_WORDS.get(dtype, dtype)), []).append(s)
    found = []
    for key, group in sorted(groups.items()):
        values = tuple(_largest(name, group) for name, _, _ in ERRORS)
        texts = tuple(f"{v:.2g}" if v and v < 0.01 else number(v) for v in values)
        found.append(Accuracy(*key, len(group), values, texts))
    return found


def _largest(name: str, group: Iterable[Summary]) -> float | None:
    """The largest value; for a recall the smallest, for the distance of an exact impl none."""
    known = [
        float(value)
        for s in group
        if (value := s.get(name)) is not None and not (name.startswith("approx") and s.get("exact"))
    ]
    if not known:
        return None
    return min(known) if name.startswith("recall") else max(known)


def _efforts(own: Iterable[Summary]) -> list[Effort]:
    groups: dict[tuple[str, str], list[Summary]] = {}
    for s in own:
        groups.setdefault((s.label, str(s.get("device"))), []).append(s)
    found = []
    for (label, device), group in sorted(groups.items()):
        counts = Counter(s.status for s in group)
        found.append(
            Effort(
                label=label,
                device=device,
                statuses=tuple(counts[status] for status in STATUS_ORDER),
                compile_s=_span([s.get("compile_s") for s in group]),
                launches=_span([s.get("n_launches") for s in group]),
                kernels=_all(group, "kernels"),
                ops=_all(group, "ops_used"),
            )
        )
    return found


def _span(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    lo, hi = number(min(known)), number(max(known))
    return lo if lo == hi else f"{lo} – {hi}"


def _all(group: Iterable[Summary], name: str) -> tuple[str, ...]:
    return tuple(sorted({value for s in group for value in s.get(name) or ()}))
