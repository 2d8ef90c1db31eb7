"""How every planned case ended, and so why a number is missing."""

from __future__ import annotations

from collections.abc import Iterator

from attnbench.site.page import Page, SiteData
from attnbench.site.views.status import boards, legend


def pages(data: SiteData) -> Iterator[Page]:
    """``status.html`` with the counts, and ``status/<device>-<dtype>.html`` with the matrices."""
    found = boards(data.cases)
    context = {"legend": legend(data.current), "boards": found, "cases": len(data.current)}
    yield Page("status.html", "Status of every planned case", "status.html", context, "status.html")
    for board in found:
        title = f"Status on {board.device}, {board.dtype}"
        yield Page(board.path, title, "matrix.html", {"board": board, "boards": found}, "status.html")
