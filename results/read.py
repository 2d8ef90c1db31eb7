"""Reading results: as rows for our own code, as a pandas frame for everybody's analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from attnbench.errors import UsageError
from attnbench.results import schema
from attnbench.results.merge import union
from attnbench.results.rows import Row, to_table
from attnbench.results.sources import Part, Paths, read_parts

if TYPE_CHECKING:
    import pandas as pd


def rows(paths: Paths) -> list[Row]:
    """Rows of one or several run folders, Parquet files or journals, each measurement once.

    A row has every column of the schema, in its order; what is not known is None. Raises UsageError for a
    path that is missing or unreadable, a row without a required column, and measurements that contradict
    each other.
    """
    return union(_complete(part) for part in read_parts(paths))


def _complete(part: Part) -> Part:
    for index, row in enumerate(part.rows):
        missing = [name for name in schema.REQUIRED if row[name] is None]
        if missing:
            raise UsageError(
                f"{part.path}, {part.locator(index)}: observed no {', '.join(missing)}, expected every "
                f"required column; see all that is wrong with attnbench validate {part.path}"
            )
    return part


def load(path_or_paths: Paths) -> pd.DataFrame:
    """Results as a pandas frame, one row per measured case and block.

    Takes a run folder, a Parquet file, a journal (also of a run that is still going), a folder of those, or
    several. All columns of the schema are there, in its order and with these types: texts ``string``,
    integers ``Int64`` and truth values ``boolean`` (both with ``<NA>``), numbers ``float64``, ``started_at``
    a UTC time stamp, ``samples_us`` a float32 array, other lists Python lists. Units are in
    ``attnbench.results.schema.BY_NAME[name].unit``.

    Raises UsageError as :func:`rows`.

    Example::

        import attnbench

        df = attnbench.load("runs/20261124-101500")
        ok = df[df.status == "ok"]
        ok.pivot_table("time_us", index="n", columns="impl", aggfunc="median")
    """
    import pandas as pd

    nullable = {pa.string(): pd.StringDtype(), pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame: pd.DataFrame = to_table(rows(path_or_paths)).to_pandas(types_mapper=nullable.get)
    frame["started_at"] = pd.to_datetime(frame["started_at"], utc=True, format="ISO8601", errors="coerce")
    for column in schema.COLUMNS:
        if pa.types.is_list(column.type) and column.type.value_type != pa.float32():
            cells = [None if cell is None else cell.tolist() for cell in frame[column.name]]
            frame[column.name] = pd.Series(cells, index=frame.index, dtype=object)
    return frame
