"""Report tables: what they say, and what they never hide."""

import csv
import io

import pytest

from attnbench.results import report, stats
from attnbench.results.aggregate import summarise
from attnbench.results.table import Column, table, to_csv, to_markdown


def blocks(make_row, times, **columns):
    return [make_row(block=block, time_us=time, **columns) for block, time in enumerate(times)]


@pytest.fixture
def sweep(make_row):
    """One case with a baseline, an exact rival, an approximation and every kind of failure."""
    approximate = {"mechanism": "performer", "backend": "torch", "family": "linear", "exact": False}
    return [
        *blocks(make_row, [1000.0, 1010.0, 990.0]),
        *blocks(
            make_row, [500.0, 520.0, 480.0], backend="triton", flags=["thermal: observed 90 °C, limit 80 °C"]
        ),
        *blocks(make_row, [505.0, 525.0, 485.0], approx_err_gaussian=0.21, **approximate),
        make_row(backend="flex", status="compile_error", reason="no g++"),
        make_row(backend="reference", status="oom", reason="out of memory"),
        *[
            make_row(backend="fla", block=b, status=s, reason="r")
            for b, s in enumerate(["timeout", "unsupported"])
        ],
        make_row(backend="fla", block=2),
    ]


@pytest.fixture
def case_table(sweep):
    (found,) = report.case_tables(summarise(sweep))
    return found


def cells(found, header):
    return [row[found.header.index(header)] for row in found.rows]


def test_a_case_table_is_titled_by_what_its_rows_share(case_table):
    assert case_table.title == "cpu · bert_base · NS · float32 · fwd · N=256"
    assert case_table.header == (
        "rank",
        "impl",
        "time µs",
        "95 % interval µs",
        "× vs softmax/sdpa_flash",
        "peak memory KiB",
        "error vs fp64",
        "error vs softmax",
        "status",
    )


def test_measured_rows_come_first_by_time_then_failures_by_severity(case_table):
    assert cells(case_table, "impl") == [
        "softmax/triton",
        "performer/torch",
        "softmax/sdpa_flash",
        "softmax/flex",
        "softmax/reference",
        "softmax/fla",
    ]
    assert cells(case_table, "rank") == ["1–2", "1–2", "3", "–", "–", "–"]


def test_a_failure_has_its_reason_and_no_number(case_table):
    assert case_table.rows[3] == (
        "–",
        "softmax/flex",
        "–",
        "–",
        "–",
        "–",
        "–",
        "exact",
        "compile_error: no g++",
    )
    assert case_table.rows[5][-1] == "timeout (1 timeout, 1 unsupported, 1 ok): r"
    assert case_table.rows[5][2] == "–"


def test_flags_are_shown_by_name_and_kept_in_full(case_table):
    assert case_table.rows[0][-1] == "ok ⚑ thermal"
    assert case_table.records[0]["flags"] == ["thermal: observed 90 °C, limit 80 °C"]


def test_times_have_the_digits_of_their_interval(case_table):
    lo, hi = stats.block_interval([1000.0, 1010.0, 990.0])
    assert case_table.rows[2][2:4] == ("1000", f"[{lo:.0f}, {hi:.0f}]")


def test_speed_ups_are_over_the_baseline_with_an_interval(case_table):
    triton, base = case_table.records[0], case_table.records[2]
    expected = stats.ratio_interval([1000.0, 1010.0, 990.0], [500.0, 520.0, 480.0])
    assert (triton["speedup"], triton["speedup_lo"], triton["speedup_hi"]) == (2.0, expected.lo, expected.hi)
    assert base["speedup"] == 1.0
    assert base["speedup_lo"] is None
    assert cells(case_table, "× vs softmax/sdpa_flash")[:3] == ["2.00", "1.98", "1.00"]


def test_exact_mechanisms_are_called_so_and_others_have_their_error(case_table):
    assert cells(case_table, "error vs softmax")[:3] == ["exact", "2.1e-01", "exact"]


def test_another_baseline_changes_ratios_only(sweep):
    (first,) = report.case_tables(summarise(sweep))
    (second,) = report.case_tables(summarise(sweep), baseline="softmax/triton")
    at = first.header.index("× vs softmax/sdpa_flash")
    assert second.header[at] == "× vs softmax/triton"
    assert [row[:at] + row[at + 1 :] for row in first.rows] == [
        row[:at] + row[at + 1 :] for row in second.rows
    ]
    assert second.records[2]["speedup"] == 0.5


def test_a_missing_baseline_is_noted(make_row):
    (found,) = report.case_tables(summarise([make_row(backend="triton")]))
    assert "the baseline softmax/sdpa_flash was not measured here" in found.notes
    assert found.records[0]["speedup"] is None


