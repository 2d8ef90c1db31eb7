"""Summaries and ranks: blocks pooled only with their like, failures never hidden, ties told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.results import stats
from attnbench.results.aggregate import SEVERITY, newest, rank, rank_ranges, summarise, worst
from attnbench.results.schema import Status


def blocks(make_row, times, **columns):
    return [make_row(block=block, time_us=time, **columns) for block, time in enumerate(times)]


def one(rows):
    (summary,) = summarise(rows)
    return summary


# ---- blocks ----------------------------------------------------------------------------------------------


def test_the_value_is_the_median_of_block_medians_with_its_interval(make_row):
    s = one(blocks(make_row, [100.0, 90.0, 130.0]))
    assert s.time_us == 100.0
    assert (s.lo_us, s.hi_us) == stats.block_interval([100.0, 90.0, 130.0])
    assert s.between_cv == stats.between_cv([100.0, 90.0, 130.0])
    assert s.block_times_us == (100.0, 90.0, 130.0)
    assert (s.blocks, s.preliminary, s.status) == (3, False, Status.OK)


@pytest.mark.parametrize(("times", "preliminary"), [([100.0], True), ([100.0, 102.0], False)])
def test_one_block_is_preliminary_and_two_have_no_interval(make_row, times, preliminary):
    s = one(blocks(make_row, times))
    assert s.preliminary is preliminary
    assert s.time_us == sum(times) / len(times)
    assert s.lo_us is None
    assert s.hi_us is None


def test_blocks_of_several_runs_are_pooled(make_row):
    s = one([make_row(run_id="a"), make_row(run_id="b"), make_row(run_id="b", block=1)])
    assert s.blocks == 3
    assert s.run_ids == ("a", "b")


@pytest.mark.parametrize(
    "other",
    [
        {"software_key": "x"},
        {"measurement_version": 2},
        {"commit": "abc"},
        {"attnbench_version": "9"},
        {"preset": "paper"},
        {"n": 512},
    ],
)
def test_measurements_of_other_things_are_not_pooled(make_row, other):
    assert len(summarise([make_row(), make_row(block=1, **other)])) == 2


def test_other_columns_are_medians_of_numbers_and_the_newest_of_the_rest(make_row):
    rows = [
        make_row(
            block=b,
            mem_peak_bytes=m,
            err_rms=e,
            flops=10,
            reason=None,
            tuned_config=c,
            started_at=f"2026-11-2{d}T00:00:00+00:00",
        )
        for b, (m, e, c, d) in enumerate(
            [(100, 0.3, "{}", 4), (103, 0.1, '{"a":1}', 6), (108, None, None, 5)]
        )
    ]
    s = one(rows)
    assert s.get("mem_peak_bytes") == 103
    assert isinstance(s.get("mem_peak_bytes"), int)
    assert s.get("err_rms") == pytest.approx(0.2)
    assert s.get("tuned_config") == '{"a":1}'
    assert s.get("flops") == 10
    assert s.get("tokens_per_s") is None
    assert s.started_at == "2026-11-26T00:00:00+00:00"


def test_flags_are_united_in_order(make_row):
    s = one(
        [
            make_row(flags=["a: 1", "b: 2"]),
            make_row(block=1, flags=["b: 2", "c: 3"]),
            make_row(block=2, flags=None),
        ]
    )
    assert s.flags == ("a: 1", "b: 2", "c: 3")


def test_a_block_that_failed_takes_the_value_away_and_stays_visible(make_row):
    rows = [
        make_row(),
        make_row(block=1, status="timeout", reason="slow"),
        make_row(block=2, status="oom", reason="full"),
    ]
    s = one(rows)
    assert s.status == Status.OOM
    assert s.reason == "full"
    assert s.statuses == {"ok": 1, "timeout": 1, "oom": 1}
    assert s.time_us is None
    assert s.block_times_us == ()
    assert s.get("mem_peak_bytes") is None  # performance
    assert s.get("err_rms") == 3e-7  # what is known of its correctness stays


def test_every_status_has_its_severity_and_ok_is_the_mildest():
    assert set(SEVERITY) == set(Status)
    assert worst(["ok", "skipped", "incorrect"]) == Status.INCORRECT
    assert worst(["ok", "ok"]) == Status.OK
    assert worst(["unsupported", "ok"]) == Status.UNSUPPORTED


def test_the_label_names_hyper_parameters_that_differ(make_row):
    assert one([make_row()]).label == "softmax/sdpa_flash"
    assert one([make_row(hyper='{"m": 64, "b": true}')]).label == "softmax/sdpa_flash b=True m=64"


def test_the_newest_code_wins_and_the_rest_is_handed_back(make_row):
    old = make_row(commit="old", started_at="2026-11-01T00:00:00+00:00")
    new = make_row(commit="new", started_at="2026-11-02T00:00:00+00:00")
    elsewhere = make_row(commit="old", software_key="other", started_at="2026-11-01T00:00:00+00:00")
    for order in ([old, new, elsewhere], [elsewhere, new, old]):
        kept, older = newest(summarise(order))
        assert {(s.get("commit"), s.software_key) for s in kept} == {("new", "5of7ware"), ("old", "other")}
        assert [s.get("commit") for s in older] == ["old"]


def test_a_preset_replaces_another_for_operations_and_not_for_tasks(make_row):
    task = {"scope": "task", "direction": "train", "metric_value": 1.0}
    for columns, kept_count in [({}, 1), (task, 2)]:
        tiny = make_row(preset="tiny", **columns)
        paper = make_row(preset="paper", started_at="2026-11-25T00:00:00+00:00", **columns)
        kept, older = newest(summarise([tiny, paper]))
        assert (len(kept), len(older)) == (kept_count, 2 - kept_count)
        assert kept[-1].get("preset") == "paper"


# ---- ranks -----------------------------------------------------------------------------------------------


def test_ranges_of_overlapping_intervals():
    intervals = [(1.0, 2.0), (1.5, 3.0), (2.5, 4.0), (5.0, 6.0)]
    assert rank_ranges(intervals) == [(1, 2), (1, 3), (2, 3), (4, 4)]
    assert rank_ranges([(1.0, 2.0), None, (3.0, 4.0)]) == [(1, 1), None, (2, 2)]
    assert rank_ranges([(1.0, 2.0), (2.0, 3.0)]) == [(1, 2), (1, 2)]  # touching is not surely faster
    assert rank_ranges([]) == []


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(0, 3)), max_size=12))
def test_some_order_of_true_values_gives_every_rank_in_range(pairs):
    """Put every true value anywhere in its interval: each rank lies in its range."""
    intervals = [(x, x + width) for x, width in pairs]
    ranges = rank_ranges(intervals)
    for share in (0.0, 0.3, 1.0):
        truths = [lo + (hi - lo) * (share if i % 2 else 1 - share) for i, (lo, hi) in enumerate(intervals)]
        for truth, around in zip(truths, ranges, strict=True):
            faster = sum(other < truth for other in truths)
            as_fast = sum(other <= truth for other in truths)
            assert around[0] <= faster + 1 <= around[1] or around[0] <= as_fast <= around[1]


def test_ranking_orders_by_value_and_tells_ties(make_row):
    rows = [
        *blocks(make_row, [100.0, 101.0, 99.0], backend="a"),
        *blocks(make_row, [100.5, 101.5, 99.5], backend="b"),
        *blocks(make_row, [50.0, 50.2, 49.8], backend="c"),
        make_row(backend="d", status="oom"),
    ]
    ranked = rank(summarise(rows))
    assert [(r.summary.get("backend"), r.text) for r in ranked] == [("c", "1"), ("a", "2–3"), ("b", "2–3")]


def test_without_an_interval_there_is_a_position_but_no_rank(make_row):
    rows = [
        *blocks(make_row, [100.0, 101.0, 99.0], backend="a"),
        *blocks(make_row, [40.0], backend="quick"),
        *blocks(make_row, [200.0, 201.0, 199.0], backend="b"),
    ]
    assert [(r.position, r.text) for r in rank(summarise(rows))] == [(1, "~1"), (2, "1"), (3, "2")]


@pytest.mark.parametrize("other", [{"software_key": "x"}, {"device": "h100"}, {"measurement_version": 2}])
def test_what_cannot_be_compared_is_not_ranked_together(make_row, other):
    summaries = summarise([make_row(), make_row(backend="b", **other)])
    with pytest.raises(ValueError, match="in one ranking"):
        rank(summaries)
