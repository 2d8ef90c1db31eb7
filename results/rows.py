"""A row as a plain dict: which Python values a column takes, and the one canonical form of a row.

Arrow alone would not do: it turns 1.5 into 1 in an integer column without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
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


def mended(row: Row) -> Row:
    """The row if it is valid; else an ``error`` of the same case that says what was wrong with it.

    For rows whose values an impl had a say in: an invalid one must neither be stored nor end a sweep.
    """
    found = [*schema.problems(row), *misfits(row)]
    if not found:
        return row
    sound = {
        name: value for name, value in row.items() if name in schema.BY_NAME and not misfits({name: value})
    }
    reason = f"the impl gave an invalid row: {'; '.join(found)}"
    return {**schema.without_performance(sound), "status": schema.Status.ERROR.value, "reason": reason[:500]}


def misfits(row: Row) -> list[str]:
    """Values that do not fit the type of their column, in words. Unknown columns are not its business."""
    found = []
    for name, value in row.items():
        misfit = _MISFITS.get(name)
        if misfit is None or value is None:
            continue
        wrong = misfit(value)
        if wrong:
            found.append(f"{name}: observed {wrong}, expected {schema.BY_NAME[name].type}")
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


Misfit = Callable[[Any], str]
"""What of a value does not fit; empty when it does."""


def _misfit_of(kind: pa.DataType) -> Misfit:
    """How values of a type are looked at; asked once a column, because rows are many."""
    if pa.types.is_list(kind):
        return partial(_no_list, _misfit_of(kind.value_type), kind.value_type == pa.float32())
    if pa.types.is_boolean(kind):
        return lambda value: "" if isinstance(value, bool) else repr(value)
    if pa.types.is_string(kind):
        return lambda value: "" if isinstance(value, str) and _encodes(value) else repr(value)
    if pa.types.is_integer(kind):
        return _no_integer
    return partial(_no_float, 1 << (24 if kind == pa.float32() else 53))


def _no_list(misfit: Misfit, floats: bool, value: Any) -> str:
    if not isinstance(value, list | tuple):
        return repr(value)
    if floats and set(map(type, value)) == {float} and all(map(math.isfinite, value)):
        return ""  # samples are many, and nearly always as they should be
    return next((f"{wrong} in the list" for item in value if (wrong := misfit(item))), "")


def _no_integer(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return "" if whole and -_INT64 <= value < _INT64 else repr(value)


def _no_float(exact: int, value: Any) -> str:
    """``exact``: Arrow takes whole numbers up to it, which a float holds exactly, and no others."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return repr(value)
    if isinstance(value, int):
        return "" if -exact <= value <= exact else repr(value)
    return "" if math.isfinite(value) else f"{value} (not a finite number)"


def _encodes(text: str) -> bool:
    """Whether the text is Unicode: a lone surrogate, from undecodable bytes, is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_MISFITS = {column.name: _misfit_of(column.type) for column in schema.COLUMNS}
