"""A sweep of mechanisms that attack the harness: each ends as it must, none reaches beyond its own row."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from attnbench.harness import process
from attnbench.harness.config import RunConfig
from attnbench.harness.run import Run, prepare, run
from attnbench.results.read import rows
from attnbench.results.schema import problems
from attnbench.results.validate import check_row

ATTACKS = Path(__file__).parent / "adversarial.py"
TIME_LIMIT_S = 24.0

EXPECTED: dict[str, tuple[str, str]] = {
    "RemembersByPointer": ("incorrect", "did not follow its input"),
    "TiresLater": ("incorrect", "from that of an earlier one on equal inputs"),
    "NanOnTheSecondCall": ("incorrect", "not finite"),
    "ReturnsItsInput": ("incorrect", "the output is a view of input 2"),
    "ReusesItsOutput": ("incorrect", "two calls return the same memory"),
    "WorksElsewhere": ("incorrect", ""),  # what it is caught at depends on when its thread runs
    "PatchesClocks": ("incorrect", "it replaced functions that measure it: time.perf_counter"),
    "PatchesTheHarness": ("incorrect", "it replaced functions that measure it: attnbench."),
    "SlowsTheClock": ("incorrect", "the clock was tampered with"),
    "ImpossibleCost": ("error", "flops: observed 1208925819614629174706176, expected int64"),
    "HangsInNativeCode": ("timeout", f"time limit of {TIME_LIMIT_S:g} s"),
    "RunsOutOfMemory": ("oom", "Cannot allocate memory"),
    "Interrupts": ("error", "KeyboardInterrupt"),
    "Leaves": ("error", "SystemExit: 0"),
    "SpeaksInRiddles": ("error", "ValueError: �[2Jgone ��"),
    "CannotBeShown": ("error", "MuteError: its message cannot be shown"),
    "DiesBehindAChild": ("crashed", "exited with code 9"),
    "ScribblesEverywhere": ("crashed", "no answer was written into the pipe"),
    "ForgesAnAnswer": ("crashed", "no answer was written into the pipe"),
    "ClosesEverything": ("crashed", "the worker process"),
}
"""Status and part of the reason, for the attacks that leave nothing to publish."""

FLAGGED = {
    "AllocatesElsewhere": {"outside_allocator"},
    "ChangesSettings": {"changed_settings", "random_state"},
    "LeaksProcesses": {"leaked_processes"},
    "ForksALot": {"leaked_processes"},
}
"""Flags that a row must have at least, for those whose numbers stand, with a warning."""

HARMLESS = ("BuildsAMask", "ForksAndGoesOn", "Honest", "HonestToo")
MAY_CARRY = {"ForksAndGoesOn": {"leaked_processes"}}
"""Its child computes for as long as it does itself: either may be the first to end."""

EVERY = (*EXPECTED, *FLAGGED, *HARMLESS)
OURS = {"outside_allocator", "changed_settings", "random_state", "leaked_processes", "hidden_saved"}
"""Flags that do not depend on who else uses the machine."""

SWEEP = pytest.mark.xdist_group("adversarial")
"""One process runs the sweep, once."""


def _config(names: tuple[str, ...], **values: Any) -> RunConfig:
    asked = RunConfig(
        impl=tuple(f"{ATTACKS}:{name}" for name in names),
        gpu="cpu",
        workload=("tiny",),
        pattern=("NS",),
        seqlen=(16,),
        direction=("fwd",),
        threads=1,
        time_limit_s=TIME_LIMIT_S,
    )
    return replace(asked, **values)


def _name(row: dict[str, Any]) -> str:
    return row["mechanism"].rpartition(":")[2]


def _honest_last(config: RunConfig) -> RunConfig:
    """The request with a seed that has an honest mechanism after all attacks, another in their midst."""
    for seed in range(1000):
        tried = replace(config, seed=seed)
        order = [item.case.mechanism.rpartition(":")[2] for item in prepare(tried)[1]]
        if order[-1] == "Honest" and 5 < order.index("HonestToo") < len(order) - 5:
            return tried
    raise AssertionError("no seed in a thousand")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "TERM_GRACE_S", 1.0)
        patch.setenv("ATTNBENCH_TEST", __file__)  # by which what the sweep started is known
        return run(_honest_last(_config(EVERY)), tmp_path_factory.mktemp("attacks") / "run")


@pytest.fixture
def row(sweep: Run, request: pytest.FixtureRequest) -> dict[str, Any]:
    found = [row for row in sweep.rows if _name(row) == request.param]
    assert len(found) == 1
    return found[0]


def _flags(row: dict[str, Any]) -> set[str]:
    return {flag.partition(":")[0] for flag in row["flags"]}


@SWEEP
@pytest.mark.parametrize(
    ("row", "status", "reason"), [(n, *e) for n, e in EXPECTED.items()], indirect=["row"]
)
def test_an_attack_ends_as_its_status(row: dict[str, Any], status: str, reason: str) -> None:
    assert (row["status"], reason in row["reason"]) == (status, True), (row["reason"], row["log_tail"])
    assert row.get("time_us") is None


@SWEEP
@pytest.mark.parametrize(("row", "flags"), FLAGGED.items(), indirect=["row"])
def test_an_attack_that_changes_no_number_is_flagged(row: dict[str, Any], flags: set[str]) -> None:
    assert row["status"] == "ok", row["reason"]
    assert flags <= _flags(row), row["flags"]


@SWEEP
@pytest.mark.parametrize("row", HARMLESS, indirect=True)
def test_what_is_honest_carries_no_flag_of_an_attack(row: dict[str, Any]) -> None:
    assert row["status"] == "ok", row["reason"]
    assert _flags(row) & OURS <= MAY_CARRY.get(_name(row), set())


@SWEEP
def test_one_row_for_every_impl_in_journal_and_parquet(sweep: Run) -> None:
    assert sorted(map(_name, sweep.rows)) == sorted(EVERY)
    for kept in ("journal.jsonl", "results.parquet"):
        found = rows([sweep.path / kept])
        assert sorted(map(_name, found)) == sorted(EVERY)
        assert [problems(row) for row in found] == [[]] * len(EVERY)
        assert [f for row in found for f in check_row(row) if f[0] == "error"] == []


@SWEEP
def test_the_honest_row_after_all_attacks_is_that_of_the_one_between_them(sweep: Run) -> None:
    by_name = {_name(row): row for row in sweep.rows}
    last, between = by_name["Honest"], by_name["HonestToo"]
    assert _name(sweep.rows[-1]) == "Honest"
    same = (
        *("err_rms", "err_max", "cosine", "bitwise_equal", "kernels", "n_launches", "ops_used", "flops"),
        *("mem_peak_bytes", "mem_output_bytes", "software_key", "environment", "status"),
    )
    a, b = ({name: row[name] for name in same} for row in (last, between))
    for facts in (a, b):
        facts["environment"] = facts["environment"].partition('"load_1m"')[0]
    assert a == b


@SWEEP
def test_nothing_that_an_attack_started_is_left(sweep: Run) -> None:
    assert sweep.rows
    left = [
        one.info
        for one in psutil.process_iter(["cmdline", "environ", "status"])
        if one.info["status"] != psutil.STATUS_ZOMBIE
        and (
            (one.info["environ"] or {}).get("ATTNBENCH_TEST") == __file__
            or "31337." in " ".join(one.info["cmdline"] or ())
        )
    ]
    assert left == []


@SWEEP
def test_what_was_printed_is_kept_to_its_end_and_harms_no_terminal(sweep: Run) -> None:
    for row in sweep.rows:
        for text in (row.get("log_tail") or "", row.get("reason") or ""):
            assert len(text.encode()) <= 3 * process.LOG_TAIL_BYTES
            assert all(c.isprintable() or c in "\n\t" for c in text)


@SWEEP
def test_a_mask_that_is_built_in_the_call_is_paid_for_and_named(sweep: Run) -> None:
    row = next(row for row in sweep.rows if _name(row) == "BuildsAMask")
    assert "aten::tril_" in row["kernels"]
    assert row["mem_peak_bytes"] >= 4 << 20


@pytest.mark.gpu
@pytest.mark.slow
def test_what_happens_beside_the_stream_of_a_gpu_is_seen(tmp_path: Path) -> None:
    assert torch.cuda.is_available()
    names = ("SideStream", "RawDeviceMemory", "PatchesClocks", "RemembersByPointer", "Honest")
    done = run(
        _config(names, gpu="auto", seqlen=(1024,), dtype=("fp32",), time_limit_s=60.0), tmp_path / "run"
    )
    found = {_name(row): row for row in done.rows}
    assert found["Honest"]["status"] == "ok", found["Honest"]["reason"]
    beside = found["SideStream"]
    assert beside["status"] == "incorrect" or "events_disagree" in _flags(beside)
    assert "outside_allocator" in _flags(found["RawDeviceMemory"])
    assert "it replaced" in found["PatchesClocks"]["reason"]
    assert "did not follow" in found["RemembersByPointer"]["reason"]


def test_a_text_that_others_will_read_is_made_printable() -> None:
    letters = "".join(random.Random(0).choices([chr(i) for i in range(0x300)] + ["\udcff", "�", "é"], k=999))
    assert process.printable("a\tb\nÉ漢") == "a\tb\nÉ漢"
    assert all(c.isprintable() or c in "\n\t" for c in process.printable(letters))
