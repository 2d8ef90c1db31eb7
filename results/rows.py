"""A row as a plain dict: which Python values a column takes, and the one canonical form of a row.

Arrow alone would not do: it turns 1.5 into 1 in an integer column without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from attnbench.results import schema

Row = dict[str, Any]
"""Column name → value; an absent column is null."""

_INT64 = 2**63


def check(row: Row) -> None:
    """Raise ValueError, naming every defect, unless the row is valid and can be stored without loss.

    NaN and infinities are refused: JSON has no word for them, and a number that is not one is no
    measurement. Whoever has one leaves the column null and says so in ``reason``.
    """
    found = [*schema.problems(row), *misfits(row)]
    if found:
        raise ValueError(f"invalid row (programming error): {'; '.join(found)}")


def misfits(row: Row) -> list[str]:
    """Values that do not fit the type of their column, in words. Unknown columns are not its business."""
    found = []
    for name, value in row.items():
        column = schema.BY_NAME.get(name)
        if column is None or value is None:
            continue
        wrong = _misfit(value, column.type)
        if wrong:
            found.append(f"{name}: observed {wrong}, expected {column.type}")
    return found


def canonical(rows: Sequence[Row]) -> list[Row]:
    """The rows with every column of the schema, in its order and precision: what Parquet would give back.

    Raises ValueError for an unknown column or a value that does not fit.
    """
    for index, row in enumerate(rows):
        found = [f"unknown column {name!r}" for name in row if name not in schema.BY_NAME] + misfits(row)
        if found:
            raise ValueError(f"row {index}: {'; '.join(found)}")
    return list(to_table(rows).to_pylist())


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Rows that :func:`check` or :func:`canonical` let pass, as an Arrow table of the current schema."""
    columns = [pa.array([row.get(c.name) for row in rows], c.type) for c in schema.COLUMNS]
    return pa.table(columns, schema=schema.arrow_schema())


def _misfit(value: Any, kind: pa.DataType) -> str:
    """What does not fit, empty when it does."""
    if pa.types.is_list(kind):
        if not isinstance(value, list | tuple):
            return repr(value)
        wrong = (_misfit(item, kind.value_type) for item in value)
        return next((f"{text} in the list" for text in wrong if text), "")
    if pa.types.is_boolean(kind):
        return "" if isinstance(value, bool) else repr(value)
    if pa.types.is_string(kind):
        return "" if isinstance(value, str) and _encodes(value) else repr(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return repr(value)
    if pa.types.is_integer(kind):
        return "" if isinstance(value, int) and -_INT64 <= value < _INT64 else repr(value)
    return "" if math.isfinite(value) else f"{value} (not a finite number)"


def _encodes(text: str) -> bool:
    """Whether the text is Unicode: a lone surrogate, from undecodable bytes, is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
