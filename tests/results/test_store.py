"""Rows in Parquet: they come back as they were, or the reader hears why not."""

import errno
import os
import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench import AttnbenchError, UsageError
from attnbench.results import rows, schema, store
from attnbench.results.store import read_parquet, write_parquet


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.parquet"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_valid_rows_round_trip(data, any_rows):
    given_rows = data.draw(any_rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.parquet"
        write_parquet(given_rows, path)
        assert read_parquet(path) == rows.canonical(given_rows)


def test_the_file_explains_itself_and_is_compressed(path, make_row):
    write_parquet([make_row(block=block) for block in range(200)], path)
    file = pq.ParquetFile(path)
    assert file.schema_arrow.metadata[b"attnbench_schema_version"] == str(schema.SCHEMA_VERSION).encode()
    assert file.schema_arrow.field("time_us").metadata[b"unit"] == "µs".encode()
    column = file.metadata.row_group(0).column(file.schema_arrow.get_field_index("impl"))
    assert column.compression == "ZSTD"
    assert "RLE_DICTIONARY" in column.encodings


def test_equal_rows_give_equal_bytes(path, tmp_path, make_row):
    write_parquet([make_row()], path)
    write_parquet([make_row()], tmp_path / "again.parquet")
    assert path.read_bytes() == (tmp_path / "again.parquet").read_bytes()


def test_no_rows_are_a_valid_file(path):
    write_parquet([], path)
    assert read_parquet(path) == []


def test_an_invalid_row_is_a_programming_error_and_leaves_the_old_file(path, make_row):
    write_parquet([make_row()], path)
    with pytest.raises(ValueError, match="invalid row"):
        write_parquet([make_row(), make_row(status="timeout", reason="")], path)
    assert len(read_parquet(path)) == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_no_draft(path, make_row, monkeypatch):
    write_parquet([make_row()], path)

    def full(table, target, **kwargs):
        Path(target).write_bytes(b"PAR1 half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.pq, "write_table", full)
    with pytest.raises(AttnbenchError, match="No space left on device; nothing was changed"):
        write_parquet([make_row(block=1)], path)
    assert read_parquet(path)[0]["block"] == 0
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file_and_no_draft(path, make_row, monkeypatch):
    def interrupted(table, target, **kwargs):
        Path(target).write_bytes(b"PAR1 half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(store.pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_parquet([make_row()], path)
    assert list(path.parent.iterdir()) == []


# ---- files that are not ours, or no longer ---------------------------------------------------------------


def changed(path, change):
    """Write the file again with ``change`` applied to its table, as another program would."""
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    return path


def test_a_missing_file_is_a_usage_error(path):
    with pytest.raises(UsageError, match="does not exist"):
        read_parquet(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all", b"PAR1" + b"\0" * 500 + b"PAR1"])
def test_another_kind_of_file_is_a_usage_error(path, content):
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        read_parquet(path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_a_usage_error(path, make_row, keep):
    write_parquet([make_row(block=block) for block in range(20)], path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UsageError, match=r"cannot be read as Parquet .*attnbench merge"):
        read_parquet(path)


def test_every_flipped_byte_of_the_data_is_found(path, make_row):
    """Pages carry checksums: no flipped byte of them may come back as a number."""
    rng = random.Random(0)
    samples = [[rng.uniform(90.0, 110.0) for _ in range(3000)] for _ in range(5)]
    write_parquet([make_row(block=block, samples_us=found) for block, found in enumerate(samples)], path)
    expected = read_parquet(path)
    data = path.read_bytes()
    refused = 0
    for position in range(4, len(data) - 4, len(data) // 150):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        try:
            assert read_parquet(path) == expected  # a byte of the footer that carries no meaning for us
        except UsageError:
            refused += 1
    assert refused > 75


def test_foreign_parquet_is_a_usage_error(path):
    pq.write_table(pa.table({"time": [1.0], "name": ["x"]}), path)
    with pytest.raises(UsageError, match=r"not of attnbench: observed no schema version .*time, name"):
        read_parquet(path)


def test_a_pandas_frame_with_our_columns_is_still_foreign(path, make_row):
    write_parquet([make_row()], path)
    changed(path, lambda table: table.replace_schema_metadata({b"pandas": b"{}"}))
    with pytest.raises(UsageError, match="no schema version"):
        read_parquet(path)


@pytest.mark.parametrize(
    ("version", "message"), [(b"99", "newer attnbench"), (b"one", "version 'one'"), (b"-1", "'-1'")]
)
def test_versions_that_are_newer_or_none_are_usage_errors(path, make_row, version, message):
    write_parquet([make_row()], path)
    changed(path, lambda table: table.replace_schema_metadata({b"attnbench_schema_version": version}))
    with pytest.raises(UsageError, match=message):
        read_parquet(path)


def test_a_newer_file_is_refused_before_its_columns_are_judged(path, make_row):
    write_parquet([make_row()], path)
    now = schema.SCHEMA_VERSION
    newer = {b"attnbench_schema_version": str(now + 1).encode()}
    changed(path, lambda t: t.append_column("energy", pa.array([1.0])).replace_schema_metadata(newer))
    with pytest.raises(
        UsageError, match=f"observed schema version {now + 1}, expected at most {now}; update"
    ):
        read_parquet(path)


def test_columns_that_the_version_does_not_explain_are_named(path, make_row):
    write_parquet([make_row()], path)
    changed(
        path,
        lambda t: (
            t.drop_columns(["case_key"])
            .append_column("energy", pa.array([1.0]))
            .set_column(t.schema.get_field_index("n") - 1, "n", pa.array(["256"]))
        ),
    )
    with pytest.raises(UsageError) as info:
        read_parquet(path)
    message = str(info.value)
    assert "unknown columns energy" in message
    assert "no case_key" in message
    assert "n of type string instead of int64" in message


def test_a_column_twice_is_refused(path, make_row):
    write_parquet([make_row()], path)
    table = pq.read_table(path)
    twice = table.append_column("time_us", pa.array([5.0]))
    pq.write_table(twice, path)
    with pytest.raises(UsageError, match="columns twice time_us"):
        read_parquet(path)


def test_missing_optional_columns_are_null(path, make_row):
    write_parquet([make_row()], path)
    changed(path, lambda table: table.drop_columns(["tokens_per_s", "flags"]))
    (row,) = read_parquet(path)
    assert row["tokens_per_s"] is None
    assert row["flags"] is None
    assert list(row) == [c.name for c in schema.COLUMNS]


def test_a_hive_like_folder_adds_no_column(tmp_path, make_row):
    path = tmp_path / "energy=5" / "results.parquet"
    write_parquet([make_row()], path)
    assert read_parquet(path) == rows.canonical([make_row()])
