"""Hostile words on the command line: exit code 0 or 2 (1 where a check fails), never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from attnbench.cli import app
from attnbench.errors import UsageError
from attnbench.results.store import write_parquet

FUZZ = settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = ("0", "-1", "1e999", "nan", "inf", "9" * 30, "9" * 5000, "1.5", "٣", "0x10", "1_0", "")
NASTY = (
    *NUMBERS,
    *("..", "a/../b", "~", "no/such/place", "/proc/self/nothing", "x" * 5000, "\udcff"),
    *("'; drop table --", "{0}", "%s%n", "$(true)", "[bold]x[/bold", "\x1b[2J", "\r\n", "a,b,,c", ",", " "),
    *("softmax", "softmax/nope", "nope", "a/b/c", "*", "[", "family:", "family:x", "x.py:Y", "os:system"),
    *("1..", "..1", "4..2", "1..9999999999999", "16,,32", "0..8", "1/0", "0/1", "2/1", "a=b", "a.b=c", "."),
)
WORDS = st.sampled_from(NASTY) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12
)
"""An argument has no NUL; a surrogate stands for a byte that is no UTF-8."""

RUN = ["run", "--dry-run", "--gpu", "cpu", "--impl", "softmax/torch", "--workload", "tiny", "--seqlen", "16"]
RUN_OPTIONS = (
    *(
        "--impl",
        "--gpu",
        "--suite",
        "--task",
        "--workload",
        "--pattern",
        "--seqlen",
        "--dtype",
        "--direction",
    ),
    *("--preset", "--set", "--density", "--seed", "--blocks", "--shard", "--time-limit", "--threads"),
    *("--engine", "--resume"),
)
ESTIMATE = ["estimate", "--impl", "softmax", "--workload", "tiny", "--seqlen", "16"]
ESTIMATE_OPTIONS = (
    *("--gpu", "--impl", "--suite", "--workload", "--pattern", "--seqlen", "--dtype", "--direction"),
    *("--preset", "--set", "--grid", "--window", "--stride", "--dilation", "--tile"),
)


@pytest.fixture(scope="module")
def results(make_row: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "x.parquet"
    write_parquet([make_row(n=n, mechanism=m) for n in (64, 128) for m in ("softmax", "lara")], path)
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what is written under a hostile name is written here


def invoke(*arguments: str, codes: tuple[int, ...] = (0, 2)) -> None:
    """Run a command as main() does: an error of usage is exit code 2."""
    done = CliRunner().invoke(app, list(arguments))
    if isinstance(done.exception, UsageError):
        assert str(done.exception)
        return
    assert done.exception is None or isinstance(done.exception, SystemExit), (arguments, done.exception)
    assert done.exit_code in codes, (arguments, done.output)


@FUZZ
@given(options=st.lists(st.tuples(st.sampled_from(RUN_OPTIONS), WORDS), min_size=1, max_size=2))
@example(options=[("--seqlen", "9" * 5000)])
@example(options=[("--blocks", "9" * 9)])
@example(options=[("--time-limit", "nan")])
@example(options=[("--seed", "9" * 30)])
@example(options=[("--shard", "1/" + "9" * 5000)])
@example(options=[("--set", "softmax.x=" + "[" * 5000)])
@example(options=[("--impl", "\udcff.py:X")])
def test_run(options):
    invoke(*RUN, *(word for pair in options for word in pair))


@pytest.mark.parametrize("option", RUN_OPTIONS)
@pytest.mark.parametrize("word", ["", "\udcff", "9" * 5000, "../x", "\x1b[2J", "-1"])
def test_every_option_of_run(option, word):
    invoke(*RUN, option, word)


@FUZZ
@given(options=st.lists(st.tuples(st.sampled_from(ESTIMATE_OPTIONS), WORDS), min_size=1, max_size=3))
@example(options=[("--grid", "9" * 5000), ("--window", "3")])
@example(options=[("--grid", "8,8"), ("--window", "0")])
@example(options=[("--grid", "8,8"), ("--window", "3"), ("--stride", "0")])
@example(options=[("--grid", "8,8"), ("--window", "3"), ("--tile", "0,0")])
def test_estimate(options):
    invoke(*ESTIMATE, *(word for pair in options for word in pair))


@FUZZ
@given(family=WORDS, pattern=WORDS)
def test_list(family, pattern):
    invoke("list", "--json", "--family", family)
    invoke("list", "--json", "--family", family, "--pattern", pattern)


@FUZZ
@given(where=WORDS, baseline=WORDS, kind=WORDS)
def test_report(results, where, baseline, kind):
    invoke("report", where)
    invoke("report", str(results), "--baseline", baseline, "--json")
    invoke("report", str(results), "--format", kind, "--out", "report", codes=(0, 2))


@FUZZ
@given(where=WORDS)
def test_results_that_are_not_there(results, where):
    invoke("validate", where, codes=(0, 1, 2))
    invoke("score", where)
    invoke("merge", where, "--out", "merged.parquet")
    invoke("compare", where, where + "x")
    invoke("compare", str(results), where)


@FUZZ
@given(out=WORDS.filter(lambda word: word in NASTY or not word.startswith("/")))
def test_places_that_cannot_be_written(results, out):
    for command in (["merge", str(results)], ["report", str(results), "--json"], ["score", str(results)]):
        done = CliRunner().invoke(app, [*command, "--out", out])
        expected = (SystemExit, UsageError) if done.exit_code in (0, 2) else _infrastructure()
        assert done.exception is None or isinstance(done.exception, expected), (command, done.exception)


def _infrastructure() -> type[Exception]:
    from attnbench.errors import AttnbenchError

    return AttnbenchError


@FUZZ
@given(number=WORDS, fail_on=WORDS)
def test_score_and_compare_of_results(results, number, fail_on):
    invoke("score", str(results), "--min-pool", number)
    invoke("score", str(results), "--scales", number)
    invoke("compare", str(results), str(results), "--fail-on", fail_on, codes=(0, 2, 3))
    invoke("compare", str(results), str(results), "--calibration", number)
    invoke("compare", str(results), str(results), "--pairs", number, codes=(0, 2, 3))


NAMES = ("mechanism", "backend", "workload", "device", "dtype", "pattern", "direction", "suite", "reason")


@settings(FUZZ, max_examples=12)
@given(data=st.data())
def test_rows_with_hostile_texts_are_shown(make_row, tmp_path, data):
    texts = st.sampled_from([word for word in NASTY if word and word != "\udcff"])
    rows = [
        make_row(n=n, **{name: data.draw(texts) for name in data.draw(st.sets(st.sampled_from(NAMES)))})
        for n in (64, 128)
    ]
    rows[1]["case_key"] += "x"
    write_parquet(rows, tmp_path / "x.parquet")
    path = str(tmp_path / "x.parquet")
    invoke("report", path)
    invoke("score", path)
    invoke("validate", path, codes=(0, 1))
    invoke("compare", path, path, codes=(0, 2, 3))


def test_figures_of_hostile_names_stay_in_their_folder(make_row, tmp_path):
    rows = [make_row(n=n, workload=w) for n in (64, 128) for w in ("../../x", "x" * 5000, "/etc/x\n")]
    write_parquet(rows, tmp_path / "x.parquet")
    invoke("report", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "out"), "--format", "svg")
    assert len(list((tmp_path / "out").glob("*.svg"))) >= 3
    assert {path.name for path in tmp_path.iterdir()} == {"x.parquet", "out"}
