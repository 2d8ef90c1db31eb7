"""Sparse mechanisms at equal density: what they keep is about what was asked for."""

from __future__ import annotations

import pytest
import torch

import attnbench
from attnbench.errors import UsageError
from attnbench.harness.config import RunConfig
from attnbench.harness.run import prepare
from attnbench.harness.selection_report import dense_density, densities
from attnbench.impls import registry
from attnbench.impls.base import MaskAttention, SparseAttention
from attnbench.impls.sparse._density import keys_at
from attnbench.impls.spec import Pattern

N, D = 2048, 16
CHOOSING = [
    (name, pattern)
    for name in registry.list_impls(family="sparse")
    for pattern in registry.spec(name).patterns
    if registry.mechanism(name).at_density(0.25, N, N, Pattern(pattern)) is not None
]


def kept(name: str, pattern: str, density: float) -> float:
    """Share of the visible pairs that the mechanism keeps at N = 2048."""
    hyper = registry.mechanism(name).at_density(density, N, N, Pattern(pattern))
    module = attnbench.build(name, D, 1, pattern=pattern, backend="torch", **hyper)
    causal = pattern == "CS"
    if isinstance(module, MaskAttention):
        return dense_density(module.visible(N, N, torch.device("cpu"))[None, None], causal=causal)
    assert isinstance(module, SparseAttention)
    q, k = (torch.randn(1, 1, N, D) for _ in range(2))
    found = densities(module.select(q, k), causal=causal, n=N, m=N)["density"]
    assert found is not None
    return found


def test_most_selectors_can_be_given_a_density():
    assert len({name for name, _ in CHOOSING}) >= 6


@pytest.mark.parametrize(("name", "pattern"), CHOOSING)
def test_density_is_about_what_was_asked_for(name, pattern):
    assert kept(name, pattern, 0.25) == pytest.approx(
        0.25, abs=0.13
    )  # blocks of 64 are coarse at this length
    assert kept(name, pattern, 0.1) <= kept(name, pattern, 0.6) + 1e-9


def test_keys_at_a_density():
    assert keys_at(0.25, 100, 100, Pattern.NS) == 25
    assert keys_at(0.75, 100, 100, Pattern.CS) == 50
    k = keys_at(0.3, 2000, 2000, Pattern.CS)
    pairs = sum(min(i + 1, k) for i in range(2000))
    assert pairs / (2000 * 2001 / 2) == pytest.approx(0.3, abs=1e-3)
    assert keys_at(0.001, 8, 8, Pattern.NS) == 1


def test_a_run_plans_every_length_at_the_density_and_named_values_win():
    request = RunConfig(
        impl=("local_window/torch", "softmax/torch"),
        gpu="cpu",
        pattern=("NS",),
        seqlen=(128, 256),
        direction=("fwd",),
        density=0.5,
    )
    _, planned = prepare(request)
    found = {(p.case.mechanism, p.case.n): dict(p.case.hyper) for p in planned}
    assert found["local_window", 128] == {"window": 32}
    assert found["local_window", 256] == {"window": 64}
    assert found["softmax", 256] == {}
    _, planned = prepare(RunConfig(**{**vars(request), "hyper": (("local_window", "window", 3),)}))
    assert {dict(p.case.hyper)["window"] for p in planned if p.case.mechanism == "local_window"} == {3}
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        prepare(RunConfig(density=1.5))
