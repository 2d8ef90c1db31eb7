"""sink_window against its definition pair by pair, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError

CALLS = [("NS", 11, 11), ("CS", 11, 11), ("CS", 1, 1), ("NC", 5, 16), ("CC", 16, 5), ("NC", 1, 7)]


def heads(n: int, d: int = 8) -> Tensor:
    return torch.randn(2, 2, n, d, dtype=torch.float64)


def sees(pattern: str, i: int, j: int, n: int, m: int, w: int, s: int) -> bool:
    """The definition, pair by pair."""
    if pattern == "NS":
        return abs(i - j) <= w or j < s
    if pattern == "CS":
        return j <= i and (j < s or i - j < w)
    if pattern == "CC":
        return abs(min(i, m - 1) - j) <= w or j < s
    centre = m - 1 if n == 1 else math.floor(i * (m - 1) / (n - 1) + 0.5)
    return abs(centre - j) <= w or j < s


def mask_of(pattern: str, n: int, m: int, w: int, s: int) -> Tensor:
    return torch.tensor([[sees(pattern, i, j, n, m, w, s) for j in range(m)] for i in range(n)])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("pattern", "n", "m"), CALLS)
@pytest.mark.parametrize(("w", "s"), [(3, 2), (1, 0), (2, 9)])
def test_equals_the_explicit_mask(pattern, n, m, w, s, backend):
    q, k, v = heads(n), heads(m), heads(m, 6)
    mask = mask_of(pattern, n, m, w, s)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
    found = attnbench.attention(q, k, v, "sink_window", pattern, backend, window=w, num_sinks=s)
    torch.testing.assert_close(found, scores.softmax(-1) @ v)


@pytest.mark.parametrize(("pattern", "n", "m"), CALLS)
@pytest.mark.parametrize(("w", "s"), [(3, 2), (1, 0), (2, 9), (40, 4), (1, 40)])
def test_declared_mask_and_pairs_are_those_of_the_definition(pattern, n, m, w, s):
    module = attnbench.build("sink_window", 16, 2, pattern=pattern, window=w, num_sinks=s)
    mask = mask_of(pattern, n, m, w, s)
    assert torch.equal(module.visible(n, m, torch.device("cpu")), mask)
    assert module.pairs(n, m) == mask.sum()
    assert module.flops(n, m) == 4 * 2 * 8 * int(mask.sum())


def test_special_cases():
    q, k, v = heads(12), heads(12), heads(12)

    def run(impl: str, **hyper: int) -> Tensor:
        return attnbench.attention(q, k, v, impl, "CS", "reference", **hyper)

    dense = run("softmax")
    torch.testing.assert_close(run("sink_window", window=12, num_sinks=0), dense)
    torch.testing.assert_close(run("sink_window", window=1, num_sinks=12), dense)
    torch.testing.assert_close(run("sink_window", window=4, num_sinks=0), run("local_window", window=4))
    few = run("sink_window", window=4, num_sinks=3)
    torch.testing.assert_close(few[:, :, :7], dense[:, :, :7])  # rows i < n_sink + w see everything once
    assert not torch.allclose(few[:, :, 7:], dense[:, :, 7:])


def test_keys_between_sinks_and_window_do_not_matter():
    q, k, v = heads(12), heads(12), heads(12)
    before = attnbench.attention(q, k, v, "sink_window", "CS", "reference", window=3, num_sinks=2)
    k[:, :, 2:9], v[:, :, 2:9] = 7.0, 7.0
    after = attnbench.attention(q, k, v, "sink_window", "CS", "reference", window=3, num_sinks=2)
    assert torch.equal(before[:, :, 11], after[:, :, 11])


@pytest.mark.parametrize(("pattern", "hyper"), [("CS", {"window": 0}), ("NS", {"num_sinks": -1})])
def test_a_window_of_nothing_is_refused(pattern, hyper):
    with pytest.raises(UsageError, match="sink_window under"):
        attnbench.build("sink_window", 16, 2, pattern=pattern, **hyper)


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC", "CC"])
def test_triton_agrees(pattern):
    n, m = (24, 24) if pattern in ("NS", "CS") else (20, 33)
    given = [heads(length)[:1].float().requires_grad_() for length in (n, m, m)]
    results = []
    for backend in ("reference", "triton"):
        o = attnbench.attention(*given, "sink_window", pattern, backend, window=5, num_sinks=2)
        results.append((o, *torch.autograd.grad(o.square().sum(), given)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
