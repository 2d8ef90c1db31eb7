"""swin_window_attention against its definition pair by pair, the source's rolled windows; special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnbench
from attnbench.errors import UsageError


def heads(n: int, d: int = 8, *, b: int = 2) -> Tensor:
    return torch.randn(b, 2, n, d, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "reference", **hyper: object) -> torch.nn.Module:
    built = attnbench.build("swin_window_attention", 16, 2, pattern=pattern, backend=backend, **hyper)
    torch.nn.init.normal_(built.tables.weight)  # 100 times its own size: the bias counts
    return built.double()


def together(p: tuple, r: tuple, grid: tuple, w: int, phase: int) -> bool:
    """Whether two positions are in one window, axis by axis."""
    for a, b, g in zip(p, r, grid, strict=True):
        side, shift = (g, 0) if g <= w else (w, phase * (w // 2))
        if math.floor((a - shift) / side) != math.floor((b - shift) / side):
            return False
    return True


def definition(q: Tensor, k: Tensor, v: Tensor, built, grid: tuple, *, causal: bool = False) -> Tensor:
    w, phase = built.hp.window, built.hp.phase
    table = built.tables.at(len(grid))
    places = list(product(*map(range, grid)))
    scores = torch.full((*q.shape[:3], len(places)), -math.inf, dtype=torch.float64)
    for i, p in enumerate(places):
        for j, r in enumerate(places):
            if together(p, r, grid, w, phase) and (j <= i or not causal):
                entry = tuple(a - b + w - 1 for a, b in zip(p, r, strict=True))
                bias = table[(slice(None), *entry)]
                scores[:, :, i, j] = (q[:, :, i] * k[:, :, j]).sum(-1) / math.sqrt(q.shape[-1]) + bias
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("pattern", "phase", "w"), [("NS", 0, 3), ("NS", 1, 2), ("CS", 1, 3), ("CC", 1, 3)])
@pytest.mark.parametrize("grid", [(11,), (5, 7), (2, 5, 4)])
def test_equals_the_definition(grid, pattern, phase, w, backend):
    n = math.prod(grid)
    q, k, v = heads(n), heads(n), heads(n, 6)
    built = module(pattern, backend, window=w, phase=phase)
    with torch.no_grad():
        found = built.attend(q, k, v, grid=grid)
        torch.testing.assert_close(found, definition(q, k, v, built, grid, causal=pattern != "NS"))


@pytest.mark.parametrize(("grid", "w"), [((8, 12), 4), ((9, 6), 3)])
def test_shifted_windows_are_the_sources_rolled_ones(grid, w):
    """Roll, cut into windows, mask what the roll made adjacent, roll back."""
    n, shift = math.prod(grid), w // 2
    q, k, v = heads(n), heads(n), heads(n)
    built = module(window=w, phase=1)
    strips = [torch.zeros(g, dtype=torch.long) for g in grid]
    for strip, g in zip(strips, grid, strict=True):
        strip[g - w : g - shift], strip[g - shift :] = 1, 2
    regions = strips[0][:, None] * 3 + strips[1]

    def windows(x: Tensor) -> Tensor:  # (..., Gh, Gw, D) → (..., windows, w², D)
        x = x.unflatten(-2, (-1, w)).unflatten(-4, (-1, w)).transpose(-4, -3)
        return x.flatten(-3, -2).flatten(-4, -3)

    def rolled(x: Tensor) -> Tensor:
        return windows(x.unflatten(2, grid).roll((-shift, -shift), (2, 3)))

    region = windows(regions[..., None])[..., 0]
    offset = torch.arange(w)[:, None] - torch.arange(w)[None] + w - 1
    table = built.tables.at(2)[:, offset[:, None, :, None], offset[None, :, None, :]].flatten(3).flatten(1, 2)
    scores = rolled(q) @ rolled(k).mT / math.sqrt(8) + table[:, None]
    scores = scores.masked_fill(region[:, :, None] != region[:, None, :], -math.inf)
    o = (scores.softmax(-1) @ rolled(v)).unflatten(3, (w, w)).unflatten(2, (grid[0] // w, -1))
    expected = o.transpose(3, 4).flatten(4, 5).flatten(2, 3).roll((shift, shift), (2, 3)).flatten(2, 3)
    torch.testing.assert_close(built.attend(q, k, v, grid=grid), expected)


def test_special_cases():
    grid, n = (5, 4), 20
    q, k, v = heads(n), heads(n), heads(n)
    whole = module(window=6, phase=1)
    constant = whole.attend(q, k, v, grid=grid)
    with torch.no_grad():
        whole.tables.weight += torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
        torch.testing.assert_close(whole.attend(q, k, v, grid=grid), constant)
        whole.tables.weight.zero_()
    dense = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    torch.testing.assert_close(whole.attend(q, k, v, grid=grid), dense)
    torch.testing.assert_close(module(window=1, phase=1).attend(q, k, v, grid=grid), v)


@pytest.mark.parametrize("grid", [(12,), (4, 8)])
def test_windows_without_bias_are_neighborhoods_that_advance_by_their_width(grid):
    n = math.prod(grid)
    q, k, v = heads(n), heads(n), heads(n)
    built = module(window=4)
    torch.nn.init.zeros_(built.tables.weight)
    blocks = attnbench.attention(
        q, k, v, "generalized_neighborhood_attention", grid=grid, window=4, stride=4, backend="reference"
    )
    torch.testing.assert_close(built.attend(q, k, v, grid=grid), blocks)


@pytest.mark.parametrize("phase", [0, 1])
def test_upstream_padding_attends_to_projected_zeros(phase):
    grid, padded = (5, 4), (6, 6)
    x, context = (torch.randn(2, 20, 16, dtype=torch.float64) for _ in range(2))
    upstream = module("NC", window=3, phase=phase, pad="upstream")
    masked = module("NC", window=3, phase=phase)
    masked.load_state_dict(upstream.state_dict())

    def filled(t: Tensor) -> Tensor:
        return F.pad(t.unflatten(1, grid), (0, 0, 0, 2, 0, 1)).flatten(1, 2)

    whole = masked(filled(x), filled(context), grid=padded).unflatten(1, padded)[:, :5, :4].flatten(1, 2)
    found = upstream(x, context, grid=grid)
    torch.testing.assert_close(found, whole)
    assert not torch.allclose(found, masked(x, context, grid=grid))
    hidden = torch.zeros(2, 20, dtype=torch.bool)
    hidden[:, 3] = True
    context[:, 3] += 5.0
    assert not torch.allclose(upstream(x, context, grid=grid), found)
    moved = upstream(x, context + 7.0 * hidden[..., None], grid=grid, key_padding_mask=hidden)
    torch.testing.assert_close(moved, upstream(x, context, grid=grid, key_padding_mask=hidden))


def test_flops_count_the_pairs_of_cut_windows():
    """Five tokens with windows of 2 moved by 1 are cells of 1, 2 and 2: 9 pairs, 7 of them causal."""
    assert module(window=2, phase=1).flops(5, 5) == 4 * 16 * 9
    assert module("CS", window=2, phase=1).flops(5, 5) == 4 * 16 * 7
    assert module(window=2, phase=1).cost("flops", 15, 15, grid=(5, 3)) == 4 * 16 * 9 * 5
    assert module(window=4, pad="upstream").flops(5, 5) == 4 * 16 * 32
    for pattern in ("NS", "CS"):
        built = module(pattern, window=(3, 2), phase=1)
        pairs = int(built.visible(35, 35, torch.device("cpu"), grid=(5, 7)).sum())
        assert built.cost("flops", 35, 35, grid=(5, 7)) == 4 * 16 * pairs


def test_tables_serve_the_ranks_of_their_window():
    assert module(window=3).tables.shapes == {1: (5,), 2: (5, 5), 3: (5, 5, 5)}
    assert module().tables.shapes == {1: (511,), 2: (13, 13), 3: (15, 13, 13)}
    assert module(window=(4, 2)).tables.shapes == {2: (7, 3)}
    assert module(window=256).tables.shapes == {1: (511,)}  # no cube of 511³ for a sequence's window


@pytest.mark.parametrize(
    ("hyper", "grid", "message"),
    [
        ({"window": 0}, None, "whole numbers of at least 1"),
        ({"window": (2, 2, 2, 2)}, None, "observed window"),
        ({"window": (3, 3)}, (2, 2, 3), "rank 3: observed window="),
        ({"window": 3}, (5, 2), "expected 12 tokens"),
        ({"window": 100}, (3, 4), "expected rank 1;"),
        ({"phase": 2}, None, "phase=2"),
    ],
)
def test_wrong_settings_are_refused(hyper, grid, message):
    with pytest.raises(UsageError, match=message):
        module(**hyper).attend(heads(12), heads(12), heads(12), grid=grid)


def test_contexts_of_another_length_are_refused():
    with pytest.raises(UsageError, match="N = 4, M = 6, expected N = M"):
        module("NC", window=2).attend(heads(4), heads(6), heads(6))


@pytest.mark.parametrize(
    ("pattern", "grid"), [("NS", (5, 4)), ("CS", (13,)), ("NC", (2, 3, 3)), ("CC", (4, 4))]
)
def test_triton_agrees(pattern, grid):
    n = math.prod(grid)
    given = [heads(n, b=1).float().requires_grad_() for _ in range(3)]
    truth = [x.detach().double().requires_grad_() for x in given]
    exact = module(pattern, window=3, phase=1)
    fast = attnbench.build(
        "swin_window_attention", 16, 2, pattern=pattern, backend="triton", window=3, phase=1
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
