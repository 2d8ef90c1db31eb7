"""Damaged files: a reader gives back what was written, or says in a UsageError what is wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnbench.errors import AttnbenchError, AttnbenchWarning, UsageError
from attnbench.results import report, schema, scoring
from attnbench.results.comparison import compare_rows, tables
from attnbench.results.journal import Journal
from attnbench.results.merge import merge
from attnbench.results.read import rows as read_rows
from attnbench.results.rows import canonical
from attnbench.results.store import read_parquet, write_parquet
from attnbench.results.validate import validate

FUZZ = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CONFIG = {"impl": ["all"], "seed": 0}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def written(make_row: Callable[..., Row]) -> list[Row]:
    """Three rows that differ in status, texts and lists."""
    return [
        make_row(n=256, kernels=["a", "é漢"], flags=["load: observed 3, limit 2"]),
        make_row(n=512, status="oom", log_tail="line\nline\t\x1b[2J"),
        make_row(n=1024, time_us=3.5, samples_us=[3.4, 3.5, 3.9]),
    ]


@pytest.fixture(scope="module")
def journal(written: list[Row], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "journal.jsonl"
    with Journal.open(path, run_id="run-a", config=CONFIG) as opened:
        for row in written:
            opened.append(row)
    return path.read_bytes()


@pytest.fixture(scope="module")
def parquet(written: list[Row], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "results.parquet"
    write_parquet(written, path)
    return path.read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Callable[[bytes, str], Path]:
    def put(data: bytes, name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return put


def read_or_refused(path: Path) -> list[Row] | None:
    """Rows, None for a UsageError; any other exception is a failure of the test."""
    try:
        return read_rows([path])
    except UsageError as error:
        said = str(error)
    assert str(path) in said
    return None


def validated(path: Path) -> None:
    """Everything that is wrong is a finding, whatever it is."""
    assert all(isinstance(str(problem), str) for problem in validate([path]))


# ---- bytes ---------------------------------------------------------------------------------------------


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cuts, flips, insertions and repetitions at drawn places; a place is a share of the length."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "repeat", "drop"]))
    share = draw(st.floats(0.0, 1.0))
    junk = draw(st.binary(min_size=1, max_size=12))
    size = draw(st.integers(1, 300))

    def apply(data: bytes) -> bytes:
        at = min(int(share * len(data)), len(data) - 1)
        if kind == "cut":
            return data[:at]
        if kind == "flip":
            return data[:at] + bytes([data[at] ^ (1 + junk[0] % 255)]) + data[at + 1 :]
        if kind == "insert":
            return data[:at] + junk + data[at:]
        if kind == "repeat":
            return data[: at + size] + data[at:]
        return data[:at] + data[at + size :]

    return apply


@FUZZ
@given(harm=damage())
def test_damaged_parquet_is_refused_or_as_it_was(parquet, written, place, harm):
    found = read_or_refused(place(harm(parquet), "x.parquet"))
    assert found in (None, canonical(written))


@FUZZ
@given(harms=st.lists(damage(), min_size=2, max_size=6))
def test_parquet_that_is_damaged_all_over_is_refused(parquet, place, harms):
    data = parquet
    for harm in harms:
        data = harm(data) or b"P"
    path = place(data, "x.parquet")
    read_or_refused(path)
    validated(path)


@FUZZ
@given(harm=damage())
def test_a_damaged_journal_is_refused_or_keeps_whole_rows(journal, written, place, harm):
    path = place(harm(journal), "journal.jsonl")
    found = read_or_refused(path)
    if found is not None:
        assert len(found) <= len(written)
    validated(path)


@FUZZ
@given(share=st.floats(0.0, 1.0))
def test_a_journal_that_is_cut_anywhere_keeps_every_row_before_the_cut(journal, written, place, share):
    data = journal[: int(share * len(journal))]
    whole = data.count(b"\n")
    path = place(data, "journal.jsonl")
    expected = canonical(written[: whole - 1]) if whole else None
    assert read_or_refused(path) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnbenchWarning)
        with Journal.open(path, run_id="run-a", config=CONFIG) as opened:
            known = opened.keys()
            missing = [row for row in written if (row["case_key"], row["block"]) not in known]
            for row in missing:
                opened.append(row)
    assert len(missing) == len(written) - max(whole - 1, 0)
    assert read_rows([path]) == canonical(written)


@FUZZ
@given(harms=st.lists(damage(), min_size=1, max_size=4))
def test_no_damaged_journal_is_continued_wrongly(journal, written, place, harms):
    data = journal
    for harm in harms:
        data = harm(data) or b"\n"
    path = place(data, "journal.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnbenchWarning)
        try:
            with Journal.open(path, run_id="run-a", config=CONFIG) as opened:
                before = len(opened.keys())
        except AttnbenchError:
            assert path.read_bytes() == data
        else:
            assert before <= len(written) + 1


# ---- lines and values ----------------------------------------------------------------------------------

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\udcff", "NaN", "../../x", "x" * 5000, "\x1b[2J"])
)
VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def _lines(journal: bytes) -> list[bytes]:
    return journal.splitlines(keepends=True)


@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_any_value_in_any_column_is_a_row_or_refused(journal, place, data):
    lines = _lines(journal)
    row = json.loads(lines[1])
    for _ in range(data.draw(st.integers(1, 3))):
        row[data.draw(st.sampled_from([*row, "mechanism", "unknown"]))] = data.draw(VALUES)
    path = place(lines[0] + json.dumps(row).encode() + b"\n", "journal.jsonl")
    found = read_or_refused(path)
    validated(path)
    if found is not None:
        refused = any(problem.severity == "error" for problem in validate([path]))
        with nullcontext() if not refused else suppress(UsageError):
            assert merge([path], path.with_name("merged.parquet")).rows == 1


@FUZZ
@given(header=st.dictionaries(st.sampled_from(["journal", "schema_version", "run_id", "config"]), VALUES))
def test_any_header_is_one_or_refused(journal, place, header):
    lines = _lines(journal)
    whole = {**json.loads(lines[0]), **header}
    read_or_refused(place(json.dumps(whole).encode() + b"\n" + lines[1], "journal.jsonl"))


@pytest.mark.parametrize(
    "number", ["1e999", "-1e999", "9" * 400, "9" * 5000, "1" + "0" * 309, "NaN", "Infinity", "-0.0e-999"]
)
def test_huge_numbers_are_refused_or_numbers(journal, place, number):
    lines = _lines(journal)
    line = lines[1].replace(b'"duration_s":1.5', b'"duration_s":' + number.encode())
    assert line != lines[1]
    found = read_or_refused(place(lines[0] + line + lines[2], "journal.jsonl"))
    assert found is None or found[0]["duration_s"] == 0.0


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"a":' * 100_000, b'"' + b"\xff" * 10, b"\xff\xfe", b"{}", b"\0"]
)
def test_a_line_that_is_no_row_is_named(journal, place, line):
    path = place(b"".join([*_lines(journal)[:2], line + b"\n", _lines(journal)[2]]), "journal.jsonl")
    with pytest.raises(UsageError, match=r"line 3|line 1"):
        read_rows([path])


@pytest.mark.parametrize("order", [(0, 1, 1), (0, 2, 1, 2), (0, 3, 2, 1)])
def test_duplicated_and_moved_lines_give_each_row_once(journal, written, place, order):
    lines = _lines(journal)
    found = read_rows([place(b"".join(lines[i] for i in order), "journal.jsonl")])
    assert found == canonical([written[i - 1] for i in dict.fromkeys(order[1:])])


def test_parquet_of_other_rows_cannot_be_told_apart_from_damage_by_its_magic(place):
    for data in (b"PAR1", b"PAR1" * 3, b"PAR1" + b"\0" * 64 + b"PAR1", b"PAR1" + b"\xff" * 64 + b"PAR1"):
        with pytest.raises(UsageError, match="cannot be read as Parquet"):
            read_parquet(place(data, "x.parquet"))


# ---- what is read is shown -----------------------------------------------------------------------------

OPTIONAL = [c.name for c in schema.COLUMNS if not c.required and c.name not in ("time_us", "reason")]


@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_rows_that_lack_what_is_optional_are_shown_all_the_same(make_row, data):
    statuses = ("ok", "oom", "timeout", "error", "skipped")
    made = [
        make_row(n=n, mechanism=name, block=block, status=data.draw(st.sampled_from(statuses)))
        for name in ("softmax", "lara")
        for n in (64, 128)
        for block in (0, 1)
    ]
    gone = data.draw(st.sets(st.sampled_from(OPTIONAL), max_size=6))
    some = data.draw(st.sets(st.integers(0, len(made) - 1), min_size=1))
    for index in some:
        made[index] = {name: value for name, value in made[index].items() if name not in gone}
    rows = canonical(made)
    assert report.build(rows).tables
    assert compare_rows(rows, rows).cases
    assert tables(compare_rows(rows[::2], rows[1::2]))
    assert scoring.score(rows, 2) is not None
