"""Measures on a Ray cluster: a task for each group of cases, on a node with the accelerator asked for.

Rows stream back one by one while a group runs. Ray itself retries nothing: what is handed out again when a
node is lost is decided by :mod:`attnbench.harness.engines.supervise`, which knows what is finished.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnbench import __version__
from attnbench.errors import AttnbenchError, UsageError
from attnbench.harness import devices
from attnbench.harness.config import RunConfig, resolve
from attnbench.harness.engines import Job, names_of
from attnbench.harness.engines.group import Group, measure
from attnbench.harness.engines.supervise import Finished, Lost, Measured, supervise
from attnbench.harness.listener import Silent
from attnbench.harness.plan import Planned, plan
from attnbench.results.rows import Row

TYPE = "accelerator_type:"
"""Prefix of the resource by which Ray says what accelerator a node has: ``accelerator_type:H100``."""

NICENESS = ("RAY_worker_niceness", "0")
"""Ray lowers the priority of its workers; a cluster that is started here must measure at the usual one."""

CANCEL_S = 15.0
"""Seconds that cancelled tasks get to end their worker processes."""

Place = Callable[[str], dict[str, Any]]
"""Options of Ray for a task that needs the device called so."""


@contextmanager
def connected(address: str = "") -> Iterator[RayEngine]:
    """A Ray engine, connected to ``address``, to RAY_ADDRESS, to a cluster on this machine, or to a new one.

    Raises UsageError where Ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError(
            "--engine ray: observed no library ray, expected it installed: pip install 'attnbench[ray]'"
        ) from None
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault(*NICENESS)
        try:
            ray.init(address=address or None, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError) as error:
            raise UsageError(
                f"--engine ray: observed no cluster at {address or os.environ.get('RAY_ADDRESS', 'auto')} "
                f"({_first_line(error)}), expected the address of a running one: `ray status` shows it"
            ) from None
    try:
        yield RayEngine()
    finally:
        if ours:
            ray.shutdown()


class RayEngine:
    """Measures on the cluster that this process is connected to. ``place`` maps devices to Ray's options."""

    def __init__(self, place: Place | None = None) -> None:
        self._place = place or self._resources

    def plan(self, request: RunConfig) -> list[Planned]:
        """The cases for every device named, planned on a node that has it: what is installed there counts."""
        if request.jobs > 1:
            raise UsageError(f"--jobs {request.jobs}: observed --engine ray, expected --engine slurm")
        import ray

        planner = ray.remote(_plan)
        planned: dict[tuple[str, int], Planned] = {}
        for name in self._names(request.gpu):
            one = replace(request, gpu="cpu" if name == "cpu" else "auto")
            found = _get(planner.options(**self._place(name)).remote(one, __version__))
            wanted = {item.case.device for item in found} - {"cpu"}
            if name != "cpu" and not wanted:
                raise UsageError(
                    f"--gpu {name}: observed no GPU that torch can use on its node, expected one; "
                    "is a CUDA build of torch installed there?"
                )
            planned |= {item.key: item for item in found}
        return list(planned.values())

    def rows(self, job: Job) -> Generator[Row]:
        """Measure the groups side by side, one on each device; each row as soon as its node has it."""
        with closing(_Tasks(self._place)) as tasks:
            yield from supervise(job.groups(), tasks)

    def _names(self, gpu: str) -> list[str]:
        """The devices asked for, by name; ``auto`` is every accelerator of the cluster, or the CPU."""
        names = names_of(gpu)
        if "auto" not in names:
            return list(names)
        return [kind for kind in _types() if not _is_variant(kind)] or ["cpu"]

    @staticmethod
    def _resources(device: str) -> dict[str, Any]:
        """One GPU of the type; for the CPU a whole node, so that nothing measured shares its node."""
        if device == "cpu":
            return {"num_cpus": _smallest_node(), "num_gpus": 0}
        return {"num_cpus": 1, "num_gpus": 1, "resources": {f"{TYPE}{type_of(device, _types())}": 0.001}}


