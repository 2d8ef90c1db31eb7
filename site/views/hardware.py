"""One device: what its vendor says, what the harness measured, how noisy it was, and on which software."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.results import stats
from attnbench.results.aggregate import Summary
from attnbench.results.format import NONE, number
from attnbench.results.rows import Row
from attnbench.site.views.provenance import Environment, FlagCount, environments, flag_counts
from attnbench.site.views.words import DTYPE_WORDS, STATUS_ORDER


@dataclass(frozen=True)
class Peak:
    """The rate of the fastest matrix product in one dtype: measured here, and by the vendor."""

    dtype: str
    measured: float | None
    vendor: float | None
    rows: int

    @property
    def texts(self) -> tuple[str, str, str]:
        """Measured and vendor's TFLOP/s, and the first in percent of the second."""
        share = None if not self.measured or not self.vendor else 100 * self.measured / self.vendor
        return number(self.measured), number(self.vendor), number(share)


@dataclass(frozen=True)
class Noise:
    """How far apart the blocks of a case were: coefficient of variation over cases with three blocks or more.

    All are None without such a case.
    """

    cases: int
    median: float | None
    p95: float | None


@dataclass(frozen=True)
class Device:
    """Everything that the page of a device shows.

    ``info`` is its entry of the catalogue, empty if unknown.
    """

    name: str
    info: Mapping[str, Any]
    rows: int
    first: str
    last: str
    statuses: tuple[int, ...]
    peaks: tuple[Peak, ...]
    bandwidth: float | None
    flush_ratio: float | None
    noise: Noise
    observed: tuple[tuple[str, str], ...]
    environments: tuple[Environment, ...]
    flags: tuple[FlagCount, ...]
    runs: tuple[tuple[str, str, int], ...]

    @property
    def title(self) -> str:
        """What it is called in full."""
        return str(self.info.get("title") or self.name)


OBSERVED = (
    "gpu_name",
    "cpu_model",
    "cpu_cores",
    "gpu_memory_bytes",
    "gpu_l2_bytes",
    "gpu_sms",
    "gpu_power_limit_w",
    "gpu_sm_clock_max_mhz",
    "gpu_memory_clock_max_mhz",
    "gpu_ecc",
    "gpu_pci_link",
    "gpu_driver",
    "cuda_runtime",
    "torch",
    "triton",
)
"""Facts of an environment that describe the device and its stack; every value that was seen is shown."""


def device(name: str, info: Mapping[str, Any], rows: Iterable[Row], current: Iterable[Summary]) -> Device:
    """The view of ``name`` from all rows and all summaries; there must be a row of it."""
    own = [row for row in rows if row["device"] == name]
    days = sorted(str(row["started_at"])[:10] for row in own)
    counts = Counter(row["status"] for row in own)
    found = environments(own)
    runs: dict[str, list[str]] = {}
    for row in own:
        runs.setdefault(row["run_id"], []).append(str(row["started_at"])[:10])
    return Device(
        name=name,
        info=info,
        rows=len(own),
        first=days[0],
        last=days[-1],
        statuses=tuple(counts[status] for status in STATUS_ORDER),
        peaks=tuple(_peaks(own, info.get("tflops") or {})),
        bandwidth=_middle(own, "peak_gbps_measured"),
        flush_ratio=_middle(own, "flush_ratio"),
        noise=_noise([s for s in current if s.get("device") == name]),
        observed=tuple(_observed(found)),
        environments=tuple(found),
        flags=tuple(flag_counts(own)),
        runs=tuple(
            (run, min(dates), len(dates))
            for run, dates in sorted(runs.items(), key=lambda item: min(item[1]), reverse=True)
        ),
    )


def _peaks(rows: Iterable[Row], vendor: Mapping[str, float]) -> list[Peak]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        dtype = str(row["dtype"])
        groups.setdefault(DTYPE_WORDS.get(dtype, dtype), []).append(row)
    found = []
    for dtype, group in sorted(groups.items()):
        count = sum(row["peak_tflops_measured"] is not None for row in group)
        found.append(Peak(dtype, _middle(group, "peak_tflops_measured"), vendor.get(dtype), count))
    return found


def _middle(rows: Iterable[Row], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return stats.quantile(known, 0.5) if known else None


def _noise(own: Sequence[Summary]) -> Noise:
    known = [s.between_cv for s in own if s.between_cv is not None and s.blocks >= stats.MIN_BLOCKS]
    if not known:
        return Noise(0, None, None)
    return Noise(len(known), stats.quantile(known, 0.5), stats.quantile(known, 0.95))


def _observed(found: Iterable[Environment]) -> list[tuple[str, str]]:
    values: dict[str, dict[str, None]] = {}
    for environment in found:
        for name, value in environment.facts:
            values.setdefault(name, {})[value] = None
    return [(name, ", ".join(values[name])) for name in OBSERVED if name in values]


def percent(value: float | None) -> str:
    """A share as ``1.2 %``."""
    return NONE if value is None else f"{number(100 * value)} %"
