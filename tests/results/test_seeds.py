"""Scores of tasks over seeds."""

import pytest

from attnbench.results import stats
from attnbench.results.aggregate import summarise
from attnbench.results.schema import Status
from attnbench.results.seeds import mixed_data, scores


@pytest.fixture
def seeds_of(make_row):
    """Rows of one mechanism on one task, a row a seed."""

    def rows(mechanism, values, **columns):
        shared = {
            "scope": "task",
            "direction": "train",
            "suite": "tts",
            "task": "tts",
            "metric": "mcd",
            "metric_better": "lower",
            "params": 1000,
            "data": "synthetic",
            "mechanism": mechanism,
            "backend": "torch",
            **columns,
        }
        return [
            make_row(
                seed=seed, metric_value=value, train_s=10.0 + seed, data_fingerprint=f"seed{seed}", **shared
            )
            for seed, value in enumerate(values)
        ]

    return rows


def table_of(rows):
    (table,) = scores(summarise(rows))
    return table


def test_a_score_is_the_mean_over_seeds_with_its_interval(seeds_of):
    (score,) = table_of(seeds_of("softmax", [4.0, 5.0, 6.0]))
    assert score.value == 5.0
    assert (score.lo, score.hi) == stats.t_interval([4.0, 5.0, 6.0])
    assert score.sd == 1.0
    assert score.seeds == (0, 1, 2)
    assert score.values == (4.0, 5.0, 6.0)
    assert score.train_s == 11.0
    assert (score.task, score.metric, score.better, score.params) == ("tts", "mcd", "lower", 1000)


def test_two_seeds_have_a_mean_and_no_interval(seeds_of):
    (score,) = table_of(seeds_of("softmax", [4.0, 5.0]))
    assert (score.value, score.lo, score.best) == (4.5, None, None)


@pytest.mark.parametrize(("better", "order"), [("lower", ["good", "bad"]), ("higher", ["bad", "good"])])
def test_the_metric_says_which_way_is_up(seeds_of, better, order):
    rows = seeds_of("good", [1.0, 1.1, 0.9], metric_better=better) + seeds_of(
        "bad", [9.0, 9.1, 8.9], metric_better=better
    )
    found = table_of(rows)
    assert [score.label.split("/")[0] for score in found] == order
    assert [(score.best, score.last) for score in found] == [(1, 1), (2, 2)]


def test_overlapping_intervals_share_ranks(seeds_of):
    found = table_of(seeds_of("a", [1.0, 2.0, 3.0]) + seeds_of("b", [1.5, 2.5, 3.5]))
    assert [(score.best, score.last) for score in found] == [(1, 2), (1, 2)]


def test_controls_are_shown_and_not_ranked(seeds_of):
    rows = seeds_of("identity", [3.0, 3.1, 2.9], control=True, family="control") + seeds_of(
        "softmax", [5.0, 5.1, 4.9]
    )
    control, softmax = table_of(rows)
    assert control.control
    assert control.best is None
    assert not softmax.control
    assert (softmax.best, softmax.last) == (1, 1)


def test_a_seed_that_failed_leaves_no_mean_and_says_so(seeds_of, make_row):
    rows = seeds_of("softmax", [4.0, 5.0])
    failed = {
        "scope": "task",
        "direction": "train",
        "suite": "tts",
        "mechanism": "softmax",
        "backend": "torch",
    }
    rows.append(make_row(seed=2, status="incorrect", reason="diverged", **failed))
    (score,) = table_of(rows)
    assert score.status == Status.INCORRECT
    assert score.statuses == {"ok": 2, "incorrect": 1}
    assert score.reason == "diverged"
    assert score.value is None
    assert score.values == ()


def test_failures_stand_last(seeds_of, make_row):
    failed = make_row(
        scope="task", direction="train", suite="tts", mechanism="aaa", backend="torch", status="oom"
    )
    found = table_of([failed, *seeds_of("softmax", [4.0, 5.0, 6.0])])
    assert [score.label for score in found] == ["softmax/torch", "aaa/torch"]
    assert found[1].task == "tts"


def test_tasks_presets_and_stacks_are_kept_apart(seeds_of):
    rows = [
        *seeds_of("softmax", [1.0]),
        *seeds_of("softmax", [1.0], suite="lm", task="lm"),
        *seeds_of("softmax", [1.0], preset="paper", n=512),
        *seeds_of("softmax", [1.0], software_key="x"),
        *seeds_of("softmax", [1.0], pattern="CS"),
    ]
    assert [len(table) for table in scores(summarise(rows))] == [1] * 5


def test_operations_have_no_score(make_row):
    assert scores(summarise([make_row()])) == []


def test_seeds_with_different_data_are_named(seeds_of):
    rows = seeds_of("a", [1.0, 2.0]) + seeds_of("b", [1.0, 2.0])
    assert mixed_data(table_of(rows)) == ()
    rows[3]["data_fingerprint"] = "other"
    assert mixed_data(table_of(rows)) == (1,)
