"""The tables and the Parquet of ``attnbench score``: scorecards as plain data, without a renderer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from attnbench.results.dials import DialCurve
from attnbench.results.format import NONE
from attnbench.results.scorecard import Placed, Scorecard, Verdict
from attnbench.results.table import Column, Record, Table, table

SCORES: Final = pa.schema(
    [
        pa.field("kind", pa.string()),  # score, position, benefit, index, correlation
        pa.field("device", pa.string()),
        pa.field("preset", pa.string()),
        pa.field("software_key", pa.string()),
        pa.field("suite", pa.string()),
        pa.field("task", pa.string()),
        pa.field("pattern", pa.string()),
        pa.field("metric", pa.string()),
        pa.field("impl", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("lo", pa.float64()),
        pa.field("hi", pa.float64()),
        pa.field("n", pa.int64()),  # seeds, or mechanisms of a correlation
        pa.field("constants", pa.string()),
        pa.field("note", pa.string()),
    ]
)
"""One value a row, with what it was computed from; the schema of ``scores.parquet``."""


def tables(cards: Iterable[Scorecard], curves: Sequence[DialCurve] = ()) -> list[Table]:
    """For each card: which tasks measure attention, all scores, positions, indices, correlations, dials."""
    found: list[Table] = []
    for card in cards:
        where = f"{card.device} · preset {card.preset}"
        found.append(_verdict_table(card, where))
        found += _score_tables(card, where)
        found += [_index_table(card, suite, where) for suite in card.indices if card.indices[suite]]
        found += [t for t in (_pattern_table(card, where), _task_table(card, where)) if t is not None]
    return found + _dial_tables(curves)


# ---- tasks ---------------------------------------------------------------------------------------------


def _verdict_table(card: Scorecard, where: str) -> Table:
    columns = (
        Column("task", lambda r: r["task"], numeric=False),
        Column("pattern", lambda r: r["pattern"], numeric=False),
        Column("metric", lambda r: f"{r['metric']} ({r['better']} is better)", numeric=False),
        Column("softmax", partial(_value, "softmax")),
        Column("no mixing", partial(_value, "no_mixing")),
        Column("benefit", partial(_value, "benefit")),
        Column("95 % interval", lambda r: _range(r["benefit_lo"], r["benefit_hi"])),
        Column("noise units", partial(_value, "units")),
        Column("exact forms tie", lambda r: {True: "yes", False: "no", None: NONE}[r["tie"]], numeric=False),
        Column("measures attention", lambda r: r["problem"] or "yes", numeric=False),
    )
    return table(f"Benefit of attention · {where}", columns, [_verdict_record(v) for v in card.verdicts])


def _verdict_record(v: Verdict) -> Record:
    gain = v.benefit
    return {
        "suite": v.suite,
        "task": v.task,
        "pattern": v.pattern,
        "metric": v.metric,
        "better": v.better,
        "softmax": v.softmax.value if v.softmax else None,
        "no_mixing": v.no_mixing.value if v.no_mixing else None,
        "benefit": gain.value if gain else None,
        "benefit_lo": gain.lo if gain else None,
        "benefit_hi": gain.hi if gain else None,
        "units": gain.units if gain else None,
        "tie": v.tie,
        "problem": f"not discriminating: {'; '.join(v.problems)}" if v.problems else None,
    }


def _score_tables(card: Scorecard, where: str) -> list[Table]:
    """One table a suite: mechanisms down, tasks across, each cell mean ± half-width (position)."""
    found = []
    for suite in dict.fromkeys(v.suite for v in card.verdicts):
        places = [(v.task, v.pattern) for v in card.verdicts if v.suite == suite]
        cells: dict[str, dict[tuple[str, str], Placed]] = {}
        for p in card.placed:
            if (p.score.task, p.score.pattern) in places and p.score.suite == suite:
                cells.setdefault(p.score.label, {})[p.score.task, p.score.pattern] = p
        records = [{"impl": label, **_row_of(cells[label])} for label in sorted(cells)]
        columns = [Column("impl", lambda r: r["impl"], numeric=False)]
        columns += [Column(f"{t} {p}", partial(_score_cell, f"{t} {p}")) for t, p in places]
        notes = (
            "mean over seeds ± half of the 95 % interval; in brackets the position between no mixing (0) "
            "and softmax (1), where the seeds tell these two apart",
        )
        found.append(table(f"Scores · {suite} · {where}", columns, records, notes))
    return found


def _row_of(cells: Mapping[tuple[str, str], Placed]) -> dict[str, Any]:
    return {
        f"{task} {pattern}": {
            "value": p.score.value,
            "lo": p.score.lo,
            "hi": p.score.hi,
            "seeds": len(p.score.seeds),
            "position": p.position,
            "status": str(p.score.status),
        }
        for (task, pattern), p in cells.items()
    }


def _score_cell(name: str, record: Record) -> str:
    cell = record.get(name)
    if cell is None:
        return NONE
    if cell["value"] is None:
        return str(cell["status"])
    half = "" if cell["lo"] is None else f" ± {(cell['hi'] - cell['lo']) / 2:.2g}"
    position = "" if cell["position"] is None else f" ({round(cell['position'], 2) + 0.0:.2f})"
    return f"{cell['value']:.4g}{half}{position}"


# ---- indices and correlations --------------------------------------------------------------------------


def _index_table(card: Scorecard, suite: str, where: str) -> Table:
    constants = card.constants[suite]
    names = list(dict.fromkeys((i.pattern, i.task) for i in card.indices[suite]))
    by_impl: dict[str, dict[str, Any]] = {}
    for index in card.indices[suite]:
        by_impl.setdefault(index.mechanism, {})[_index_name(index.pattern, index.task)] = index.value
    records = [{"impl": impl, **values} for impl, values in sorted(by_impl.items())]
    columns = [Column("impl", lambda r: r["impl"], numeric=False)]
    columns += [Column(_index_name(p, t), partial(_value, _index_name(p, t))) for p, t in names]
    notes = [f"constants: {constants.name}; a mechanism without a task has no index of the pattern"]
    notes += [f"left out, {m.pattern} {m.backbone} {m.name}: {why}" for m, why in constants.left_out.items()]
    return table(f"Compositional index · {suite} · {where}", columns, records, notes)


def _index_name(pattern: str, task: str) -> str:
    return f"{pattern} {task}" if task else f"{pattern} all"


def _pattern_table(card: Scorecard, where: str) -> Table | None:
    return _matrix("Pattern correlation", card.by_pattern, where)


def _task_table(card: Scorecard, where: str) -> Table | None:
    return _matrix("Task correlation", card.by_task, where)


def _matrix(title: str, cells: Mapping[tuple[str, str], Any], where: str) -> Table | None:
    names = list(dict.fromkeys(a for a, _ in cells))
    if len(names) < 2:
        return None
    records = [{"": a, **{b: _correlation(cells[a, b]) for b in names}} for a in names]
    columns = [Column("", lambda r: r[""], numeric=False)]
    columns += [Column(b, partial(_correlation_cell, b)) for b in names]
    notes = ("Pearson's r over the mechanisms that have both indices (their number); blank below four",)
    return table(f"{title} · {where}", columns, records, notes)


def _correlation(c: Any) -> dict[str, Any]:
    return {"n": c.n, "pearson": c.pearson, "spearman": c.spearman, "lo": c.lo, "hi": c.hi}


def _correlation_cell(name: str, record: Record) -> str:
    cell = record[name]
    return f"({cell['n']})" if cell["pearson"] is None else f"{cell['pearson']:.2f} ({cell['n']})"


# ---- dials ---------------------------------------------------------------------------------------------


def _dial_tables(curves: Sequence[DialCurve]) -> list[Table]:
    groups: dict[tuple[str, str, str, str, str], list[DialCurve]] = {}
    for c in curves:
        groups.setdefault((c.task, c.pattern, c.preset, c.metric, c.dial), []).append(c)
    found = []
    for (task, pattern, preset, metric, dial), group in groups.items():
        xs = sorted({p.x for c in group for p in c.points})
        records = [{"impl": c.label, **{str(p.x): p.value for p in c.points}} for c in group]
        columns = [Column("impl", lambda r: r["impl"], numeric=False)]
        columns += [Column(f"{dial}={x}", partial(_value, str(x))) for x in xs]
        trained = next((c.trained for c in group if c.trained is not None), None)
        notes = () if trained is None else (f"trained at {dial}={trained}",)
        found.append(table(f"{task} · {pattern} · {metric} · preset {preset}", columns, records, notes))
    return found


def _value(name: str, record: Record) -> str:
    value = record.get(name)
    return NONE if value is None else f"{value:.4g}"


def _range(lo: float | None, hi: float | None) -> str:
    return NONE if lo is None or hi is None else f"{lo:.3g} – {hi:.3g}"


# ---- Parquet -------------------------------------------------------------------------------------------


def write(cards: Iterable[Scorecard], path: Path) -> int:
    """Write every number of the cards to a Parquet file, one a row; returns how many. Replaces the file."""
    records = [record for card in cards for record in _records(card)]
    found = pa.Table.from_pylist(records, SCORES)
    part = path.with_suffix(".part")
    pq.write_table(found, part)
    part.replace(path)
    return len(records)


def _records(card: Scorecard) -> Iterable[dict[str, Any]]:
    where = {"device": card.device, "preset": card.preset, "software_key": card.software_key}
    for p in card.placed:
        s = p.score
        what = {"suite": s.suite, "task": s.task, "pattern": s.pattern, "metric": s.metric, "impl": s.label}
        note = s.reason or None
        yield {"kind": "score", **where, **what, "value": s.value, "lo": s.lo, "hi": s.hi, "n": len(s.seeds),
               "note": note}  # fmt: skip
        yield {"kind": "position", **where, **what, "value": p.position, "n": len(s.seeds), "note": p.verdict}
    for v in card.verdicts:
        gain = v.benefit
        yield {
            "kind": "benefit",
            **where,
            **{"suite": v.suite, "task": v.task, "pattern": v.pattern, "metric": v.metric},
            **({"value": gain.value, "lo": gain.lo, "hi": gain.hi} if gain else {}),
            "note": "; ".join(v.problems) or None,
        }
    for suite, found in card.indices.items():
        for i in found:
            yield {"kind": "index", **where, "suite": suite, "task": i.task or None, "pattern": i.pattern,
                   "impl": i.mechanism, "value": i.value, "constants": i.constants,
                   "note": "; ".join(i.missing) or None}  # fmt: skip
    for kind, cells in (("pattern_correlation", card.by_pattern), ("task_correlation", card.by_task)):
        for (a, b), c in cells.items():
            yield {"kind": kind, **where, "task": f"{a} ~ {b}", "value": c.pearson, "lo": c.lo, "hi": c.hi,
                   "n": c.n}  # fmt: skip
