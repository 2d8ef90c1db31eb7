"""Multivariate time series of Informer's study: ETT, ECL and Weather, with its splits and normalisation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from attnbench.errors import unknown_name
from attnbench.tasks.data.sources import Parts, Source, damaged

Rows = tuple[int, int]
"""First row and the row after the last."""


@dataclass(frozen=True)
class Table:
    """A table of numbers in time: ``values`` (rows, channels) fp64 at ``times``; the target is the last."""

    channels: tuple[str, ...]
    times: NDArray[np.datetime64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """Rows of the three parts; windows of val and test may reach back over their first row."""

    train: Rows
    val: Rows
    test: Rows


@dataclass(frozen=True)
class _File:
    channels: int
    target: str


class _Tables(Source):
    """CSV files with a column ``date`` and numbers; a part is a file."""

    tables: ClassVar[Mapping[str, _File]]

    def table(self, name: str) -> Table:
        """Read ``name``.csv. Raises DataMissing without it, DataDamaged for other columns or gaps."""
        import pandas as pd

        if name not in self.tables:
            raise unknown_name(f"table of data set {self.data_set.name}", name, self.tables)
        path, kind = self._path(name), self.tables[name]
        if not path.is_file():
            raise self.missing(path.name)
        try:
            frame = pd.read_csv(path)
        except (ValueError, pd.errors.ParserError) as error:
            raise damaged(path, str(error).splitlines()[0], "comma-separated values") from None
        columns = list(frame.columns)
        if columns[:1] != ["date"] or kind.target not in columns or len(columns) != kind.channels + 1:
            raise damaged(
                path,
                f"{len(columns)} columns {', '.join(map(str, columns[:8]))}",
                f"date and {kind.channels} columns, {kind.target} among them",
            )
        ordered = [c for c in columns[1:] if c != kind.target] + [kind.target]
        return Table(tuple(ordered), _times(path, frame["date"]), _numbers(path, frame[ordered]))

    def split(self, name: str, rows: int) -> Split:
        """Rows of train, val and test of a table with ``rows`` rows: 70, 10 and 20 % of it."""
        first, last = int(rows * 0.7), rows - int(rows * 0.2)
        return Split((0, first), (first, last), (last, rows))

    def count(self, part: str) -> int:
        """Rows of the file ``part``.csv."""
        path = self._path(self.part(part))
        return len(self.table(part).times) if path.is_file() else 0

    def sample(self, part: str) -> Table:
        """The whole table."""
        return self.table(part)

    def files(self) -> Iterable[Path]:
        """The CSV files that are here."""
        return [path for path in map(self._path, self.tables) if path.is_file()]

    def _path(self, name: str) -> Path:
        return self.root / f"{name}.csv"


def _times(path: Path, column: Any) -> NDArray[np.datetime64]:
    import pandas as pd

    try:
        return pd.to_datetime(column).to_numpy("datetime64[s]")
    except ValueError as error:
        raise damaged(path, str(error).splitlines()[0], "a date in every row of column date") from None


def _numbers(path: Path, frame: Any) -> NDArray[np.float64]:
    try:
        values: NDArray[np.float64] = frame.to_numpy(np.float64)
    except ValueError as error:
        raise damaged(path, error, "numbers") from None
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise damaged(path, f"no number in row {row + 1}, column {frame.columns[column]}", "numbers")
    return values


class ETT(_Tables):
    """Electricity transformer temperature (Informer, arXiv 2012.07436): hourly h1 and h2, 15-minute m1."""

    marks = ("ETTh1.csv", "ETTh2.csv", "ETTm1.csv")
    nested = ("ETT-small",)
    published: ClassVar[Parts] = {"ETTh1": 17_420, "ETTh2": 17_420, "ETTm1": 69_680}
    tables: ClassVar[Mapping[str, _File]] = {name: _File(7, "OT") for name in published}

    def split(self, name: str, rows: int) -> Split:
        """12, 4 and 4 months of 30 days, whatever ``rows`` are; the rest is not used."""
        month = 30 * 24 * (4 if name == "ETTm1" else 1)
        return Split((0, 12 * month), (12 * month, 16 * month), (16 * month, 20 * month))


class ECL(_Tables):
    """Electricity consumption of 321 clients, hourly."""

    marks = ("ECL.csv",)
    published: ClassVar[Parts] = {"ECL": 26_304}
    tables: ClassVar[Mapping[str, _File]] = {"ECL": _File(321, "MT_320")}


class WTH(_Tables):
    """Hourly weather."""

    marks = ("WTH.csv",)
    published: ClassVar[Parts] = {"WTH": 35_064}
    tables: ClassVar[Mapping[str, _File]] = {"WTH": _File(12, "WetBulbCelsius")}


def normalised(values: NDArray[np.float64], train: Rows) -> NDArray[np.float32]:
    """``values`` (rows, channels) minus mean over population standard deviation of the training rows.

    A channel that is constant there is only centred.
    """
    part = values[slice(*train)]
    std = part.std(0)
    return ((values - part.mean(0)) / np.where(std > 0.0, std, 1.0)).astype(np.float32)


def time_features(times: NDArray[np.datetime64]) -> NDArray[np.float32]:
    """Hour, weekday, day of the month and day of the year, each scaled to [-0.5, 0.5]; (rows, 4)."""
    days = times.astype("datetime64[D]")
    hour = (times - days).astype("timedelta64[h]").astype(np.int64)
    weekday = (days.astype(np.int64) + 3) % 7  # day 0, the first of January 1970, was a Thursday
    month_day = (days - times.astype("datetime64[M]")).astype(np.int64)
    year_day = (days - times.astype("datetime64[Y]")).astype(np.int64)
    scaled = np.stack([hour / 23, weekday / 6, month_day / 30, year_day / 365], 1) - 0.5
    return scaled.astype(np.float32)
