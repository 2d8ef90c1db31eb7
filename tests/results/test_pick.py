"""What is picked, from hand-made rows whose answer is plain: bounds, ties, failures and missing lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnbench.cli import app
from attnbench.errors import UsageError
from attnbench.results.pick import Question, pick, to_table
from attnbench.results.store import write_parquet

MakeRow = Callable[..., dict[str, Any]]
ASKED = Question("NS", 256, "fp32")


def _blocks(make_row: MakeRow, name: str, times: tuple[float, ...], **more: Any) -> list[dict[str, Any]]:
    exact = more.pop("exact", True)
    return [
        make_row(mechanism=name, backend="torch", block=b, time_us=t, exact=exact, **more)
        for b, t in enumerate(times)
    ]


@pytest.fixture
def rows(make_row: MakeRow) -> list[dict[str, Any]]:
    return [
        *_blocks(make_row, "softmax", (100.0, 101.0, 102.0)),
        *_blocks(make_row, "window", (50.0, 50.5, 51.0), exact=False, approx_err_recorded=0.3),
        *_blocks(make_row, "kernelised", (20.0, 20.2, 20.4), exact=False, approx_err_recorded=0.9),
        make_row(mechanism="hungry", backend="torch", status="oom", reason="no memory"),
        *_blocks(make_row, "softmax", (400.0, 401.0, 402.0), n=1024),
    ]


def test_the_fastest_wins_and_the_second_is_the_runner_up(rows: list[dict[str, Any]]) -> None:
    (answer,) = pick(rows, ASKED)
    assert answer.best is not None
    assert answer.runner_up is not None
    assert (answer.best.label, answer.best.time_us) == ("kernelised/torch", 20.2)
    assert answer.runner_up.label == "window/torch"
    assert "2.5 times as fast as window/torch" in answer.reason
    assert answer.rejected == (("hungry/torch", "oom: no memory"),)


def test_the_bound_on_the_error_rejects_by_name(rows: list[dict[str, Any]]) -> None:
    (answer,) = pick(rows, Question("NS", 256, "float32", max_error=0.5))
    assert [c.label for c in answer.candidates] == ["window/torch", "softmax/torch"]
    assert ("kernelised/torch", "error 0.90 above 0.5") in answer.rejected
    (exact,) = pick(rows, Question("NS", 256, "float32", max_error=0.0))
    assert [c.label for c in exact.candidates] == ["softmax/torch"]
    assert exact.reason == "softmax/torch is the only impl with an error of at most 0"


def test_an_unknown_error_is_no_small_error(make_row: MakeRow) -> None:
    rows = _blocks(make_row, "mystery", (1.0, 1.0, 1.0), exact=False)
    (bounded,) = pick(rows, Question("NS", 256, "fp32", max_error=1.0))
    assert bounded.best is None
    assert bounded.rejected == (("mystery/torch", "its error on recorded inputs was not measured"),)
    (free,) = pick(rows, ASKED)
    assert free.best is not None
    assert free.best.error is None


def test_overlapping_intervals_are_called_a_tie(make_row: MakeRow) -> None:
    rows = [*_blocks(make_row, "a", (100.0, 101.0, 102.0)), *_blocks(make_row, "b", (100.5, 101.5, 102.5))]
    (answer,) = pick(rows, ASKED)
    assert [c.tied for c in answer.candidates] == [True, True]
    assert answer.reason.startswith("a tie: the intervals of a/torch, b/torch overlap")
    assert [line[0] for line in to_table(answer, ASKED).rows] == ["pick (tie)", "runner-up (tie)"]


def test_single_blocks_are_compared_by_value_and_say_so(make_row: MakeRow) -> None:
    (answer,) = pick(
        [*_blocks(make_row, "a", (100.0,)), *_blocks(make_row, "b", (100.5,))], ASKED
    )  # fmt: skip
    assert answer.best is not None
    assert (answer.best.label, answer.best.tied) == ("a/torch", False)
    assert "a single block" in answer.reason


@pytest.mark.parametrize(("n", "nearest"), [(512, (256, 1024)), (128, (256,)), (4096, (1024,))])
def test_a_missing_length_names_its_neighbours(
    rows: list[dict[str, Any]], n: int, nearest: tuple[int, ...]
) -> None:
    (answer,) = pick(rows, Question("NS", n, "fp32"))
    assert (answer.best, answer.nearest) == (None, nearest)
    assert all(str(length) in answer.reason for length in (n, *nearest))
    assert "cannot tell" in answer.reason


def test_only_the_newest_software_is_asked(make_row: MakeRow) -> None:
    old = _blocks(make_row, "a", (1.0, 1.0, 1.0), software_key="old", started_at="2026-01-01T00:00:00+00:00")
    (answer,) = pick([*old, *_blocks(make_row, "b", (9.0, 9.0, 9.0))], ASKED)
    assert [c.label for c in answer.candidates] == ["b/torch"]


def test_every_workload_has_its_answer(make_row: MakeRow) -> None:
    rows = [
        *_blocks(make_row, "a", (1.0, 1.0, 1.0)),
        *_blocks(make_row, "a", (2.0, 2.0, 2.0), workload="llm"),
    ]
    assert [answer.workload for answer in pick(rows, ASKED)] == ["bert_base", "llm"]
    assert len(pick(rows, Question("NS", 256, "fp32", workload="llm"))) == 1


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Question("CC", 256, "fp32"), "unknown pattern 'CC'"),
        (Question("NS", 256, "bf16"), "unknown dtype 'bfloat16'"),
        (Question("NS", 256, "fp32", device="h200"), "unknown device 'h200'"),
        (Question("NS", 256, "fp32", scope="layer"), "rows of the scopes op, expected some of scope layer"),
    ],
)
def test_what_no_row_has_is_refused(rows: list[dict[str, Any]], question: Question, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pick(rows, question)


def test_several_devices_must_be_told_apart(rows: list[dict[str, Any]], make_row: MakeRow) -> None:
    both = [*rows, *_blocks(make_row, "a", (1.0, 1.0, 1.0), device="h200")]
    with pytest.raises(UsageError, match="expected one of cpu, h200"):
        pick(both, ASKED)
    (answer,) = pick(both, Question("NS", 256, "fp32", device="h200"))
    assert answer.device == "h200"


def test_the_answer_is_json(rows: list[dict[str, Any]]) -> None:
    (answer,) = pick(rows, ASKED)
    plain = json.loads(json.dumps(answer.plain(), allow_nan=False))
    assert plain["best"]["label"] == "kernelised/torch"
    assert plain["tied"] == []


# ---- the command ---------------------------------------------------------------------------------------


def test_the_command_names_the_pick_and_exits_with_1_where_data_cannot_tell(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_parquet(rows, tmp_path / "in.parquet")
    ask = ["pick", str(tmp_path / "in.parquet"), "--pattern", "NS", "--dtype", "fp32"]
    done = CliRunner().invoke(app, [*ask, "--seqlen", "256", "--max-error", "0.5"])
    assert done.exit_code == 0
    assert "window/torch is the fastest with an error of at most 0.5" in " ".join(done.stdout.split())
    missing = CliRunner().invoke(app, [*ask, "--seqlen", "512"])
    assert missing.exit_code == 1
    assert "nothing was measured at N=512" in " ".join(missing.stdout.split())


def test_the_command_gives_json(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_parquet(rows, tmp_path / "in.parquet")
    ask = ["pick", str(tmp_path / "in.parquet"), "--seqlen", "256", "--dtype", "fp32", "--json"]
    (answer,) = json.loads(CliRunner().invoke(app, ask).stdout)
    assert answer["best"]["label"] == "kernelised/torch"


def test_the_command_refuses_unknown_inputs(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_parquet(rows, tmp_path / "in.parquet")
    done = CliRunner().invoke(app, ["pick", str(tmp_path / "in.parquet"), "--inputs", "poems"])
    assert isinstance(done.exception, UsageError)
    assert "poems" in str(done.exception)
