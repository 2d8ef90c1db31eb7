"""Scorecards from rows: does a task measure attention, where does a mechanism stand, what is written."""

import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from attnbench.cli import app
from attnbench.errors import UsageError
from attnbench.results import dials, frozen, score_report, scoring
from attnbench.results.aggregate import summarise
from attnbench.results.scorecard import judge, place, scorecards
from attnbench.results.seeds import scores
from attnbench.results.store import write_parquet

SOFTMAX, NO_MIXING = [1.0, 1.1, 1.2], [9.0, 9.1, 9.2]


@pytest.fixture
def task_rows(make_row):
    """Rows of one impl on one task, a row a seed."""

    def rows(impl, values, task="lm", pattern="CS", metrics=None, **columns):
        mechanism, backend = impl.split("/")
        shared = {
            "scope": "task",
            "direction": "train",
            "suite": "cab",
            "task": task,
            "workload": f"{task}_tiny",
            "pattern": pattern,
            "metric": "byte_ppl",
            "metric_better": "lower",
            "check_softmax": 2.0,
            "check_no_mixing": 8.0,
            "data": "synthetic",
            "mechanism": mechanism,
            "backend": backend,
            "impl": impl,
            "control": mechanism in ("no_mixing", "uniform"),
            **columns,
        }
        return [
            make_row(
                seed=seed,
                metric_value=value,
                train_s=10.0,
                data_fingerprint="f",
                metrics=json.dumps({k: v[seed] for k, v in (metrics or {}).items()}),
                **shared,
            )
            for seed, value in enumerate(values)
        ]

    return rows


@pytest.fixture
def sane(task_rows):
    """Softmax twice and no mixing, within their limits."""
    return [
        *task_rows("softmax/torch", SOFTMAX),
        *task_rows("softmax/sdpa_flash", [1.05, 1.1, 1.21]),
        *task_rows("no_mixing/torch", NO_MIXING),
    ]


def tables(rows):
    return scores(summarise(rows))


def verdict(rows):
    (table,) = tables(rows)
    return judge(table)


def test_a_task_within_its_limits_measures_attention(sane):
    found = verdict(sane)
    assert found.discriminates
    assert found.tie is True
    assert found.benefit.value == pytest.approx(8.0)
    assert found.benefit.units == pytest.approx(80.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_mixing/torch": [7.9, 9.0, 9.0]}, "no_mixing reached 7.9: below 8 is a leak"),
        ({"softmax/torch": [1.0, 1.1, 2.5]}, "softmax reached 2.5, expected below 2"),
        ({"no_mixing/torch": None}, "no score without mixing"),
        ({"softmax/torch": None, "softmax/sdpa_flash": None}, "no score of softmax attention"),
        ({"softmax/sdpa_flash": [1.8, 1.81, 1.82]}, "two exact implementations of softmax differ"),
    ],
)
def test_what_is_wrong_with_a_task_is_said(task_rows, changes, words):
    values = {
        "softmax/torch": SOFTMAX,
        "softmax/sdpa_flash": SOFTMAX,
        "no_mixing/torch": NO_MIXING,
        **changes,
    }
    found = verdict([r for impl, v in values.items() if v for r in task_rows(impl, v)])
    assert not found.discriminates
    assert any(words in problem for problem in found.problems)


def test_limits_of_a_metric_that_should_be_high(task_rows):
    columns = {"metric": "accuracy", "metric_better": "higher", "check_softmax": 0.9, "check_no_mixing": 0.1}
    good = [
        *task_rows("softmax/torch", [0.95, 0.99, 1.0], **columns),
        *task_rows("no_mixing/torch", [0.02, 0.03, 0.04], **columns),
    ]
    assert verdict(good).discriminates
    bad = [
        *task_rows("softmax/torch", [0.85, 0.99, 1.0], **columns),
        *task_rows("no_mixing/torch", [0.02, 0.03, 0.14], **columns),
    ]
    assert verdict(bad).problems == (
        "softmax reached 0.85, expected above 0.9",
        "no_mixing reached 0.14: above 0.1 is a leak",
    )


def test_a_preset_without_limits_is_not_said_to_discriminate(task_rows):
    columns = {"check_softmax": None, "check_no_mixing": None}
    rows = [
        *task_rows("softmax/torch", SOFTMAX, **columns),
        *task_rows("no_mixing/torch", NO_MIXING, **columns),
    ]
    assert verdict(rows).problems == ("the preset states no limits under this pattern",)


