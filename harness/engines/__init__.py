"""Where the cases of a run are measured: in this process's workers, on a Ray cluster, in a Slurm array.

An engine plans for the devices that it reaches and hands back rows; journal, resume and Parquet are the
driver's, one for all engines.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from attnbench.errors import UsageError
from attnbench.harness.config import RunConfig
from attnbench.harness.engines.group import Group, exceeded_by, grouped
from attnbench.harness.listener import Listener
from attnbench.harness.plan import Planned
from attnbench.results.rows import Row


@dataclass(frozen=True)
class Job:
    """A run to be finished: what is planned, and the rows that an earlier attempt has in the journal."""

    run_id: str
    folder: Path
    request: RunConfig
    planned: tuple[Planned, ...]
    rows: tuple[Row, ...]
    listener: Listener

    @property
    def finished(self) -> frozenset[tuple[str, int]]:
        """(case key, block) of the cases that have a row."""
        return frozenset((row["case_key"], row["block"]) for row in self.rows)

    def groups(self) -> list[Group]:
        """What is left, in groups that share a worker process."""
        finished = self.finished
        exceeded = exceeded_by(self.planned, self.rows) if self.request.infer else {}
        return [
            Group(
                run_id=self.run_id,
                request=self.request,
                cases=cases,
                checkpoints=self.folder.absolute() / "checkpoints",
                exceeded={
                    series: shown for (block, series), shown in exceeded.items() if block == cases[0].block
                },
            )
            for cases in grouped(item for item in self.planned if item.key not in finished)
        ]


class Engine(Protocol):
    """Where cases are measured."""

    def plan(self, request: RunConfig) -> list[Planned]:
        """Every case of the request, each for the device on which this engine would measure it.

        Raises UsageError for a request that means nothing and for devices that the engine does not reach.
        """

    def rows(self, job: Job) -> Generator[Row]:
        """Measure what ``job`` lacks: each row as soon as its case is finished, in any order, each once.

        Closing the generator ends what this process started. Raises AttnbenchError where measuring cannot go
        on; every row that was handed out before stands.
        """


@dataclass(frozen=True)
class Options:
    """What an engine must know besides the request: where its cluster is. Not part of a run's record.

    ``address`` is Ray's; ``slurm`` holds parameters of submitit, ``partition`` or ``time`` for instance.
    """

    address: str = ""
    slurm: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def opened(name: str, options: Options = Options()) -> Iterator[Engine]:
    """The engine called ``name``, connected while the block runs.

    Raises UsageError for options of another engine, a library that is not installed, no cluster.
    """
    for option, given, owner in (("--address", options.address, "ray"), ("--slurm", options.slurm, "slurm")):
        if given and name != owner:
            raise UsageError(f"{option}: observed --engine {name}, expected --engine {owner} with it")
    if name == "ray":
        from attnbench.harness.engines.ray import connected

        with connected(options.address) as engine:
            yield engine
    elif name == "slurm":
        from attnbench.harness.engines.slurm import SlurmEngine

        yield SlurmEngine(options.slurm)
    else:
        from attnbench.harness.engines.local import LocalEngine

        yield LocalEngine()


def names_of(gpu: str) -> tuple[str, ...]:
    """The names in ``--gpu a100,h100``, each once. Raises UsageError where there is none."""
    names = tuple(dict.fromkeys(part.strip() for part in gpu.split(",") if part.strip()))
    if not names:
        raise UsageError(f"--gpu {gpu!r}: observed no name, expected auto, cpu or names such as h100")
    return names


__all__ = ["Engine", "Group", "Job", "Options", "names_of", "opened"]
