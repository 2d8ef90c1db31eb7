"""Measures on a Slurm cluster: an array of jobs, each of which runs one shard in a folder of its own.

A shard is an ordinary run on its node: planned there, journalled there, resumed there after preemption. The
driver watches the shards' journals on the shared file system and copies finished rows into its own.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnbench.errors import AttnbenchError, UsageError, unknown_name
from attnbench.harness import devices
from attnbench.harness.config import RunConfig, resolve
from attnbench.harness.engines import Job, names_of
from attnbench.harness.plan import Planned, plan
from attnbench.results.files import atomically
from attnbench.results.journal import read_journal
from attnbench.results.rows import Row

SHARDS, LOGS, SUBMITTED = "shards", "submitit", "slurm.json"
POLL_S = 5.0
"""Seconds between two looks at the shards' journals."""

LOCAL = "cluster"
"""``--slurm cluster=local`` runs the array on this machine, through the same code."""


@dataclass(frozen=True)
class Shard:
    """Part of a run: what its job measures, and the folder of the run that it makes."""

    request: RunConfig
    run_id: str
    folder: Path

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.folder.name

    @property
    def complete(self) -> bool:
        """Whether it has measured everything."""
        from attnbench.harness.run import RESULTS

        return (self.folder / RESULTS).is_file()

    def rows(self) -> list[Row]:
        """The rows it has finished so far."""
        from attnbench.harness.run import JOURNAL

        path = self.folder / JOURNAL
        begun = path.is_file() and b"\n" in path.read_bytes()
        return read_journal(path).rows if begun else []


