"""How long to warm up and how many samples to take, as presets.

The default is the published protocol; another preset may stop earlier, but flags are always judged by the
default, so that a cheaper measurement is seen to be one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True)
class Settings:
    """Rules of one measurement. Durations in seconds, widths and agreements as shares.

    Warm-up ends when there were ``warmup_calls`` calls and ``warmup_s`` of busy device, and the medians of
    the last two windows of ``warmup_window_s`` agree within ``warmup_agreement``, or at ``warmup_cap_s``.
    Sampling ends when there are ``min_samples`` samples and ``min_total_s`` of measured time, and the 95 %
    interval of the median reaches no further than ``half_width`` on either side of it; at ``max_samples``;
    or at ``wall_cap_s``, but not before ``floor_samples``. A CPU sample lasts at least ``min_sample_s``.
    """

    warmup_calls: int = 10
    warmup_s: float = 0.3
    warmup_window_s: float = 0.05
    warmup_agreement: float = 0.01
    warmup_cap_s: float = 3.0
    min_samples: int = 30
    min_total_s: float = 0.1
    half_width: float = 0.005
    max_samples: int = 2000
    wall_cap_s: float = 15.0
    floor_samples: int = 5
    min_sample_s: float = 0.005

    def secondary(self) -> Settings:
        """The same rule for a number beside the headline, for a fifth of the samples and of the time."""
        return replace(
            self,
            min_samples=self.min_samples // 3,
            min_total_s=self.min_total_s / 5,
            max_samples=self.max_samples // 5,
            wall_cap_s=self.wall_cap_s / 5,
            floor_samples=max(1, self.floor_samples // 2),
        )


LIMITS: Final = Settings()
"""What a number must meet to carry no flag, whichever preset it was measured with."""

PRESETS: Final[dict[str, Settings]] = {
    "default": LIMITS,
    # calls that are compared in turns, many in a few minutes: the cap is for all calls of a comparison
    "turns": Settings(
        warmup_calls=3,
        warmup_s=0.02,
        warmup_window_s=0.01,
        warmup_agreement=0.05,
        warmup_cap_s=0.15,
        min_samples=12,
        min_total_s=0.005,
        half_width=0.005,
        max_samples=60,
        wall_cap_s=0.8,
        floor_samples=5,
    ),
    "tiny": Settings(
        warmup_calls=3,
        warmup_s=0.06,
        warmup_window_s=0.02,
        warmup_agreement=0.05,
        warmup_cap_s=0.5,
        min_samples=10,
        min_total_s=0.05,
        half_width=0.02,
        max_samples=200,
        wall_cap_s=1.5,
        floor_samples=3,
    ),
}
