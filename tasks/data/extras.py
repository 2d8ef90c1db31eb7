"""Libraries that only some tasks need: imported when a task opens, with a clear word when they are absent."""

from __future__ import annotations

import importlib
from typing import Any

from attnbench.errors import UsageError

EXTRA = "tasks"
"""Name of the optional dependencies of pyproject.toml that hold them all."""


def require(module: str, library: str, user: str) -> Any:
    """The imported ``module``; UsageError that says how to install ``library`` when it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{user}: observed no {library} here ({error}), expected it installed: "
            f"pip install 'attnbench[{EXTRA}]'"
        ) from None
