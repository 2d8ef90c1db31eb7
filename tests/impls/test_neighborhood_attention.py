"""neighborhood_attention against its definition pair by pair, and its exact special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.kernels import flash


def heads(n: int, d: int = 8, *, b: int = 2) -> Tensor:
    return torch.randn(b, 2, n, d, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "reference", **hyper: object) -> torch.nn.Module:
    built = attnbench.build("neighborhood_attention", 16, 2, pattern=pattern, backend=backend, **hyper)
    if built.tables is not None:
        torch.nn.init.normal_(built.tables.weight)
    return built.double()


def sees(i: int, j: int, length: int, w: int, causal: bool) -> bool:
    """One axis of the definition."""
    w = min(w, length)
    if causal:
        return max(i - w + 1, 0) <= j <= i
    start = min(max(i - w // 2, 0), length - w)
    return start <= j < start + w


def definition(q: Tensor, k: Tensor, v: Tensor, grid: tuple, w: int, causal: tuple, table=None) -> Tensor:
    places = list(product(*map(range, grid)))
    scores = torch.full((*q.shape[:3], len(places)), -math.inf, dtype=torch.float64)
    for (i, p), (j, r) in product(enumerate(places), enumerate(places)):
        if all(sees(*axis) for axis in zip(p, r, grid, (w,) * len(grid), causal, strict=True)):
            scores[:, :, i, j] = (q[:, :, i] * k[:, :, j]).sum(-1) / math.sqrt(q.shape[-1])
            if table is not None:
                entry = tuple(a - b + w - 1 for a, b in zip(p, r, strict=True))
                scores[:, :, i, j] += table[(slice(None), *entry)]
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("pattern", "w", "causal"),
    [("NS", 3, None), ("NS", 4, None), ("CS", 3, None), ("CC", 4, None), ("NS", 3, "first")],
)
@pytest.mark.parametrize("grid", [(11,), (5, 6), (2, 5, 3)])
def test_equals_the_definition(grid, pattern, w, causal, backend):
    n, rank = math.prod(grid), len(grid)
    q, k, v = heads(n), heads(n), heads(n, 6)
    axes = (True, *(False,) * (rank - 1)) if causal else None
    found = module(pattern, backend, window=w, causal=axes).attend(q, k, v, grid=grid)
    expected = axes or (pattern in ("CS", "CC"),) * rank
    torch.testing.assert_close(found, definition(q, k, v, grid, w, expected))


@pytest.mark.parametrize("grid", [(9,), (2, 6)])
def test_position_bias_of_a_window_cut_to_the_grid(grid):
    n = math.prod(grid)
    q, k, v = heads(n), heads(n), heads(n)
    built = module(window=4, rpb=True)
    with torch.no_grad():
        expected = definition(q, k, v, grid, 4, (False,) * len(grid), built.tables.at(len(grid)))
        torch.testing.assert_close(built.attend(q, k, v, grid=grid), expected)


def test_every_query_sees_as_many_keys_and_flops_count_them():
    built = module(window=(3, 4))
    mask = built.visible(35, 35, torch.device("cpu"), grid=(5, 7))
    assert (mask.sum(-1) == 12).all()
    assert built.cost("flops", 35, 35, grid=(5, 7)) == 4 * 16 * 35 * 12
    assert module("CS", window=3).flops(5, 5) == 4 * 16 * (1 + 2 + 3 + 3 + 3)
    assert module("CS", window=2).cost("flops", 6, 6, grid=(2, 3)) == 4 * 16 * 3 * 5


def test_special_cases():
    grid, n = (4, 5), 20
    q, k, v = heads(n), heads(n), heads(n)
    scores = q @ k.mT / math.sqrt(8)
    torch.testing.assert_close(module(window=5).attend(q, k, v, grid=grid), scores.softmax(-1) @ v)
    torch.testing.assert_close(module(window=1).attend(q, k, v, grid=grid), v)
    past = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(module("CS", window=n).attend(q, k, v), past.softmax(-1) @ v)


def test_far_from_borders_outputs_move_with_the_tokens():
    q, k, v = heads(20), heads(20), heads(20)
    built = module(window=3)
    before, after = built.attend(q, k, v), built.attend(*(x.roll(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(after[:, :, 3:17], before[:, :, 2:16])


def test_transposed_grids_give_transposed_outputs():
    q, k, v = heads(20), heads(20), heads(20)

    def turn(x: Tensor, grid: tuple) -> Tensor:
        return x.unflatten(2, grid).transpose(2, 3).flatten(2, 3)

    direct = module(window=(3, 2)).attend(q, k, v, grid=(4, 5))
    turned = module(window=(2, 3)).attend(*(turn(x, (4, 5)) for x in (q, k, v)), grid=(5, 4))
    torch.testing.assert_close(turn(turned, (5, 4)), direct)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_keys_off_the_grid_share_the_softmax(backend):
    grid, n = (4, 5), 20
    q, k, v = heads(n), heads(n), heads(n, 6)
    more = heads(3), heads(3, 6)
    built = module(backend=backend, window=3)
    mask = built.visible(n, n, torch.device("cpu"), grid=grid)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
    scores = torch.cat((scores, q @ more[0].mT / math.sqrt(8)), -1)
    o, lse = built.attend_lse(q, k, v, grid=grid, extra_kv=more)
    torch.testing.assert_close(o, scores.softmax(-1) @ torch.cat((v, more[1]), 2))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    alone = built.attend(
        q, k, v, grid=grid, extra_kv=more, key_padding_mask=torch.ones(2, n, dtype=torch.bool)
    )
    torch.testing.assert_close(alone, flash(q, *more, backend="reference")[0])


@pytest.mark.parametrize(
    ("pattern", "hyper", "grid", "message"),
    [
        ("NS", {"window": 0}, None, "at least 1"),
        ("NS", {"window": (3, 3)}, (2, 2, 3), "rank 3: observed window="),
        ("NS", {"causal": (True, False)}, (12,), "expected one bool, or 1"),
        ("CS", {"causal": (True, False)}, None, "expected every axis causal"),
        ("NS", {"window": 3}, (3, 5), "expected 12 tokens"),
    ],
)
def test_wrong_settings_are_refused(pattern, hyper, grid, message):
    with pytest.raises(UsageError, match=message):
        module(pattern, **hyper).attend(heads(12), heads(12), heads(12), grid=grid)


@pytest.mark.parametrize(
    ("pattern", "grid"), [("NS", (5, 4)), ("CS", (13,)), ("NC", (2, 3, 3)), ("CC", (4, 4))]
)
def test_triton_agrees(pattern, grid):
    n = math.prod(grid)
    given = [heads(n, b=1).float().requires_grad_() for _ in range(3)]
    truth = [x.detach().double().requires_grad_() for x in given]
    exact = module(pattern, window=3, rpb=True)
    fast = attnbench.build(
        "neighborhood_attention", 16, 2, pattern=pattern, backend="triton", window=3, rpb=True
    )
    fast.load_state_dict(exact.state_dict())
    upstream = torch.randn(1, 2, n, 8, dtype=torch.float64)
    outputs = fast.attend(*given, grid=grid), exact.attend(*truth, grid=grid)
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-4, atol=1e-5)
    outputs[0].backward(upstream.float())
    outputs[1].backward(upstream)
    pairs = [(a.grad, b.grad) for a, b in zip(given, truth, strict=True)]
    for got, want in [*pairs, (fast.tables.weight.grad, exact.tables.weight.grad)]:
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
