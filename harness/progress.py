"""The progress bar of a run: one line on a terminal, one line a failure elsewhere, nothing when quiet."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from attnbench.harness.listener import Listener, Silent
from attnbench.harness.plan import Planned
from attnbench.results.schema import Status

QUIET_STATUSES = (Status.OK, Status.UNSUPPORTED, Status.SKIPPED)
"""Statuses that are counted but not announced one by one."""


class Bar:
    """A listener that draws a bar on stderr and announces every case that failed."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("planning", total=None)

    def planned(self, total: int, done: int) -> None:
        """Set the length of the bar; cases finished in an earlier attempt count as done."""
        self._progress.update(self._task, total=total, completed=done)

    def started(self, case: Planned) -> None:
        """Name the case that is measured now."""
        self._progress.update(self._task, description=case.case.label())

    def step(self, case: Planned, done: int, of: int) -> None:
        """Show how far the training of a task is."""
        self._progress.update(self._task, description=f"{case.case.label()} · step {done}/{of}")

    def finished(self, row: Mapping[str, Any]) -> None:
        """Advance, and print a line for a case that failed."""
        self._progress.advance(self._task)
        if row["status"] not in QUIET_STATUSES:
            place = f"{row['impl']} {row['pattern']} N={row['n']} {row['dtype']} {row['direction']}"
            self._progress.console.print(Text(f"{row['status']:>13}  {place}: {row['reason']}"))


@contextlib.contextmanager
def listener(quiet: bool) -> Iterator[Listener]:
    """A bar, or silence when ``quiet``."""
    if quiet:
        yield Silent()
        return
    console = Console(file=sys.stderr)
    columns = (
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress)
