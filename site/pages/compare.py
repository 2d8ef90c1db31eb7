"""Two runs, impls or devices side by side: the newest two runs drawn, any other pair by the script."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from attnbench.results.rows import Row
from attnbench.site.figure import inline
from attnbench.site.page import Asset, Page, SiteData
from attnbench.site.views import compare
from attnbench.site.views.slices import compact


def pages(data: SiteData) -> Iterator[Page | Asset]:
    """``compare.html`` and a file with the timed rows of every device."""
    timed: dict[str, list[Row]] = {}
    for row in data.rows:
        if row.get("scope") != "task":
            timed.setdefault(row["device"], []).append(row)
    files: dict[str, dict[str, Any]] = {}
    for device, rows in sorted(timed.items()):
        made = compare.content(rows)
        text = compact(made)
        path = f"data/compare/{hashlib.sha256(text.encode()).hexdigest()[:12]}.js"
        files[device] = {"file": path, "runs": made["runs"], "impls": made["impls"]}
        yield Asset(path, f'attnbench.receive("{path}",{text});\n'.encode())
    pair = compare.default_pair(data.rows)
    found = None
    if pair is not None:
        found = compare.result(compare.between(data.rows, "run", *pair), "run", *pair)
    context = {
        "result": found,
        "shown": compare.SHOWN,
        "devices": files,
        "kinds": list(compare.KINDS.items()),
        "config": inline(
            {
                "devices": files,
                "rule": compare.rule(),
                "signs": compare.SIGNS,
                "usual": {"by": "run", "a": pair[0] if pair else "", "b": pair[1] if pair else ""},
            }
        ),
    }
    yield Page("compare.html", "Compare", "compare.html", context, "compare.html")
