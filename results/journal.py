"""The journal of a run: one JSON line per finished case, on disk before the next case starts.

It is what makes ``kill -9``, a full disk or a power cut lose at most the case that was being measured. The
first line is a header; every line after it is one row. Parquet is made from it when the run is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from attnbench.errors import AttnbenchError, AttnbenchWarning, UsageError
from attnbench.results import schema
from attnbench.results.files import sync_folder
from attnbench.results.rows import Row, check

FORMAT: Final = 1
"""Version of the journal's own layout, apart from the schema of its rows."""


@dataclass(frozen=True)
class Header:
    """First line of a journal: what the rows after it belong to."""

    schema_version: int
    run_id: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """A journal as read: its rows as they were written, and the size of its intact part in bytes."""

    header: Header
    rows: list[Row]
    end: int


def read_journal(path: str | Path) -> Contents:
    """Read a journal without locking or changing it.

    A run may still be writing it, so a last line that is not whole is left out.
    Raises UsageError for a file that is missing, not a journal, of a newer layout, or damaged before its
    last line.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            contents = _read(stream, path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if contents is None:
        raise UsageError(
            f"{path} is not a journal: observed no complete line; expected a header and one row a line. "
            "Nothing was measured into it: start the run again"
        )
    return contents


class Journal:
    """An open journal, locked against other writers. Use :meth:`open`, as a context manager."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._end = 0
        self._keys: set[tuple[str, int]] = set()

    @classmethod
    def open(cls, path: str | Path, *, run_id: str, config: Mapping[str, Any]) -> Self:
        """Create the journal of a run, or go on with it.

        A last line that a kill or a full disk cut short is moved to ``<path>.partial-<n>`` with a warning;
        its case counts as not measured. Raises UsageError when another process writes the journal, when it
        belongs to another run or configuration, or when it is damaged before its last line; AttnbenchError
        when it cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unreadable(path, error) from None
        journal = cls(path, descriptor)
        try:
            journal._lock()
            journal._start(Header(schema.SCHEMA_VERSION, run_id, json.loads(json.dumps(dict(config)))))
        except BaseException:
            journal.close()
            raise
        return journal

    def append(self, row: Row) -> None:
        """Write one finished row; when this returns, the row is on disk.

        Raises ValueError for an invalid row or one whose case and block are in the journal already, both
        programming errors, and AttnbenchError when the disk is full; the journal then still ends with the
        row before.
        """
        if self._descriptor < 0:
            raise ValueError(f"{self.path} is closed (programming error)")
        check(row)
        key = (row["case_key"], row["block"])
        if key in self._keys:
            raise ValueError(f"case {key[0]}, block {key[1]} is in the journal already (programming error)")
        self._write({name: value for name, value in row.items() if value is not None})
        self._keys.add(key)

    def keys(self) -> frozenset[tuple[str, int]]:
        """(case_key, block) of every finished row."""
        return frozenset(self._keys)

    def rows(self) -> list[Row]:
        """Every finished row, in the order of writing."""
        return read_journal(self.path).rows

    def close(self) -> None:
        """Give the journal free for other processes. Calling it twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside ----------------------------------------------------------------------------------------

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self.path} is being written by another process; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise AttnbenchError(
                f"{self.path} cannot be locked ({error.strerror}): its file system has no locks; "
                "choose an --out on a local disk"
            ) from error

    def _start(self, expected: Header) -> None:
        """Write the header, or compare it and learn what is finished; then make the end of the file good."""
        with self.path.open("rb") as stream:
            contents = _read(stream, self.path)
        self._end = contents.end if contents else 0
        self._move_tail_aside()
        if contents is None:
            self._write(_header_object(expected))
            sync_folder(self.path.parent)
            return
        if contents.header != expected:
            raise _other_run(self.path, contents.header, expected)
        for number, row in enumerate(contents.rows, 2):
            match row:
                case {"case_key": str(case_key), "block": int(block)}:
                    self._keys.add((case_key, block))
                case _:
                    raise _damaged(self.path, number, "a row without case_key or block")

    def _move_tail_aside(self) -> None:
        """Keep what stands behind the last whole line in a file of its own and cut the journal there."""
        size = os.fstat(self._descriptor).st_size
        if size == self._end:
            return
        tail = os.pread(self._descriptor, size - self._end, self._end)
        try:
            aside = _write_beside(self.path, tail)
            os.ftruncate(self._descriptor, self._end)
            os.fsync(self._descriptor)
        except OSError as error:
            raise AttnbenchError(
                f"the unfinished last line of {self.path} cannot be moved aside: {error.strerror}; "
                "free some space and try again"
            ) from error
        warnings.warn(
            f"{self.path}: the last line was cut short ({len(tail)} bytes, moved to {aside.name}); "
            "its case will be measured again",
            AttnbenchWarning,
            stacklevel=4,
        )

    def _write(self, value: dict[str, Any]) -> None:
        """One line in one write, flushed to disk; on any failure the file is cut back to where it ended."""
        line = json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            written = 0
            while written < len(line):  # a second round only where the first met the end of the disk
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except BaseException as error:
            self._cut_back()
            if not isinstance(error, OSError):
                raise
            raise AttnbenchError(
                f"{self.path} cannot be written: {error.strerror}; every row before this one is safe. "
                f"Free some space, then go on with --resume {self.path.parent}"
            ) from error
        self._end += len(line)

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._descriptor, self._end)
        except OSError as error:  # a row behind half a line would damage the journal: allow none
            self.close()
            raise AttnbenchError(
                f"{self.path} can be neither written nor cut back ({error.strerror}): the disk may be "
                f"failing. Every row before this one is safe; go on with --resume {self.path.parent}"
            ) from error


