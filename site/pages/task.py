"""One page a task."""

from __future__ import annotations

from collections.abc import Iterator

from attnbench.site.figure import Figure, figure
from attnbench.site.page import Page, SiteData
from attnbench.site.views.command import repeat
from attnbench.site.views.glance import seeds
from attnbench.site.views.links import task_page
from attnbench.site.views.tasks import TaskTable


def pages(data: SiteData) -> Iterator[Page]:
    """``task/<id>.html`` for every task with a row."""
    for name in sorted({table.task for table in data.task_tables}):
        tables = [table for table in data.task_tables if table.task == name]
        rows = [row for row in data.rows if row["scope"] == "task" and (row["task"] or row["suite"]) == name]
        commands = {
            f"{preset}, {device}": repeat(
                [row for row in rows if (row["preset"], row["device"]) == (preset, device)],
                data.catalogue.workloads,
                data.catalogue.mechanisms,
            )
            for preset, device in sorted({(row["preset"], row["device"]) for row in rows})
        }
        info = data.catalogue.tasks.get(name, {})
        context = {
            "task": name,
            "info": info,
            "tables": tables,
            "commands": commands,
            "figures": {table.anchor: _figure(table) for table in tables},
            "fingerprints": sorted(
                {(r["data"], r["data_fingerprint"]) for r in rows if r["data_fingerprint"]}
            ),
        }
        yield Page(task_page(name), str(info.get("title") or name), "task.html", context, "index.html")


def _figure(table: TaskTable) -> Figure | None:
    spec = seeds([entry.score for entry in table.entries])
    return None if spec is None else figure(spec, f"seeds_{table.anchor}", interactive=False)
