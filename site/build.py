"""Builds the static site: validated rows in, pages out, byte-identical for identical input."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from attnbench.errors import UsageError
from attnbench.results.read import rows as read_rows
from attnbench.results.rows import Row
from attnbench.results.store import write_parquet
from attnbench.results.validate import validate
from attnbench.site import views

PAGES = (
    {"file": "index.html", "title": "Leaderboard"},
    {"file": "status.html", "title": "Status"},
    {"file": "data.html", "title": "Data"},
)
SHOWN_PROBLEMS = 20


def build(paths: Iterable[str | Path], out: str | Path) -> int:
    """Write the site of all rows in ``paths`` into ``out`` and return the number of pages.

    Raises UsageError, and writes nothing, when the results do not pass validation or a folder that is not
    a site would be overwritten.
    """
    sources, folder = list(paths), Path(out)
    errors = [p for p in validate(sources) if p.severity == "error"]
    if errors:
        listed = "\n".join(f"  {problem}" for problem in errors[:SHOWN_PROBLEMS])
        more = f"\n  and {len(errors) - SHOWN_PROBLEMS} more" if len(errors) > SHOWN_PROBLEMS else ""
        raise UsageError(f"the results have {len(errors)} problems, expected none:\n{listed}{more}")
    rows = read_rows(sources)
    _prepare(folder)
    (folder / "data").mkdir(exist_ok=True)
    write_parquet(rows, folder / "data/results.parquet")
    for page in PAGES:
        (folder / page["file"]).write_text(_render(page, rows, folder), encoding="utf-8")
    return len(PAGES)


def _render(page: dict[str, str], rows: list[Row], folder: Path) -> str:
    environment = Environment(
        loader=PackageLoader("attnbench.site"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    common = {"pages": PAGES, "file": page["file"], "title": page["title"], "site": _facts(rows)}
    return environment.get_template(page["file"]).render(**common, **_content(page["file"], rows, folder))


def _content(file: str, rows: list[Row], folder: Path) -> dict[str, Any]:
    if file == "index.html":
        return {
            "sections": views.sections(rows),
            "columns": views.COLUMNS,
            "selectors": views.SELECTORS,
            "tasks": views.task_tables(rows),
        }
    if file == "status.html":
        return {"legend": views.legend(rows), "matrices": views.matrices(rows)}
    data = (folder / "data/results.parquet").read_bytes()
    return {
        "size": f"{len(data) / 1024:.0f} KiB",
        "sha256": hashlib.sha256(data).hexdigest(),
        "environments": views.environments(rows),
        "runs": views.runs(rows),
        "flags": views.flags(rows),
    }


def _facts(rows: list[Row]) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "runs": len({row["run_id"] for row in rows}),
        "newest": max((str(row["started_at"])[:10] for row in rows), default="never"),
        "versions": ", ".join(sorted({row["attnbench_version"] for row in rows})) or "without results",
        "statement": views.statement(rows),
    }


def _prepare(folder: Path) -> None:
    """Make the folder and its assets; a folder that holds something else is left alone."""
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / "static/site.css").is_file():
            raise UsageError(
                f"{folder} is not empty and holds no site of ours: observed other files, expected a new or "
                "empty folder; choose another --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with as_file(files("attnbench.site") / "static") as static:
            shutil.copytree(static, folder / "static", dirs_exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; choose another --out") from None
