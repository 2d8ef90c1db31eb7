"""Reading results from wherever they lie: ``attnbench.load`` and its plain-row sister."""

import numpy as np
import pandas as pd
import pytest

import attnbench
from attnbench import UsageError
from attnbench.results import read, rows, schema, sources
from attnbench.results.journal import Journal
from attnbench.results.store import write_parquet


def a_run(folder, found, finished=True):
    """A run folder as the harness leaves it: a journal, and Parquet once it is complete."""
    with Journal.open(folder / "journal.jsonl", run_id=found[0]["run_id"], config={}) as journal:
        for row in found:
            journal.append(row)
    if finished:
        write_parquet(found, folder / "results.parquet")
    return folder


@pytest.mark.parametrize("kind", ["folder", "parquet", "journal", "text", "several"])
def test_every_kind_of_path_gives_the_same_rows(tmp_path, make_row, kind):
    found = [make_row(), make_row(n=512, status="oom")]
    run = a_run(tmp_path / "run", found)
    paths = {
        "folder": run,
        "parquet": run / "results.parquet",
        "journal": run / "journal.jsonl",
        "text": str(run),
        "several": [run / "results.parquet", run / "journal.jsonl", run],
    }
    assert read.rows(paths[kind]) == rows.canonical(found)


def test_a_run_that_is_still_going_can_be_read(tmp_path, make_row):
    run = tmp_path / "run"
    with Journal.open(run / "journal.jsonl", run_id="run-a", config={}) as journal:
        journal.append(make_row())
        assert len(read.rows(run)) == 1


def test_a_journal_is_newer_than_the_parquet_beside_it(tmp_path, make_row):
    run = a_run(tmp_path / "run", [make_row()])
    with Journal.open(run / "journal.jsonl", run_id="run-a", config={}) as journal:
        journal.append(make_row(block=1))
    assert [row["block"] for row in read.rows(run)] == [0, 1]


def test_a_folder_of_results_stands_for_what_lies_in_it(tmp_path, make_row):
    a_run(tmp_path / "b", [make_row(run_id="b")])
    a_run(tmp_path / "a", [make_row(run_id="a")], finished=False)
    write_parquet([make_row(run_id="c")], tmp_path / "c.parquet")
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.md").write_text("not results")
    (tmp_path / ".hidden.parquet").write_text("a draft")
    assert [row["run_id"] for row in read.rows(tmp_path)] == ["a", "b", "c"]


def test_the_content_of_a_file_counts_not_its_name(tmp_path, make_row):
    write_parquet([make_row()], tmp_path / "results.parquet")
    renamed = (tmp_path / "results.parquet").rename(tmp_path / "upload.bin")
    assert read.rows(renamed) == rows.canonical([make_row()])


def test_paths_without_results_are_usage_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for path, message in [
        (tmp_path / "absent", "absent does not exist; expected a run folder"),
        (tmp_path / "empty", r"holds no results: observed neither journal\.jsonl nor"),
        (
            tmp_path / "notes.txt",
            "is neither a journal nor Parquet: observed a file that starts with b'hell'",
        ),
        ([], "no results given"),
    ]:
        with pytest.raises(UsageError, match=message):
            read.rows(path)


def test_an_edited_journal_names_its_lines(tmp_path, make_row):
    run = a_run(tmp_path / "run", [make_row(), make_row(block=1)], finished=False)
    text = (run / "journal.jsonl").read_text()
    (run / "journal.jsonl").write_text(text.replace('"n":256', '"n":2.5,"watts":3'))
    with pytest.raises(UsageError) as info:
        read.rows(run)
    for part in (
        "line 2: unknown column 'watts'",
        "line 2: n: observed 2.5",
        "line 3: unknown column 'watts'",
    ):
        assert part in str(info.value)


def test_locators_point_into_the_file(tmp_path, make_row):
    run = a_run(tmp_path / "run", [make_row()])
    journal = sources.read_part(run / "journal.jsonl")
    assert journal.locator(0) == "line 2"
    assert '"case_key"' in (run / "journal.jsonl").read_text().splitlines()[1]
    assert sources.read_part(run / "results.parquet").locator(0) == "row 0"


# ---- load ------------------------------------------------------------------------------------------------


@pytest.fixture
def frame(tmp_path, make_row):
    found = [
        make_row(grid=[16, 16], flags=["thermal: observed 90, limit 80"], samples_us=[99.0, 100.0, 101.0]),
        make_row(n=512, status="oom", m=None, exact=None),
    ]
    return attnbench.load(a_run(tmp_path / "run", found))


def test_load_gives_every_column_in_order(frame):
    assert list(frame.columns) == [c.name for c in schema.COLUMNS]
    assert list(frame.index) == [0, 1]


def test_load_gives_types_that_can_be_computed_with(frame):
    assert frame["time_us"].dtype == np.float64
    assert frame["n"].dtype == pd.Int64Dtype()
    assert frame["exact"].dtype == pd.BooleanDtype()
    assert isinstance(frame["impl"].dtype, pd.StringDtype)
    assert frame["started_at"].dt.tz is not None
    assert frame["started_at"][0] == pd.Timestamp("2026-11-24T10:00:00Z")
    assert frame.groupby("status").size().to_dict() == {"ok": 1, "oom": 1}


def test_load_shows_what_is_not_known_as_missing(frame):
    assert np.isnan(frame["time_us"][1])
    assert frame["m"][1] is pd.NA
    assert frame["exact"][1] is pd.NA
    assert frame["samples_us"][1] is None


def test_load_gives_lists_as_lists_and_samples_as_float32(frame):
    assert frame["grid"][0] == [16, 16]
    assert frame["flags"][0] == ["thermal: observed 90, limit 80"]
    assert frame["samples_us"][0].dtype == np.float32
    assert frame["samples_us"][0].tolist() == [99.0, 100.0, 101.0]


def test_the_example_of_the_docstring_works(frame):
    ok = frame[frame.status == "ok"]
    pivot = ok.pivot_table("time_us", index="n", columns="impl", aggfunc="median")
    assert pivot.loc[256, "softmax/sdpa_flash"] == 100.0


def test_load_of_no_rows_keeps_the_columns(tmp_path):
    write_parquet([], tmp_path / "none.parquet")
    empty = attnbench.load(tmp_path / "none.parquet")
    assert empty.empty
    assert list(empty.columns) == [c.name for c in schema.COLUMNS]
