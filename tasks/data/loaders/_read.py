"""Reading of files in which every failure names the file: text, Parquet tables, images."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnbench.tasks.data.sources import damaged


def text(path: Path) -> str:
    """The whole file as UTF-8, line ends as they are. Raises DataDamaged for other bytes."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"no UTF-8 at byte {error.start}", "UTF-8 text") from None


def lines(path: Path) -> Iterator[str]:
    r"""The lines of a UTF-8 file without their ``\n``, one after the other; other line ends are content."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.removesuffix(b"\n").decode("utf-8")
            except UnicodeDecodeError:
                raise damaged(path, f"no UTF-8 in line {number}", "UTF-8 text") from None


def count_lines(path: Path) -> int:
    """Number of lines; 0 for a file that does not exist."""
    if not path.is_file():
        return 0
    with path.open("rb") as stream:
        return sum(1 for _ in stream)


def parquet_files(root: Path, split: str) -> list[Path]:
    """Parquet files of ``split``: ``split/*.parquet`` (also in a folder), or ``[data/]split-*.parquet``."""
    for pattern in (
        f"{split}/*.parquet",
        f"*/{split}/*.parquet",
        f"data/{split}-*.parquet",
        f"{split}-*.parquet",
    ):
        found = sorted(root.glob(pattern))
        if found:
            return found
    return []


def parquet_rows(paths: Sequence[Path]) -> int:
    """Rows of all files together, read from their footers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = 0
    for path in paths:
        try:
            total += pq.read_metadata(path).num_rows
        except pa.ArrowException as error:
            raise damaged(path, str(error).splitlines()[0], "a Parquet file") from None
    return total


def parquet_records(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of all files in order, ``columns`` only. Raises DataDamaged for other columns or bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                absent = [name for name in columns if name not in file.schema_arrow.names]
                if absent:
                    raise damaged(
                        path, f"columns {', '.join(file.schema_arrow.names)}", f"columns {', '.join(columns)}"
                    )
                for batch in file.iter_batches(batch_size=64, columns=list(columns)):
                    yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise damaged(path, str(error).splitlines()[0], "a Parquet file") from None


def image(source: Path | bytes, path: Path | None = None) -> NDArray[np.uint8]:
    """An image as (height, width, 3) RGB; ``path`` names bytes that come out of a container."""
    from PIL import Image, UnidentifiedImageError

    name = path if path is not None else source
    assert isinstance(name, Path)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # PIL raises these for broken PNG chunks
        raise damaged(name, error, "a PNG or JPEG image") from None
