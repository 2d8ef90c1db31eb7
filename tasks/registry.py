"""From a name to a task: one file per task in the suite folders. Listing the ids imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from attnbench.errors import UsageError, unknown_name
from attnbench.tasks.base import Task

SUITES = ("cab", "lra", "recall", "synthetic")
"""Folders that hold tasks; a file ``<suite>/<id>.py`` defines one as ``TASK``."""


@cache
def _files() -> Mapping[str, str]:
    here = Path(__file__).parent
    return {
        path.stem: f"attnbench.tasks.{suite}.{path.stem}"
        for suite in SUITES
        for path in sorted((here / suite).glob("*.py"))
        if not path.stem.startswith("_")
    }


def ids() -> list[str]:
    """Ids of all tasks, by suite and then by name."""
    return list(_files())


def suite_of(name: str) -> str:
    """Suite of a task. Raises UsageError for an unknown name."""
    return _module(name).split(".")[-2]


def select(names: Iterable[str]) -> list[str]:
    """Ids of the tasks that ``names`` mean: ids, globs, ``suite:recall`` or ``all``, each id once.

    Raises UsageError for a name that means no task.
    """
    chosen: dict[str, None] = {}
    for name in names:
        suite = name.removeprefix("suite:") if name.startswith("suite:") else None
        if suite is not None and suite not in SUITES:
            raise unknown_name("suite of tasks", suite, SUITES)
        wanted = "*" if name == "all" else name
        found = [i for i in ids() if (suite_of(i) == suite if suite else fnmatchcase(i, wanted))]
        if not found:
            _module(name)
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def task(name: str) -> Task:
    """The task called ``name``. Raises UsageError for an unknown name, with near spellings."""
    found = getattr(importlib.import_module(_module(name)), "TASK", None)
    if not isinstance(found, Task) or found.id != name:
        raise UsageError(f"{_module(name)}: observed TASK = {found!r}, expected a Task with id {name!r}")
    return found


def _module(name: str) -> str:
    if name not in _files():
        raise unknown_name("task", name, _files(), "`attnbench list --tasks` shows them all.")
    return _files()[name]
