"""All columns of one case, with the standings of every impl over all cases of the setting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attnbench.site.page import Page, SiteData
from attnbench.site.pages import cases
from attnbench.site.views import columns
from attnbench.site.views.case import Case
from attnbench.site.views.profile import same_setting, setting
from attnbench.site.views.table import case_table
from attnbench.site.views.words import DIRECTION_WORDS, pattern_words


def pages(data: SiteData) -> Iterator[Page]:
    """``leaderboard.html``."""
    context: dict[str, Any] = {"table": None, "workloads": 0}
    chosen = data.default_case
    if chosen is not None:
        inside = same_setting(data.cases, chosen, all_workloads=True)
        found = setting({case: data.cases[case] for case in inside})
        context |= cases.context(data, columns.BOARD, "board.js")
        table = case_table(chosen, data.entries[chosen], columns.BOARD, found.standings, data.old_before)
        context |= {
            "table": table,
            "measured": sum(line.summary.ok for line in table.lines),
            "workloads": len({case.workload for case in data.cases}),
            "over": _over(chosen, len(inside)),
            "common": [f"{case.workload} {case.size}" for case in found.common],
        }
    yield Page("leaderboard.html", "Leaderboard", "leaderboard.html", context, "leaderboard.html")


def _over(chosen: Case, cases: int) -> str:
    """What the columns over all cases are over, in the words of the script."""
    direction = DIRECTION_WORDS.get(chosen.direction, chosen.direction)
    return (
        f"{cases} {'case' if cases == 1 else 'cases'}: {pattern_words(chosen.pattern)}, {direction}, "
        f"{chosen.scope}, every length and workload measured on {chosen.device} in {chosen.dtype_words}."
    )
