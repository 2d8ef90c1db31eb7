"""Validation: each defect that a file can have is found, and a sound file has none."""

import json
import math

import pytest

from attnbench import UsageError
from attnbench.results import rows, store
from attnbench.results.journal import Journal
from attnbench.results.store import write_parquet
from attnbench.results.validate import check_row, validate


@pytest.fixture
def problems_of(tmp_path, monkeypatch):
    """Write rows without the writer's own checks, and validate the file."""

    def problems(*found):
        path = tmp_path / "results.parquet"
        with monkeypatch.context() as unchecked:
            unchecked.setattr(store, "check", lambda row: None)
            write_parquet(found, path)
        return validate(path)

    return problems


def test_a_sound_file_has_no_problem(problems_of, make_row):
    task = make_row(scope="task", direction="train", metric_value=-0.5, metric_better="higher", task="t", n=9)
    assert problems_of(make_row(), make_row(block=1), make_row(n=512, status="oom"), task) == []


def test_a_problem_prints_as_one_line_with_its_place(problems_of, make_row, tmp_path):
    (problem,) = problems_of(make_row(), make_row(n=512, dtype="int4"))
    assert str(problem) == (
        f"error: {tmp_path}/results.parquet, row 1: dtype: observed 'int4', "
        "expected one of bfloat16, float16, float32, float64"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "XX"}, "pattern: observed 'XX'"),
        ({"dtype": "bf16"}, "dtype: observed 'bf16'"),
        ({"direction": "bwd"}, "direction: observed 'bwd'"),
        ({"family": "quantum"}, "family: observed 'quantum'"),
        ({"time_kind": "warm"}, "time_kind: observed 'warm'"),
        ({"impl": "other/triton"}, "impl: observed 'other/triton', expected softmax/sdpa_flash"),
        ({"direction": "train"}, "scope op with direction train"),
        ({"n": 0, "m": 9}, "n: observed 0, expected more than 0"),
        ({"block": -1}, "block: observed -1, expected 0 or more"),
        ({"compile_s": -0.1}, "compile_s: observed -0.1, expected 0 or more"),
        ({"mem_peak_bytes": -5}, "mem_peak_bytes: observed -5"),
        ({"cosine": 1.1}, "cosine: observed 1.1, expected a cosine"),
        ({"approx_cosine_recorded": -1.5}, "approx_cosine_recorded: observed -1.5"),
        ({"p25_us": 120.0}, "p25_us 120 is more than time_us 100"),
        ({"time_lo_us": 90.0, "time_hi_us": 95.0}, "time_us 100 is more than time_hi_us 95"),
        ({"min_us": 99.0, "p5_us": 98.0}, "min_us 99 is more than p5_us 98"),
        ({"samples_us": [100.0, 100.0, -1.0]}, "samples_us: observed a sample of no or negative duration"),
        ({"samples_us": [110.0, 110.0, 110.0]}, "time_us: observed 100, expected 110, the median"),
        ({"n_samples": 4}, "n_samples: observed 4, expected 5"),
        ({"roofline_us": 150.0}, "faster_than_physics: observed 100 µs, expected at least 150 µs"),
        ({"hyper": "m=3"}, "hyper: observed 'm=3', expected JSON"),
        ({"hyper": "[1]"}, "hyper: observed '[1]', expected a JSON object"),
        ({"environment": "{}"}, "environment: observed '{}', expected a JSON object with its settings"),
        ({"tuned_config": "{"}, "tuned_config: observed '{'"),
        ({"started_at": "yesterday"}, "started_at: observed 'yesterday', expected an ISO 8601 time"),
        ({"started_at": "2026-11-24T10:00:00+01:00"}, "expected UTC"),
        ({"started_at": "2026-11-24T10:00:00"}, "expected UTC"),
    ],
)
def test_a_row_that_cannot_be_true_is_an_error(problems_of, make_row, changes, message):
    (problem,) = problems_of(make_row(**changes))
    assert problem.severity == "error"
    assert problem.where == "row 0"
    assert message in problem.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": "f5f9884+dirty"}, "measured with local changes"),
        ({"measurement_version": 7}, "measurement_version 7 is not compared with 1"),
        ({"samples_us": [], "n_samples": 5}, "samples_us is empty"),
        (
            {"roofline_us": 150.0, "flags": ["faster_than_physics: observed 100 µs, limit 150 µs"]},
            "faster_than_physics",
        ),
    ],
)
def test_a_row_that_deserves_a_look_is_a_warning(problems_of, make_row, changes, message):
    (problem,) = problems_of(make_row(**changes))
    assert problem.severity == "warning"
    assert message in problem.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "status 'fine' is not one of"),
        ({"status": "oom", "reason": "r"}, "status oom carries performance: time_us"),
        ({"time_us": None}, "status ok without time_us"),
        ({"err_rms": math.nan}, "err_rms: observed nan (not a finite number)"),
        ({"err_rms": math.inf}, "err_rms: observed inf (not a finite number)"),
    ],
)
def test_the_invariant_of_the_schema_is_checked(problems_of, make_row, changes, message):
    found = problems_of({**make_row(), **changes})
    assert found
    assert message in found[0].message


