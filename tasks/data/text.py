"""English and Python text that every CPython carries: the embedded corpora of the language tasks.

The text depends on the version of Python, so a run records its SHA-256 and only equal hashes are compared.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attnbench.errors import UsageError, unknown_name
from attnbench.tasks.base import Corpus

VOCABULARY = 128
"""Bytes below 128: what is not ASCII is removed from every corpus."""

TEST_SHARE = 0.1
"""The last tenth of a corpus is its test part."""

_OPTIONAL = ("test", "tests", "idlelib", "idle_test", "tkinter", "turtledemo", "lib2to3", "ensurepip")
"""Parts of the library that a distribution may leave out: skipped everywhere, so that texts agree."""


def _help_topics() -> bytes:
    """The language reference behind ``help()``: 79 topics, about 460 kB, in alphabetical order."""
    from pydoc_data import topics

    return _ascii("".join(topics.topics[name] for name in sorted(topics.topics)))


def _library_sources() -> bytes:
    """The sources of the standard library, about 10 MB, files in an order that mixes the packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages", *_OPTIONAL} & set(path.relative_to(root).parts)
    ]
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    return b"".join(_ascii(path.read_text(encoding="utf-8", errors="ignore")) for path in files)


def _ascii(text: str) -> bytes:
    return text.encode("ascii", errors="ignore")


CORPORA: Mapping[str, Callable[[], bytes]] = {
    "python help topics": _help_topics,
    "python library sources": _library_sources,
}


@cache
def corpus(name: str) -> tuple[bytes, Corpus]:
    """The ASCII bytes of an embedded corpus and its identity.

    Raises UsageError for an unknown name, or when this Python installation does not contain the text.
    """
    if name not in CORPORA:
        raise unknown_name("corpus", name, CORPORA)
    try:
        text = CORPORA[name]()
    except ImportError as error:
        text, why = b"", f": {error}"
    else:
        why = ""
    if len(text) < 100_000:
        raise UsageError(
            f"corpus {name!r}: observed {len(text)} bytes in this Python installation{why}, expected at "
            "least 100,000; use a complete CPython (the standard library is stripped here)"
        )
    return text, Corpus(name, "embedded", hashlib.sha256(text).hexdigest())


def split(text: bytes) -> tuple[Tensor, Tensor]:
    """(training part, test part) as uint8 tensors; the test part is the last tenth."""
    values = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(text) - round(len(text) * TEST_SHARE)
    return values[:cut], values[cut:]
