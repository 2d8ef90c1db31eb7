"""What a row may hold, and its canonical form."""

import math

import pytest

from attnbench.results import rows, schema


def test_a_valid_row_passes(make_row):
    rows.check(make_row())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["time_us", "err_rms", "samples_us"])
def test_numbers_that_are_not_finite_are_refused_by_name(make_row, column, value):
    row = make_row()
    row[column] = [1.0, value] if column == "samples_us" else value
    with pytest.raises(ValueError, match=rf"{column}: observed .*not a finite number"):
        rows.check(row)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("n", 1.5),  # Arrow would store 1
        ("n", True),
        ("n", 2**63),
        ("reason", b"bytes"),  # Arrow would store text
        ("reason", "\udc80"),
        ("time_us", True),  # Arrow would store 1.0
        ("time_us", "12"),
        ("exact", 1),
        ("flags", "a flag"),
        ("flags", [None]),
        ("grid", [1.0]),
    ],
)
def test_values_of_another_type_are_refused_by_name(make_row, column, value):
    with pytest.raises(ValueError, match=f"{column}: observed"):
        rows.check({**make_row(), column: value})


def test_every_defect_is_named_at_once(make_row):
    with pytest.raises(ValueError, match=r"unknown column 'tme_us'.*n: observed 'many'"):
        rows.check({**make_row(), "tme_us": 1.0, "n": "many"})


def test_canonical_has_every_column_in_order_and_the_precision_of_the_schema(make_row):
    (row,) = rows.canonical([make_row(samples_us=[0.1], block=3)])
    assert list(row) == [c.name for c in schema.COLUMNS]
    assert row["samples_us"] == [0.10000000149011612]
    assert row["block"] == 3
    assert row["task"] is None
    assert rows.canonical([row]) == [row]


def test_canonical_names_row_and_column(make_row):
    with pytest.raises(ValueError, match=r"row 1: n: observed 1\.5"):
        rows.canonical([make_row(), make_row(n=1.5)])
    with pytest.raises(ValueError, match="row 0: unknown column 'x'"):
        rows.canonical([{"x": 1}])
