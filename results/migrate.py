"""Lifts rows of older schema versions to the current one, one version at a time.

When a column changes its meaning or goes, ``schema.SCHEMA_VERSION`` is raised and the step from the version
before is entered in :data:`LIFTS`; results that were ever published stay readable that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from attnbench.errors import UsageError
from attnbench.results import schema
from attnbench.results.rows import Row


def _only_new_columns(row: Row) -> Row:
    """A version that only brought columns: what was not measured then is null."""
    return row


LIFTS: Final[dict[int, Callable[[Row], Row]]] = {1: _only_new_columns, 2: _only_new_columns}
"""Version → the function that turns a row of it into a row of the next version. Version 1 is the first."""


def lift(rows: Iterable[Row], version: int, path: Path) -> list[Row]:
    """Rows of ``version`` as rows of the current version; ``path`` is named in errors.

    Raises UsageError when the version is newer than this program or has no way up.
    """
    if version > schema.SCHEMA_VERSION:
        raise UsageError(
            f"{path} was written by a newer attnbench: observed schema version {version}, "
            f"expected at most {schema.SCHEMA_VERSION}; update attnbench"
        )
    steps = range(version, schema.SCHEMA_VERSION)
    missing = [step for step in steps if step not in LIFTS]
    if version < 1 or missing:
        raise UsageError(
            f"{path} has schema version {version}, which cannot be lifted to {schema.SCHEMA_VERSION}; "
            "read it with the version of attnbench that wrote it, or measure again"
        )
    lifted = list(rows)
    for step in steps:
        lifted = [LIFTS[step](row) for row in lifted]
    return lifted
