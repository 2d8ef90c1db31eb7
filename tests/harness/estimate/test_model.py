"""Modelled bounds: by hand for softmax attention, labelled, and never a row of results."""

import json
import subprocess
import sys

import pytest
import torch

from attnbench import UsageError
from attnbench.cli import app
from attnbench.harness.config import RunConfig
from attnbench.harness.devices import hardware
from attnbench.harness.estimate.model import estimate, estimates, mask_tiles, sheets
from attnbench.harness.estimate.neighborhoods import simulate
from attnbench.harness.estimate.show import LABEL, estimate_json, estimate_table
from attnbench.harness.measure import Measurer
from attnbench.impls.case import Case, Workload
from attnbench.results import read, rows

SHAPE = Workload("shape", batch=2, heads=8, kv_heads=2, head_dim=64)


def case(**changes):
    values = {
        "mechanism": "softmax",
        "backend": "reference",
        "pattern": "NS",
        "workload": SHAPE,
        "n": 4096,
        "m": 4096,
        "dtype": "bfloat16",
        "direction": "fwd",
        "device": "b200",
    }
    return Case(**values | changes)


def test_softmax_by_hand():
    found = estimate(case(), hardware("b200"))
    flops = 4 * 2 * 8 * 4096 * 4096 * 64
    moved = 2 * (2 * 8 + 2 * 2) * 4096 * 64 * 2  # q and o of 8 heads, k and v of 2
    assert (found.flops, found.flops_dense, found.moved_bytes) == (flops, flops, moved)
    assert found.intensity == flops / moved
    assert found.ridge == pytest.approx(2250e12 / 8e12)
    assert found.limit == "compute"
    assert found.bound_us == found.dense_us == pytest.approx(flops / 2250e12 * 1e6)
    assert found.memory_bytes == moved + 2 * 8 * 4096 * 4  # and the log-sum-exp
    assert found.fits
    assert found.tile_speedup is None


def test_a_backward_adds_two_and_a_half_forwards_and_the_gradients():
    forward, both = (estimate(case(direction=d), hardware("b200")) for d in ("fwd", "fwd_bwd"))
    assert both.flops == forward.flops * 7 // 2
    assert both.moved_bytes == 2 * forward.moved_bytes
    assert both.memory_bytes > 1.9 * forward.memory_bytes


def test_few_queries_are_bound_by_memory():
    found = estimate(case(pattern="CS", n=1), hardware("b200"))
    assert found.limit == "memory"
    assert found.bound_us == pytest.approx(found.moved_bytes / 8e12 * 1e6)


def test_what_does_not_fit_is_said():
    wide = Workload("wide", batch=64, heads=128, kv_heads=128, head_dim=128)
    assert estimate(case(workload=wide, n=65536, m=65536), hardware("rtx-4090")).fits is False


def test_an_unpublished_peak_leaves_no_bound():
    found = estimate(case(dtype="float64"), hardware("b200"))
    assert (found.bound_us, found.limit, found.ridge) == (None, None, None)


def test_a_window_visits_few_tiles_and_uses_them_badly():
    found = estimate(case(mechanism="local_window", pattern="CS", n=1024, m=1024), hardware("b200"))
    assert found.tile_speedup == pytest.approx(64 / 15)  # 8 tiles on the diagonal, 7 below it
    assert found.tile_efficiency == pytest.approx((1024 * 15 - 105) / (15 * 128 * 128), rel=1e-3)
    long = estimate(case(mechanism="local_window", n=8192, m=8192), hardware("b200"))
    assert long.tile_speedup is None


def test_masks_are_counted_in_tiles():
    mask = torch.zeros(5, 7, dtype=torch.bool)
    assert mask_tiles(mask, 2, 3) is None
    mask[0, 0] = mask[4, 6] = mask[4, 5] = True
    found = mask_tiles(mask, 2, 3)
    assert (found.visited, found.dense, found.pairs) == (3, 9, 3)


