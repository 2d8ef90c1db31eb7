"""The journal: written, continued, refused to others, recovered from a cut last line."""

import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench import AttnbenchWarning, UsageError
from attnbench.results import rows, schema
from attnbench.results.journal import Journal, read_journal

CONFIG = {"impl": ["all"], "seed": 0}


def opened(path, run_id="run-a", config=None):
    return Journal.open(path, run_id=run_id, config=CONFIG if config is None else config)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "journal.jsonl"


# ---- writing and going on --------------------------------------------------------------------------------


def test_rows_come_back_in_order_and_without_their_nulls(path, make_row):
    first, second = make_row(reason=None), make_row(block=1, status="oom")
    with opened(path) as journal:
        journal.append(first)
        journal.append(second)
        assert journal.rows() == [{k: v for k, v in first.items() if v is not None}, second]
        assert journal.keys() == {(first["case_key"], 0), (first["case_key"], 1)}
    lines = path.read_text().splitlines()
    header = {"journal": 1, "schema_version": schema.SCHEMA_VERSION, "run_id": "run-a", "config": CONFIG}
    assert json.loads(lines[0]) == header
    assert len(lines) == 3


def test_going_on_keeps_rows_and_knows_what_is_finished(path, make_row):
    with opened(path) as journal:
        journal.append(make_row())
    with opened(path) as journal:
        assert journal.keys() == {(make_row()["case_key"], 0)}
        journal.append(make_row(block=1))
    assert [row["block"] for row in read_journal(path).rows] == [0, 1]
    assert read_journal(path).header.run_id == "run-a"


def test_a_config_of_tuples_equals_itself_after_json(path):
    config = {"impl": ("all",), "shard": (1, 1)}
    opened(path, config=config).close()
    opened(path, config=config).close()


def test_the_same_case_and_block_twice_is_a_programming_error(path, make_row):
    with opened(path) as journal:
        journal.append(make_row())
        with pytest.raises(ValueError, match="is in the journal already"):
            journal.append(make_row())
    with opened(path) as journal, pytest.raises(ValueError, match="is in the journal already"):
        journal.append(make_row())
    assert len(read_journal(path).rows) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "fine"},
        {"time_us": float("nan")},
        {"extra": 1},
        {"time_us": None},
        {"status": "oom", "reason": ""},
    ],
)
def test_an_invalid_row_is_a_programming_error_and_writes_nothing(path, make_row, wrong):
    with opened(path) as journal:
        before = path.read_bytes()
        with pytest.raises(ValueError, match="invalid row"):
            journal.append({**make_row(), **wrong})
        assert path.read_bytes() == before
        assert journal.keys() == set()