class Measure:
    """What a job of the array runs. Slurm starts it again after a preemption or at the job's time limit."""

    def __call__(self, shard: Shard) -> None:
        """Measure the shard, or go on with it."""
        from attnbench.harness import run as driver

        if not (shard.folder / driver.CONFIG).exists():
            driver.create(shard.folder, shard.request, shard.run_id)
        driver.resume(shard.folder)

    def checkpoint(self, shard: Shard) -> Any:
        """What submitit queues when the job is about to be stopped: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, shard)


class SlurmEngine:
    """Measures in a job array for each device. ``parameters`` go to submitit: partition, time, account."""

    def __init__(self, parameters: Mapping[str, str], poll_s: float = POLL_S) -> None:
        self._parameters = dict(parameters)
        self._poll_s = poll_s

    def plan(self, request: RunConfig) -> list[Planned]:
        """The cases as this machine sees them; each shard is planned again on its node, by what is there.

        A family such as ``h100`` is planned for its first member, so that keys may differ from the rows'.
        """
        if request.shard != (1, 1):
            raise UsageError("--shard: observed --engine slurm, which makes the shards; expected --jobs N")
        if "auto" in names_of(request.gpu):
            raise UsageError(
                "--gpu auto: observed --engine slurm, which cannot see what the nodes have; expected cpu or "
                "the names of GPUs as Slurm spells them, h100 for instance"
            )
        if not self._local and shutil.which("srun") is None:
            raise UsageError(
                "--engine slurm: observed no srun on this machine, expected a login node of a Slurm cluster; "
                "--slurm cluster=local runs the array here"
            )
        _library()
        planned: dict[tuple[str, int], Planned] = {}
        for name in names_of(request.gpu):
            planned |= {item.key: item for item in plan(resolve(request, _known(name)))}
        return list(planned.values())

    def rows(self, job: Job) -> Generator[Row]:
        """Submit what no earlier attempt has submitted, and hand out rows as they appear in the shards."""
        shards = _shards(job)
        jobs = self._submit(job.folder, [shard for shard in shards if not shard.complete])
        seen = set(job.finished)
        while True:
            ended = [entry for entry in jobs if entry.done()]  # before the last look, so that it is the last
            for shard in shards:
                for row in shard.rows():
                    if (row["case_key"], row["block"]) not in seen:
                        seen.add((row["case_key"], row["block"]))
                        yield row
            if len(ended) == len(jobs):
                break
            time.sleep(self._poll_s)
        unfinished = [shard.name for shard in shards if not shard.complete]
        if unfinished:
            raise AttnbenchError(
                f"{', '.join(unfinished)}: the jobs ended before their shards were measured "
                f"({_why(jobs) or 'without an error'}); their rows so far are kept. See "
                f"{job.folder / LOGS}, then go on with --resume {job.folder}"
            )

    def _submit(self, folder: Path, shards: list[Shard]) -> list[Any]:
        """The jobs of the shards: those that an earlier driver submitted and that still run, and new ones."""
        submitit = _library()
        known: dict[str, str] = {}
        if (folder / SUBMITTED).is_file():
            known = json.loads((folder / SUBMITTED).read_text())
        jobs, new = [], []
        for shard in shards:
            old = submitit.SlurmJob(folder / LOGS, known[shard.name]) if shard.name in known else None
            if old is not None and not old.done(force_check=True):
                jobs.append(old)
            else:
                new.append(shard)
        for gpu in dict.fromkeys(shard.request.gpu for shard in new):
            part = [shard for shard in new if shard.request.gpu == gpu]
            submitted = self._executor(folder, gpu).map_array(Measure(), part)
            jobs += submitted
            if not self._local:
                known |= {shard.name: entry.job_id for shard, entry in zip(part, submitted, strict=True)}
        with atomically(folder / SUBMITTED) as draft:
            draft.write_text(json.dumps(known, indent=2) + "\n")
        return jobs

    @property
    def _local(self) -> bool:
        return self._parameters.get(LOCAL) == "local"

    def _executor(self, folder: Path, gpu: str) -> Any:
        submitit = _library()
        executor = submitit.AutoExecutor(folder / LOGS, cluster="local" if self._local else "slurm")
        wanted = {"name": "attnbench", "timeout_min": 24 * 60, **self._resources(gpu)}
        for name, value in self._parameters.items():
            if name != LOCAL:
                wanted[name if name in SHARED else f"slurm_{name}"] = int(value) if value.isdigit() else value
        try:
            executor.update_parameters(**wanted)
        except (NameError, TypeError, ValueError) as error:
            raise UsageError(f"--slurm: {error}; expected parameters that submitit has") from None
        return executor

    @staticmethod
    def _resources(gpu: str) -> dict[str, Any]:
        if gpu == "cpu":
            return {}
        sheet = devices.hardware(gpu)
        return {"slurm_gpus_per_node": f"{gpu if sheet is None else sheet.family}:1"}


SHARED = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
"""Parameters that submitit takes by these names for every kind of cluster; the others are Slurm's."""


def _shards(job: Job) -> list[Shard]:
    """The shards of a run, equal in every attempt."""
    count = job.request.jobs
    return [
        Shard(
            request=replace(job.request, gpu=gpu, shard=(index, count), engine="local", jobs=1),
            run_id=job.run_id,
            folder=job.folder.absolute() / SHARDS / f"{gpu}-{index}-of-{count}",
        )
        for gpu in names_of(job.request.gpu)
        for index in range(1, count + 1)
    ]


def _known(name: str) -> str:
    """A device of ``devices.toml`` by its name or family, to plan for where it is not."""
    if name == "cpu":
        return name
    table = devices.table()
    for device in table.values():
        if name in (device.name, device.family):
            return device.name
    raise unknown_name("device", name, {"cpu", *table, *(device.family for device in table.values())})


def _why(jobs: list[Any]) -> str:
    """The first error of a job, in one line."""
    for entry in jobs:
        error = entry.exception()
        if error is not None:
            return _told(str(error))
    return ""


def _told(text: str) -> str:
    """The error of a job out of what submitit says of it: a trace between rules and paths, or a sentence."""
    before_paths = text.partition("You can check full logs")[0]
    lines = [line.strip() for line in before_paths.splitlines() if line.strip(" -")]
    return lines[-1 if "Traceback" in text else 0] if lines else ""


def _library() -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise UsageError(
            "--engine slurm: observed no library submitit, expected it installed: "
            "pip install 'attnbench[slurm]'"
        ) from None
    return submitit
