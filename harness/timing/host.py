"""What Linux tells of the CPUs: cores that we may use, caches, governor, and who else is using them.

Every file is read below ``root``, so that a test can lay out a machine; what is not there is None.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from attnbench.harness.flags import Flag

STEAL_LIMIT = 0.01
SWITCHES_PER_S_LIMIT = 20.0
ELSEWHERE_LIMIT = 0.1
LOOK_S = 0.1
"""How long :func:`pin` watches which CPUs are busy: ten ticks of the kernel's clock."""


_process_time, _thread_time = time.process_time, time.thread_time
"""Bound before any impl is imported."""


def _allowed_cpus() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class CpuHealth:
    """A snapshot of the CPUs. Ticks are those of /proc/stat, summed over the CPUs that we may use.

    ``elsewhere_s`` is the CPU time of this process in other threads than the one that calls; ``threads`` may
    compute in all.
    """

    time_s: float
    steal_ticks: int | None
    total_ticks: int | None
    load_1m: float | None
    online: int
    involuntary_switches: int
    unpinned: str
    threads: int = 1
    elsewhere_s: float = 0.0

    def flags_since(self, before: CpuHealth) -> tuple[Flag, ...]:
        """``unpinned``, ``steal``, ``load``, ``context_switches`` and ``side_threads``."""
        flags = []
        if self.unpinned:
            flags.append(Flag("unpinned", self.unpinned, "one CPU for each thread, on one NUMA node"))
        if None not in (self.steal_ticks, before.steal_ticks, self.total_ticks, before.total_ticks):
            ticks = (self.total_ticks or 0) - (before.total_ticks or 0)
            steal = ((self.steal_ticks or 0) - (before.steal_ticks or 0)) / max(ticks, 1)
            if steal > STEAL_LIMIT:
                flags.append(Flag("steal", f"{steal:.1%} taken by the hypervisor", f"{STEAL_LIMIT:.0%}"))
        if self.load_1m is not None and self.load_1m > self.online:
            flags.append(Flag("load", f"{self.load_1m:.1f}", f"{self.online} CPUs"))
        seconds = max(self.time_s - before.time_s, 1e-3)
        rate = (self.involuntary_switches - before.involuntary_switches) / seconds
        if rate > SWITCHES_PER_S_LIMIT:
            flags.append(
                Flag("context_switches", f"{rate:.0f}/s against our will", f"{SWITCHES_PER_S_LIMIT:.0f}/s")
            )
        elsewhere = (self.elsewhere_s - before.elsewhere_s) / seconds
        allowed = self.threads - 1 + ELSEWHERE_LIMIT
        if elsewhere > allowed:
            seen = f"{elsewhere:.2f} CPUs busy for this process outside the calling thread"
            flags.append(Flag("side_threads", seen, f"{allowed:.1f} with {self.threads} threads"))
        return tuple(flags)


