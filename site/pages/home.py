"""The answer: the table of one case, chosen by device, dtype, pattern, direction and length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attnbench.site.figure import figure
from attnbench.site.page import Page, SiteData
from attnbench.site.pages import cases
from attnbench.site.views import columns, glance
from attnbench.site.views.table import case_table


def pages(data: SiteData) -> Iterator[Page]:
    """``index.html``."""
    context: dict[str, Any] = {"table": None, "figures": [], "tasks": data.task_tables}
    chosen = data.default_case
    if chosen is not None:
        context |= cases.context(data, columns.ANSWER, "answer.js")
        context["table"] = case_table(
            chosen, data.entries[chosen], columns.ANSWER, old_before=data.old_before
        )
        context["cases"] = len(data.cases)
        context["setting"] = glance.setting_words(chosen)
        specs = {
            "scaling": glance.scaling(data.cases, chosen),
            "tradeoff": glance.tradeoff(data.cases, chosen),
            "outcomes": glance.outcomes(data.current),
        }
        context["figures"] = [
            figure(spec, name, interactive=False) for name, spec in specs.items() if spec is not None
        ]
    yield Page(
        "index.html", "Which attention, for my case, at what cost?", "index.html", context, "index.html"
    )
