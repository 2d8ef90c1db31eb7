"""The default engine: one worker process after the other, on this machine."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from attnbench.errors import UsageError
from attnbench.harness import devices
from attnbench.harness.config import RunConfig, resolve
from attnbench.harness.engines import Job, names_of
from attnbench.harness.engines.group import measure
from attnbench.harness.plan import Planned, plan
from attnbench.results.rows import Row


class LocalEngine:
    """Measures here, on one device."""

    def plan(self, request: RunConfig) -> list[Planned]:
        """The cases for the one device that ``request.gpu`` names."""
        names = names_of(request.gpu)
        if len(names) > 1:
            raise UsageError(
                f"--gpu {request.gpu}: observed {len(names)} names with --engine local, expected one; "
                "several are measured with --engine ray or --engine slurm"
            )
        if request.jobs > 1:
            raise UsageError(f"--jobs {request.jobs}: observed --engine {request.engine}, expected slurm")
        return plan(resolve(request, devices.resolve(names[0])))

    def rows(self, job: Job) -> Generator[Row]:
        """Measure group after group."""
        for group in job.groups():
            with closing(measure(group, job.listener)) as rows:
                yield from rows