@dataclass(frozen=True)
class Host:
    """The machine as its files describe it. ``allowed`` tells the CPUs that this process may run on."""

    root: Path = Path("/")
    allowed: Callable[[], frozenset[int]] = field(default=_allowed_cpus)

    def text(self, path: str) -> str | None:
        """Contents of a file below the root without the line end; None where it cannot be read."""
        with suppress(OSError, UnicodeDecodeError):
            return (self.root / path).read_text().strip()
        return None

    def cores(self) -> list[tuple[int, tuple[int, ...]]]:
        """Physical cores that we may use, as (NUMA node, CPUs on it), in the order of the CPUs."""
        nodes = self._nodes()
        cores: dict[str, list[int]] = {}
        for cpu in sorted(self.allowed()):
            siblings = self.text(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            cores.setdefault(siblings or str(cpu), []).append(cpu)
        return [(nodes.get(cpus[0], 0), tuple(cpus)) for cpus in cores.values()]

    def physical_cores(self) -> int:
        """How many threads can compute at once: physical cores within our affinity and CPU quota."""
        quota = self._quota()
        cores = len(self.cores())
        return max(1, cores if quota is None else min(cores, int(quota)))

    def last_level_cache_bytes(self) -> int | None:
        """Last-level caches of the CPUs that we may use, added up; None where the files do not say."""
        caches: dict[tuple[int, str], int] = {}
        for cpu in self.allowed():
            found = [
                self._cache(p) for p in (self.root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")
            ]
            known = [cache for cache in found if cache is not None]
            if known:
                level, shared, size = max(known)
                caches[level, shared] = size
        if not caches:
            return None
        last = max(level for level, _ in caches)
        return sum(size for (level, _), size in caches.items() if level == last)

    def unpinned(self, threads: int) -> str:
        """Why a computation on ``threads`` threads may wander between CPUs; empty when it cannot."""
        cores = self.cores()
        cpus = sum(len(c) for _, c in cores)
        if cpus != threads:
            return f"{threads} threads on {cpus} CPUs"
        if len(cores) < cpus:
            return f"{cpus} CPUs on {len(cores)} cores"
        nodes = len({node for node, _ in cores})
        return f"{nodes} NUMA nodes" if nodes > 1 else ""

    def health(self, threads: int, time_s: float) -> CpuHealth:
        """A snapshot; ``threads`` compute, and ``time_s`` is the clock of the caller."""
        steal, total = self._ticks()
        load = self.text("proc/loadavg")
        return CpuHealth(
            time_s=time_s,
            steal_ticks=steal,
            total_ticks=total,
            load_1m=float(load.split()[0]) if load else None,
            online=os.cpu_count() or 1,
            involuntary_switches=resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
            unpinned=self.unpinned(threads),
            threads=threads,
            elsewhere_s=_process_time() - _thread_time(),
        )

    def _nodes(self) -> dict[int, int]:
        nodes = {}
        for folder in (self.root / "sys/devices/system/node").glob("node[0-9]*"):
            for cpu in parse_cpulist(self.text(f"sys/devices/system/node/{folder.name}/cpulist") or ""):
                nodes[cpu] = int(folder.name.removeprefix("node"))
        return nodes

    def _quota(self) -> float | None:
        """CPUs that the control group grants; None without a limit."""
        both = (self.text("sys/fs/cgroup/cpu.max") or "").split()
        if not both:
            v1 = ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "sys/fs/cgroup/cpu/cpu.cfs_period_us")
            both = [self.text(path) or "" for path in v1]
        with suppress(ValueError, ZeroDivisionError, IndexError):
            quota = int(both[0]) / int(both[1])
            return quota if quota > 0 else None
        return None

    def _cache(self, folder: Path) -> tuple[int, str, int] | None:
        """(level, CPUs that share it, bytes) of one cache."""
        base = folder.relative_to(self.root).as_posix()
        level, size, shared = (self.text(f"{base}/{name}") for name in ("level", "size", "shared_cpu_list"))
        if level is None or size is None:
            return None
        units = {"K": 1 << 10, "M": 1 << 20}
        return int(level), shared or "", int(size.rstrip("KM")) * units.get(size[-1], 1)

    def busy_ticks(self) -> dict[int, int]:
        """How long each CPU has computed since the start of the system, in ticks; empty where unknown."""
        rows = [line.split() for line in (self.text("proc/stat") or "").splitlines()]
        return {
            int(row[0].removeprefix("cpu")): sum(map(int, row[1:4])) + sum(map(int, row[6:9]))
            for row in rows
            if row and row[0].removeprefix("cpu").isdigit() and len(row) >= 9
        }

    def _ticks(self) -> tuple[int | None, int | None]:
        """Stolen and all ticks of the CPUs that we may use. Guest time is part of user time already."""
        allowed = {f"cpu{cpu}" for cpu in self.allowed()}
        rows = [line.split() for line in (self.text("proc/stat") or "").splitlines()]
        ticks = [[int(x) for x in row[1:9]] for row in rows if row and row[0] in allowed]
        if not ticks or any(len(row) < 8 for row in ticks):
            return None, None
        return sum(row[7] for row in ticks), sum(sum(row) for row in ticks)


def parse_cpulist(text: str) -> list[int]:
    """``"0-2,8"`` → [0, 1, 2, 8], the kernel's notation for sets of CPUs."""
    cpus: list[int] = []
    for part in text.split(","):
        if part:
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    return cpus


def pin(threads: int, host: Host | None = None) -> tuple[int, ...]:
    """Bind this process to one CPU of each of ``threads`` physical cores, on one NUMA node if it has enough.

    Of equal cores it takes the least busy: other processes that are bound, workers of a second run among
    them, do not move away. Looking takes :data:`LOOK_S`.

    To be called before torch starts its threads, which inherit the binding. Returns the CPUs; empty where
    the system cannot bind or has not so many cores, and the measurements then carry the flag ``unpinned``.
    """
    host = host or Host()
    cores = host.cores()
    if not hasattr(os, "sched_setaffinity") or threads > len(cores):
        return ()
    nodes = [node for node, _ in cores]
    best = max(sorted(set(nodes)), key=nodes.count)
    before = host.busy_ticks()
    time.sleep(LOOK_S)
    after = host.busy_ticks()

    def busy(cpus: tuple[int, ...]) -> int:
        return sum(after.get(cpu, 0) - before.get(cpu, 0) for cpu in cpus)

    ordered = sorted(cores, key=lambda core: (core[0] != best, busy(core[1])))
    cpus = tuple(sorted(cpus[0] for _, cpus in ordered[:threads]))
    os.sched_setaffinity(0, cpus)
    return cpus
