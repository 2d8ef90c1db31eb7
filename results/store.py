"""Rows in Parquet: the form in which finished results are kept, merged and published."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from attnbench.errors import UsageError
from attnbench.results import migrate, schema
from attnbench.results.files import atomically
from attnbench.results.rows import Row, canonical, check, to_table

MAGIC: Final = b"PAR1"
_VERSION: Final = b"attnbench_schema_version"


def write_parquet(rows: Iterable[Row], path: str | Path) -> None:
    """Write rows to ``path``, zstd-compressed, replacing the file as a whole or not at all.

    Raises ValueError for an invalid row (a programming error) and AttnbenchError when the disk is full or
    the folder cannot be written.
    """
    checked = list(rows)
    for row in checked:
        check(row)
    table = to_table(checked)
    with atomically(path) as draft:
        pq.write_table(table, draft, compression="zstd", use_dictionary=True, write_page_checksum=True)


def read_parquet(path: str | Path) -> list[Row]:
    """The rows of a Parquet file that attnbench wrote, lifted to the current schema.

    Nothing in the file is executed or unpickled. Raises UsageError for a file that is missing, damaged, of
    another program, of a newer schema, or whose columns are not those of its schema version.
    """
    path = Path(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            version = _version(file.schema_arrow, path)
            if version == schema.SCHEMA_VERSION:
                _check_columns(file.schema_arrow, path)
            rows: list[Row] = file.read().to_pylist()
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; expected a Parquet file written by attnbench") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{path} cannot be read as Parquet ({cause}): it is damaged, cut short or another kind of file; "
            "fetch it again, or rebuild it from its journal with attnbench merge"
        ) from None
    if version == schema.SCHEMA_VERSION:
        return [{c.name: row.get(c.name) for c in schema.COLUMNS} for row in rows]
    try:
        return canonical(migrate.lift(rows, version, path))
    except ValueError as error:
        raise UsageError(f"{path}: {error}; correct the file or leave it out") from None


def _version(found: pa.Schema, path: Path) -> int:
    text = (found.metadata or {}).get(_VERSION, b"").decode("ascii", "replace")
    if not text.isdecimal():
        raise UsageError(
            f"{path} is Parquet, but not of attnbench: observed "
            f"{f'schema version {text!r}' if text else 'no schema version'} and the columns "
            f"{_some(found.names)}; expected a file written by attnbench run or attnbench merge"
        )
    return int(text)


def _check_columns(found: pa.Schema, path: Path) -> None:
    """Refuse what the version does not explain; a missing optional column is null, by intention."""
    twice = sorted({name for name in found.names if found.names.count(name) > 1})
    unknown = [name for name in found.names if name not in schema.BY_NAME]
    missing = [c.name for c in schema.COLUMNS if c.required and c.name not in found.names]
    wrong = [
        f"{field.name} of type {field.type} instead of {schema.BY_NAME[field.name].type}"
        for field in found
        if field.name in schema.BY_NAME and field.type != schema.BY_NAME[field.name].type
    ]
    observed: dict[str, list[Any]] = {
        "unknown columns": unknown,
        "columns twice": twice,
        "no": missing,
        "columns": wrong,
    }
    texts = [f"{what} {_some(names)}" for what, names in observed.items() if names]
    if texts:
        raise UsageError(
            f"{path} does not match schema version {schema.SCHEMA_VERSION}: observed {'; '.join(texts)}. "
            "It was changed by another program or written by a development version; use the original file"
        )


def _some(names: Iterable[str]) -> str:
    """At most eight names, the rest counted."""
    listed = list(names)
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more
