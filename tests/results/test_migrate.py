"""Older results stay readable: rows are lifted version by version, or refused with the reason."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnbench import UsageError
from attnbench.results import migrate, read, rows, schema, store

HERE = Path("results.parquet")


@pytest.fixture
def two_versions_later(monkeypatch):
    """The current schema as version 3: version 1 said milliseconds, version 2 had no family."""

    def to_us(row):
        return {**{k: v for k, v in row.items() if k != "time_ms"}, "time_us": row["time_ms"] * 1e3}

    def with_family(row):
        return {**row, "family": "dense"}

    monkeypatch.setattr(schema, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(migrate, "LIFTS", {1: to_us, 2: with_family})


def old_row(make_row):
    row = make_row(time_us=2500.0)
    row["time_ms"] = row.pop("time_us") / 1e3
    del row["family"]
    return row


def test_rows_of_the_current_version_are_left_as_they_are(make_row):
    row = make_row()
    assert migrate.lift([row], schema.SCHEMA_VERSION, HERE) == [row]


def test_steps_are_taken_in_order(make_row, two_versions_later):
    (row,) = migrate.lift([old_row(make_row)], 1, HERE)
    assert row == make_row(time_us=2500.0)
    (from_two,) = migrate.lift([{"n": 1}], 2, HERE)
    assert from_two == {"n": 1, "family": "dense"}


def test_an_old_parquet_file_is_lifted(tmp_path, make_row, two_versions_later):
    path = tmp_path / "old.parquet"
    table = pa.Table.from_pylist([old_row(make_row)])
    pq.write_table(table.replace_schema_metadata({"attnbench_schema_version": "1"}), path)
    assert store.read_parquet(path) == rows.canonical([make_row(time_us=2500.0)])


def test_version_1_had_no_measured_peaks(tmp_path, make_row):
    """A file of version 1 as it was written: without the columns that came later."""
    came_later = {"peak_tflops_measured", "peak_gbps_measured"}
    came_later |= {"roofline_measured_us", "roofline_measured_pct"}
    table = rows.to_table(rows.canonical([make_row()])).drop_columns(sorted(came_later))
    path = tmp_path / "v1.parquet"
    pq.write_table(table.replace_schema_metadata({"attnbench_schema_version": "1"}), path)
    assert store.read_parquet(path) == rows.canonical([make_row()])
    assert dict.fromkeys(came_later).items() <= store.read_parquet(path)[0].items()


def test_an_old_journal_is_lifted(tmp_path, make_row, two_versions_later):
    header = {"journal": 1, "schema_version": 1, "run_id": "run-a", "config": {}}
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, old_row(make_row))))
    assert read.rows(path) == rows.canonical([make_row(time_us=2500.0)])


def test_a_lift_that_leaves_a_foreign_column_is_reported(tmp_path, make_row, two_versions_later):
    path = tmp_path / "old.parquet"
    table = pa.Table.from_pylist([{**old_row(make_row), "energy": 1.0}])
    pq.write_table(table.replace_schema_metadata({"attnbench_schema_version": "1"}), path)
    with pytest.raises(UsageError, match=r"old\.parquet: row 0: unknown column 'energy'"):
        store.read_parquet(path)


def test_a_newer_version_is_refused():
    limit = schema.SCHEMA_VERSION
    with pytest.raises(UsageError, match=rf"observed schema version 7, expected at most {limit}; update"):
        migrate.lift([], 7, HERE)


def test_a_version_without_a_way_up_is_refused(two_versions_later, monkeypatch):
    monkeypatch.delitem(migrate.LIFTS, 2)
    with pytest.raises(UsageError, match="schema version 1, which cannot be lifted to 3"):
        migrate.lift([], 1, HERE)
    with pytest.raises(UsageError, match="schema version 0, which cannot be lifted"):
        migrate.lift([], 0, HERE)


def test_the_chain_reaches_every_version_that_was_ever_written():
    assert set(migrate.LIFTS) == set(range(1, schema.SCHEMA_VERSION))