def type_of(device: str, types: list[str]) -> str:
    """Which of Ray's accelerator types a device of ``devices.toml``, a family or a type itself means.

    Raises UsageError that lists the types of the cluster when it has none such.
    """
    sheet = devices.hardware(device.lower())
    wanted = sheet.family if sheet is not None else device.lower()
    exact = [kind for kind in types if kind.lower() == wanted]
    near = [kind for kind in types if f"-{wanted}-" in f"-{kind.lower()}-"]
    if exact or near:
        return (exact or sorted(near, key=len))[0]
    raise UsageError(
        f"--gpu {device}: observed {', '.join(types) or 'no accelerator'} on the Ray cluster, expected "
        f"{wanted}; `ray status` shows its resources"
    )


class _Tasks:
    """A pool of Ray tasks, each streaming the rows of one group."""

    def __init__(self, place: Place) -> None:
        import ray

        self._ray, self._place = ray, place
        self._task = ray.remote(_measure)
        self._running: dict[Any, Group] = {}

    def submit(self, group: Group) -> None:
        options = {"num_returns": "streaming", "max_retries": 0, **self._place(group.device)}
        self._running[self._task.options(**options).remote(group)] = group

    def wait(self) -> Finished | Measured | Lost:
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        stream: Any = ready[0]
        group = self._running[stream]
        try:
            return Measured(group, _get(next(stream)))
        except StopIteration:
            del self._running[stream]
            return Finished(group)
        except self._ray.exceptions.RayError as error:  # a process, a node or a row on its way was lost
            del self._running[stream]
            return Lost(group, _first_sentence(error))

    def close(self) -> None:
        """Cancel what still runs or waits; a task that runs ends its worker process first."""
        for stream in self._running:
            self._ray.cancel(stream)
        ends = [stream.completed() for stream in self._running]
        if ends:
            self._ray.wait(ends, num_returns=len(ends), timeout=CANCEL_S)
        self._running = {}


def _get(reference: Any) -> Any:
    """The value of a reference; an error that was raised in the task is raised here as it was there."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AttnbenchError):
            raise error.cause from None
        raise AttnbenchError(f"a task on the Ray cluster failed: {error}") from error


def _types() -> list[str]:
    """Accelerator types of the cluster."""
    import ray

    return sorted(name.removeprefix(TYPE) for name in ray.cluster_resources() if name.startswith(TYPE))


def _is_variant(kind: str) -> bool:
    """Whether the type is a second name of a node's: A100-40G and A100-80G besides A100."""
    head, _, size = kind.rpartition("-")
    return bool(head) and size.endswith("G") and size[:-1].isdigit()


def _smallest_node() -> int:
    import ray

    sizes: list[Mapping[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max(1, int(min((size["CPU"] for size in sizes if size.get("CPU")), default=1)))


def _first_sentence(error: BaseException) -> str:
    """What happened, without the addresses and paths that Ray goes on with: rows are published."""
    return f"{type(error).__name__}: {_first_line(error).partition('. ')[0].rstrip('.')}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---- on the nodes --------------------------------------------------------------------------------------


def _plan(request: RunConfig, version: str) -> list[Planned]:
    """Plan for the device of this node."""
    if version != __version__:
        raise UsageError(
            f"--engine ray: observed attnbench {__version__} on a node, expected {version} as here; "
            "install the same version on every node"
        )
    return plan(resolve(request, devices.resolve(request.gpu)))


def _measure(group: Group) -> Generator[Row]:
    """Measure a group here; half-finished trainings are kept where the run's folder can be seen."""
    here = devices.resolve("cpu" if group.device == "cpu" else "auto")
    if here != group.device:
        raise AttnbenchError(
            f"Ray placed a case for {group.device} on a node with {here}: nodes with equal accelerator types "
            "differ; measure one kind at a time, or give them types of their own with `ray start --resources`"
        )
    if group.checkpoints.parent.is_dir():
        yield from measure(group, Silent())
        return
    with tempfile.TemporaryDirectory(prefix="attnbench-") as scratch:
        yield from measure(replace(group, checkpoints=Path(scratch)), Silent())
