"""One page a run, and one for each mechanism in it: the evidence that every number links to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attnbench.results.rows import Row
from attnbench.site.page import Asset, Page, SiteData
from attnbench.site.pages.data import parquet_bytes
from attnbench.site.views.command import install, repeat
from attnbench.site.views.links import impl_page
from attnbench.site.views.run import Evidence, Run, evidences, runs, settings
from attnbench.site.views.words import STATUS_ORDER


def pages(data: SiteData) -> Iterator[Page | Asset]:
    """``run/<id>.html``, ``run/<id>/<mechanism>.html`` and the Parquet file of each run."""
    for run in runs(data.rows):
        yield Asset(run.parquet, parquet_bytes(run.rows))
        context = {
            "run": run,
            "statuses": STATUS_ORDER,
            "commands": [_command(data, [r for r in run.rows if r["device"] == d]) for d in run.devices],
            "install": install(run.rows),
        }
        yield Page(run.page, f"Run {run.run_id}", "run.html", context, "data.html")
        found = evidences(run)
        for mechanism in run.mechanisms:
            yield _evidence(data, run, mechanism.mechanism, mechanism.page, found[mechanism.mechanism])


def _evidence(data: SiteData, run: Run, mechanism: str, path: str, cases: list[Evidence]) -> Page:
    rows = [row for case in cases for row in case.rows]
    context: dict[str, Any] = {
        "run": run,
        "mechanism": mechanism,
        "impl_page": "" if rows[0]["family"] == "control" else impl_page(mechanism),
        "cases": [(case, _command(data, case.rows)) for case in cases],
        "kernels": sorted({name for row in rows for name in row["kernels"] or ()}),
        "ops": sorted({name for row in rows for name in row["ops_used"] or ()}),
        "settings": settings(rows),
        "install": install(rows),
    }
    return Page(path, f"{mechanism} in run {run.run_id}", "evidence.html", context, "data.html")


def _command(data: SiteData, rows: tuple[Row, ...] | list[Row]) -> str:
    return repeat(list(rows), data.catalogue.workloads, data.catalogue.mechanisms)
