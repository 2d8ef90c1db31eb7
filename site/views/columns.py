"""The columns of case tables: where a number comes from, its units, and what it means.

Python renders the first table of a page from this list and the script of the page every later one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from attnbench.results.format import BYTE_UNITS, TIME_UNITS, Unit, common_unit, number
from attnbench.results.schema import BY_NAME

RATE_UNITS: Final = (Unit("GFLOP/s", 1e-3), Unit("TFLOP/s", 1.0))
PERCENT: Final = (Unit("%", 1e-2),)
PERCENT_AS_STORED: Final = (Unit("%", 1.0),)
NO_UNIT: Final = (Unit("", 1.0),)
WITHIN: Final = (1.0, 1.1, 1.5, 2.0, 5.0, 10.0)
"""Factors of the performance profile: in what share of the cases is an impl within so much of the fastest?"""


@dataclass(frozen=True)
class Column:
    """One column. ``key`` names its value, ``doc`` its meaning, ``anchor`` its place in the metrics page.

    A table shows a column in the largest of ``units`` that suits all its values. ``group`` collects columns
    that are shown and hidden together. ``priority`` 1 stays on a phone, 2 on a tablet, 3 needs a desk.
    """

    key: str
    label: str
    doc: str
    group: str
    units: tuple[Unit, ...] = NO_UNIT
    numeric: bool = True
    priority: int = 3
    anchor: str = ""

    def unit(self, values: Iterable[float | None]) -> Unit:
        """The unit that suits all of ``values``, which are as stored."""
        return common_unit(values, self.units) if len(self.units) > 1 else self.units[0]

    def plain(self) -> dict[str, Any]:
        """The column as the script of the page reads it."""
        return {
            "key": self.key,
            "label": self.label,
            "doc": self.doc,
            "group": self.group,
            "units": [list(unit) for unit in self.units],
            "numeric": self.numeric,
            "priority": self.priority,
            "anchor": self.anchor,
        }


def shown(value: float | None, unit: Unit, half_width: float | None = None) -> str:
    """``value``, as stored, in ``unit``; as many digits as ``half_width`` supports, else three."""
    if value is None:
        return number(None)
    return number(value / unit.size, None if half_width is None else half_width / unit.size)


def _of(name: str, label: str, group: str, units: tuple[Unit, ...] = NO_UNIT, priority: int = 3) -> Column:
    """A column of the schema under the heading ``label``."""
    return Column(name, label, BY_NAME[name].doc.replace("`", ""), group, units, True, priority, name)


RANK: Final = Column(
    *(
        "rank",
        "rank",
        "Place by time; a range where intervals overlap, ~ where one block gives none.",
        "case",
    ),
    priority=1,
)
IMPL: Final = Column("impl", "impl", "Mechanism and backend.", "case", numeric=False, priority=1)
FAMILY: Final = Column("family", "family", "Kind of approach.", "record", numeric=False, priority=2)
TIME: Final = Column(
    *("time_us", "time", "Median of the block medians, ± half of its 95 % interval.", "case", TIME_UNITS),
    priority=1,
    anchor="time_us",
)
RATIO: Final = Column(
    *("ratio", "× baseline", "Time of the baseline over this time: above 1 is faster.", "case"), priority=1
)
FLAGS: Final = Column(
    *("flags", "flags", "What makes the numbers less certain.", "record"),
    numeric=False,
    priority=2,
    anchor="flags",
)
MEASURED: Final = Column(
    *("date", "measured", "Day of the newest block.", "record"), numeric=False, anchor="started_at"
)
BLOCKS: Final = Column(
    *("blocks", "blocks", "Fresh processes that measured the case; one alone is preliminary.", "record"),
    anchor="block",
)

TIMES: Final = (
    _of("e2e_us", "with launch", "time", TIME_UNITS),
    _of("launch_us", "launch", "time", TIME_UNITS),
)
WORK: Final = (
    _of("tflops_effective", "effective", "work", RATE_UNITS, 2),
    _of("tflops", "achieved", "work", RATE_UNITS),
    _of("roofline_pct", "of roofline", "work", PERCENT_AS_STORED),
    _of("roofline_measured_pct", "of measured roofline", "work", PERCENT_AS_STORED, 2),
)
MEMORY: Final = (
    _of("mem_peak_bytes", "peak memory", "memory", BYTE_UNITS, 1),
    _of("mem_saved_bytes", "saved for backward", "memory", BYTE_UNITS, 2),
    _of("mem_workspace_bytes", "workspace", "memory", BYTE_UNITS),
)
ERRORS: Final = (
    _of("err_ratio", "error ratio", "fidelity", (Unit("×", 1.0),), 2),
    _of("approx_err_recorded", "off softmax, recorded", "fidelity", PERCENT, 2),
    _of("approx_err_structured", "structured", "fidelity", PERCENT),
    _of("approx_err_gaussian", "gaussian", "fidelity", PERCENT),
)
SELECTION: Final = (
    _of("density", "density", "selection", PERCENT),
    _of("recall_mean", "recall", "selection", PERCENT),
    _of("selector_share", "selector", "selection", PERCENT),
)
COVERAGE: Final = Column(
    *("coverage", "ok", "Cases measured and correct, of all cases planned for the impl.", "profile", PERCENT),
    priority=2,
)
PROFILE: Final = tuple(
    Column(
        f"within_{factor:g}",
        f"≤ {factor:g}×",
        f"Share of all cases in which the impl takes at most {factor:g} times as long as the fastest one.",
        "profile",
        PERCENT,
    )
    for factor in WITHIN
)
GEO_MEAN: Final = Column(
    *("geo_mean", "geo-mean ×", "Geometric mean of × baseline over the common set of cases.", "profile")
)

VALUES: Final = (*TIMES, *WORK, *MEMORY, *ERRORS, *SELECTION)
"""Columns of the schema that a slice carries, besides the time."""

ANSWER: Final = (
    *(RANK, IMPL, TIME, RATIO, WORK[0], WORK[3], MEMORY[0], MEMORY[1], ERRORS[0], ERRORS[1], FLAGS),
)
"""The table of the first page."""

BOARD: Final = (
    *(RANK, IMPL, TIME, RATIO, *TIMES, *MEMORY, *WORK, *ERRORS, *SELECTION),
    *(COVERAGE, *PROFILE, GEO_MEAN, FAMILY, BLOCKS, FLAGS, MEASURED),
)
"""The table of the leaderboard."""

GROUPS: Final = {
    "time": "Launch",
    "memory": "Memory",
    "work": "Work and bounds",
    "fidelity": "Fidelity",
    "selection": "Selection",
    "profile": "Over all cases",
    "record": "Record",
}
"""Groups that the leaderboard can show and hide."""
