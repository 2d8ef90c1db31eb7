"""Attention split among processes is the attention of one device, and is measured like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnbench.errors import UsageError
from attnbench.harness.config import PRESETS, Resolved, RunConfig, parse_ranks
from attnbench.harness.parallel.collectives import Ranks
from attnbench.harness.parallel.layout import positions, shard, unshard
from attnbench.harness.parallel.softmax import _part
from attnbench.harness.parallel.suite import METHODS, cases, ranks_of, why_not
from attnbench.harness.run import prepare, run
from attnbench.results.schema import problems

PROGRAM = Path(__file__).parent / "program.py"


def _config(**values: object) -> RunConfig:
    return RunConfig(**({"suite": "context_parallel", "gpu": "cpu", "seqlen": (64,)} | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_split_attention_is_the_attention_of_one_device(size: int, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * size, "\n".join(outputs)
    assert outputs[0].count("worst=") == (28 if size < 4 else 24)  # Ulysses has no 2 key heads for 4 ranks


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_put_together_are_the_sequence(layout: str, size: int) -> None:
    x = torch.arange(12 * size).view(1, 1, -1, 1)
    parts = [shard(x, rank, size, layout) for rank in range(size)]  # type: ignore[arg-type]
    assert torch.equal(unshard(parts, layout), x)  # type: ignore[arg-type]
    places = positions(12 * size, size, layout)  # type: ignore[arg-type]
    assert torch.equal(places, places.sort(dim=1).values)


def test_in_zigzag_every_rank_has_as_many_pairs() -> None:
    size, length = 4, 6
    places = positions(size * length, size, "zigzag")
    pairs = []
    for rank in range(size):
        count = 0
        for step in range(size):
            rows, columns, diagonal = _part(step, Ranks(rank, size), True, length)
            q, k = places[rank][rows], places[(rank - step) % size][columns]
            seen = k[None, :] <= q[:, None]
            assert diagonal or bool(seen.all()), (
                "a part that is computed without a mask must be visible whole"
            )
            count += int(seen.sum())
        pairs.append(count)
    n = size * length
    assert sum(pairs) == n * (n + 1) // 2
    assert max(pairs) - min(pairs) <= length * length // 4


def test_lengths_are_planned_for_strong_and_for_weak_scaling() -> None:
    _, planned = prepare(
        _config(impl=("softmax/ring",), pattern=("CS",), direction=("fwd",), ranks=(1, 2, 4))
    )
    found = sorted((item.case.n, ranks_of(item.case)) for item in planned)
    assert found == [(64, 1), (64, 2), (64, 4), (128, 2), (256, 4)]
    assert len({item.case.key() for item in planned}) == len(planned)


def test_all_impls_of_the_suite_are_planned_and_some_by_name() -> None:
    assert {item.case.impl for item in prepare(_config())[1]} == set(METHODS)
    softmax = {item.case.impl for item in prepare(_config(impl=("softmax",)))[1]}
    assert softmax == {"softmax/ring", "softmax/all_gather", "softmax/ulysses"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"impl": ("performer",)}, ["performer", "softmax/ring"]),
        ({"impl": ("softmax/triton",)}, ["softmax/triton", "softmax/ring"]),
        ({"pattern": ("NC",)}, ["nothing to measure", "NC"]),
        ({"hyper": (("softmax", "scale", 1),)}, ["--set"]),
        ({"suite": "ops", "ranks": (2,)}, ["--ranks", "context_parallel"]),
    ],
)
def test_requests_that_mean_nothing_are_refused(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(_config(**changes))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("text", ["", "0", "1,,2", "two", "-1"])
def test_ranks_are_numbers(text: str) -> None:
    with pytest.raises(UsageError, match="--ranks"):
        parse_ranks(text)


@pytest.mark.parametrize(
    ("impl", "workload", "n", "ranks", "why"),
    [
        ("softmax/ring", "tiny", 66, 4, "expected a multiple of 8"),
        ("softmax/ulysses", "tiny", 66, 3, "expected multiples of 3"),
        ("softmax/ulysses", "tiny_gqa", 64, 4, "2 key heads"),
        ("linear_transformer/state_exchange", "tiny_gqa", 64, 2, "2 key heads for 4"),
        ("softmax/all_gather", "tiny_gqa", 64, 4, ""),
    ],
)
def test_what_cannot_be_split_says_why(impl: str, workload: str, n: int, ranks: int, why: str) -> None:
    config = _config(impl=(impl,), workload=(workload,), pattern=("CS",), seqlen=(n,), ranks=(ranks,))
    resolved = Resolved(config, PRESETS["tiny"], "cpu", ("CS",), ("float32",), ("fwd",))
    reason = why_not(next(case for case in cases(resolved) if case.n == n))
    assert (why in reason) if why else reason == ""


@pytest.mark.slow
def test_a_run_has_a_row_for_every_number_of_ranks(tmp_path: Path) -> None:
    config = _config(impl=("softmax/ring",), pattern=("CS",), direction=("fwd_bwd",), ranks=(1, 2))
    rows = run(config, tmp_path / "run").rows
    assert [problems(row) for row in rows] == [[]] * 3
    assert {(row["n"], row["world_size"], row["status"]) for row in rows} == {
        (64, 1, "ok"),
        (64, 2, "ok"),
        (128, 2, "ok"),
    }
    assert {row["time_kind"] for row in rows} == {"slowest_rank"}
    assert all(row["err_ratio"] <= 2 and row["mem_peak_bytes"] > 0 for row in rows)
