"""Coverage, performance profile and geometric mean, against the definitions computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from attnbench.results.aggregate import newest, summarise
from attnbench.site.views.case import Case, by_case
from attnbench.site.views.columns import WITHIN
from attnbench.site.views.profile import Setting, same_setting, setting
from tests.site.synthetic import synthetic_rows

MakeRow = Callable[..., dict[str, Any]]


def of(rows: list[dict[str, Any]]) -> Setting:
    return setting(by_case(newest(summarise(rows))[0]))


@pytest.fixture
def two_lengths(make_row: MakeRow) -> list[dict[str, Any]]:
    """softmax takes 100 and 400 µs; lara 50 and 500; abc 150 and fails."""
    return [
        make_row(time_us=100.0),
        make_row(n=512, m=512, time_us=400.0),
        make_row(mechanism="lara", backend="torch", time_us=50.0),
        make_row(mechanism="lara", backend="torch", n=512, m=512, time_us=500.0),
        make_row(mechanism="abc", backend="torch", time_us=150.0),
        make_row(mechanism="abc", backend="torch", n=512, m=512, status="oom"),
    ]


def within(found: Setting, label: str) -> dict[float, float]:
    return dict(zip(WITHIN, found.standings[label].within, strict=True))


def test_shares_within_a_factor_of_the_fastest(two_lengths: list[dict[str, Any]]) -> None:
    found = of(two_lengths)
    assert within(found, "softmax/sdpa_flash") == {
        1.0: 0.5,
        1.1: 0.5,
        1.5: 0.5,
        2.0: 1.0,
        5.0: 1.0,
        10.0: 1.0,
    }
    assert within(found, "lara/torch") == {1.0: 0.5, 1.1: 0.5, 1.5: 1.0, 2.0: 1.0, 5.0: 1.0, 10.0: 1.0}


def test_a_failure_is_never_within_and_counts_in_the_coverage(two_lengths: list[dict[str, Any]]) -> None:
    found = of(two_lengths)
    assert within(found, "abc/torch")[10.0] == 0.5
    assert found.standings["abc/torch"].coverage == 0.5
    assert found.standings["abc/torch"].statuses == {"ok": 1, "oom": 1}


def test_the_mean_is_over_the_common_set_or_absent(two_lengths: list[dict[str, Any]]) -> None:
    found = of(two_lengths)
    assert [case.n for case in found.common] == [256, 512]
    assert found.standings["lara/torch"].geo_mean == pytest.approx(math.sqrt(2.0 * 0.8))
    assert found.standings["softmax/sdpa_flash"].geo_mean == pytest.approx(1.0)
    assert found.standings["abc/torch"].geo_mean is None


def test_without_a_baseline_there_is_no_common_set(make_row: MakeRow) -> None:
    found = of([make_row(mechanism="lara", backend="torch")])
    assert found.common == ()
    assert found.standings["lara/torch"].geo_mean is None


def test_nothing_measured_gives_no_share(make_row: MakeRow) -> None:
    found = of([make_row(status="timeout")])
    assert set(found.standings["softmax/sdpa_flash"].within) == {0.0}
    assert found.standings["softmax/sdpa_flash"].coverage == 0.0


def test_a_setting_differs_in_length_and_workload_only(make_row: MakeRow) -> None:
    rows = [make_row(), make_row(n=512, m=512), make_row(workload="other"), make_row(dtype="float16")]
    cases = by_case(newest(summarise(rows))[0])
    chosen = next(c for c in cases if (c.n, c.workload, c.dtype) == (256, "bert_base", "float32"))
    sizes = [(c.workload, c.n) for c in same_setting(cases, chosen, all_workloads=True)]
    assert sizes == [("bert_base", 256), ("bert_base", 512), ("other", 256)]
    assert len(same_setting(cases, chosen, all_workloads=False)) == 2


def test_shares_grow_with_the_factor_and_someone_is_fastest() -> None:
    rows = synthetic_rows(lengths=(256, 4096), dtypes=("bfloat16",), gpus=("h100-sxm",), runs=1, tasks=False)
    cases = by_case(newest(summarise(rows))[0])
    chosen = Case(**{**vars(next(iter(cases)))})
    inside = {case: cases[case] for case in same_setting(cases, chosen, all_workloads=True)}
    found = setting(inside)
    for standing in found.standings.values():
        assert list(standing.within) == sorted(standing.within)
    fastest = sum(s.within[0] for s in found.standings.values())
    assert fastest == pytest.approx(1.0)
