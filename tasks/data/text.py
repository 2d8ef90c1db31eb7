"""Text for the language tasks: what every CPython carries as bytes, and PG-19 as tokens.

Embedded text depends on the version of Python, so a run records its SHA-256 and only equal hashes are
compared.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnbench.errors import UsageError, unknown_name
from attnbench.tasks.base import Corpus
from attnbench.tasks.data import sources
from attnbench.tasks.data.extras import require
from attnbench.tasks.data.loaders.texts import GPT2, PG19

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


@dataclass(frozen=True)
class Text:
    """Two streams of token ids below ``vocabulary``; ``test_bytes`` are the bytes of the test text."""

    train: Tensor
    test: Tensor
    vocabulary: int
    test_bytes: int
    corpus: Corpus


def load(name: str) -> Text:
    """The corpus ``name`` cut in two: an embedded one as bytes, ``pg19`` as tokens of GPT-2.

    Raises UsageError for an unknown name or an incomplete Python, DataMissing without the books of PG-19.
    """
    if name == "pg19":
        return _pg19()
    content, known = corpus(name)
    train, test = split(content)
    return Text(train, test, VOCABULARY, len(test), known)


def windows(part: Tensor, starts: Tensor, length: int) -> Tensor:
    """Token ids (len(starts), length) of the windows of ``part`` that begin at ``starts``."""
    index = starts[:, None] + torch.arange(length)
    return part[index.to(part.device)].long()


def draw_windows(part: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """``count`` windows (count, length) of ``part``, drawn with replacement."""
    return windows(part, torch.randint(len(part) - length + 1, (count,), generator=generator), length)


# ---- tokens of GPT-2 -----------------------------------------------------------------------------------

GPT2_VOCABULARY = 50_257


@cache
def gpt2() -> Any:
    """The tokeniser of GPT-2.

    Raises UsageError without the library or with another vocabulary, DataMissing without the file.
    """
    library = require("tokenizers", "tokenizers", "tokens of GPT-2")
    source = sources.find("gpt2")
    assert isinstance(source, GPT2)
    source.require_complete()
    return library.Tokenizer.from_file(str(source.path))


def _pg19() -> Text:
    """PG-19 as tokens, the books in the order of the data set; encoded once and kept on disk."""
    source = sources.find("pg19")
    assert isinstance(source, PG19)
    source.require_complete(("train", "test"))
    corpus = source.corpus()
    folder = Path.home() / ".cache" / "attnbench" / "tokens"
    train, test = (folder / f"pg19-{part}-{corpus.fingerprint[:16]}.u16" for part in ("train", "test"))
    for part, path in (("train", train), ("test", test)):
        if not path.is_file():
            _encode((_stripped(book.text) for book in source.books(part)), path)
    test_bytes = sum(len(line.encode()) for book in source.books("test") for line in _stripped(book.text))
    return Text(_stream(train), _stream(test), GPT2_VOCABULARY, test_bytes, corpus)


def _stripped(text: str) -> list[str]:
    """The lines of a book without the white space around them, as fairseq's encoder reads them."""
    return [line.strip() for line in text.splitlines()]


def _encode(books: Iterator[list[str]], path: Path) -> None:
    """Write the tokens of all lines to ``path`` as 16-bit integers; nothing is there until all are."""
    tokenizer = gpt2()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        for lines in books:
            for encoded in tokenizer.encode_batch_fast(lines, add_special_tokens=False):
                file.write(np.asarray(encoded.ids, np.uint16).tobytes())
    part.replace(path)


def _stream(path: Path) -> Tensor:
    """The tokens in ``path``, read from disk where they are used."""
    return torch.from_numpy(np.memmap(path, np.uint16, mode="c"))
