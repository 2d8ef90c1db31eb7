"""What a server shows for an address that is not there."""

from __future__ import annotations

from collections.abc import Iterator

from attnbench.site.page import Page, SiteData


def pages(data: SiteData) -> Iterator[Page]:
    """``404.html``; it stands alone, for a server shows it at any depth."""
    yield Page("404.html", "Not here", "404.html", {"root": f"{data.url}/" if data.url else ""})
