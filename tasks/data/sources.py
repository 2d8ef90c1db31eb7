"""Where the real data sets of the tasks lie on this machine, and what to do when they do not.

A run never downloads: a task asks :func:`find` for a data set and gets a :class:`Source` that reads it, or
:class:`DataMissing` with everything needed to get it. Imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from attnbench.errors import UsageError, unknown_name
from attnbench.tasks.base import Corpus
from attnbench.tasks.data.catalogue import CATALOGUE, DataSet

ROOT_VARIABLE = "ATTNBENCH_DATA"
"""Environment variable: a folder with one folder a data set."""

HASHED_BYTES = 50_000_000
"""Data sets up to this size are fingerprinted by content, larger ones by the names and sizes of files."""


Parts = Mapping[str, int | None]
"""Samples of every part of a data set, as published; None where that varies."""


class DataMissing(UsageError):
    """A data set, or a part of it, is not on this machine."""


class DataDamaged(UsageError):
    """A file of a data set does not hold what its format promises."""


@dataclass(frozen=True)
class Count:
    """Samples of one part of a data set: as found, and as published (None where that varies)."""

    part: str
    observed: int
    published: int | None

    @property
    def complete(self) -> bool:
        """Whether nothing is missing and nothing is too many."""
        return self.published is None or self.observed == self.published

    def __str__(self) -> str:
        of = "" if self.complete else f" of {self.published:,}"
        return f"{self.observed:,}{of} {self.part}"


class Source(ABC):
    """One data set in one folder of this machine; subclasses read its samples.

    ``root`` is the folder that the paths of the layout start from.
    """

    marks: ClassVar[tuple[str, ...]]
    """Globs of which one finds a file wherever the data set is."""
    nested: ClassVar[tuple[str, ...]] = ()
    """Folders that archives of the data set unpack into: the root may be such a folder of where we look."""
    published: ClassVar[Parts]

    def __init__(self, data_set: DataSet, root: Path) -> None:
        self.data_set, self.root = data_set, root

    @classmethod
    def locate(cls, folder: Path) -> Path | None:
        """The root of the data set in or below ``folder``, None when it is not there."""
        for candidate in (folder, *(folder / name for name in cls.nested)):
            if any(next(candidate.glob(mark), None) for mark in cls.marks):
                return candidate
        return None

    @abstractmethod
    def count(self, part: str) -> int:
        """Number of samples in ``part``; 0 when it is absent."""

    @abstractmethod
    def sample(self, part: str) -> Any:
        """Read one sample of ``part``. Raises DataMissing or DataDamaged."""

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """The files that samples are read from."""

    def verify(self, parts: Iterable[str] = ()) -> tuple[Count, ...]:
        """Count the samples of ``parts`` (default: all) and read one of each.

        Raises DataMissing for a part that is absent, DataDamaged for a sample that cannot be read. A part
        with another number of samples than published is no error: see :meth:`require_complete`.
        """
        found = []
        for part in parts or self.published:
            observed = self.count(part)
            if observed == 0:
                raise self.missing(part)
            self.sample(part)
            found.append(Count(part, observed, self.published[part]))
        return tuple(found)

    def require_complete(self, parts: Iterable[str] = ()) -> None:
        """Raise UsageError when a part has another number of samples than published."""
        wrong = [count for count in self.verify(parts) if not count.complete]
        if wrong:
            listed = ", ".join(f"{c.observed:,} in {c.part} (published: {c.published:,})" for c in wrong)
            raise UsageError(
                f"data set {self.data_set.name} in {self.root}: observed {listed}; a published setting needs "
                "all of it, copy it again"
            )

    def fingerprint(self) -> str:
        """SHA-256 of the names and contents of all files; beyond ``HASHED_BYTES``, of names and sizes."""
        listed = sorted((path.relative_to(self.root).as_posix(), path) for path in self.files())
        sizes = [path.stat().st_size for _, path in listed]
        small = sum(sizes) <= HASHED_BYTES
        digest = hashlib.sha256()
        for (name, path), size in zip(listed, sizes, strict=True):
            digest.update(f"{name}\0{size}\0".encode())
            if small:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def corpus(self, part: str = "") -> Corpus:
        """What a row says about data read from here, as real data; ``part`` is added to the name."""
        name = f"{self.data_set.name} {part}".rstrip()
        return Corpus(name, "real", self.fingerprint())

    def missing(self, what: str) -> DataMissing:
        """Error for a part or a file that the folder lacks."""
        return DataMissing(
            f"data set {self.data_set.name} in {self.root}: observed no {what}, expected "
            f"{_layout(self.data_set)}. {_advice(self.data_set)}"
        )

    def part(self, name: str) -> str:
        """``name`` itself; UsageError when the data set has no part of that name."""
        if name not in self.published:
            raise unknown_name(f"part of data set {self.data_set.name}", name, self.published)
        return name


def damaged(path: Path, observed: object, expected: str) -> DataDamaged:
    """Error for a file whose content is not what its format says."""
    return DataDamaged(f"{path}: observed {observed}, expected {expected}; copy the file again")


@cache
def loader(name: str) -> type[Source]:
    """The class that reads the data set ``name``. Raises UsageError for an unknown one."""
    module, kind = data_set(name).loader.split(":")
    found = getattr(importlib.import_module(f"attnbench.tasks.data.loaders.{module}"), kind)
    assert issubclass(found, Source)
    return found


def data_set(name: str) -> DataSet:
    """The entry of the catalogue. Raises UsageError for an unknown name."""
    if name not in CATALOGUE:
        raise unknown_name("data set", name, CATALOGUE, "`attnbench data status` shows them all.")
    return CATALOGUE[name]


def places(name: str, root: Path | str | None = None) -> list[Path]:
    """Folders that may hold the data set ``name``, in the order of the search.

    ``root/name`` and ``root`` itself where a root is given; else ``$ATTNBENCH_DATA/name`` and
    ``~/.cache/attnbench/name``.
    """
    if root is not None:
        return [Path(root).expanduser() / name, Path(root).expanduser()]
    given = os.environ.get(ROOT_VARIABLE, "")
    shared = [Path(given).expanduser() / name] if given else []
    return [*shared, Path.home() / ".cache" / "attnbench" / name]


def find(name: str, root: Path | str | None = None) -> Source:
    """The data set ``name`` on this machine, searched in :func:`places`.

    Raises UsageError for an unknown name, and DataMissing (a UsageError) when it is nowhere: the message
    names the folders, the expected files, size, licence, and the command or address to get them.
    """
    known, kind = data_set(name), loader(name)
    looked = places(name, root)
    for folder in looked:
        found = kind.locate(folder)
        if found is not None:
            return kind(known, found)
    raise DataMissing(
        f"data set {name} ({known.title}) is not on this machine: observed none of it in "
        f"{' or '.join(map(str, looked))}, expected {_layout(known)}; size {known.size}, licence: "
        f"{known.licence}. {_advice(known)}"
    )


def layout(name: str) -> str:
    """The files of the data set ``name`` below its root, one line each."""
    return "\n".join(data_set(name).layout)


@dataclass(frozen=True)
class State:
    """One data set as `attnbench data status` shows it; ``root`` is None when it is not here."""

    data_set: DataSet
    root: Path | None
    counts: tuple[Count, ...] = ()
    problem: str = ""

    @property
    def summary(self) -> str:
        """What is wrong, or what was counted, or whether it is here."""
        if self.problem or self.counts:
            return self.problem or ", ".join(map(str, self.counts))
        return "missing" if self.root is None else "found"


def states(root: Path | str | None = None, verify: bool = False) -> Iterator[State]:
    """The state of every data set; with ``verify`` each that is here is counted and sampled."""
    for name, entry in CATALOGUE.items():
        try:
            found = find(name, root)
        except DataMissing:
            yield State(entry, None)
            continue
        try:
            yield State(entry, found.root, found.verify() if verify else ())
        except UsageError as error:
            yield State(entry, found.root, problem=str(error))


def _layout(entry: DataSet) -> str:
    return "; ".join(entry.layout)


def _advice(entry: DataSet) -> str:
    place = f"put it into ${ROOT_VARIABLE}/{entry.name} or ~/.cache/attnbench/{entry.name}"
    if entry.command:
        return f"Run `{entry.command}` (from {entry.home}), or {place}."
    return f"{entry.by_hand} ({entry.home}), then {place}."
