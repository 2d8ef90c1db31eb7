"""When a device is warm and when there are enough samples. Pure: durations in, decisions and flags out.

Both rules say, when they gave up, which condition was not met and by how much.
"""

from __future__ import annotations

from bisect import insort

from attnbench.harness.flags import Flag
from attnbench.harness.timing.settings import LIMITS, Settings
from attnbench.results import stats


class WarmUp:
    """Decides when to stop warming up.

    The medians of two consecutive windows are compared, not of two calls: a device that idled needs more
    than 100 ms to reach its clocks, and a single call is noise.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._window: list[float] = []
        self._window_s = 0.0
        self._medians: list[float] = []
        self.calls = 0
        self.busy_s = 0.0

    def add(self, sample_us: float, busy_us: float) -> None:
        """Record one call: its time, and how long the device was busy for it, flush and spin included."""
        self.calls += 1
        self.busy_s += busy_us * 1e-6
        self._window.append(sample_us)
        self._window_s += busy_us * 1e-6
        if self._window_s >= self._settings.warmup_window_s:
            self._medians = [*self._medians[-1:], stats.quantile(self._window, 0.5)]
            self._window, self._window_s = [], 0.0

    @property
    def call_us(self) -> float:
        """Time of one call as it is now: the median of the last full window, or of what there is."""
        return self._medians[-1] if self._medians else stats.quantile(self._window, 0.5)

    @property
    def drift(self) -> float | None:
        """Relative change between the medians of the last two windows; None before there are two."""
        if len(self._medians) < 2 or min(self._medians) <= 0.0:
            return None
        before, now = self._medians
        return abs(now - before) / min(before, now)

    def finished(self, elapsed_s: float) -> bool:
        """Whether the rule is met, or the cap on its time is reached after ``elapsed_s``."""
        return elapsed_s >= self._settings.warmup_cap_s or not self._unmet(self._settings)

    def flags(self) -> tuple[Flag, ...]:
        """``not_warm`` with the conditions of the published protocol that were not met."""
        unmet = self._unmet(LIMITS)
        if not unmet:
            return ()
        return (Flag("not_warm", ", ".join(o for o, _ in unmet), ", ".join(limit for _, limit in unmet)),)

    def _unmet(self, rule: Settings) -> list[tuple[str, str]]:
        unmet = []
        if self.calls < rule.warmup_calls:
            unmet.append((f"{self.calls} calls", f"{rule.warmup_calls}"))
        if self.busy_s < rule.warmup_s:
            unmet.append((f"{self.busy_s * 1e3:.0f} ms", f"{rule.warmup_s * 1e3:.0f}"))
        drift = self.drift
        if drift is None or drift > rule.warmup_agreement:
            seen = "no two windows" if drift is None else f"drift {drift:.1%}"
            unmet.append((seen, f"{rule.warmup_agreement:.1%} between windows"))
        return unmet


class Stopping:
    """Decides when there are enough samples: when the median is known well enough, or at the caps."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ordered: list[float] = []
        self.samples: list[float] = []
        self.total_s = 0.0

    def add(self, sample_us: float, measured_us: float) -> None:
        """Record one sample per call, and the time that was measured for it (all its loops)."""
        self.samples.append(sample_us)
        insort(self._ordered, sample_us)
        self.total_s += measured_us * 1e-6

    @property
    def half_width(self) -> float | None:
        """Distance from the median to the further end of its 95 % interval, relative to the median.

        None below 8 samples, which have no such interval, and for a median of 0.
        """
        interval = stats.median_interval(self._ordered)
        if interval is None:
            return None
        median = stats.quantile(self._ordered, 0.5)
        return max(interval[1] - median, median - interval[0]) / median if median > 0.0 else None

    def finished(self, elapsed_s: float) -> bool:
        """Whether to stop after ``elapsed_s`` of wall time."""
        rule, n = self._settings, len(self.samples)
        if n >= rule.max_samples or (elapsed_s >= rule.wall_cap_s and n >= rule.floor_samples):
            return True
        if n < rule.min_samples or self.total_s < rule.min_total_s:
            return False
        half_width = self.half_width
        return half_width is not None and half_width <= rule.half_width

    def flags(self) -> tuple[Flag, ...]:
        """``few_samples``, ``not_converged`` and ``multimodal``, judged by the published protocol."""
        flags = []
        if len(self.samples) < LIMITS.min_samples:
            flags.append(
                Flag("few_samples", f"{len(self.samples)} samples", f"at least {LIMITS.min_samples}")
            )
        half_width = self.half_width
        if half_width is None or half_width > LIMITS.half_width:
            seen = "no interval" if half_width is None else f"±{half_width:.2%}"
            flags.append(Flag("not_converged", f"median known to {seen}", f"±{LIMITS.half_width:.1%}"))
        gap = stats.largest_gap(self._ordered)
        if gap is not None:
            flags.append(Flag("multimodal", f"no sample from {gap[0]:.4g} to {gap[1]:.4g} µs", "one mode"))
        return tuple(flags)
