"""The key of a case, its trip through JSON, and the grid that a length is folded into."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from attnbench.impls.case import Case, Workload, fold

WORKLOAD = Workload("tiny", batch=1, heads=4, kv_heads=2, head_dim=32, model="a", source="b")
CASE = Case("softmax", "torch", "CS", WORKLOAD, 64, 64, "float32", "fwd", "cpu", hyper=(("scale", 2.0),))


def test_a_case_survives_json_with_its_key() -> None:
    back = Case.from_json(json.loads(json.dumps(CASE.to_json())))
    assert back == CASE
    assert back.key() == CASE.key()


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "triton"},
        {"pattern": "NS"},
        {"n": 65},
        {"m": 65},
        {"dtype": "float16"},
        {"seed": 1},
        {"direction": "fwd_bwd"},
        {"device": "h200"},
        {"scope": "layer"},
        {"grid": (8, 8)},
        {"hyper": ()},
        {"workload": replace(WORKLOAD, kv_heads=4)},
        {"task": "lm"},
    ],
)
def test_whatever_changes_the_work_changes_the_key(change: dict[str, object]) -> None:
    assert replace(CASE, **change).key() != CASE.key()


def test_a_reworded_source_keeps_the_key() -> None:
    assert replace(CASE, workload=replace(WORKLOAD, source="elsewhere")).key() == CASE.key()


def test_lengths_of_one_curve_share_their_series() -> None:
    assert replace(CASE, n=128, m=128).series() == CASE.series()
    assert replace(CASE, backend="triton").series() != CASE.series()


@pytest.mark.parametrize(
    ("tokens", "rank", "ranks", "grid"),
    [
        (12, 1, (1, 2), ()),
        (12, 2, (1, 2), (3, 4)),
        (12, 3, (1, 2), ()),
        (12, 2, (2,), (3, 4)),
        (37, 1, (2,), (1, 37)),
        (12, 3, (3,), (2, 2, 3)),
        (196, 2, (2, 3), (14, 14)),
        (64, 1, (2, 3), (8, 8)),
    ],
)
def test_the_grid_is_as_even_as_divisors_allow(
    tokens: int, rank: int, ranks: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    assert fold(tokens, rank, ranks) == grid


def test_keys_of_a_workload() -> None:
    assert WORKLOAD.keys(100, "CS") == 100
    assert replace(WORKLOAD, m_fixed=77).keys(100, "NC") == 77
    assert replace(WORKLOAD, m_per_n=0.25).keys(100, "CC") == 25


def test_the_row_says_whether_a_grid_is_the_workloads_own() -> None:
    on_grid = replace(WORKLOAD, grid_rank=2)
    assert replace(CASE, grid=()).geometry == ""
    assert replace(CASE, grid=(8, 8)).geometry == "folded"
    assert replace(CASE, grid=(8, 8), workload=on_grid).geometry == "native"
    assert replace(CASE, grid=(8, 8), workload=on_grid, m=24).grid_kv == (4, 6)
    assert replace(CASE, grid=()).grid_kv == ()
