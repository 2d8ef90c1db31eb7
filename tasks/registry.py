"""From a name to a task: one file per task in the suite folders. Listing the ids imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from attnbench.errors import UsageError, unknown_name
from attnbench.tasks.base import Task

SUITES = ("cab",)
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
