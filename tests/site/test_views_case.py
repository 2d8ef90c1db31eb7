"""Cases: who is fastest, what the intervals leave open, what a table shows, what a selector offers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from attnbench.results.aggregate import Summary, newest, summarise
from attnbench.results.format import number
from attnbench.site.views import columns, selection
from attnbench.site.views.case import Case, Entry, baseline, by_case, case_of, default, entries
from attnbench.site.views.table import case_table
from tests.site.synthetic import synthetic_rows

Row = dict[str, Any]
MakeRow = Callable[..., Row]


def summaries(rows: Sequence[Row]) -> list[Summary]:
    return newest(summarise(rows))[0]


def impl(make_row: MakeRow, backend: str, *times: float, **changes: Any) -> list[Row]:
    return [make_row(backend=backend, time_us=t, block=b, **changes) for b, t in enumerate(times)]


def ranks(found: Sequence[Entry]) -> dict[str, str]:
    return {entry.summary.impl: entry.rank for entry in found}


def test_a_single_block_has_a_place_but_no_rank(make_row: MakeRow) -> None:
    group = summaries([make_row(), make_row(backend="torch", time_us=50.0)])
    assert ranks(entries(group)) == {"softmax/torch": "~1", "softmax/sdpa_flash": "~2"}


def test_overlapping_intervals_tie_and_clear_ones_do_not(make_row: MakeRow) -> None:
    rows = [
        *impl(make_row, "torch", 100.0, 101.0, 102.0),
        *impl(make_row, "sdpa_math", 100.5, 101.5, 102.5),
        *impl(make_row, "reference", 300.0, 301.0, 302.0),
    ]
    found = ranks(entries(summaries(rows)))
    assert found == {"softmax/torch": "1–2", "softmax/sdpa_math": "1–2", "softmax/reference": "3"}


def test_failures_come_last_without_a_number(make_row: MakeRow) -> None:
    rows = [make_row(), make_row(backend="torch", status="oom", reason="no memory here")]
    last = entries(summaries(rows))[-1]
    assert (last.rank, last.ratio, last.half_width_us) == ("–", None, None)
    assert last.summary.reason == "no memory here"


def test_the_ratio_is_the_time_of_the_first_baseline_over_the_own(make_row: MakeRow) -> None:
    rows = [
        make_row(backend="torch", time_us=80.0),
        make_row(backend="sdpa_math", time_us=40.0),
        make_row(mechanism="lara", backend="torch", time_us=20.0),
    ]
    found = {e.summary.impl: e.ratio for e in entries(summaries(rows))}
    assert found == {"softmax/sdpa_math": 1.0, "softmax/torch": 0.5, "lara/torch": 2.0}


def test_a_failed_or_changed_softmax_is_no_baseline(make_row: MakeRow) -> None:
    failed = make_row(status="oom")
    assert baseline(summaries([failed])) is None
    changed = make_row(backend="torch", hyper='{"scale": 2}')
    assert baseline(summaries([changed])) is None
    assert entries(summaries([changed]))[0].ratio is None


def test_seeds_software_and_versions_of_the_method_are_cases_apart(make_row: MakeRow) -> None:
    rows = [
        make_row(),
        make_row(seed=1),
        make_row(software_key="other"),
        make_row(software_key="third", measurement_version=2),
    ]
    found = by_case(summaries(rows))
    assert len(found) == 4
    assert sum("~v2" in case.stack for case in found) == 1


def test_size_and_title_name_the_keys_where_they_differ(make_row: MakeRow) -> None:
    cross = case_of(summaries([make_row(n=1, m=4096, pattern="NC")])[0])
    assert cross.size == "1x4096"
    assert "N = 1, M = 4096" in cross.title
    assert case_of(summaries([make_row()])[0]).size == "256"


def test_the_default_case_has_a_baseline_and_most_impls(make_row: MakeRow) -> None:
    rows = [
        *(make_row(mechanism=f"m{i}", backend="torch", n=512, m=512) for i in range(3)),
        make_row(n=1024, m=1024),
        make_row(n=2048, m=2048),
        make_row(mechanism="m0", backend="torch", n=1024, m=1024),
    ]
    chosen = default(by_case(summaries(rows)))
    assert chosen is not None
    assert chosen.n == 1024
    assert default({}) is None


def test_an_accelerator_is_shown_before_a_cpu(make_row: MakeRow) -> None:
    rows = [make_row(), make_row(backend="torch"), make_row(device="h100-sxm", time_kind="device_cold")]
    chosen = default(by_case(summaries(rows)))
    assert chosen is not None
    assert chosen.device == "h100-sxm"


# ---- the table -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return synthetic_rows(lengths=(256, 4096), dtypes=("bfloat16",), gpus=("h100-sxm",), runs=1, tasks=False)


def test_every_number_of_a_table_follows_from_the_rows(rows: list[Row]) -> None:
    """An independent recomputation: plain medians over rows, no code of the views."""
    cases = by_case(summaries(rows))
    checked = 0
    for case, group in cases.items():
        table = case_table(case, entries(group), columns.ANSWER)
        own = [
            r
            for r in rows
            if (r["pattern"], r["n"], r["direction"]) == (case.pattern, case.n, case.direction)
        ]
        for line in table.lines:
            mine = [
                r for r in own if r["impl"] == line.summary.impl and r["hyper"] == line.summary.get("hyper")
            ]
            if not line.summary.ok:
                assert any(r["status"] != "ok" for r in mine)
                assert not [cell for cell in line.cells if isinstance(cell.value, float)]
                assert line.span == 8
                continue
            cells = {cell.column.key: cell.value for cell in line.cells}
            for name in ("time_us", "tflops_effective", "mem_peak_bytes", "err_ratio"):
                expected = statistics.median(r[name] for r in mine)
                assert cells[name] == pytest.approx(expected, rel=1e-9), (case, line.summary.impl, name)
                checked += 1
    assert checked > 200


def test_a_column_has_one_unit_and_as_many_digits_as_the_interval(make_row: MakeRow) -> None:
    rows = [*impl(make_row, "torch", 1990.0, 2000.0, 2010.0), *impl(make_row, "reference", 9e4, 9.1e4, 9.2e4)]
    cases = by_case(summaries(rows))
    case = next(iter(cases))
    table = case_table(case, entries(cases[case]), columns.ANSWER)
    unit = next(head.unit for head in table.heads if head.column.key == "time_us")
    cells = {line.backend: next(c for c in line.cells if c.column.key == "time_us") for line in table.lines}
    assert unit == "ms"
    half = {e.summary.impl: e.half_width_us for e in entries(cases[case])}["softmax/torch"]
    assert half is not None
    assert cells["torch"].text == number(2.0, half / 1e3)
    assert cells["torch"].detail.startswith("±")
    assert not math.isclose(cells["torch"].value, cells["reference"].value)  # type: ignore[arg-type]


def test_exact_impls_show_no_distance_to_softmax(make_row: MakeRow) -> None:
    rows = [
        make_row(approx_err_recorded=1e-7),
        make_row(mechanism="lara", backend="torch", exact=False, approx_err_recorded=0.5),
    ]
    cases = by_case(summaries(rows))
    case = next(iter(cases))
    table = case_table(case, entries(cases[case]), columns.ANSWER)
    texts = {
        line.mechanism: next(c.text for c in line.cells if c.column.key == "approx_err_recorded")
        for line in table.lines
    }
    assert texts == {"softmax": "–", "lara": "50.0"}


def test_badges_say_baseline_exact_and_preliminary(make_row: MakeRow) -> None:
    cases = by_case(summaries([make_row()]))
    case = next(iter(cases))
    (line,) = case_table(case, entries(cases[case]), columns.ANSWER).lines
    assert [label for label, _ in line.badges] == ["baseline", "exact", "k=1"]


# ---- the selectors -------------------------------------------------------------------------------------


def case(**changes: Any) -> Case:
    values: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "direction": "fwd",
        "scope": "op",
        "workload": "w",
        "pattern": "NS",
        "n": 256,
        "m": 256,
        "seed": 0,
        "stack": "abc",
    }
    return Case(**{**values, **changes})


def test_lengths_are_offered_by_size_and_not_by_spelling() -> None:
    known = [case(), case(n=4096, m=4096), case(n=1, m=512), case(n=1024, m=1024)]
    (lengths,) = [s for s in selection.selectors(known, known[0]) if s.key == "n"]
    assert [value for value, _ in lengths.options] == ["1x512", "256", "1024", "4096"]
    assert lengths.chosen == "256"


def test_an_address_leaves_out_what_is_usual() -> None:
    usual = case()
    assert selection.address(usual, usual) == ""
    assert selection.address(case(dtype="bfloat16", n=512, m=512), usual) == "dtype=bfloat16&n=512"


def test_words_stand_beside_the_names_of_patterns_and_formats() -> None:
    found = {s.key: dict(s.options) for s in selection.selectors([case()], case())}
    assert found["pattern"] == {"NS": "NS · noncausal self"}
    assert found["dtype"] == {"float32": "fp32"}
