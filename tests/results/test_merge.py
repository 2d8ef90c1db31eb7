"""Merging shards: every measurement once, contradictions named, order of the arguments without meaning."""

import itertools

import pytest

from attnbench import UsageError
from attnbench.results import merge, migrate, rows, schema, store
from attnbench.results.merge import differing
from attnbench.results.store import read_parquet, write_parquet


@pytest.fixture
def shards(tmp_path, make_row):
    """Three shards of one sweep; the last repeats a row of the first."""
    parts = [
        [make_row(n=256, started_at="2026-11-24T10:00:05+00:00"), make_row(n=512)],
        [make_row(n=1024, run_id="run-b"), make_row(n=1024, run_id="run-b", block=1)],
        [make_row(n=512), make_row(n=2048, status="oom")],
    ]
    paths = []
    for index, part in enumerate(parts):
        paths.append(tmp_path / f"shard{index}.parquet")
        write_parquet(part, paths[-1])
    return paths


def test_the_union_has_every_measurement_once(tmp_path, shards):
    done = merge.merge(shards, tmp_path / "all.parquet")
    assert done == merge.Merged(rows=5, duplicates=1)
    merged = read_parquet(tmp_path / "all.parquet")
    assert sorted((row["n"], row["block"]) for row in merged) == [
        (256, 0),
        (512, 0),
        (1024, 0),
        (1024, 1),
        (2048, 0),
    ]
    assert merged[-1]["n"] == 256  # the one that started last


def test_the_order_of_the_shards_does_not_matter(tmp_path, shards):
    results = set()
    for index, order in enumerate(itertools.permutations(shards)):
        out = tmp_path / f"all{index}.parquet"
        merge.merge(order, out)
        results.add(out.read_bytes())
    assert len(results) == 1


def test_merging_again_changes_nothing(tmp_path, shards):
    merge.merge(shards, tmp_path / "once.parquet")
    done = merge.merge([tmp_path / "once.parquet", *shards], tmp_path / "twice.parquet")
    assert done == merge.Merged(rows=5, duplicates=6)
    assert (tmp_path / "once.parquet").read_bytes() == (tmp_path / "twice.parquet").read_bytes()


def test_the_output_may_be_one_of_the_inputs(shards):
    merge.merge(shards, shards[0])
    assert len(read_parquet(shards[0])) == 5


def test_contradictions_are_listed_and_nothing_is_written(tmp_path, make_row):
    a, b, out = (tmp_path / f"{name}.parquet" for name in "abc")
    write_parquet([make_row(), make_row(n=512)], a)
    write_parquet([make_row(n=512, time_us=50.0), make_row(status="oom")], b)
    with pytest.raises(UsageError) as info:
        merge.merge([a, b], out)
    message = str(info.value)
    assert message.startswith("2 measurements are given twice with different values")
    assert f"{a}, row 1 and {b}, row 0" in message
    assert "time_us, min" not in message
    assert f"{a}, row 0 and {b}, row 1" in message
    assert "status" in message
    assert not out.exists()


def test_many_contradictions_are_counted(tmp_path, make_row):
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_parquet([make_row(block=block) for block in range(14)], a)
    write_parquet([make_row(block=block, time_us=7.0) for block in range(14)], b)
    with pytest.raises(UsageError, match="… and 4 more"):
        merge.merge([a, b], tmp_path / "out.parquet")


def test_the_same_case_of_two_runs_or_stacks_is_no_contradiction(tmp_path, make_row):
    path = tmp_path / "a.parquet"
    write_parquet([make_row(), make_row(run_id="run-b"), make_row(software_key="other")], path)
    assert merge.merge(path, tmp_path / "out.parquet").rows == 3


def test_another_schema_version_is_refused_unless_it_can_be_lifted(tmp_path, make_row, monkeypatch):
    path, out = tmp_path / "a.parquet", tmp_path / "out.parquet"
    write_parquet([make_row()], path)
    now = schema.SCHEMA_VERSION
    monkeypatch.setattr(schema, "SCHEMA_VERSION", now + 1)
    with pytest.raises(UsageError, match=f"schema version {now}, which cannot be lifted to {now + 1}"):
        merge.merge(path, out)
    monkeypatch.setattr(migrate, "LIFTS", {now: lambda row: {**row, "suite": "lifted"}})
    merge.merge(path, out)
    assert read_parquet(out)[0]["suite"] == "lifted"


def test_rows_that_break_the_invariant_are_refused(tmp_path, make_row, monkeypatch):
    bad = {**make_row(), "status": "oom", "reason": "it did"}
    path, out = tmp_path / "a.parquet", tmp_path / "out.parquet"
    monkeypatch.setattr(store, "check", lambda row: None)
    write_parquet([make_row(block=1), bad], path)
    monkeypatch.undo()
    with pytest.raises(
        UsageError, match=r"a\.parquet, row 1: status oom carries performance: time_us.*validate"
    ):
        merge.merge(path, out)
    assert not out.exists()


def test_differing_takes_nan_for_equal(make_row):
    (row,) = rows.canonical([make_row()])
    nan = float("nan")
    assert differing({**row, "err_rms": nan}, {**row, "err_rms": float("nan")}) == []
    assert differing({**row, "err_rms": nan}, {**row, "err_rms": 1.0}) == ["err_rms"]
