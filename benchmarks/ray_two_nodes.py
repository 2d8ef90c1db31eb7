"""Kill one node of a Ray cluster in the middle of a run: is a case lost?

Starts a cluster of two nodes with a (pretended) H100 each on this machine, measures on both, kills one
without warning once rows have come in, and compares the rows with the plan:

    python benchmarks/ray_two_nodes.py
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.harness.config import RunConfig
from attnbench.harness.engines.ray import NICENESS, RayEngine
from attnbench.harness.listener import Silent
from attnbench.harness.run import resume, run

KILL_AFTER = 2
"""Rows that must be in the journal before the node is killed."""


@dataclass(frozen=True)
class Shown:
    """Cases planned, rows before the kill and in all, rows that are ok, cases left to resume."""

    planned: int
    before: int
    rows: int
    ok: int
    resumed: int
    seconds: float


class Killer(Silent):
    """A listener that kills a node once enough rows are finished."""

    def __init__(self, kill: Any) -> None:
        self.rows, self._kill = 0, kill
        self.killed_at = 0

    def finished(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        if self.rows == KILL_AFTER:
            self.killed_at = self.rows
            self._kill()


class Counter(Silent):
    """A listener that counts what is measured."""

    rows = 0

    def finished(self, row: Mapping[str, Any]) -> None:
        self.rows += 1


def place(device: str) -> dict[str, Any]:
    """A task takes the CPU of a node that says it has an H100."""
    return {"num_cpus": 1, "resources": {"accelerator_type:H100": 0.001}}


def demonstrate(out: Path, seqlens: tuple[int, ...] = (16, 24, 32)) -> Shown:
    """Run into the folder ``out`` and tell what happened."""
    import ray
    from ray.cluster_utils import Cluster

    config = RunConfig(
        impl=("softmax/torch", "softmax/sdpa_math"),
        gpu="cpu",
        workload=("tiny",),
        pattern=("NS",),
        seqlen=seqlens,
        threads=1,
        engine="ray",
    )
    start = time.monotonic()
    os.environ.setdefault(*NICENESS)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    node = {"num_cpus": 1, "resources": {"accelerator_type:H100": 1}}
    cluster.add_node(**node)
    victim = cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        engine = RayEngine(place)
        planned = len(engine.plan(config))
        killer = Killer(lambda: cluster.remove_node(victim, allow_graceful=False))
        done = run(config, out, killer, engine)
        again = Counter()
        resume(out, again, engine)
    finally:
        ray.shutdown()
        cluster.shutdown()
    ok = done.by_status().get("ok", 0)
    return Shown(planned, killer.killed_at, len(done.rows), ok, again.rows, time.monotonic() - start)


def main() -> None:
    """Print what happened."""
    with tempfile.TemporaryDirectory() as folder:
        shown = demonstrate(Path(folder) / "run")
    print(f"planned {shown.planned} cases on two nodes; one killed after {shown.before} rows")
    print(f"rows {shown.rows}, ok {shown.ok}; left for --resume: {shown.resumed}; {shown.seconds:.0f} s")


if __name__ == "__main__":
    main()
