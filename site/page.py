"""What a page of the site is, and what every page is made from: validated rows and what follows from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from attnbench.results.aggregate import Summary, newest, summarise
from attnbench.results.rows import Row
from attnbench.site.catalogue import Catalogue
from attnbench.site.views.case import Case, Entry, by_case, default, ranked
from attnbench.site.views.slices import Slice, slices
from attnbench.site.views.tasks import TaskTable, task_tables
from attnbench.site.views.words import statement, year_before


@dataclass(frozen=True)
class Page:
    """One HTML file: ``path`` below the root of the site, rendered from ``template`` with ``context``.

    ``nav`` is the path of the entry of the header that the page belongs to; ``description`` is for search
    engines.
    """

    path: str
    title: str
    template: str
    context: Mapping[str, Any] = field(default_factory=dict)
    nav: str = ""
    description: str = ""


@dataclass(frozen=True)
class Asset:
    """One other file, written as it is."""

    path: str
    content: bytes


@dataclass(frozen=True)
class Facts:
    """What header and footer of every page say of the data set; only what follows from rows.

    ``data_version`` changes when any value of any row does.
    """

    rows: int
    runs: int
    newest: str
    versions: tuple[str, ...]
    commits: tuple[str, ...]
    data_version: str
    statement: str


@dataclass(frozen=True)
class SiteData:
    """Everything that pages are made from.

    ``current`` has the newest summary of every case of operations and layers, ``tasks`` those of tasks,
    ``older`` the summaries of both that newer ones replace. ``url`` is the address that the site will have,
    ``repository`` that of the source, both empty when not known.
    """

    rows: tuple[Row, ...]
    current: tuple[Summary, ...]
    tasks: tuple[Summary, ...]
    older: tuple[Summary, ...]
    catalogue: Catalogue
    facts: Facts
    url: str = ""
    repository: str = ""

    @cached_property
    def cases(self) -> dict[Case, list[Summary]]:
        """The summaries of operations and layers by case."""
        return by_case(self.current)

    @cached_property
    def entries(self) -> dict[Case, list[Entry]]:
        """All impls of every case, ranked."""
        return ranked(self.cases)

    @property
    def old_before(self) -> str:
        """The day before which a measurement is called old: a year before the newest; empty without rows."""
        return year_before(self.facts.newest)

    @cached_property
    def default_case(self) -> Case | None:
        """The case that pages show first; None without any."""
        return default(self.cases)

    @cached_property
    def slices(self) -> list[Slice]:
        """What the scripts of the pages load."""
        return slices(self.entries, self.old_before)

    @cached_property
    def task_tables(self) -> list[TaskTable]:
        """The scores of all tasks."""
        return task_tables(self.tasks)

    @cached_property
    def mechanisms(self) -> tuple[str, ...]:
        """Mechanisms with a row, by name; controls of tasks are none."""
        return tuple(sorted({row["mechanism"] for row in self.rows if row["family"] != "control"}))

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """Devices with a row, by name."""
        return tuple(sorted({row["device"] for row in self.rows}))


class PageModule(Protocol):
    """A module of :mod:`attnbench.site.pages`."""

    def pages(self, data: SiteData) -> Iterable[Page | Asset]:
        """The files that this module contributes."""


def site_data(
    rows: Iterable[Row], catalogue: Catalogue | None = None, url: str = "", repository: str = ""
) -> SiteData:
    """Summarise rows once for all pages."""
    everything = tuple(rows)
    kept, older = newest(summarise(everything))
    return SiteData(
        rows=everything,
        current=tuple(s for s in kept if s.get("scope") != "task"),
        tasks=tuple(s for s in kept if s.get("scope") == "task"),
        older=tuple(older),
        catalogue=catalogue or Catalogue(),
        facts=_facts(everything),
        url=url.rstrip("/"),
        repository=repository.rstrip("/"),
    )


def _facts(rows: tuple[Row, ...]) -> Facts:
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda r: (r["run_id"], r["case_key"], r["block"], r["software_key"])):
        digest.update(repr(sorted(row.items())).encode())
    return Facts(
        rows=len(rows),
        runs=len({row["run_id"] for row in rows}),
        newest=max((str(row["started_at"])[:10] for row in rows), default="never"),
        versions=tuple(sorted({row["attnbench_version"] for row in rows})),
        commits=tuple(sorted({row["commit"] for row in rows if row.get("commit")})),
        data_version=digest.hexdigest()[:12],
        statement=statement(rows),
    )