def test_positions_are_between_no_mixing_and_softmax(sane, task_rows):
    (table,) = tables([*sane, *task_rows("performer/torch", [3.0, 3.1, 3.2])])
    placed = {p.score.label: p for p in place(table, judge(table))}
    assert placed["softmax/torch"].position == 1.0
    assert placed["no_mixing/torch"].position == 0.0
    assert placed["performer/torch"].position == pytest.approx(0.75)
    assert placed["performer/torch"].verdict == "weak"
    assert placed["softmax/torch"].verdict == "learns"


def test_ends_that_noise_does_not_tell_apart_give_no_position(task_rows):
    rows = [*task_rows("softmax/torch", [1.0, 2.0, 3.0]), *task_rows("no_mixing/torch", [2.0, 3.0, 1.3])]
    (table,) = tables([*rows, *task_rows("performer/torch", [3.0, 3.1, 3.2])])
    assert [p.position for p in place(table, judge(table))] == [None] * 3


def pool(task_rows, task, offset=0.0, **columns):
    names = ["performer", "abc", "lara", "cosformer", "linformer"]
    return [
        row
        for i, name in enumerate(names)
        for row in task_rows(f"{name}/torch", [2 + i + offset, 2.1 + i, 2.2 + i], task, **columns)
    ]


def test_an_index_is_cut_from_mechanisms_and_leaves_controls_and_twins_out(sane, task_rows):
    (card,) = scorecards(tables([*sane, *pool(task_rows, "lm")]))
    constants = card.constants["cab"]
    assert constants.name == "cab tiny on cpu, 6 mechanisms"
    by_impl = {i.mechanism: i.value for i in card.indices["cab"] if i.task == "lm"}
    assert "softmax/sdpa_flash" not in by_impl
    members = [v for name, v in by_impl.items() if not name.startswith("no_mixing")]
    assert sum(members) == pytest.approx(0.0, abs=1e-9)  # z-scores over their own pool
    assert by_impl["softmax/torch"] == max(by_impl.values())
    assert by_impl["no_mixing/torch"] == min(by_impl.values())


def test_tasks_are_in_order_however_the_rows_were_measured(task_rows):
    rows = [
        *pool(task_rows, "zeta", suite="cab"),
        *pool(task_rows, "aleph", suite="recall"),
        *pool(task_rows, "alpha", suite="cab", pattern="NS"),
        *pool(task_rows, "alpha", suite="cab"),
    ]
    (card,) = scorecards(tables(rows))
    order = [("cab", "alpha", "CS"), ("cab", "alpha", "NS"), ("cab", "zeta", "CS"), ("recall", "aleph", "CS")]
    assert [(v.suite, v.task, v.pattern) for v in card.verdicts] == order


def test_a_task_that_does_not_discriminate_is_left_out_of_the_index_with_its_reason(task_rows, sane):
    leaky = [
        *task_rows("softmax/torch", SOFTMAX, task="sr"),
        *task_rows("no_mixing/torch", SOFTMAX, task="sr"),
        *pool(task_rows, "sr"),
    ]
    (card,) = scorecards(tables([*sane, *pool(task_rows, "lm"), *leaky]))
    assert {s.metric.task for s in card.constants["cab"].scales} == {"lm"}
    (why,) = card.constants["cab"].left_out.values()
    assert why.startswith("not discriminating: no_mixing reached 1")


def test_a_small_pool_gives_no_index_and_says_so(sane):
    (card,) = scorecards(tables(sane))
    assert card.indices["cab"] == ()
    assert "1 mechanisms of the pool" in next(iter(card.constants["cab"].left_out.values()))


def test_tasks_are_correlated_over_common_mechanisms(task_rows, sane):
    other = [
        *task_rows("softmax/torch", SOFTMAX, task="mlm"),
        *task_rows("no_mixing/torch", NO_MIXING, task="mlm"),
        *pool(task_rows, "mlm", 0.01),
    ]
    (card,) = scorecards(tables([*sane, *pool(task_rows, "lm"), *other]))
    cell = card.by_task["CS:lm", "CS:mlm"]
    assert cell.n == 6
    pattern = card.by_pattern["cab:CS", "cab:CS"]
    assert pattern.n == 6  # without the controls
    assert cell.pearson == pytest.approx(1.0, abs=1e-3)


