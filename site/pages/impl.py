"""One page a mechanism."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from attnbench.site.figure import figure
from attnbench.site.page import Page, SiteData
from attnbench.site.views import glance
from attnbench.site.views.links import impl_page
from attnbench.site.views.mechanism import ERRORS, mechanism
from attnbench.site.views.tasks import places
from attnbench.site.views.words import STATUS_ORDER


def pages(data: SiteData) -> Iterator[Page]:
    """``impl/<mechanism>.html`` for every mechanism with a row."""
    placed = places(data.task_tables)
    for name in data.mechanisms:
        info = data.catalogue.mechanisms.get(name, {})
        view = mechanism(name, info, data.entries, data.tasks)
        context = {
            "view": view,
            "errors": ERRORS,
            "statuses": STATUS_ORDER,
            "places": placed.get(name, ()),
            "repository": data.repository,
            **_curves(data, name),
        }
        title = str(info.get("name") or name)
        yield Page(
            impl_page(name), title, "impl.html", context, "leaderboard.html", str(info.get("summary", ""))
        )


def _curves(data: SiteData, name: str) -> dict[str, Any]:
    """A chart of the setting in which the mechanism was measured most, accelerators before CPUs."""
    own = {
        case: [s for s in group if s.get("mechanism") == name and s.ok] for case, group in data.cases.items()
    }
    lengths = Counter((case.setting, case.workload) for case in data.cases)
    chosen = max(
        (case for case, found in own.items() if found),
        key=lambda c: (c.device != "cpu", lengths[c.setting, c.workload], c.direction == "fwd", c),
        default=None,
    )
    spec = None if chosen is None else glance.scaling(data.cases, chosen, name)
    if chosen is None or spec is None:
        return {"figures": [], "setting": ""}
    return {"figures": [figure(spec, "scaling", interactive=False)], "setting": glance.setting_words(chosen)}
