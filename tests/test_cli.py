"""The command line as a user meets it: its own process, its exit code, its one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "tests/harness/zoo.py"


def attnbench(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnbench.cli", *map(str, args)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, timeout=300, env=env)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_help_names_every_command() -> None:
    text = attnbench("--help").stdout
    assert all(f"  {name}" in text for name in ("run", "list", "check", "report", "validate", "env", "site"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--impl", "softmacks"], ["softmacks", "did you mean softmax"]),
        (["--impl", "softmax/cuda"], ["backend", "softmax"]),
        (["--impl", "zz*"], ["matches nothing", "attnbench list"]),
        (["--impl", "family:quantum"], ["family", "quantum"]),
        (["--impl", "lara", "--pattern", "CS"], ["nothing to measure", "lara", "CS"]),
        (["--impl", "nowhere/x.py:Y"], ["no file", "nowhere/x.py"]),
        (["--impl", f"{ZOO}:Nobody"], ["Nobody", "Honest"]),
        (["--gpu", "b200"], ["b200"]),
        (["--gpu", "voodoo2"], ["voodoo2"]),
        (["--seqlen", "8..4"], ["--seqlen", "8..4", "expected lengths"]),
        (["--shard", "3/2"], ["--shard", "expected i/n"]),
        (["--workload", "gpt-17"], ["workload", "gpt-17"]),
        (["--task", "chess"], ["task", "chess"]),
        (["--preset", "huge"], ["preset", "huge", "tiny"]),
        (["--set", "softmax"], ["--set", "mechanism.name=value"]),
        (["--resume", "nowhere"], ["nowhere", "run.json"]),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(args: list[str], words: list[str]) -> None:
    done = attnbench("run", *args)
    refused(done, *words)
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_unknown_hyper_parameter_is_refused_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = attnbench("run", "--impl", "softmax", "--set", "softmax.heat=3", "--dry-run", "--out", out)
    refused(done, "heat", "softmax")
    assert not out.exists()


def test_an_unwritable_folder_is_refused() -> None:
    refused(attnbench("run", "--impl", "softmax", "--out", "/proc/attnbench"), "/proc/attnbench", "--out")


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"run_id": "x", "config": {}}')
    refused(attnbench("run", "--impl", "softmax", "--out", tmp_path), "already holds a run", "--resume")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.parquet", b"not parquet"), ("b.parquet", b"PAR1" + b"\0" * 40 + b"PAR1"), ("c.txt", b"hello")],
)
def test_corrupt_or_foreign_results_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for command in (["report"], ["site", "build"]):
        refused(attnbench(*command, path), str(path))
    assert path.read_bytes() == content


def test_missing_results_are_refused(tmp_path: Path) -> None:
    refused(attnbench("report", tmp_path / "nothing"), "nothing")


def test_dry_run_prints_the_plan_as_json() -> None:
    args = (
        "--impl",
        "softmax/reference,softmax/triton",
        "--pattern",
        "CS",
        "--seqlen",
        "64,128",
        "--gpu",
        "cpu",
    )
    plan = json.loads(attnbench("run", *args, "--dry-run", "--json").stdout)
    cases = plan["cases"]
    assert len({case["case_key"] for case in cases}) == len(cases)
    blocked = [case for case in cases if case["unsupported"]]
    assert {case["label"].split()[0] for case in blocked} == {"softmax/triton"}
    assert all("cuda" in case["unsupported"] for case in blocked)


def test_list_reads_the_specs() -> None:
    from attnbench.impls import registry

    listed = json.loads(attnbench("list", "--json").stdout)
    assert [entry["mechanism"] for entry in listed] == registry.ids()


@pytest.mark.slow
def test_run_report_site_end_to_end(tmp_path: Path) -> None:
    out, page = tmp_path / "run", tmp_path / "site"
    impls = "softmax/reference,softmax/torch,linear_transformer,softmax/triton"
    sizes = ("--pattern", "CS", "--seqlen", "32,64", "--gpu", "cpu", "--threads", "1")
    done = attnbench("run", "--impl", impls, *sizes, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert set(outcome["by_status"]) == {"ok", "unsupported"}
    text = attnbench("report", out, "--out", tmp_path / "report").stdout
    assert "softmax/torch" in text
    assert "linear_transformer/torch" in text
    assert list((tmp_path / "report").glob("*.csv"))
    assert list((tmp_path / "report").glob("*.png"))
    assert attnbench("validate", out).returncode == 0
    assert attnbench("site", "build", out, "--out", page).returncode == 0
    html = (page / "index.html").read_text()
    assert "linear_transformer" in html
    first = {p.relative_to(page): p.read_bytes() for p in page.rglob("*") if p.is_file()}
    assert attnbench("site", "build", out, "--out", page).returncode == 0
    assert first == {p.relative_to(page): p.read_bytes() for p in page.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_check_prints_what_failed_and_why() -> None:
    done = attnbench("check", f"{ZOO}:ReturnsNan", "--backend", "torch")
    assert done.returncode == 1
    assert "failed" in done.stdout
    good = attnbench("check", f"{ZOO}:WrongValues", "--backend", "reference", "--json")
    assert json.loads(good.stdout or "[]") is not None


def test_env_lists_backends_and_peers() -> None:
    shown = json.loads(attnbench("env", "--json").stdout)
    assert "triton" in shown["backends"]
    assert shown["peers"]
    assert "/root" not in json.dumps(shown)
