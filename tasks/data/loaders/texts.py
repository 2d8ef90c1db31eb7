"""PG-19, Multi-News and IMDB, from their own files or Parquet copies, and the tokeniser of GPT-2."""

from __future__ import annotations

import csv
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from attnbench.tasks.data.loaders import _read
from attnbench.tasks.data.sources import Parts, Source, damaged

ARTICLE_BREAK = "|||||"
"""What separates the articles of one Multi-News example."""

NEWLINE = "NEWLINE_CHAR"
"""How the line files of Multi-News write a line end inside an article."""


class _Texts(Source):
    """What the text sets share: their own files, or else Parquet copies with ``columns``."""

    columns: ClassVar[tuple[str, ...]]

    @abstractmethod
    def own_files(self, part: str) -> list[Path]:
        """The files of ``part`` as its authors distribute it; empty for a Parquet copy."""

    def count(self, part: str) -> int:
        """Samples in ``part``."""
        own = self.own_files(part)
        return len(own) if own else _read.parquet_rows(_read.parquet_files(self.root, part))

    def files(self) -> Iterable[Path]:
        """All files of all parts."""
        for part in self.published:
            yield from self.own_files(part) or _read.parquet_files(self.root, part)

    def records(self, part: str) -> Iterator[dict[str, Any]]:
        """The rows of the Parquet copy of ``part``."""
        found = _read.parquet_files(self.root, part)
        if not found:
            raise self.missing(part)
        return _read.parquet_records(found, self.columns)


@dataclass(frozen=True)
class Book:
    """One book: its title ("" where the metadata lack it) and its whole text."""

    title: str
    text: str


class PG19(_Texts):
    """PG-19 (arXiv 1911.05507): whole books, parts train, validation and test."""

    marks = ("test/*.txt", "test/*.parquet", "*/test/*.parquet", "data/test-*.parquet")
    published: ClassVar[Parts] = {"train": 28_602, "validation": 50, "test": 100}
    columns = ("text", "short_book_title")

    def own_files(self, part: str) -> list[Path]:
        """One text file a book, in the order of their names."""
        return sorted((self.root / self.part(part)).glob("*.txt"))

    def books(self, part: str) -> Iterator[Book]:
        """The books of ``part``, one after the other."""
        own = self.own_files(part)
        if not own:
            yield from (Book(row["short_book_title"], row["text"]) for row in self.records(part))
            return
        titles = self._titles()
        for path in own:
            yield Book(titles.get(path.stem, ""), _read.text(path))

    def sample(self, part: str) -> Book:
        """The first book."""
        return next(self.books(part))

    def _titles(self) -> dict[str, str]:
        path = self.root / "metadata.csv"
        if not path.is_file():
            return {}
        found = {}
        for number, row in enumerate(csv.reader(_read.lines(path)), 1):
            if len(row) != 4:
                raise damaged(path, f"{len(row)} columns in line {number}", "book_id, title, date, url")
            found[row[0]] = row[1]
        return found


@dataclass(frozen=True)
class News:
    """One example of Multi-News: the articles on an event, and the summary by an editor."""

    articles: tuple[str, ...]
    summary: str


class MultiNews(_Texts):
    """Multi-News (arXiv 1906.01749): parts train, validation and test."""

    marks = ("test.tgt", "test/*.parquet", "*/test/*.parquet", "data/test-*.parquet")
    nested = ("data",)
    published: ClassVar[Parts] = {"train": 44_972, "validation": 5_622, "test": 5_622}
    columns = ("document", "summary")

    def own_files(self, part: str) -> list[Path]:
        """The files with the articles and the summaries, in this order."""
        stem = {"validation": "val"}.get(self.part(part), part)
        target = self.root / f"{stem}.tgt"
        for source in (self.root / f"{stem}.src", self.root / f"{stem}.src.cleaned"):
            if source.is_file() and target.is_file():
                return [source, target]
        return []

    def count(self, part: str) -> int:
        """Examples in ``part``: the summaries of the line files."""
        own = self.own_files(part)
        return _read.count_lines(own[1]) if own else super().count(part)

    def examples(self, part: str) -> Iterator[News]:
        """The examples of ``part``; articles without text are left out, as there is nothing in them."""
        own = self.own_files(part)
        if not own:
            yield from (_news(row["document"], row["summary"]) for row in self.records(part))
            return
        sources, targets = (_read.lines(path) for path in own)
        try:
            for document, summary in zip(sources, targets, strict=True):
                yield _news(document.replace(NEWLINE, "\n"), summary)
        except ValueError:
            observed = " and ".join(str(_read.count_lines(path)) for path in own)
            raise damaged(own[0], f"{observed} lines in it and in {own[1].name}", "equally many") from None

    def sample(self, part: str) -> News:
        """The first example."""
        return next(self.examples(part))


def _news(document: str, summary: str) -> News:
    articles = (article.strip() for article in document.split(ARTICLE_BREAK))
    return News(tuple(article for article in articles if article), summary.strip())


class IMDB(_Texts):
    """IMDB reviews (Maas et al., 2011): 1 for a positive and 0 for a negative one; parts train and test."""

    marks = ("test/pos/*.txt", "test/*.parquet", "*/test/*.parquet", "data/test-*.parquet")
    nested = ("aclImdb",)
    published: ClassVar[Parts] = {"train": 25_000, "test": 25_000}
    columns = ("text", "label")

    def own_files(self, part: str) -> list[Path]:
        """One file a review: the negative ones, then the positive ones, each in the order of their names."""
        folder = self.root / self.part(part)
        return [path for label in ("neg", "pos") for path in sorted((folder / label).glob("*.txt"))]

    def reviews(self, part: str) -> Iterator[tuple[str, int]]:
        """Text and label of the reviews of ``part``."""
        own = self.own_files(part)
        if not own:
            yield from ((row["text"], row["label"]) for row in self.records(part))
            return
        for path in own:
            yield _read.text(path), int(path.parent.name == "pos")

    def sample(self, part: str) -> tuple[str, int]:
        """The first review."""
        return next(self.reviews(part))


class GPT2(Source):
    """The tokeniser of GPT-2, in the one file of the library tokenizers: part tokens, its vocabulary."""

    marks = ("tokenizer.json",)
    published: ClassVar[Parts] = {"tokens": 50_257}

    @property
    def path(self) -> Path:
        """The file, for the library to read."""
        return self.root / "tokenizer.json"

    def files(self) -> Iterable[Path]:
        """The one file."""
        yield self.path

    def count(self, part: str) -> int:
        """Tokens of the vocabulary."""
        self.part(part)
        return len(self._vocabulary())

    def sample(self, part: str) -> str:
        """The token with the first id that is taken."""
        self.part(part)
        vocabulary = self._vocabulary()
        return min(vocabulary, key=vocabulary.__getitem__)

    def _vocabulary(self) -> dict[str, int]:
        try:
            found = json.loads(_read.text(self.path))["model"]["vocab"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, dict):
            raise damaged(self.path, "no vocabulary in it", "JSON with model.vocab, tokens and their ids")
        return found
