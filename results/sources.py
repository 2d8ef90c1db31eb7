"""Where rows come from: a run folder, a Parquet file, a journal, or a folder of those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attnbench.errors import UsageError
from attnbench.results import migrate, schema
from attnbench.results.journal import read_journal
from attnbench.results.rows import Row, canonical, misfits
from attnbench.results.store import MAGIC, read_parquet

JOURNAL: Final = "journal.jsonl"
RESULTS: Final = "results.parquet"

Paths = str | Path | Iterable[str | Path]
"""One path, or several."""


@dataclass(frozen=True)
class Part:
    """The rows of one file, each with every column of the current schema."""

    path: Path
    rows: list[Row]
    is_journal: bool

    def locator(self, index: int) -> str:
        """Where row ``index`` stands in the file: its line in a journal, its number from 0 in Parquet."""
        return f"line {index + 2}" if self.is_journal else f"row {index}"


def read_parts(paths: Paths) -> Iterator[Part]:
    """Read every file that ``paths`` mean, one after another. Raises UsageError as :func:`read_part`."""
    for path in locate(paths):
        yield read_part(path)


def locate(paths: Paths) -> list[Path]:
    """The files that ``paths`` mean, each once, in the order given.

    Of a run folder it is the journal, or the Parquet file where only that was kept. Any other folder stands
    for the run folders and Parquet files directly in it, by name. Raises UsageError for a path that does
    not exist, a folder without results, and for no path at all.
    """
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not given:
        raise UsageError("no results given; expected a run folder, a Parquet file or a journal")
    found: dict[Path, Path] = {}
    for path in given:
        for file in _files_of(path):
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_part(path: Path) -> Part:
    """Read one file, by what it contains, not by its name.

    Raises UsageError for a file that is neither journal nor Parquet of attnbench, or damaged, or newer.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if start == MAGIC:
        return Part(path, read_parquet(path), is_journal=False)
    if start.startswith(b"{"):
        return Part(path, _rows_of_journal(path), is_journal=True)
    raise UsageError(
        f"{path} is neither a journal nor Parquet: observed a file that starts with {start!r}; "
        "expected a run folder, a Parquet file or a journal"
    )


def _files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise UsageError(f"{path} does not exist; expected a run folder, a Parquet file or a journal")
    if not path.is_dir():
        return [path]
    if own := _file_of_run(path):
        return [own]
    files = [
        child if child.suffix == ".parquet" else _file_of_run(child)
        for child in sorted(path.iterdir())
        if not child.name.startswith(".") and (child.is_dir() or child.suffix == ".parquet")
    ]
    kept = [file for file in files if file is not None]
    if not kept:
        raise UsageError(
            f"{path} holds no results: observed neither {JOURNAL} nor *.parquet, here or one folder down; "
            "expected a folder made by attnbench run"
        )
    return kept


def _file_of_run(folder: Path) -> Path | None:
    """The journal comes first: a run that was continued has a journal newer than its Parquet file."""
    for name in (JOURNAL, RESULTS):
        if (folder / name).is_file():
            return folder / name
    return None


def _rows_of_journal(path: Path) -> list[Row]:
    contents = read_journal(path)
    rows = contents.rows
    if contents.header.schema_version != schema.SCHEMA_VERSION:
        rows = migrate.lift(rows, contents.header.schema_version, path)
    wrong = []
    for line, row in enumerate(rows, 2):
        found = [f"unknown column {name!r}" for name in row if name not in schema.BY_NAME] + misfits(row)
        wrong += [f"line {line}: {text}" for text in found]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise UsageError(
            f"{path} does not match schema version {schema.SCHEMA_VERSION}: {'; '.join(wrong[:5])}{more}. "
            "It was edited or written by a development version; restore it, or delete those lines"
        )
    return canonical(rows)