# ---- frozen scales -------------------------------------------------------------------------------------


@pytest.fixture
def frozen_file(sane, task_rows, tmp_path):
    path = tmp_path / "pool-1.json"
    assert scoring.freeze(scoring.score([*sane, *pool(task_rows, "lm")]), path) == 1
    return path


def test_frozen_scales_do_not_move_when_a_mechanism_joins(frozen_file, sane, task_rows):
    rows = [*sane, *pool(task_rows, "lm"), *task_rows("newcomer/torch", [50.0, 51.0, 52.0])]
    old, free, kept = (
        {i.mechanism: i.value for i in card.indices["cab"] if i.task == "lm"}
        for card in (
            scorecards(tables(rows[: -len(SOFTMAX)]))[0],
            scorecards(tables(rows))[0],
            scorecards(tables(rows), frozen.load(frozen_file))[0],
        )
    )
    assert kept.pop("newcomer/torch") < min(old.values())
    assert kept == pytest.approx(old)
    assert free["abc/torch"] != pytest.approx(old["abc/torch"])


def test_an_index_on_frozen_scales_names_their_file(frozen_file, sane):
    (card,) = scorecards(tables(sane), frozen.load(frozen_file))
    assert {i.constants for i in card.indices["cab"]} == {"pool-1: cab tiny on cpu, 6 mechanisms"}


def test_scores_on_other_data_are_not_put_on_frozen_scales(frozen_file, sane, task_rows):
    rows = [{**row, "data_fingerprint": "another"} for row in [*sane, *pool(task_rows, "lm")]]
    (card,) = scorecards(tables(rows), frozen.load(frozen_file))
    assert card.indices["cab"] == ()
    assert list(card.constants["cab"].left_out.values()) == ["run on other data than the scale was cut on"]


def test_frozen_scales_without_use_are_named(frozen_file, sane):
    rows = [{**row, "preset": "small"} for row in sane]
    found = scoring.score(rows, scales=frozen.load(frozen_file))
    assert "frozen scales for cab tiny: nothing here to use them on" in found.notes


def test_two_devices_cannot_share_a_file_of_scales(sane, task_rows, tmp_path):
    there = {"device": "NVIDIA H100"}
    both = [
        *sane,
        *pool(task_rows, "lm"),
        *task_rows("softmax/torch", SOFTMAX, **there),
        *task_rows("no_mixing/torch", NO_MIXING, **there),
        *pool(task_rows, "lm", **there),
    ]
    with pytest.raises(UsageError, match="two pools for cab tiny"):
        scoring.freeze(scoring.score(both), tmp_path / "pool.json")
    assert not (tmp_path / "pool.json").exists()


def test_nothing_to_freeze_is_an_error(sane, tmp_path):
    with pytest.raises(UsageError, match="no scale of an index"):
        scoring.freeze(scoring.score(sane), tmp_path / "pool.json")


def test_scales_are_frozen_and_used_from_the_command_line(sane, task_rows, tmp_path):
    write_parquet([*sane, *pool(task_rows, "lm")], tmp_path / "rows.parquet")
    file, rows = str(tmp_path / "pool-1.json"), str(tmp_path / "rows.parquet")
    done = CliRunner().invoke(app, ["score", rows, "--freeze", file])
    assert (done.exit_code, f"1 scales in {file}" in done.output.replace("\n", "")) == (0, True)
    done = CliRunner().invoke(app, ["score", rows, "--scales", file])
    assert "pool-1: cab tiny on cpu, 6 mechanisms" in " ".join(done.output.split())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2, "sets": []}', '{"format": 1, "sets": [{"name": "x"}]}'],
)
def test_a_file_that_holds_no_scales_is_refused(text, tmp_path):
    path = tmp_path / "pool.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="observed no scales"):
        frozen.load(path)


def test_a_scale_of_no_width_is_refused(frozen_file):
    content = json.loads(frozen_file.read_text())
    content["sets"][0]["scales"][0]["sigma"] = 0.0
    frozen_file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="sigma 0"):
        frozen.load(frozen_file)


# ---- dials ---------------------------------------------------------------------------------------------


