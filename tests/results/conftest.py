"""Arbitrary rows that the schema accepts, for round trips."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import strategies as st

from attnbench.results import schema
from attnbench.results.schema import Status


def _values(column: schema.Column) -> st.SearchStrategy[Any]:
    """Everything that the type of a column admits, with text of any alphabet."""

    def of(kind: pa.DataType) -> st.SearchStrategy[Any]:
        if pa.types.is_boolean(kind):
            return st.booleans()
        if pa.types.is_string(kind):
            return st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
        if pa.types.is_integer(kind):
            return st.integers(-(2**63), 2**63 - 1)
        width = 32 if kind == pa.float32() else 64
        return st.floats(allow_nan=False, allow_infinity=False, width=width)

    if pa.types.is_list(column.type):
        return st.lists(of(column.type.value_type), max_size=4)
    return of(column.type)


@pytest.fixture(scope="session")
def any_rows() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Lists of valid rows with arbitrary values in every column and distinct keys."""
    optional = {c.name: st.none() | _values(c) for c in schema.COLUMNS if not c.required}
    required = {c.name: _values(c) for c in schema.COLUMNS if c.required}
    anything = st.fixed_dictionaries({**required, **optional})

    def valid(row: dict[str, Any], status: Status) -> dict[str, Any]:
        row = {**row, "status": status.value, "reason": row["reason"] or "a reason"}
        if status != Status.OK:
            return schema.without_performance(row)
        return {**row, "time_us": row["time_us"] or 1.0, "metric_value": row["metric_value"] or 0.5}

    rows = st.builds(valid, anything, st.sampled_from(list(Status)))
    return st.lists(rows, max_size=4, unique_by=lambda row: (row["case_key"], row["block"]))