def test_text_of_any_kind_stays_on_one_line(path, make_row):
    reason = 'a "quote"\nnew line\x00 nul\u2028 separator \U0001f600 \r'
    with opened(path) as journal:
        journal.append(make_row(status="error", reason=reason))
        assert journal.rows()[0]["reason"] == reason
    assert path.read_bytes().count(b"\n") == 2


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_valid_rows_round_trip(data, any_rows):
    given_rows = data.draw(any_rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        with opened(path) as journal:
            for row in given_rows:
                journal.append(row)
        assert rows.canonical(read_journal(path).rows) == rows.canonical(given_rows)


# ---- whose journal ---------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_until_the_first_closes(path):
    with opened(path), pytest.raises(UsageError, match="is being written by another process"):
        opened(path)
    opened(path).close()


def test_a_writer_in_another_process_is_refused(path):
    code = """
        import sys
        from attnbench import UsageError
        from attnbench.results.journal import Journal
        try:
            Journal.open(sys.argv[1], run_id="run-a", config={"impl": ["all"], "seed": 0})
        except UsageError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    with opened(path):
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    allowed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "is being written by another process" in refused.stdout
    assert allowed.stdout == ""


def test_another_run_or_configuration_is_refused(path):
    opened(path).close()
    with pytest.raises(UsageError, match="observed run_id run-a, expected run-b"):
        opened(path, run_id="run-b")
    with pytest.raises(UsageError, match=r"another configuration: impl, preset differ.*--resume"):
        opened(path, config={"impl": ["softmax"], "seed": 0, "preset": "tiny"})
    opened(path).close()  # a refused open leaves no lock behind


def test_a_journal_of_another_schema_version_is_not_continued(path, monkeypatch):
    opened(path).close()
    now = schema.SCHEMA_VERSION
    monkeypatch.setattr(schema, "SCHEMA_VERSION", now + 1)
    with pytest.raises(UsageError, match=f"observed schema_version {now}, expected {now + 1}"):
        opened(path)


@pytest.mark.parametrize("first_line", ['{"a": 1}', '{"journal": 1, "schema_version": "1", "run_id": "x"}'])
def test_a_file_of_another_kind_is_refused_untouched(path, first_line):
    path.parent.mkdir()
    path.write_text(first_line + "\n")
    with pytest.raises(UsageError, match="is not a journal"):
        opened(path)
    assert path.read_text() == first_line + "\n"


def test_a_newer_layout_is_refused(path):
    path.parent.mkdir()
    path.write_text('{"journal": 2, "rows": "elsewhere"}\n')
    with pytest.raises(UsageError, match="newer attnbench: observed journal layout 2"):
        read_journal(path)


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be opened"):
        opened(tmp_path / "file" / "journal.jsonl")
    with pytest.raises(UsageError, match="cannot be opened"):
        opened(tmp_path)


# ---- damage ----------------------------------------------------------------------------------------------


def whole_journal(path, make_row, count=3):
    with opened(path) as journal:
        for block in range(count):
            journal.append(make_row(block=block))
    return path.read_bytes()


def test_every_cut_is_recovered_without_losing_a_whole_row_or_a_byte(path, make_row):
    """Cut the file at every byte of its last line and at some before: what was whole stays."""
    data = whole_journal(path, make_row)
    start_of_last = data.rindex(b"\n", 0, -1) + 1
    for cut in [1, start_of_last - 1, *range(start_of_last + 1, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:cut])
        whole = data[:cut].rfind(b"\n") + 1
        with pytest.warns(AttnbenchWarning, match="was cut short"):
            journal = opened(path)
        with journal:
            assert len(journal.keys()) == max(data[:cut].count(b"\n") - 1, 0)
            aside = path.with_name("journal.jsonl.partial-1")
            assert aside.read_bytes() == data[whole:cut]
            assert path.read_bytes()[:whole] == data[:whole]
            aside.unlink()


def test_a_recovered_journal_goes_on(path, make_row):
    data = whole_journal(path, make_row)
    path.write_bytes(data[:-10])
    with pytest.warns(AttnbenchWarning), opened(path) as journal:
        journal.append(make_row(block=2))
    assert path.read_bytes() == data


def test_partial_tails_never_overwrite_each_other(path, make_row):
    data = whole_journal(path, make_row)
    for cut in (5, 50):
        path.write_bytes(data[:-cut])
        with pytest.warns(AttnbenchWarning):
            opened(path).close()
    names = sorted(child.name for child in path.parent.iterdir())
    assert names == ["journal.jsonl", "journal.jsonl.partial-1", "journal.jsonl.partial-2"]


def test_a_last_line_of_zeros_is_a_cut_line_too(path, make_row):
    """A power cut can leave the length of a file without its content."""
    data = whole_journal(path, make_row)
    path.write_bytes(data + b"\0" * 300 + b"rest}\n")
    with pytest.warns(AttnbenchWarning, match=r"306 bytes"), opened(path) as journal:
        assert len(journal.keys()) == 3
    assert path.read_bytes() == data


@pytest.mark.parametrize("damage", [b"{", b"", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_damage_before_the_last_line_names_file_and_line(path, make_row, damage):
    lines = whole_journal(path, make_row).splitlines()
    lines[2] = damage
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(data)
    for read in (opened, read_journal):
        with pytest.raises(UsageError, match=r"journal\.jsonl, line 3: observed .* delete line 3"):
            read(path)
    assert path.read_bytes() == data


def test_a_row_without_its_key_names_its_line(path, make_row):
    whole_journal(path, make_row)
    with path.open("a") as file:
        file.write('{"block": 0}\n')
    with pytest.raises(UsageError, match="line 5: observed a row without case_key or block"):
        opened(path)


def test_reading_a_journal_being_written_leaves_the_unfinished_line_alone(path, make_row):
    data = whole_journal(path, make_row)
    path.write_bytes(data[:-7])
    assert len(read_journal(path).rows) == 2
    assert path.read_bytes() == data[:-7]
    assert list(path.parent.iterdir()) == [path]


def test_reading_nothing_is_a_usage_error(path):
    with pytest.raises(UsageError, match="cannot be opened: No such file"):
        read_journal(path)
    path.parent.mkdir()
    path.write_bytes(b'{"journal"')
    with pytest.raises(UsageError, match="no complete line"):
        read_journal(path)
