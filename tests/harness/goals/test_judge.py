"""Verdicts on the goals from rows alone, and the report that shows them."""

import json

import pytest

from attnbench.harness.goals.judge import GOALS, races, report, verdicts
from attnbench.results import schema


def row(op, backend, samples, name="causal", n=4096, head_dim=64, direction="fwd", **changes):
    values = {
        "mechanism": f"op:{op}",
        "backend": backend,
        "hyper": json.dumps({"setting": name}),
        "head_dim": head_dim,
        "n": n,
        "direction": direction,
        "status": "ok",
        "samples_us": samples,
        "time_us": sorted(samples)[len(samples) // 2],
        "gbps_min": 1600.0,
        "peak_gbps_measured": 2000.0,
        "roofline_measured_pct": 61.2,
        **changes,
    }
    return values if values["status"] == "ok" else schema.without_performance(values)


def failed(op, backend, status, reason, **changes):
    return row(op, backend, [1.0], status=status, reason=reason, **changes)


def of(rows, words):
    (found,) = [v for v in verdicts(races(rows, "triton")) if words in f"{v.goal.op} {v.goal.words}"]
    return found


def test_a_ratio_is_taken_within_rounds():
    """Drift that hits all backends alike leaves the ratio alone."""
    ours = row("flash", "triton", [10.0, 20.0, 40.0])
    peer = row("flash", "sdpa_flash", [11.0, 22.0, 44.0])
    assert of([ours, peer], "flash ≥ 1 ").decisive == pytest.approx(1.1)


def test_the_best_peer_counts_and_the_median_decides():
    rows = []
    for n, flash_us, flex_us in ((1024, 9.0, 30.0), (4096, 12.0, 13.0), (16384, 20.0, 11.0)):
        rows += [row("flash", "triton", [10.0] * 3, n=n), row("flash", "sdpa_flash", [flash_us] * 3, n=n)]
        rows += [row("flash", "flex", [flex_us] * 3, n=n)]
    found = of(rows, "flash ≥ 1 ")
    assert [point.value for point in found.points] == pytest.approx([0.9, 1.2, 1.1])
    assert found.decisive == pytest.approx(1.1)
    assert found.met is True


def test_each_setting_of_the_recurrence_must_reach_its_goal():
    rows = []
    for name, peer_us in (("scalar", 20.0), ("vector", 9.0)):
        rows += [row("linrec", "triton", [10.0] * 3, name), row("linrec", "fla", [peer_us] * 3, name)]
    found = of(rows, "linrec")
    assert found.decisive == pytest.approx(0.9)
    assert found.met is False


def test_the_saving_is_that_of_an_ideal_kernel():
    times = {"density 1": 100.0, "density 0.5": 55.0, "density 0.1": 20.0}
    rows = [row("block_sparse", "triton", [us] * 3, name) for name, us in times.items()]
    found = of(rows, "ideal saving")
    assert [point.value for point in found.points] == pytest.approx([45 / 50, 80 / 90])
    assert found.met is True


def test_bandwidth_is_a_share_of_the_measured_copy():
    assert of([row("kv_reduce", "triton", [5.0])], "bandwidth").decisive == pytest.approx(0.8)


def test_what_was_not_measured_says_why():
    rows = [row("linrec", "triton", [10.0]), failed("linrec", "fla", "unsupported", "fla is not installed")]
    found = of(rows, "linrec")
    assert (found.met, found.decisive) == (None, None)
    assert found.reason == "fla: unsupported, fla is not installed"
    assert of([], "window").reason == "no such race was run"
    late = failed("linrec", "triton", "skipped", "time was over", name="late")
    assert of([late, *rows], "linrec").reason == found.reason


def test_a_kernel_that_is_wrong_wins_nothing():
    rows = [failed("flash", "triton", "incorrect", "differs"), row("flash", "sdpa_flash", [99.0])]
    assert of(rows, "flash ≥ 1 ").met is None


def test_the_report_has_every_goal_and_every_race():
    rows = [
        row("flash", "triton", [10.0] * 3),
        row("flash", "sdpa_flash", [15.0] * 3),
        failed("flash", "flex", "oom", "out of | memory\nfor real"),
        row("window", "triton", [10.0] * 3, "a"),
        row("window", "torch", [12.0] * 3, "a"),
        failed("window", "triton", "skipped", "time was over", name="b"),
    ]
    text = report(races(rows, "triton"), "Title", [("GPU", "H200")])
    assert text.startswith("# Title\n\n- GPU: H200\n")
    goals = text.split("## Goals")[1].split("\n## ")[0]
    assert goals.count("\n|") == len(GOALS) + 2
    assert (
        "| flash | ≥ 1 × the best of sdpa_flash, flex | 1.50 | 1.50 (causal D=64 N=4096 fwd) | 1 | yes |"
        in text
    )
    assert "| window | ≥ 1.5 × the best of torch | 1.20 | 1.20 (a D=64 N=4096 fwd) | 1 | **no** |" in text
    assert "| causal | 64 | 4096 | fwd | 10.0 | 61 | 1.50 | oom |" in text
    assert "| b | 64 | 4096 | fwd | skipped: time was over | – | – |" in text