def test_a_missing_environment_is_an_error(make_row):
    (row,) = rows.canonical([make_row()])
    assert check_row({**row, "environment": None}) == [("error", "environment is missing")]


def test_a_bound_that_is_only_just_met_is_fine(problems_of, make_row):
    assert problems_of(make_row(roofline_us=100.0)) == []


# ---- between rows ----------------------------------------------------------------------------------------


def test_contradicting_duplicates_are_errors_and_copies_warnings(problems_of, make_row):
    copy, contradiction = problems_of(make_row(), make_row(), make_row(time_us=50.0))
    assert (copy.severity, copy.where) == ("warning", "row 1")
    assert "the same row as" in copy.message
    assert (contradiction.severity, contradiction.where) == ("error", "row 2")
    assert "with different values: time_us" in contradiction.message


def test_duplicates_are_found_across_files(tmp_path, make_row):
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_parquet([make_row()], a)
    write_parquet([make_row(time_us=50.0)], b)
    (problem,) = validate([a, b])
    assert problem.path == b
    assert f"the same measurement as {a}, row 0" in problem.message


def test_a_key_that_stands_for_two_cases_is_an_error(problems_of, make_row):
    key = make_row()["case_key"]
    (problem,) = problems_of(make_row(), make_row(block=1, n=512, case_key=key))
    assert problem.severity == "error"
    assert problem.message == f"case_key {key} stands for two cases: n 512 after 256, m 512 after 256"


def test_null_fits_any_value_of_a_key(problems_of, make_row):
    key = make_row()["case_key"]
    assert problems_of(make_row(), make_row(block=1, status="unsupported", m=None, case_key=key)) == []


def test_a_case_with_two_keys_is_a_warning(problems_of, make_row):
    (problem,) = problems_of(make_row(), make_row(block=1, case_key="another"))
    assert problem.severity == "warning"
    assert "the same case has two keys" in problem.message


# ---- files -----------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_a_finding_beside_the_others(tmp_path, make_row):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged")
    write_parquet([make_row(n=512, dtype="int4")], tmp_path / "b.parquet")
    unreadable, row = validate(tmp_path)
    assert (unreadable.path.name, unreadable.where, unreadable.severity) == ("a.parquet", "", "error")
    assert "cannot be read as Parquet" in str(unreadable)
    assert row.path.name == "b.parquet"


def test_a_path_that_does_not_exist_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        validate(tmp_path / "absent")


def test_rows_of_a_journal_are_found_by_line(tmp_path, make_row):
    with Journal.open(tmp_path / "journal.jsonl", run_id="run-a", config={}) as journal:
        journal.append(make_row())
        journal.append(make_row(n=512, environment=json.dumps([])))
    (problem,) = validate(tmp_path)
    assert problem.where == "line 3"
    assert "environment" in problem.message


def test_rows_without_a_key_are_missing_it_and_not_each_others_duplicates(tmp_path, make_row):
    header = {"journal": 1, "schema_version": 1, "run_id": "run-a", "config": {}}
    unowned = [{k: v for k, v in make_row(time_us=t).items() if k != "software_key"} for t in (100.0, 200.0)]
    lines = [json.dumps(line) for line in (header, *unowned)]
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    assert [(p.where, p.message) for p in validate(tmp_path)] == [
        ("line 2", "software_key is missing"),
        ("line 3", "software_key is missing"),
    ]