def test_one_block_is_called_preliminary(make_row):
    (found,) = report.case_tables(summarise([make_row()]))
    assert found.rows[0][0] == "~1"
    assert any(note.startswith("preliminary") for note in found.notes)


def test_lengths_and_stacks_have_tables_of_their_own_in_reading_order(make_row):
    rows = [make_row(n=n) for n in (2048, 512, 10000)] + [
        make_row(pattern="CS"),
        make_row(software_key="other", n=512),
    ]
    titles = [found.title.split(" · ", 2)[2] for found in report.case_tables(summarise(rows))]
    assert titles == [
        "CS · float32 · fwd · N=256",
        "NS · float32 · fwd · N=512",
        "NS · float32 · fwd · N=2k",
        "NS · float32 · fwd · N=10000",
        "NS · float32 · fwd · N=512",
    ]


def test_cross_lengths_and_layers_are_told_in_the_title(make_row):
    (found,) = report.case_tables(summarise([make_row(pattern="NC", m=77, scope="layer")]))
    assert found.title == "cpu · bert_base · NC · float32 · fwd · layer · N=256 M=77"


def test_every_case_ends_in_the_status_table(sweep, make_row):
    (found,) = report.status_tables(summarise([*sweep, make_row(n=512)]))
    assert found.header == ("impl", "ok", "oom", "timeout", "compile_error", "cases")
    assert found.rows[0] == ("performer/torch", "1", "–", "–", "–", "1")
    assert found.rows[-1] == ("all", "4", "1", "1", "1", "7")
    by_impl = {row[0]: row[1:] for row in found.rows}
    assert by_impl["softmax/sdpa_flash"] == ("2", "–", "–", "–", "2")


def test_the_task_table(make_row):
    shared = {
        "scope": "task",
        "direction": "train",
        "suite": "tts",
        "task": "tts",
        "metric": "mcd",
        "metric_better": "lower",
        "data": "synthetic",
        "backend": "torch",
    }
    rows = [
        make_row(mechanism="a", seed=s, metric_value=v, params=12345, train_s=60.0, **shared)
        for s, v in enumerate([4.0, 4.2, 4.1])
    ]
    rows += [
        make_row(mechanism="none", seed=s, metric_value=9.0 + s, control=True, **shared) for s in range(3)
    ]
    rows += [make_row(mechanism="b", status="incorrect", reason="diverged", **shared)]
    (found,) = report.task_tables(summarise(rows))
    assert found.title == "cpu · tts · NS · preset tiny · synthetic"
    assert found.header[2] == "mcd (lower is better)"
    assert found.rows[0][:7] == ("1", "a/torch", "4.10", "0.25", "3", "12,345", "60.0")
    assert found.rows[1][:2] == ("–", "none/torch (control)")
    assert found.rows[2][:4] == ("–", "b/torch", "–", "–")
    assert found.rows[2][-1] == "incorrect: diverged"


def test_a_report_takes_the_newest_code_and_says_what_it_left_out(make_row):
    old, new = (
        make_row(commit="old"),
        make_row(commit="new", time_us=50.0, started_at="2026-11-25T00:00:00+00:00"),
    )
    whole = report.build([old, new])
    assert len(whole.tables) == 2
    assert whole.cases[0].records[0]["time_us"] == 50.0
    assert whole.notes == (
        "older summaries of the same cases left out: 1 "
        "(from another commit, preset or version of the method)",
    )


def test_a_report_of_nothing_is_empty():
    assert report.build([]).tables == ()


# ---- files -----------------------------------------------------------------------------------------------


def test_csv_has_unrounded_values_of_every_row(case_table):
    read = list(csv.DictReader(io.StringIO(to_csv([case_table, case_table]))))
    assert len(read) == 12
    assert float(read[2]["time_lo_us"]) == case_table.records[2]["time_lo_us"]
    assert read[3]["time_us"] == ""
    assert read[0]["flags"] == "thermal: observed 90 °C, limit 80 °C"
    assert to_csv([]) == "\n"


def test_markdown_is_a_table_whatever_the_cells_hold():
    found = table(
        "title",
        [Column("a", lambda r: r["a"], numeric=False), Column("b", lambda r: str(r["b"]))],
        [{"a": "pipe | and\nnew line", "b": 1}],
        ["a note"],
    )
    assert to_markdown([found]) == (
        "### title\n\n| a | b |\n| :--- | ---: |\n| pipe \\| and new line | 1 |\n\n- a note\n"
    )
    assert to_markdown([]) == ""
    assert to_markdown([found, found]).count("### title") == 2
