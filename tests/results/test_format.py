"""Numbers as text: no more digits than are known, one unit a column."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.results.format import (
    BYTE_UNITS,
    TIME_UNITS,
    bytes_text,
    common_unit,
    interval,
    length,
    number,
    scientific,
    time_text,
)


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (None, None, "–"),
        (0.0, None, "0"),
        (12.3456, None, "12.3"),
        (0.0123456, None, "0.0123"),
        (98765.0, None, "98800"),
        (-1.5, None, "-1.50"),
        (12.3456, 0.4, "12.35"),
        (12.3456, 3.0, "12.3"),
        (12.3456, 30.0, "12"),
        (12.3456, 1e-9, "12.346"),
        (9.999, None, "10.0"),
        (99.96, None, "100"),
    ],
)
def test_digits_follow_the_interval(value, half, text):
    assert number(value, half) == text


@given(st.floats(1e-6, 1e9), st.none() | st.floats(1e-6, 1e9))
def test_a_number_read_back_is_near_and_never_in_exponent_form(value, half):
    text = number(value, half)
    assert "e" not in text
    assert float(text) == pytest.approx(value, rel=0.06)


def test_a_column_has_the_unit_of_its_smallest_value():
    assert common_unit([1500.0, 2e6], TIME_UNITS).name == "ms"
    assert common_unit([900.0, 2e6, None], TIME_UNITS).name == "µs"
    assert common_unit([0.5], TIME_UNITS).name == "µs"
    assert common_unit([None], TIME_UNITS).name == "µs"
    assert common_unit([2**21, 0], BYTE_UNITS).name == "MiB"


def test_intervals_and_errors():
    ms = TIME_UNITS[1]
    assert interval(1234.0, 1299.0, ms) == "[1.234, 1.299]"
    assert interval(None, None, ms) == "–"
    assert scientific(0.000321) == "3.2e-04"
    assert scientific(None) == "–"


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(1, "1"), (512, "512"), (1000, "1000"), (1024, "1k"), (65536, "64k"), (2**20, "1M"), (1536, "1536")],
)
def test_lengths(tokens, text):
    assert length(tokens) == text


def test_axis_texts():
    assert [time_text(x) for x in (0.1, 20.0, 1e4, 3e6)] == ["0.1 µs", "20 µs", "10 ms", "3 s"]
    assert [bytes_text(x) for x in (512, 2**19, 3 * 2**30)] == ["512 B", "512 KiB", "3 GiB"]
