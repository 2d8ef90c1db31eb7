"""Figures of scores against a dial: curves, intervals and the mark of training lie where the scores say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Annotation

from attnbench.results import dials, figures
from attnbench.results.aggregate import summarise
from attnbench.results.dial_figures import by_dial, dial_figure, dial_name
from attnbench.results.seeds import scores

MakeRow = Callable[..., dict[str, Any]]


@pytest.fixture
def rows(make_row: MakeRow) -> list[dict[str, Any]]:
    task = {"scope": "task", "task": "copy", "suite": "recall", "direction": "train", "metric": "accuracy"}
    at_64 = {"softmax": (1.0, 0.98, 0.96), "lara": (0.5, 0.6, 0.7), "uniform": (0.1, 0.1, 0.1)}
    return [
        make_row(
            **task, mechanism=name, backend="torch", metric_better="higher", metric_value=value, seed=seed,
            control=name == "uniform", n=64,
            metrics=json.dumps(
                {"accuracy@n=32": 1.0, "accuracy@n=64": value, "accuracy@n=512": value / 2, "a@pairs=3": 1.0}
            ),
        )
        for name, per_seed in at_64.items()
        for seed, value in enumerate(per_seed)
    ]  # fmt: skip


def test_a_figure_a_dial_with_curves_where_the_scores_lie(rows: list[dict[str, Any]]) -> None:
    (group,) = by_dial(dials.curves(scores(summarise(rows))))  # one point makes no curve
    (axis,) = dial_figure(group).axes
    lines = {str(line.get_label()): line for line in axis.get_lines()}
    assert list(lines["lara/torch"].get_xdata()) == [32, 64, 512]
    assert list(lines["lara/torch"].get_ydata()) == [1.0, pytest.approx(0.6), pytest.approx(0.3)]
    assert lines["softmax/torch"].get_color() == "#1A1A1A"
    assert lines["uniform/torch"].get_linestyle() != "-"
    assert axis.get_xscale() == "log"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["32", "64", "512"]
    (mark,) = (text for text in axis.texts if isinstance(text, Annotation))
    assert (mark.get_text(), mark.xy[0]) == ("trained", 64)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("n", "accuracy")


def test_the_interval_of_every_point_is_drawn(rows: list[dict[str, Any]]) -> None:
    (group,) = by_dial(dials.curves(scores(summarise(rows))))
    (axis,) = dial_figure(group).axes
    bars = {tuple(line.get_ydata()) for line in axis.get_lines() if len(line.get_xdata()) == 2}
    lara = next(curve for curve in group if curve.label == "lara/torch")
    assert {(point.lo, point.hi) for point in lara.points} <= bars


def test_the_report_draws_it_beside_the_others_the_same_twice(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    first, again = (figures.draw(rows, tmp_path / name, ("svg",)) for name in "ab")
    (group,) = by_dial(dials.curves(scores(summarise(rows))))
    assert f"{dial_name(group)}.svg" in [path.name for path in first]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_a_name_is_safe_whatever_the_metric_is(rows: list[dict[str, Any]]) -> None:
    (group,) = by_dial(dials.curves(scores(summarise([{**row, "task": "../../x" * 99} for row in rows]))))
    assert "/" not in dial_name(group)
    assert len(dial_name(group)) < 200
