"""Two versions measured in turns: the order, the extra pairs, and what a version may be."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from attnbench.errors import UsageError
from attnbench.harness import compare, versions
from attnbench.harness.versions import Version
from attnbench.results.compare import Rule, Verdict
from attnbench.results.store import write_parquet

A, B = Version("a", Path("/a")), Version("b", Path("/b"))
STEADY = (1.0, 1.002, 0.998, 1.001, 0.999, 1.0, 1.001, 0.999)


def scripted(make_row, slowdown: float, noise=STEADY, calls: list[str] | None = None):
    def measure(version: Version, block: int):
        if calls is not None:
            calls.append(version.label)
        time = 100.0 * (1 + slowdown if version is B else noise[block % len(noise)])
        return [make_row(block=block, time_us=time, software_key="same")]

    return measure


def test_blocks_are_measured_in_turns(make_row):
    calls: list[str] = []
    compare.in_turns(A, B, scripted(make_row, 0.0, calls=calls), 4, 4, Rule(min_pairs=4))
    assert "".join(calls) == "abbaabba"


@pytest.mark.parametrize(("slowdown", "verdict"), [(0.1, Verdict.SLOWER), (0.0, Verdict.SAME)])
def test_a_planted_slow_down_is_found_and_identical_code_is_not(make_row, slowdown, verdict):
    found = compare.in_turns(A, B, scripted(make_row, slowdown), 8, 16)
    assert [case.decision.verdict for case in found.cases] == [verdict]
    assert found.cases[0].decision.pairs == 8


def test_more_pairs_are_measured_while_a_case_is_uncertain(make_row):
    noise = (1.0, 1.05, 0.97, 1.02, 0.95, 1.03, 0.99, 1.0)
    found = compare.in_turns(A, B, scripted(make_row, 0.012, noise), 8, 16)
    assert found.cases[0].decision.pairs == 16


def test_recorded_results_are_compared_as_they_are(make_row, tmp_path):
    for name, factor in (("base", 1.0), ("head", 1.2)):
        rows = [make_row(block=b, time_us=100 * factor * s) for b, s in enumerate(STEADY)]
        write_parquet(rows, tmp_path / f"{name}.parquet")
    found = compare.compare(str(tmp_path / "base.parquet"), str(tmp_path / "head.parquet"))
    assert found.counts["slower"] == 1
    assert "not measured in turns" in found.notes[0]


def test_sides_of_two_kinds_are_refused(make_row, tmp_path):
    path = tmp_path / "base.parquet"
    write_parquet([make_row()], path)
    with pytest.raises(UsageError, match="expected two of a kind"):
        compare.compare(str(path), ".")
    with pytest.raises(UsageError, match="expected no options of run"):
        compare.compare(str(path), str(path), ["--impl", "softmax"])
    with pytest.raises(UsageError, match="2 <= pairs <= most"):
        compare.compare(".", ".", pairs=1)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree that passes for attnbench."""
    root = tmp_path / "tree"
    (root / "harness").mkdir(parents=True)
    (root / "cli.py").write_text("print('base')\n")
    return root


def test_a_source_tree_is_a_version(tree, tmp_path):
    with versions.opened(str(tree), tmp_path / "scratch", "base") as version:
        assert (version.path / "attnbench" / "cli.py").read_text() == "print('base')\n"
        environment = versions.environment_of(version, {"PYTHONPATH": "/old"})
        assert environment["PYTHONPATH"] == f"{version.path}:/old"
    assert tree.is_dir()


def test_a_wheel_is_a_version(tmp_path):
    wheel = tmp_path / "attnbench-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("attnbench/cli.py", "")
    with versions.opened(str(wheel), tmp_path / "scratch", "head") as version:
        assert (version.path / "attnbench" / "cli.py").is_file()
    with (
        pytest.raises(UsageError, match="no such file"),
        versions.opened("none.whl", tmp_path / "scratch", "b"),
    ):
        pass


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_a_version_and_leaves_nothing_behind(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tree)
    (tree / "harness" / "x.py").write_text("")
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "base"]):
        subprocess.run(["git", *arguments], check=True)
    (tree / "cli.py").write_text("print('head')\n")
    with versions.opened("HEAD", tmp_path / "scratch", "base") as version:
        assert (version.path / "attnbench" / "cli.py").read_text() == "print('base')\n"
    listed = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 1
    with (
        pytest.raises(UsageError, match="expected a results folder"),
        versions.opened("no-such-commit", tmp_path / "scratch", "head"),
    ):
        pass


def test_the_running_version_starts_as_itself(tmp_path):
    with versions.opened(".", tmp_path, "base") as version:
        done = subprocess.run(
            [*versions.command("--version")],
            env=versions.environment_of(version, dict(os.environ)),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("attnbench ")
