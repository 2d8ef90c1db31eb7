"""Rows of two sides become pairs, verdicts, findings and tables."""

from __future__ import annotations

import pytest

from attnbench.results import comparison
from attnbench.results.comparison import compare_rows
from attnbench.results.table import to_markdown

STEADY = (1.0, 1.001, 0.999, 1.0, 1.001, 0.999)


@pytest.fixture
def side(make_row):
    def build(factor: float = 1.0, **changes):
        return [make_row(block=b, time_us=100 * factor * s, **changes) for b, s in enumerate(STEADY)]

    return build


def test_blocks_pair_by_number(side):
    shuffled = side(1.1)[::-1]
    found = compare_rows(side(), shuffled)
    assert found.counts == {"slower": 1, "faster": 0, "same": 0, "uncertain": 0}
    assert found.cases[0].decision.ratio == pytest.approx(1.1)
    assert found.notes == ()
    assert found.failed("slower")
    assert not found.failed("never")


def test_a_faster_head_and_an_equal_one_do_not_fail(side):
    assert not compare_rows(side(), side(0.9)).failed("uncertain")
    assert not compare_rows(side(), side()).failed("uncertain")


def test_cases_without_a_partner_are_named_not_dropped(side):
    found = compare_rows(side(), [*side(), *side(n=512)])
    assert (len(found.cases), found.only_base) == (1, ())
    assert "N=512" in found.only_head[0]
    assert "only in the head: 1" in comparison.tables(found)[0].notes[-1]


def test_a_case_that_fails_now_is_a_finding(side, make_row):
    broken = [make_row(block=b, status="incorrect") for b in range(6)]
    found = compare_rows(side(), broken)
    (case,) = found.cases
    assert [(f.column, f.head) for f in case.findings] == [("status", "incorrect")]
    assert "no times to compare: ok before and incorrect now" in case.decision.reason
    assert found.failed("slower")
    assert compare_rows(broken, broken).failed("slower") is False


def test_wrong_results_and_missing_cases_fail_where_times_need_not(side, make_row):
    broken = [make_row(block=b, status="incorrect") for b in range(6)]
    slower, wrong, gone = (
        compare_rows(side(), side(2.0)),
        compare_rows(side(), broken),
        compare_rows(side(), []),
    )
    assert [found.failed("incorrect") for found in (slower, wrong, gone)] == [False, True, False]
    assert [found.failed("missing") for found in (slower, wrong, gone)] == [False, False, True]
    assert not compare_rows(side(mem_peak_bytes=1), side(mem_peak_bytes=9)).failed("incorrect")


def test_memory_is_compared_without_statistics(side):
    found = compare_rows(side(mem_peak_bytes=1000), side(mem_peak_bytes=2000))
    assert [f.column for f in found.cases[0].findings] == ["mem_peak_bytes"]
    assert found.counts["same"] == 1
    assert found.failed("slower")


def test_flags_with_values_are_known_by_name(side, make_row):
    capped = side(1.2)
    capped[0] = make_row(block=0, time_us=120.0, flags=["power_capped: observed 400 W, limit 350 W"])
    found = compare_rows(side(), capped)
    assert found.cases[0].decision.dropped == 1


def test_environment_and_turns_are_notes(side):
    found = compare_rows(side(software_key="a"), side(software_key="b"), interleaved=False)
    assert len(found.notes) == 2
    assert "different environment" in found.notes[1]


def test_tables_show_what_is_not_the_same(side):
    found = compare_rows(side(), [*side(1.1, mem_peak_bytes=10**9)])
    titles = [t.title for t in comparison.tables(found)]
    assert titles == ["verdicts", "cases that are not the same", "worse, exactly"]
    text = to_markdown(comparison.tables(found))
    assert "slower" in text
    assert "1.10" in text
    assert [t.title for t in comparison.tables(compare_rows(side(), side()))] == ["verdicts"]