def test_metrics_at_other_lengths_become_curves(task_rows):
    metrics = {
        "accuracy@n=64": [1.0, 1.0, 1.0],
        "accuracy@n=256": [0.5, 0.6, 0.7],
        "accuracy@n=64,depth=3": [1.0, 1.0, 1.0],
        "accuracy": [1.0, 1.0, 1.0],
        "loss@pairs=8": [0.1, 0.2, 0.3],
    }
    rows = task_rows("softmax/torch", [1.0, 1.0, 1.0], task="copy", n=64, m=64, metrics=metrics)
    by_length, by_pairs = dials.curves(tables(rows))
    assert (by_length.metric, by_length.dial, by_length.trained) == ("accuracy", "n", 64)
    assert [(p.x, p.value) for p in by_length.points] == [(64, 1.0), (256, pytest.approx(0.6))]
    assert by_length.points[1].lo < 0.6 < by_length.points[1].hi
    assert (by_pairs.dial, by_pairs.trained) == ("pairs", None)
    assert dials.generalisation(by_length, "higher").extrapolation == pytest.approx(1 / 0.6)
    assert dials.generalisation(by_pairs, "lower") is None


def test_a_metric_that_was_not_finite_once_is_no_point(task_rows):
    rows = task_rows("softmax/torch", [1.0, 1.0], metrics={"loss@n=8": [0.1, None]})
    assert dials.curves(tables(rows)) == []


# ---- tables and files ----------------------------------------------------------------------------------


def test_tables_and_parquet_hold_every_score(sane, task_rows, tmp_path):
    found = scoring.score([*sane, *pool(task_rows, "lm")])
    titles = [table.title.split(" · ")[0] for table in found.tables]
    assert titles == ["Benefit of attention", "Scores", "Compositional index"]
    grid = found.tables[1]
    cells = dict(zip(grid.header, grid.rows[-1], strict=True))
    assert cells["impl"] == "softmax/torch"
    assert cells["lm CS"] == "1.1 ± 0.25 (1.00)"
    paths = scoring.write(found, tmp_path / "deep")
    assert [p.name for p in paths] == ["scores.parquet", "scores.csv", "scores.md"]
    rows = pq.read_table(paths[0]).to_pylist()
    assert pq.read_schema(paths[0]) == score_report.SCORES
    stored = {r["impl"]: r["value"] for r in rows if r["kind"] == "score"}
    assert stored["softmax/torch"] == pytest.approx(1.1)
    assert len(stored) == 8
    (gain,) = [r for r in rows if r["kind"] == "benefit"]
    assert gain["lo"] < gain["value"] < gain["hi"]


def test_a_failed_seed_is_shown_by_its_status(sane, task_rows):
    broken = [*task_rows("performer/torch", [2.0, 2.1])]
    broken.append({**broken[0], "seed": 2, "status": "incorrect", "reason": "diverged", "metric_value": None})
    grid = scoring.score([*sane, *broken]).tables[1]
    assert ("performer/torch", "incorrect") in grid.rows


def test_without_tasks_and_lengths_it_says_what_to_run(make_row):
    found = scoring.score([make_row()])
    assert found.tables == ()
    assert [note.split(":")[0] for note in found.notes] == ["no task was run", "no efficiency length"]


def test_a_folder_that_cannot_be_written_is_a_usage_error(sane, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        scoring.write(scoring.score(sane), tmp_path / "file")


def test_efficiency_lengths_come_from_rows(make_row):
    def sweep(impl, cost):
        mechanism, backend = impl.split("/")
        return [
            make_row(mechanism=mechanism, backend=backend, impl=impl, n=n, m=n, time_us=cost(n))
            for n in (256, 512, 1024, 2048)
        ]

    rows = sweep("softmax/torch", lambda n: n * n / 1000) + sweep("performer/torch", lambda n: n * 1.0)
    tables = {t.title.split(" · ")[0]: t for t in scoring.score(rows).tables}
    (record,) = tables["Efficiency length, time"].records
    assert (record["impl"], record["side"]) == ("performer/torch", "crosses")
    assert record["length"] == pytest.approx(1000, rel=1e-3)
    assert record["fitted"] == pytest.approx(1000, rel=1e-3)
    assert record["exponent"] == pytest.approx(1.0)