def _read(stream: BinaryIO, path: Path) -> Contents | None:
    """Header, rows and size of the intact part; None where not even the header is whole."""
    header: Header | None = None
    rows: list[Row] = []
    end = 0
    for number, line in enumerate(stream, 1):
        value = _object(line)
        if value is None:
            if stream.read(1):
                raise _damaged(path, number, "a line that is not a JSON object")
            break
        if header is None:
            header = _header(value, path)
        else:
            rows.append(value)
        end += len(line)
    return None if header is None else Contents(header, rows, end)


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a whole line, else None."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _header(value: dict[str, Any], path: Path) -> Header:
    match value:
        case {"journal": int(layout)} if layout > FORMAT:
            raise UsageError(
                f"{path} was written by a newer attnbench: observed journal layout {layout}, "
                f"expected at most {FORMAT}; update attnbench"
            )
        case {
            "journal": int(),
            "schema_version": int(version),
            "run_id": str(run_id),
            "config": dict(config),
        }:
            return Header(version, run_id, config)
    raise UsageError(
        f"{path} is not a journal: observed a first line with {', '.join(list(value)[:8]) or 'nothing'}; "
        "expected journal, schema_version, run_id and config, as attnbench run writes them"
    )


def _header_object(header: Header) -> dict[str, Any]:
    return {
        "journal": FORMAT,
        "schema_version": header.schema_version,
        "run_id": header.run_id,
        "config": header.config,
    }


def _write_beside(path: Path, data: bytes) -> Path:
    """Write ``data`` to the first free ``<path>.partial-<n>``, on disk when this returns."""
    number = 1
    while (aside := path.with_name(f"{path.name}.partial-{number}")).exists():
        number += 1
    with aside.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return aside


def _other_run(path: Path, found: Header, expected: Header) -> UsageError:
    for name in ("schema_version", "run_id"):
        if getattr(found, name) != getattr(expected, name):
            return UsageError(
                f"{path} cannot be continued by this run: observed {name} {getattr(found, name)}, "
                f"expected {getattr(expected, name)}; choose another --out"
            )
    names = sorted(
        name
        for name in found.config.keys() | expected.config.keys()
        if found.config.get(name) != expected.config.get(name)
    )
    return UsageError(
        f"{path} was started with another configuration: {', '.join(names)} differ; "
        f"go on with --resume {path.parent} and no other option, or choose another --out"
    )


def _damaged(path: Path, number: int, observed: str) -> UsageError:
    return UsageError(
        f"{path}, line {number}: observed {observed}, expected one finished row. Only a last line can be cut "
        f"short by a crash, so the file was edited or the disk failed: restore the file, or delete line "
        f"{number} and go on with --resume {path.parent}, which measures its case again"
    )


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{path} cannot be opened: {error.strerror}; expected the journal of a run, in a folder you may write"
    )
