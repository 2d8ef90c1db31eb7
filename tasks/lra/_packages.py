"""Windows of the standard library's sources, told apart by the package that they come from.

The embedded stand-in for the texts of Long Range Arena. Sources depend on the version of Python, so their
content is in the fingerprint.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attnbench.errors import UsageError

VOCABULARY = 128
"""Bytes below 128: what is not ASCII is removed."""

PACKAGES = ("asyncio", "email", "unittest", "multiprocessing", "xml", "importlib", "logging", "http")
"""Packages of 180 to 490 kB that every complete CPython has."""

TRAIN_SHARE = 0.8
"""The first four fifths of every package are trained on."""

LEAST_BYTES = 50_000


@cache
def package(name: str) -> NDArray[np.uint8]:
    """The ASCII bytes of a package's sources, files in the order of their names.

    Raises UsageError when this Python installation does not have them.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) / name
    paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    content = np.frombuffer(text.encode("ascii", errors="ignore"), np.uint8)
    if len(content) < LEAST_BYTES:
        raise UsageError(
            f"observed {len(content)} bytes of sources in {root}, expected at least {LEAST_BYTES:,}; use a "
            "complete CPython (its standard library is stripped here)"
        )
    return content


def windows(
    rng: np.random.Generator, labels: NDArray[np.int64], length: int, training: bool
) -> NDArray[np.uint8]:
    """Windows (S, length) of the packages that ``labels`` (S,) number, at random places of one part."""
    found = np.empty((len(labels), length), np.uint8)
    for index, name in enumerate(PACKAGES):
        text = package(name)
        cut = round(len(text) * TRAIN_SHARE)
        part = text[:cut] if training else text[cut:]
        rows = np.flatnonzero(labels == index)
        starts = rng.integers(len(part) - length + 1, size=len(rows))
        found[rows] = part[starts[:, None] + np.arange(length)]
    return found
