"""Efficiency lengths from measured rows: from which length on an impl is cheaper than softmax attention.

Two baselines, because they are two questions: ``softmax/torch`` materialises the scores, which is what CAB
compares with (arXiv 2210.07661); ``softmax/sdpa_flash`` is what a user would otherwise call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from attnbench.results.aggregate import Summary
from attnbench.results.efficiency import (
    Crossing,
    FittedLength,
    crossing,
    crossing_interval,
    fitted_length,
    scaling_exponent,
)
from attnbench.results.format import NONE
from attnbench.results.report import sweep_of
from attnbench.results.table import Column, Record, Table, table

BASELINES: Final = ("softmax/torch", "softmax/sdpa_flash")
QUANTITIES: Final = {"time": "time_us", "memory": "mem_peak_bytes"}
MIN_LENGTHS: Final = 3
"""Fewest common lengths of a curve and its baseline; a parabola through fewer is not a fit."""


@dataclass(frozen=True)
class EfficiencyLength:
    """Where one impl becomes cheaper than a baseline, in one quantity; ``lengths`` are those of both.

    ``fitted`` is CAB's number, kept for comparison. ``exponent`` is the slope of log cost over log n on the
    three longest lengths. ``first`` is any summary of the curve: it says on what it was measured.
    """

    first: Summary
    baseline: str
    quantity: str
    lengths: tuple[int, ...]
    crossing: Crossing
    fitted: FittedLength
    exponent: float | None


def efficiency_lengths(summaries: Iterable[Summary]) -> list[EfficiencyLength]:
    """One entry for each sweep, impl, baseline and quantity with at least three common lengths."""
    sweeps: dict[tuple[Any, ...], dict[str, dict[int, Summary]]] = {}
    for s in summaries:
        if s.ok and s.get("scope") != "task" and s.get("n") is not None:
            sweeps.setdefault(sweep_of(s), {}).setdefault(s.label, {})[s.get("n")] = s
    return [
        found
        for by_label in sweeps.values()
        for baseline in BASELINES
        if baseline in by_label
        for label in sorted(by_label)
        if label not in BASELINES
        for quantity in QUANTITIES
        for found in _length(by_label[label], by_label[baseline], baseline, quantity)
    ]


def _length(
    mine: Mapping[int, Summary], base: Mapping[int, Summary], baseline: str, quantity: str
) -> Iterable[EfficiencyLength]:
    column = QUANTITIES[quantity]
    curve, reference = _curve(mine, column), _curve(base, column)
    common = sorted(set(curve) & set(reference))
    if len(common) < MIN_LENGTHS:
        return
    here = {n: curve[n] for n in common}
    there = {n: reference[n] for n in common}
    blocks = [{n: side[n].block_times_us for n in common} for side in (mine, base)]
    replicated = quantity == "time" and all(len(xs) > 1 for side in blocks for xs in side.values())
    yield EfficiencyLength(
        first=mine[common[0]],
        baseline=baseline,
        quantity=quantity,
        lengths=tuple(common),
        crossing=crossing_interval(*blocks) if replicated else crossing(here, there),
        fitted=fitted_length(here, there),
        exponent=scaling_exponent(here),
    )


def _curve(by_length: Mapping[int, Summary], column: str) -> dict[int, float]:
    values = {n: s.time_us if column == "time_us" else s.get(column) for n, s in by_length.items()}
    return {n: float(value) for n, value in values.items() if value}


def length_tables(found: Sequence[EfficiencyLength]) -> list[Table]:
    """One table for each sweep and quantity."""
    groups: dict[tuple[Any, ...], list[EfficiencyLength]] = {}
    for e in found:
        groups.setdefault((*sweep_of(e.first), e.quantity), []).append(e)
    return [_table(group) for group in groups.values()]


def _table(group: Sequence[EfficiencyLength]) -> Table:
    first = group[0].first
    facets = ("device", "workload", "pattern", "scope", "dtype", "direction")
    title = " · ".join(str(first.get(name)) for name in facets)
    columns = (
        Column("impl", lambda r: r["impl"], numeric=False),
        Column("against", lambda r: r["baseline"], numeric=False),
        Column("cheaper from N", _crossing_cell),
        Column("95 % interval", lambda r: _ends(r["lo"], r["hi"])),
        Column("CAB's fit", partial(_rounded, "fitted")),
        Column("why not the fit", lambda r: "; ".join(r["problems"]) or NONE, numeric=False),
        Column("exponent", lambda r: NONE if r["exponent"] is None else f"{r['exponent']:.2f}"),
    )
    notes = (f"lengths {', '.join(map(str, group[0].lengths))}",)
    return table(
        f"Efficiency length, {group[0].quantity} · {title}", columns, [_record(e) for e in group], notes
    )


def _record(e: EfficiencyLength) -> Record:
    return {
        "impl": e.first.label,
        "baseline": e.baseline,
        "quantity": e.quantity,
        "side": e.crossing.side,
        "length": e.crossing.length,
        "lo": e.crossing.lo,
        "hi": e.crossing.hi,
        "fitted": e.fitted.length,
        "problems": list(e.fitted.problems),
        "exponent": e.exponent,
        "lengths": list(e.lengths),
    }


def _crossing_cell(record: Record) -> str:
    if record["side"] == "always":
        return f"≤ {record['lengths'][0]}"
    if record["side"] == "never":
        return f"> {record['lengths'][-1]}"
    return f"{record['length']:.0f}"


def _rounded(name: str, record: Record) -> str:
    return NONE if record[name] is None else f"{record[name]:.0f}"


def _ends(lo: float | None, hi: float | None) -> str:
    return NONE if lo is None or hi is None else f"{lo:.0f} – {hi:.0f}"
