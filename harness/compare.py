"""Measure two versions in turns: A B B A A B B A …, each block a fresh driver and fresh workers.

Turns cancel drift to first order, fresh processes make blocks independent; the rule that reads the pairs is
:mod:`attnbench.results.compare`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from attnbench.errors import AttnbenchError, UsageError
from attnbench.harness import versions
from attnbench.harness.versions import Version
from attnbench.results.compare import DEFAULT, Rule
from attnbench.results.comparison import Comparison, compare_rows
from attnbench.results.read import rows as read_rows
from attnbench.results.rows import Row

PAIRS, MAX_PAIRS = 8, 16
"""Pairs of blocks before the first look, and in all where a case is still uncertain."""

Announce = Callable[[str], None]
Measure = Callable[[Version, int], list[Row]]
"""Measures one block of a version; rows carry that block's number."""


@dataclass(frozen=True)
class Side:
    """What stands on one side of a comparison: recorded results, or a version to measure."""

    name: str

    @property
    def recorded(self) -> bool:
        """Whether the name is that of results: a run folder, a Parquet file or a journal."""
        path = Path(self.name)
        if path.is_dir():
            return (path / "run.json").is_file() or any(path.glob("*.parquet"))
        return path.is_file() and path.suffix in (".parquet", ".jsonl")


def compare(
    base: str,
    head: str,
    run_arguments: Sequence[str] = (),
    *,
    pairs: int = PAIRS,
    max_pairs: int = MAX_PAIRS,
    rule: Rule = DEFAULT,
    announce: Announce = lambda text: None,
) -> Comparison:
    """Compare two recorded results, or two versions by measuring both here in turns.

    ``run_arguments`` are options of ``attnbench run`` and choose what is measured. Raises UsageError for two
    sides of different kinds, options where nothing is measured, and names that mean nothing.
    """
    sides = Side(base), Side(head)
    if all(side.recorded for side in sides):
        if run_arguments:
            given = " ".join(run_arguments)
            raise UsageError(f"observed {given}, expected no options of run: both sides are recorded")
        return compare_rows(read_rows([Path(base)]), read_rows([Path(head)]), rule, interleaved=False)
    if any(side.recorded for side in sides):
        raise UsageError(
            f"{base} and {head}: observed recorded results and a version, expected two of a kind; "
            "measure the version with `attnbench run`, or name two versions"
        )
    if not 2 <= pairs <= max_pairs:
        raise UsageError(f"observed {pairs} pairs and at most {max_pairs}, expected 2 <= pairs <= most")
    with TemporaryDirectory(prefix="attnbench-compare-") as folder:
        scratch = Path(folder)
        with versions.opened(base, scratch, "base") as a, versions.opened(head, scratch, "head") as b:
            measure = _measurer(scratch, run_arguments)
            return in_turns(a, b, measure, pairs, max_pairs, rule, announce)


def in_turns(
    base: Version,
    head: Version,
    measure: Measure,
    pairs: int,
    max_pairs: int,
    rule: Rule = DEFAULT,
    announce: Announce = lambda text: None,
) -> Comparison:
    """Measure ``pairs`` pairs in the order A B B A …; up to ``max_pairs`` while a case is uncertain."""
    rows: dict[str, list[Row]] = {"base": [], "head": []}
    done = 0
    while True:
        for block in range(done, pairs):
            order = ("base", "head") if block % 2 == 0 else ("head", "base")
            for side in order:
                announce(f"pair {block + 1} of {pairs}: {side}")
                rows[side] += measure(base if side == "base" else head, block)
        found = compare_rows(rows["base"], rows["head"], rule)
        if pairs >= max_pairs or not found.undecided:
            return found
        done, pairs = pairs, max_pairs


def _measurer(scratch: Path, run_arguments: Sequence[str]) -> Measure:
    def measure(version: Version, block: int) -> list[Row]:
        out = scratch / f"block-{block}-{version.path.name}"
        done = subprocess.run(
            versions.command("run", *run_arguments, "--quiet", "--out", str(out)),
            env=versions.environment_of(version, dict(os.environ)),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()
            kind = UsageError if done.returncode == UsageError.exit_code else AttnbenchError
            raise kind(f"{version.label}: attnbench run failed: {said[-1] if said else 'without a word'}")
        return [{**row, "block": block} for row in read_rows([out])]

    return measure