def test_a_request_is_planned_like_a_run():
    request = RunConfig(
        impl=("softmax/reference", "softmax/torch", "nystromformer"),
        workload=("tiny",),
        pattern=("NS",),
        direction=("fwd",),
    )
    found = estimates(request, "h100")
    assert [(e.mechanism, e.n, e.gpu) for e in found] == [
        (mechanism, n, gpu)
        for gpu in ("h100-sxm", "h100-pcie")
        for mechanism in ("nystromformer", "softmax")
        for n in (256,)
    ]
    assert {e.dtype for e in found} == {"bfloat16"}


def test_a_measured_case_has_the_same_work():
    """The formulas of a run and of an estimate are one."""
    shape = Workload("small", batch=1, heads=2, kv_heads=1, head_dim=16)
    asked = case(
        workload=shape, n=32, m=32, backend="torch", direction="fwd_bwd", dtype="float32", device="cpu"
    )
    measurer = Measurer(
        {
            "device": "cpu",
            "timing": "tiny",
            "gate_max_n": 64,
            "preset": "tiny",
            "threads": 1,
            "checkpoints": "",
        }
    )
    row = measurer.measure(asked, lambda message: None)
    modelled = estimate(asked, hardware("b200"))
    assert row["status"] == "ok", row
    assert (row["flops"], row["flops_dense"], row["bytes_min"]) == (
        modelled.flops,
        modelled.flops_dense,
        modelled.moved_bytes,
    )
    assert row["roofline_measured_pct"] == pytest.approx(100 * row["roofline_measured_us"] / row["time_us"])
    assert row["peak_tflops_measured"] > 0
    assert row["peak_gbps_measured"] > 0
    assert row["tuned_config"] is None


@pytest.mark.parametrize("asked", ["cpu", "auto", "voodoo2"])
def test_only_gpus_with_figures_are_modelled(asked):
    with pytest.raises(UsageError, match=f"unknown device to model '{asked}'"):
        sheets(asked)


def test_tasks_have_no_formula():
    with pytest.raises(UsageError, match="observed --task"):
        estimates(RunConfig(task=("lm",)), "b200")


def test_estimates_are_labelled_and_are_no_results(tmp_path):
    found = [estimate(case(), hardware("b200"))]
    shown = estimate_json(found)
    assert shown["modelled"] is True
    assert "not measured" in shown["note"]
    assert LABEL in estimate_table(found).notes
    with pytest.raises(ValueError, match="case_key is missing"):
        rows.check(shown["estimates"][0])
    for name in ("estimate.parquet", "journal.jsonl"):
        path = tmp_path / name
        path.write_text(json.dumps(shown))
        with pytest.raises(UsageError):
            read.rows(path)


def test_a_neighborhood_is_read_from_text():
    found = simulate("30,48,80", "18,24,24", "16,8,8", tile="4,8,8/2,8,8")
    assert found["tile_speedup"] == pytest.approx(10.42, abs=0.005)
    assert simulate("256,256", "80", "16")["tile_efficiency"] == 1.0
    for arguments, words in (
        (("", "3"), "--grid ''"),
        (("8,8", ""), "--window ''"),
        (("8,x", "3"), "--grid '8,x': expected positive numbers"),
        (("8,8", "3,3,3"), "expected one value or 2"),
        (("2,2,2,2", "2"), "observed rank 4"),
        (("8,8", "3", "1", "1", "4,4/4"), "observed rank 2 and 1"),
    ):
        with pytest.raises(UsageError, match=words):
            simulate(*arguments)


def test_the_command_prints_labelled_json():
    from typer.testing import CliRunner

    arguments = ["estimate", "--impl", "softmax", "--gpu", "b200", "--workload", "tiny", "--seqlen", "64"]
    done = CliRunner().invoke(app, [*arguments, "--pattern", "NS", "--json"], catch_exceptions=False)
    shown = json.loads(done.stdout)
    assert shown["modelled"] is True
    assert [e["n"] for e in shown["estimates"]] == [64]
    done = CliRunner().invoke(app, ["estimate", "--grid", "64", "--window", "16", "--stride", "16"])
    assert "not measured" in done.stdout


def test_the_simulator_needs_no_torch():
    code = "import sys, attnbench.harness.estimate.neighborhoods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
