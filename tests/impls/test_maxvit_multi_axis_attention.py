"""maxvit_multi_axis_attention against its two partitions pair by pair, and its exact special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError


def module(pattern: str = "NS", backend: str = "reference", **hyper: object) -> torch.nn.Module:
    built = attnbench.build("maxvit_multi_axis_attention", 16, 2, pattern=pattern, backend=backend, **hyper)
    for layer in built.layers:
        torch.nn.init.normal_(layer.tables.weight)
    return built.double()


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 16, dtype=torch.float64)


def plain(built) -> torch.nn.Module:
    """Uniform weights and no projection of values: a layer is then the mean of a group."""
    with torch.no_grad():
        for layer in built.layers:
            for linear in (layer.q_proj, layer.v_proj, layer.out_proj):
                linear.bias.zero_()
            layer.q_proj.weight.zero_()
            layer.tables.weight.zero_()
            for linear in (layer.v_proj, layer.out_proj):
                linear.weight.copy_(torch.eye(16))
    return built


def phase_of_definition(x: Tensor, source: Tensor, layer, grid: tuple, phase: int, size: int, causal: bool):
    """Softmax among the tokens of a group, the bias by the difference of their places in it."""
    q, k, v = (
        linear(t).unflatten(-1, (2, 8)).transpose(1, 2)
        for linear, t in ((layer.q_proj, x), (layer.k_proj, source), (layer.v_proj, source))
    )
    places = list(product(*map(range, grid)))
    scores = torch.full((*q.shape[:3], len(places)), -math.inf, dtype=torch.float64)
    table = layer.tables.at(len(grid))
    steps = [-(-g // size) for g in grid]
    for (i, p), (j, r) in product(enumerate(places), enumerate(places)):
        if phase == 0:
            together = all(a // size == b // size for a, b in zip(p, r, strict=True))
            entry = [a - b + size - 1 for a, b in zip(p, r, strict=True)]
        else:
            together = all(a % s == b % s for a, b, s in zip(p, r, steps, strict=True))
            entry = [a // s - b // s + size - 1 for a, b, s in zip(p, r, steps, strict=True)]
        if together and (j <= i or not causal):
            bias = table[(slice(None), *entry)]
            scores[:, :, i, j] = (q[:, :, i] * k[:, :, j]).sum(-1) / math.sqrt(8) + bias
    return layer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("pattern", "phase"), [("NS", "both"), ("CS", "both"), ("NC", "both"), ("NC", 1), ("NS", 0)]
)
@pytest.mark.parametrize("grid", [(11,), (5, 6), (2, 4, 3)])
def test_equals_the_definition(grid, pattern, phase, backend):
    n, size = math.prod(grid), {0: 3, 1: 2}
    x, context = tokens(n), tokens(n) if pattern == "NC" else None
    built = module(pattern, backend, window=size[0], group=size[1], phase=phase)
    with torch.no_grad():
        expected = x
        for each, layer in zip((0, 1) if phase == "both" else (phase,), built.layers, strict=True):
            source = expected if context is None else context
            expected = phase_of_definition(expected, source, layer, grid, each, size[each], pattern == "CS")
        torch.testing.assert_close(built(x, context, grid=grid), expected)


def test_windows_or_groups_of_the_whole_grid_are_dense():
    x = tokens(20)
    for phase in (0, 1):
        built = module(window=5, phase=phase)
        torch.nn.init.zeros_(built.layers[0].tables.weight)
        dense = attnbench.build("softmax", 16, 2, backend="reference").double()
        dense.load_state_dict(
            {k.removeprefix("layers.0."): v for k, v in built.state_dict().items() if "table" not in k}
        )
        torch.testing.assert_close(built(x, grid=(4, 5)), dense(x))


def test_groups_are_dilated_neighborhoods():
    """With T = 0 and g tokens per axis, the grid phase is a window of g at distance G/g."""
    x, grid = tokens(48), (6, 8)
    built = module(group=2, phase=1)
    torch.nn.init.zeros_(built.layers[0].tables.weight)
    near = attnbench.build("dilated_neighborhood_attention", 16, 2, window=2, backend="reference").double()
    near.load_state_dict(
        {k.removeprefix("layers.0."): v for k, v in built.state_dict().items() if "table" not in k}
    )
    torch.testing.assert_close(built(x, grid=grid), near(x, grid=grid))


@pytest.mark.parametrize("grid", [(12,), (12, 6)])
def test_two_steps_mix_every_token(grid):
    """On a grid of w·g tokens per axis uniform weights give the mean of all tokens, everywhere."""
    n = math.prod(grid)
    x = tokens(n)
    built = plain(module(window=tuple(g // 2 for g in grid), group=2))
    torch.testing.assert_close(built(x, grid=grid), x.mean(1, keepdim=True).expand_as(x))


def test_flops_count_both_partitions_and_their_projections():
    """Seven tokens: blocks of 3, 3, 1 are 19 pairs; groups of 2 at distance 4, three pairs and one token."""
    projections = 8 * 7 * 16 * 16
    assert module(window=3, phase=0).flops(7, 7) == 4 * 16 * 19 + projections
    assert module(group=2, phase=1).flops(7, 7) == 4 * 16 * 13 + projections
    assert module(window=3, group=2).flops(7, 7) == 4 * 16 * 32 + 2 * projections
    causal = 6 + 6 + 1 + 3 * 3 + 1
    assert module("CS", window=3, group=2).flops(7, 7) == 4 * 16 * causal + 2 * projections


def test_groups_are_as_large_as_windows_unless_given():
    built = module(window=3)
    assert (
        built.layers[1].tables.shapes == built.layers[0].tables.shapes == {1: (5,), 2: (5, 5), 3: (5, 5, 5)}
    )
    assert module(window=3, group=(4, 2)).layers[1].tables.shapes == {2: (7, 3)}


@pytest.mark.parametrize(
    ("hyper", "grid", "message"),
    [
        ({"window": 0}, None, "at least 1"),
        ({"group": (2, 2)}, (12,), "rank 1: observed group="),
        ({"window": (2, 2)}, (2, 2, 3), "rank 3: observed window="),
        ({"phase": 2}, None, "phase=2"),
    ],
)
def test_wrong_settings_are_refused(hyper, grid, message):
    with pytest.raises(UsageError, match=message):
        module(**hyper)(tokens(12), grid=grid)


@pytest.mark.parametrize(("pattern", "grid"), [("NS", (3, 4)), ("CS", (7,)), ("NC", (2, 2, 3))])
def test_triton_agrees(pattern, grid):
    n = math.prod(grid)
    x, context = tokens(n)[:1], tokens(n)[:1] if pattern == "NC" else None
    exact = module(pattern, window=3, group=2)
    fast = attnbench.build(
        "maxvit_multi_axis_attention", 16, 2, pattern=pattern, backend="triton", window=3, group=2
    )
    fast.load_state_dict(exact.state_dict())
    found = fast(x.float(), None if context is None else context.float(), grid=grid)
    expected = exact(x, context, grid=grid)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    for got, want in zip(fast.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-3, atol=1e-4)
