"""Time series for forecasting: a generated one, the sunspots that statsmodels carries, the published tables.

A series knows its rows of training, validation and test; values are normalised with the training rows.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnbench.errors import UsageError
from attnbench.tasks.base import Corpus
from attnbench.tasks.data import sources
from attnbench.tasks.data.extras import require
from attnbench.tasks.data.loaders.tables import ECL, ETT, WTH, Split, normalised, time_features

Array = NDArray[np.float32]
Part = Literal["train", "test"]

GENERATOR = "sines/1"
"""Version of :func:`sines`, part of its fingerprint."""

_SUNSPOTS_SHA256 = "cc303d26340b6d599bc2878899f8c50c12323dc04b52a26ad047965ea2b9d2a3"


@dataclass(frozen=True)
class Series:
    """Normalised ``values`` (rows, channels), time features ``marks`` (rows, k), k may be 0."""

    values: Array
    marks: Array
    split: Split
    corpus: Corpus

    def starts(self, part: Part, seq: int, pred: int) -> NDArray[np.int64]:
        """First rows of all windows of ``seq`` rows seen and ``pred`` rows to forecast, at stride 1.

        The forecast lies in ``part``; what is seen may reach back into the part before. Raises UsageError
        when not a single window fits.
        """
        first, end = self.split.train if part == "train" else self.split.test
        first = max(0, first - seq)
        count = end - first - seq - pred + 1
        if count < 1:
            raise UsageError(
                f"series {self.corpus.name}: observed {end - first} {part} rows, expected at least "
                f"{seq + pred} for {seq} seen and {pred} forecast"
            )
        return np.arange(first, first + count)


def sines(rows: int, channels: int, noise: float = 0.3, seed: int = 0) -> Series:
    """Sums of a daily (24) and a weekly (168) sine of random phase and size, a slope and noise, per channel.

    There are no time features: the phase of a window must be read off what is seen. 70 % of the rows train,
    10 % validate, 20 % test. A function of its arguments alone.
    """
    rng = np.random.default_rng([seed, rows, channels])
    t = np.arange(rows)[:, None]
    phase = rng.uniform(0.0, 2.0 * np.pi, (2, channels))
    size = rng.uniform(0.5, 1.5, (2, channels))
    slope = rng.uniform(-0.2, 0.2, channels)
    values = sum(size[i] * np.sin(2.0 * np.pi * t / period + phase[i]) for i, period in enumerate((24, 168)))
    values = values + slope * t / rows + noise * rng.standard_normal((rows, channels))
    text = f"{GENERATOR}/{rows}/{channels}/{noise}/{seed}"
    corpus = Corpus(f"daily and weekly sines, {channels} channels", "synthetic", _sha256(text.encode()))
    return _without_marks(values, corpus)


def sunspots() -> Series:
    """Monthly sunspot numbers from 1749, one channel, as the wheel of statsmodels carries them.

    Raises UsageError without statsmodels or with another file than the known one.
    """
    folder = Path(require("statsmodels", "statsmodels", "sunspots").__file__).parent
    file = folder / "datasets" / "sunspots" / "src" / "sunspots_monthly.dat"
    content = file.read_bytes() if file.is_file() else b""
    if _sha256(content) != _SUNSPOTS_SHA256:
        raise UsageError(
            f"sunspots: observed {len(content)} other bytes in {file}, expected the series of statsmodels "
            "0.14 and 0.15; install one of these"
        )
    years = re.findall(r"^\d{4}((?: +\d+\.\d)+) *$", content.decode("ascii"), re.MULTILINE)
    values = np.array([float(number) for year in years for number in year.split()])
    return _without_marks(values[:, None], Corpus("monthly sunspots", "embedded", _SUNSPOTS_SHA256))


def table(data_set: str, name: str, target_only: bool) -> Series:
    """A published table with its split: all channels, or the target alone. Raises DataMissing without it."""
    source = sources.find(data_set)
    assert isinstance(source, ETT | ECL | WTH)
    found = source.table(name)
    split = source.split(name, len(found.times))
    values = found.values[:, -1:] if target_only else found.values
    corpus = source.corpus(f"{name}, {'target' if target_only else 'all channels'}")
    return Series(normalised(values, split.train), time_features(found.times), split, corpus)


def _without_marks(values: NDArray[np.float64], corpus: Corpus) -> Series:
    """A series without time features: 70 % training, 20 % test at the end, validation between."""
    rows = len(values)
    first, last = int(rows * 0.7), rows - int(rows * 0.2)
    split = Split((0, first), (first, last), (last, rows))
    return Series(normalised(values, split.train), np.zeros((rows, 0), np.float32), split, corpus)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
