"""What every page with a chart refers to: the colours of both themes, and the library that draws."""

from __future__ import annotations

from collections.abc import Iterator

from attnbench.site import draw, palette
from attnbench.site.page import Asset, SiteData


def pages(data: SiteData) -> Iterator[Asset]:
    """``static/charts.css`` and ``static/vega.js``; the latter only for a site that has something to draw."""
    yield Asset("static/charts.css", palette.css().encode())
    if data.rows:
        yield Asset("static/vega.js", draw.bundle())
