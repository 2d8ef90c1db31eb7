"""The outcome of timing one call, and its columns of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.harness.flags import Flag
from attnbench.results import stats


@dataclass(frozen=True)
class Timing:
    """Times of one call in µs. ``samples_us`` are those of the headline, in order, none dropped.

    ``kind`` names the headline: ``device_cold`` (GPU) or ``cpu_hot``. ``e2e_us`` and ``graph`` are None on a
    CPU, where a call has run when it returns. ``compile_s`` is the first call minus the median later one.
    """

    kind: str
    samples_us: tuple[float, ...]
    loops: int
    warmup_calls: int
    compile_s: float
    flush_ratio: float
    cold_us: float
    hot_us: float
    e2e_us: float | None
    graph: bool | None
    flags: tuple[Flag, ...]

    def columns(self) -> dict[str, Any]:
        """The columns of the group ``time``, see :mod:`attnbench.results.schema`."""
        return {
            **sample_columns(self.samples_us),
            "time_kind": self.kind,
            "cold_us": self.cold_us,
            "hot_us": self.hot_us,
            "e2e_us": self.e2e_us,
            "launch_us": None if self.e2e_us is None else max(0.0, self.e2e_us - self.hot_us),
            "loops": self.loops,
            "warmup_calls": self.warmup_calls,
            "compile_s": self.compile_s,
            "flush_ratio": self.flush_ratio,
            "graph": self.graph,
        }


def sample_columns(samples_us: Sequence[float]) -> dict[str, Any]:
    """The columns that follow from the headline samples alone."""
    d = stats.describe(samples_us)
    return {
        "time_us": d.median,
        "time_lo_us": d.lo,
        "time_hi_us": d.hi,
        "p5_us": d.p5,
        "p25_us": d.p25,
        "p75_us": d.p75,
        "p95_us": d.p95,
        "min_us": d.min,
        "mean_us": d.mean,
        "mad_us": d.mad,
        "n_samples": d.n,
        "n_outliers_mild": d.n_outliers_mild,
        "n_outliers_severe": d.n_outliers_severe,
        "samples_us": list(samples_us),
    }
