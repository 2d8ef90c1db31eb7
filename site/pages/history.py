"""What became slower or faster: steps in recorded runs, newest first, and their feed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from attnbench.site import charts
from attnbench.site.figure import Figure, figure
from attnbench.site.page import Asset, Page, SiteData
from attnbench.site.views.feed import feed
from attnbench.site.views.history import FEWEST, Event, Series, all_series, events
from attnbench.site.views.links import impl_page, run_page

DRAWN: Final = 40
"""Events whose largest step is drawn; older ones are listed without a chart."""


def pages(data: SiteData) -> Iterator[Page | Asset]:
    """``history.html`` and ``feed.xml``."""
    series = all_series(data.rows)
    found = events(series)
    newest = max((str(row["started_at"]) for row in data.rows), default="")
    yield Asset("feed.xml", feed(found, newest, data.url))
    context: dict[str, Any] = {
        "events": [
            (event, _drawing(event, at), impl_page(event.mechanism)) for at, event in enumerate(found)
        ],
        "run_page": run_page,
        "series": len(series),
        "fewest": FEWEST,
        "devices": sorted({event.device for event in found}),
        "impls": sorted({event.impl for event in found}),
    }
    yield Page("history.html", "Regressions", "history.html", context, "history.html")


def _drawing(event: Event, at: int) -> Figure | None:
    if at >= DRAWN:
        return None
    return figure(chart_of(event.steps[0].series), f"step-chart-{at}", interactive=False)


def chart_of(series: Series, small: bool = False) -> charts.Spec:
    """The chart of one series; ``small`` is a sparkline."""
    runs: Sequence[Any] = series.runs
    return charts.timeline(
        [run.date for run in runs],
        [run.value_us for run in runs],
        [run.software for run in runs],
        series.levels,
        series.changes,
        title=f"{series.impl}, {series.case}",
        small=small,
    )
