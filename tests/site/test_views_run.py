"""Runs, evidence, statuses, mechanisms, devices and tasks: what their pages say follows from the rows."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from attnbench.results.aggregate import Summary, newest, summarise
from attnbench.results.rows import canonical
from attnbench.site.views import hardware, mechanism, provenance, run, status, summary, tasks
from attnbench.site.views.case import Case, Entry, by_case, ranked
from attnbench.site.views.command import install, repeat
from attnbench.site.views.words import STATUS_ORDER, statement
from tests.site.synthetic import synthetic_rows

Row = dict[str, Any]
MakeRow = Callable[..., Row]


def summaries(rows: list[Row]) -> list[Summary]:
    return newest(summarise(rows))[0]


def of(rows: list[Row]) -> dict[Case, list[Entry]]:
    return ranked(by_case([s for s in summaries(rows) if s.get("scope") != "task"]))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return canonical(
        synthetic_rows(lengths=(256, 65536), dtypes=("bfloat16", "float32"), gpus=("h100-sxm",), runs=1)
    )


# ---- a run ---------------------------------------------------------------------------------------------


def test_runs_come_newest_first_and_count_their_rows(make_row: MakeRow) -> None:
    found = run.runs(
        canonical(
            [
                make_row(),
                make_row(run_id="later", started_at="2026-11-25T10:00:00+00:00"),
                make_row(
                    run_id="later", backend="torch", status="oom", started_at="2026-11-25T11:00:00+00:00"
                ),
            ]
        )
    )
    assert [(r.run_id, len(r.rows), r.started[:10]) for r in found] == [
        ("later", 2, "2026-11-25"),
        ("run-a", 1, "2026-11-24"),
    ]
    counts = dict(zip(STATUS_ORDER, found[0].statuses, strict=True))
    assert (counts["ok"], counts["oom"], sum(counts.values())) == (1, 1, 2)
    assert found[0].hours == pytest.approx(3.0 / 3600)


def test_evidence_has_every_block_in_order_of_execution(make_row: MakeRow) -> None:
    stamps = [f"2026-11-24T10:0{minute}:00+00:00" for minute in (2, 0, 1)]
    made = canonical([make_row(block=b, started_at=stamp) for b, stamp in enumerate(stamps)])
    (case,) = run.evidences(run.runs(made)[0])["softmax"]
    assert [(b.block, b.order) for b in case.blocks] == [(0, 3), (1, 1), (2, 2)]


def test_a_failed_block_shows_its_reason_and_log_and_no_time(make_row: MakeRow) -> None:
    made = canonical([make_row(status="error", reason="it broke", log_tail="Traceback")])
    (case,) = run.evidences(run.runs(made)[0])["softmax"]
    (block,) = case.blocks
    assert (block.status, block.reason, block.log_tail) == ("error", "it broke", "Traceback")
    assert (block.time, block.strip, block.memory) == ("–", None, "–")


def test_a_strip_has_a_bar_for_every_bin_that_has_a_sample() -> None:
    samples = [1.0] * 5 + [2.0] * 10 + [5.0]
    found = run.strip(samples)
    heights = [float(h) for h in re.findall(r"v-([\d.]+)h", found.path)]
    assert heights == [9.0, 18.0, 1.8]
    assert found.median == pytest.approx(run.STRIP_WIDTH / 4, abs=0.1)
    assert found.words == "16 samples from 1.00 to 5.00 µs"


def test_equal_samples_are_one_bar() -> None:
    assert len(re.findall("M", run.strip([3.0, 3.0]).path)) == 1


# ---- the command that repeats --------------------------------------------------------------------------


def test_the_command_names_every_choice(make_row: MakeRow) -> None:
    made = [
        make_row(
            mechanism="performer", backend="torch", dtype="bfloat16", hyper='{"num_features": 64}', block=2
        )
    ]
    words = shlex.split(repeat(canonical(made), {}, ()))
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[:2] == ["attnbench", "run"]
    assert options == {
        "--impl": "performer/torch",
        "--gpu": "cpu",
        "--preset": "tiny",
        "--pattern": "NS",
        "--seed": "0",
        "--workload": "bert_base",
        "--seqlen": "256",
        "--dtype": "bf16",
        "--direction": "fwd",
        "--blocks": "3",
        "--set": "performer.num_features=64",
    }


def test_the_command_says_all_only_for_all(make_row: MakeRow) -> None:
    made = canonical([make_row(), make_row(mechanism="lara", backend="torch")])
    assert "--impl lara,softmax " in repeat(made, {}, ("softmax", "lara", "abc"))
    assert "--impl all " in repeat(made, {}, ("softmax", "lara"))


def test_a_length_counts_keys_where_the_workload_fixes_the_queries(make_row: MakeRow) -> None:
    made = canonical([make_row(workload="decode", n=1, m=4096, pattern="NC")])
    assert "--seqlen 4096" in repeat(made, {"decode": {"n_fixed": 1}}, ())
    assert "--seqlen 1 " in repeat(made, {"decode": {"n_fixed": None}}, ()) + " "


def test_a_task_is_repeated_as_a_task(make_row: MakeRow) -> None:
    made = canonical(
        [make_row(scope="task", task="lm", suite="lm", direction="train", metric="ppl", metric_value=4.0,
                  metric_better="lower")]
    )  # fmt: skip
    command = repeat(made, {}, ())
    assert "--task lm" in command
    assert "--seqlen" not in command


def test_hostile_names_stay_one_word_of_the_command(make_row: MakeRow) -> None:
    made = canonical([make_row(workload="a; rm -rf ~", backend="$(x)")])
    words = shlex.split(repeat(made, {}, ()))
    assert "a; rm -rf ~" in words
    assert "softmax/$(x)" in words
    assert install(made) == ("attnbench 0.1.0 at commit f5f9884",)


# ---- statuses ------------------------------------------------------------------------------------------


def test_boards_count_every_case_once(rows: list[Row]) -> None:
    current = [s for s in summaries(rows) if s.get("scope") != "task"]
    found = status.boards(by_case(current))
    assert sum(board.cases for board in found) == len(current)
    cells = Counter(
        cell.status
        for board in found
        for matrix in board.matrices
        for line in matrix.lines
        for cell in line.cells
        if cell is not None
    )
    assert cells == Counter(str(s.status) for s in current)
    assert len(cells) == 9, "every status has its place in the made-up rows"


def test_a_case_that_was_not_planned_is_blank(make_row: MakeRow) -> None:
    made = [make_row(), make_row(n=512, m=512), make_row(backend="torch", status="oom", reason="no memory")]
    (board,) = status.boards(by_case(summaries(made)))
    (matrix,) = board.matrices
    cells = {line.label: line.cells for line in matrix.lines}
    assert [c and c.letter for c in cells["softmax/sdpa_flash"]] == ["✓", "✓"]
    assert [c and (c.letter, c.reason) for c in cells["softmax/torch"]] == [("M", "no memory"), None]


# ---- a mechanism ---------------------------------------------------------------------------------------


def test_curves_hold_the_medians_of_the_rows(rows: list[Row]) -> None:
    found = mechanism.mechanism("performer", {}, of(rows), [])
    checked = 0
    for _, _, tables in found.curves:
        for table in tables:
            for pattern, curves in table.patterns:
                for curve in (c for c in curves if c.kind == "own"):
                    for size, point in zip(table.sizes, curve.points, strict=True):
                        mine = [
                            r["time_us"]
                            for r in rows
                            if (r["impl"], r["pattern"], str(r["n"])) == (curve.label, pattern, size)
                            and (r["dtype"], r["direction"]) == (table.case.dtype, table.case.direction)
                            and r["scope"] == "op"
                        ]
                        assert point is not None
                        assert point.value == pytest.approx(statistics.median(mine))
                        checked += 1
    assert checked == 16


def test_baseline_and_fastest_stand_beside_the_own_curves(make_row: MakeRow) -> None:
    made = [make_row(), make_row(mechanism="lara", backend="torch", time_us=300.0),
            make_row(mechanism="abc", backend="torch", time_us=10.0)]  # fmt: skip
    found = mechanism.mechanism("lara", {}, of(made), [])
    ((_, curves),) = found.curves[0][2][0].patterns
    assert [(c.label, c.kind, c.points[0].value if c.points[0] else None) for c in curves] == [
        ("lara/torch", "own", 300.0),
        ("softmax/sdpa_flash", "baseline", 100.0),
        ("fastest of all", "fastest", 10.0),
    ]
    assert curves[-1].points[0] is not None
    assert curves[-1].points[0].note == "abc/torch"


def test_equal_failures_are_told_once_with_their_number(make_row: MakeRow) -> None:
    made = [make_row(n=n, m=n, status="unsupported", reason="no") for n in (256, 512, 1024)]
    found = mechanism.mechanism("softmax", {}, of(made), [])
    (failure,) = found.failures
    assert (failure.status, failure.reason, failure.cases, len(failure.named)) == ("unsupported", "no", 3, 2)


def test_accuracy_is_the_worst_over_the_cases(make_row: MakeRow) -> None:
    made = [
        make_row(
            mechanism="lara", backend="torch", exact=False, n=n, m=n, err_ratio=ratio, recall_mean=recall
        )
        for n, ratio, recall in ((256, 1.0, 0.9), (512, 1.5, 0.7))
    ]
    (found,) = mechanism.mechanism("lara", {}, of(made), []).accuracy
    values = dict(zip((key for key, _, _ in mechanism.ERRORS), found.values, strict=True))
    assert (found.cases, values["err_ratio"], values["recall_mean"]) == (2, 1.5, 0.7)


# ---- a device ------------------------------------------------------------------------------------------


def test_a_device_shows_measured_peaks_beside_the_vendors(rows: list[Row]) -> None:
    info = {"title": "H100", "tflops": {"bf16": 989.4}}
    found = hardware.device("h100-sxm", info, rows, summaries(rows))
    peaks = {peak.dtype: peak for peak in found.peaks}
    measured = [r["peak_tflops_measured"] for r in rows if r["dtype"] == "bfloat16" and r["status"] == "ok"]
    assert peaks["bf16"].measured == pytest.approx(statistics.median(m for m in measured if m))
    assert peaks["bf16"].texts[2] == "80.0"
    assert peaks["fp32"].vendor is None
    assert sum(found.statuses) == len(rows) == found.rows


def test_the_noise_between_blocks_needs_three_of_them(make_row: MakeRow) -> None:
    two = canonical([make_row(block=b, time_us=100.0 + b) for b in range(2)])
    assert hardware.device("cpu", {}, two, summaries(two)).noise.cases == 0
    three = canonical([make_row(block=b, time_us=100.0 + b) for b in range(3)])
    noise = hardware.device("cpu", {}, three, summaries(three)).noise
    assert noise.cases == 1
    assert noise.median == pytest.approx(statistics.stdev((100, 101, 102)) / 101, rel=0.01)


def test_environments_show_what_is_known_of_the_newest_row(make_row: MakeRow) -> None:
    made = canonical(
        [
            make_row(environment=json.dumps({"cpu": "old", "gone": None})),
            make_row(block=1, environment=json.dumps({"cpu": "new", "list": [1], "none": None, "empty": ""}),
                     started_at="2026-11-25T10:00:00+00:00"),
        ]
    )  # fmt: skip
    (found,) = provenance.environments(made)
    assert found.facts == (("cpu", "new"), ("list", "[1]"))
    assert (found.rows, found.first, found.last) == (2, "2026-11-24", "2026-11-25")


def test_flags_are_counted_by_name(make_row: MakeRow) -> None:
    made = [
        make_row(flags=["load: observed 3", "drift: observed 4 %"]),
        make_row(block=1, flags=["load: observed 2"]),
    ]
    assert [(f.name, f.rows, f.example) for f in provenance.flag_counts(made)] == [
        ("drift", 1, "drift: observed 4 %"),
        ("load", 2, "load: observed 2"),
    ]


# ---- tasks and the table for machines ------------------------------------------------------------------


def test_a_task_table_has_the_mean_over_seeds_and_controls_without_a_rank(rows: list[Row]) -> None:
    (table,) = [t for t in tasks.task_tables(summaries(rows)) if t.task == "lm"]
    means = {
        impl: statistics.mean(r["metric_value"] for r in rows if r["impl"] == impl and r["task"] == "lm")
        for impl in ("softmax/sdpa_flash", "performer/torch")
    }
    entries = {e.impl: e for e in table.entries}
    for impl, mean in means.items():
        assert entries[impl].score.value == pytest.approx(mean)
        assert len(entries[impl].seeds) == 3
    assert entries["no_mixing/torch"].rank == "–"
    assert entries["no_mixing/torch"].page == ""
    assert entries["routing_transformer/torch"].failed
    assert table.leader is not None
    assert table.leader.score.value == min(e.score.value for e in table.entries if e.score.value is not None)


def test_a_task_table_says_who_ties_with_the_best_and_what_it_does_not_measure(make_row: MakeRow) -> None:
    shared = {"scope": "task", "task": "lm", "direction": "train", "metric": "ppl", "metric_better": "lower"}
    made = [
        make_row(**shared, mechanism=name, backend="torch", control=name == "no_mixing", seed=seed,
                 metric_value=value + noise)
        for name, value in (("softmax", 4.0), ("lara", 4.1), ("abc", 9.0), ("no_mixing", 4.05))
        for seed, noise in enumerate((0.0, 0.3, -0.3))
    ]  # fmt: skip
    (table,) = tasks.task_tables(summaries(made))
    assert table.leader is not None
    assert (table.leader.impl, table.tied) == ("softmax/torch", 1)
    assert table.problems == (
        "the preset states no limits under this pattern",
        "benefit of attention 0.05: 0.2 noise units, expected 2 or more",
    )


def test_a_mechanism_finds_its_places(rows: list[Row]) -> None:
    placed = tasks.places(tasks.task_tables(summaries(rows)))["performer"]
    assert [(p.table.task, p.entry.impl) for p in placed] == [
        ("lm", "performer/torch"),
        ("recall", "performer/torch"),
    ]


def test_the_summary_has_a_line_for_every_summary(rows: list[Row]) -> None:
    everything = summaries(rows)
    operations = [s for s in everything if s.get("scope") != "task"]
    text = summary.summary_csv(
        ranked(by_case(operations)), [s for s in everything if s.get("scope") == "task"]
    )
    head, *lines = text.splitlines()
    assert len(lines) == len(everything)
    assert head.startswith("label,rank_best,rank_last,position,ratio_to_baseline,time_lo95_us")
    assert "samples_us" not in head


def test_the_statement_says_what_the_times_are(make_row: MakeRow) -> None:
    assert statement([make_row()]) == "Times are median of hot calls on a CPU; lower is better."
    assert statement([make_row(status="oom", time_kind=None)]) == ""
