"""Figures of scores: means, seeds and controls lie where the rows say, and failures are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnbench.results import figures
from attnbench.results.aggregate import summarise
from attnbench.results.score_figures import INK, SEED, score_figure, score_name
from attnbench.results.seeds import scores

MakeRow = Callable[..., dict[str, Any]]


@pytest.fixture
def rows(make_row: MakeRow) -> list[dict[str, Any]]:
    values = {"softmax": (3.0, 3.1, 3.2), "lara": (4.0, 4.2, 4.4), "uniform": (8.0, 8.0, 8.0)}
    task = {"scope": "task", "task": "lm/x", "suite": "lm", "direction": "train", "metric": "byte_ppl"}
    found = [
        make_row(
            **task, mechanism=name, backend="torch", metric_better="lower", metric_value=value, seed=seed,
            control=name == "uniform",
        )
        for name, per_seed in values.items()
        for seed, value in enumerate(per_seed)
    ]  # fmt: skip
    failed = make_row(
        **task, mechanism="abc", backend="torch", status="incorrect", reason="not finite", seed=0
    )
    return [*found, failed]


def test_means_seeds_and_controls_lie_where_the_rows_say(rows: list[dict[str, Any]]) -> None:
    (table,) = scores(summarise(rows))
    canvas = score_figure(table)
    (axis,) = canvas.axes
    dots = [line for line in axis.get_lines() if line.get_marker() == "o"]
    assert [float(line.get_xdata()[0]) for line in dots] == [pytest.approx(3.1), pytest.approx(4.2)]
    ticks = [list(line.get_xdata()) for line in axis.get_lines() if line.get_color() == SEED]
    assert ticks == [[3.0, 3.1, 3.2], [4.0, 4.2, 4.4]]
    bars = [line for line in axis.get_lines() if line.get_color() == INK and line.get_marker() == "None"]
    assert [tuple(bar.get_xdata()) for bar in bars] == [
        (pytest.approx(s.lo), pytest.approx(s.hi)) for s in table[:2]
    ]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["softmax/torch", "lara/torch"]
    assert [text.get_text() for text in axis.texts] == ["uniform"]
    assert axis.get_xlabel() == "byte_ppl (lower is better)"


def test_what_has_no_score_is_named(rows: list[dict[str, Any]]) -> None:
    (table,) = scores(summarise(rows))
    assert [text.get_text() for text in score_figure(table).texts][-1] == "no score: abc/torch (incorrect)"


def test_a_file_for_each_table_the_same_twice(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    first, again = (figures.draw(rows, tmp_path / name, ("pdf", "svg")) for name in "ab")
    (table,) = scores(summarise(rows))
    assert [path.name for path in first] == [f"{score_name(table)}.pdf", f"{score_name(table)}.svg"]
    assert "/" not in score_name(table)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
