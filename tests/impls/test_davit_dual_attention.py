"""davit_dual_attention against both phases written out, and the exact special cases of the channel phase."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.errors import UsageError

GRIDS = [(9,), (4, 5), (2, 3, 4)]


def build(backend: str = "reference", **hyper: object) -> nn.Module:
    options = {"window": 3, **hyper}
    return attnbench.build("davit_dual_attention", 16, 2, backend=backend, **options).double()


def tokens(grid: tuple, b: int = 2) -> Tensor:
    return torch.randn(b, math.prod(grid), 16, dtype=torch.float64)


def heads(n: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 2, n, 8, dtype=torch.float64)
    return q, k, v


def windowed(layer: nn.Module, x: Tensor, grid: tuple, side: int) -> Tensor:
    q, k, v = layer.qkv(x).chunk(3, -1)
    found: dict[tuple, list[int]] = {}
    for token, place in enumerate(product(*map(range, grid))):
        found.setdefault(tuple(p // side for p in place), []).append(token)
    o = torch.zeros_like(x)
    for own, h in product(found.values(), (slice(0, 8), slice(8, 16))):
        scores = q[:, own, h] @ k[:, own, h].mT / math.sqrt(8)
        o[:, own, h] = scores.softmax(-1) @ v[:, own, h]
    return layer.out(o)


def channelled(layer: nn.Module, x: Tensor, scale: float) -> Tensor:
    q, k, v = layer.qkv(x).chunk(3, -1)
    o = torch.zeros_like(x)
    for h, a in product((0, 8), range(8)):
        scores = torch.stack([(q[..., h + a] * k[..., h + b]).sum(-1) for b in range(8)], -1)
        weights = (scale * scores).softmax(-1)
        o[..., h + a] = sum(weights[:, b, None] * v[..., h + b] for b in range(8))
    return layer.out(o)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_phases_equal_the_definition(grid, backend):
    x, n = tokens(grid), math.prod(grid)
    m = build(backend)
    first = windowed(m.layers["window"], x, grid, 3)
    torch.testing.assert_close(m(x, grid=grid), channelled(m.layers["channel"], first, 8**-0.5))
    alone = build(backend, phase=0)
    torch.testing.assert_close(alone(x, grid=grid), windowed(alone.layers["window"], x, grid, 3))
    for scale, sigma in (("head", 8**-0.5), ("tokens", n**-0.5)):
        alone = build(backend, phase=1, scale=scale)
        torch.testing.assert_close(alone(x, grid=grid), channelled(alone.layers["channel"], x, sigma))


def test_the_convolution_is_added_before_each_phase():
    grid = (4, 5)
    m, x = build(cpe=True), tokens(grid)
    expected = x
    for name in ("window", "channel"):
        layer = m.layers[name]
        nn.init.normal_(layer.cpe.bias)
        image = expected.mT.unflatten(2, grid)
        taps = layer.cpe.taps.at(2).unsqueeze(1)
        conv = nn.functional.conv2d(image, taps, layer.cpe.bias, padding=1, groups=16)
        expected = expected + conv.flatten(2).mT
        if name == "window":
            expected = windowed(layer, expected, grid, 3)
        else:
            expected = channelled(layer, expected, 8**-0.5)
    torch.testing.assert_close(m(x, grid=grid), expected)


def test_channels_know_no_positions():
    m, x = build(phase=1), tokens((9,))
    order = torch.randperm(9)
    torch.testing.assert_close(m(x[:, order]), m(x)[:, order])


def test_channels_alike_come_out_as_they_are_and_without_queries_as_their_mean():
    m = build(phase=1)
    q, k, v = heads(11)
    alike = v[..., :1].expand_as(v)
    torch.testing.assert_close(m.between_channels(q, k, alike), alike)
    mean = v.mean(-1, keepdim=True).expand_as(v)
    torch.testing.assert_close(m.between_channels(torch.zeros_like(q), k, v), mean)


def test_every_token_twice_sharpens_the_map_by_the_square_root_of_two():
    m = build(phase=1, scale="tokens")
    q, k, v = heads(11)
    twice = [torch.cat([x, x], 2) for x in (q, k, v)]
    sharper = m.between_channels(math.sqrt(2.0) * q, k, v)
    torch.testing.assert_close(m.between_channels(*twice)[:, :, :11], sharper)


def test_padding_does_not_count_among_the_tokens():
    m = build(phase=1, scale="tokens")
    q, k, v = heads(11)
    padded = torch.zeros(2, 11, dtype=torch.bool)
    padded[0, [2, 5, 6]] = True
    kept = ~padded[0]
    short = m.between_channels(*(x[:1, :, kept] for x in (q, k, v)))
    torch.testing.assert_close(m.between_channels(q, k, v, padded)[:1, :, kept], short)


def test_flops_counted_by_hand():
    projections = 8 * 20 * 16 * 16
    window, channel = 4 * 20 * 9 * 16, 4 * 20 * 8 * 16
    m = build()
    assert m.flops(20, 20, grid=(4, 5)) == 2 * projections + window + channel
    assert build(phase=1, cpe=True).flops(20, 20, grid=(4, 5)) == projections + channel + 2 * 20 * 9 * 16
    assert build(phase=0, window=9).flops(20, 20, grid=(4, 5)) == projections + 4 * 20 * 20 * 16


@pytest.mark.parametrize(("hyper", "match"), [({"window": 0}, "window=0"), ({"window": (3, 3, 3)}, "rank 2")])
def test_wrong_windows_are_refused(hyper, match):
    with pytest.raises(UsageError, match=match):
        build(**hyper)(tokens((4, 5)), grid=(4, 5))


def test_triton_agrees():
    x = tokens((2, 4), b=1).float()
    padded = torch.zeros(1, 8, dtype=torch.bool)
    padded[0, 5] = True
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        m = build(backend, scale="tokens").float()
        leaf = x.clone().requires_grad_()
        output = m(leaf, grid=(2, 4), key_padding_mask=padded)
        gradients = torch.autograd.grad(output.square().sum(), [leaf, *m.parameters()])
        results.append((output, *gradients))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
