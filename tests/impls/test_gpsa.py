"""gpsa against its N×N definition, with and without padding, and the convolution it starts as."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError

GRIDS = [(1, 1), (3, 4), (1, 5), (4, 2)]


def build(heads: int = 2, *, backend: str = "reference", random: bool = True, **options):
    ours = attnbench.build("gpsa", 8 * heads, heads, backend=backend, **options).double()
    if random:
        torch.nn.init.normal_(ours.position, std=0.5)
        torch.nn.init.normal_(ours.gate)
    return ours


def oracle(ours, x: Tensor, grid: tuple[int, int], padded: Tensor | None = None) -> Tensor:
    """Both maps in full, the positional one pair by pair from its three features."""
    h, n = ours.num_heads, x.shape[1]
    q, k, v = (
        ours.split(p(x), count)
        for p, count in ((ours.q_proj, h), (ours.k_proj, ours.num_kv_heads), (ours.v_proj, ours.num_kv_heads))
    )
    k, v = ours.grouped(k, v)
    features = torch.empty(n, n, 3, dtype=x.dtype)
    for i in range(n):
        for j in range(n):
            dx, dy = j % grid[1] - i % grid[1], j // grid[1] - i // grid[1]
            features[i, j] = torch.tensor([dx, dy, dx**2 + dy**2], dtype=x.dtype)
    content = q @ k.mT / math.sqrt(ours.head_dim)
    position = torch.einsum("ijf,hf->hij", features, ours.position).expand_as(content)
    if padded is not None:
        content, position = (s.masked_fill(padded[:, None, None], -math.inf) for s in (content, position))
    gate = torch.sigmoid(ours.gate)[:, None, None]
    a = (1 - gate) * content.softmax(-1) + gate * position.softmax(-1)
    return ours.out_proj(ours.join((a / a.sum(-1, keepdim=True)) @ v))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("padding", [False, True])
def test_equals_the_definition_with_gradients(grid, padding):
    n = grid[0] * grid[1]
    ours = build(heads=4, num_kv_heads=2)
    x = torch.randn(2, n, 32, dtype=torch.float64, requires_grad=True)
    padded = None
    if padding:
        padded = torch.zeros(2, n, dtype=torch.bool)
        padded[0, n // 2 + 1 :: 2] = True
    found = ours(x, grid=grid, key_padding_mask=padded)
    expected = oracle(ours, x, grid, padded)
    wanted = [x, ours.position, ours.gate, ours.v_proj.weight]
    upstream = torch.randn_like(found)
    grads = [torch.autograd.grad(o, wanted, upstream) for o in (found, expected)]
    for one, other in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_padding_beyond_the_reach_of_a_sharp_head():
    ours = build(heads=1, locality_strength=1e4, random=False)
    ours.gate.fill_(math.inf)
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    padded = torch.tensor([[True] * 8 + [False]])  # every query has but the last key, however far
    expected = ours.out_proj(ours.v_proj(x[:, 8:])).expand(-1, 9, -1)
    torch.testing.assert_close(ours(x, grid=(3, 3), key_padding_mask=padded), expected)


@torch.no_grad()
def test_closed_gates_are_softmax_attention_and_open_ones_ignore_content():
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    ours = build()
    ours.gate.fill_(-math.inf)
    q, k, v = (ours.split(p(x), 2) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    dense = attnbench.attention(q, k, v, "softmax", "NS", "reference")
    torch.testing.assert_close(ours(x, grid=(3, 4)), ours.out_proj(ours.join(dense)))
    ours.gate.fill_(math.inf)
    before = ours(x, grid=(3, 4))
    torch.nn.init.normal_(ours.q_proj.weight)
    torch.testing.assert_close(ours(x, grid=(3, 4)), before)


@pytest.mark.parametrize(("heads", "centre"), [(4, 0.5), (9, 1)])
@torch.no_grad()
def test_sharp_heads_are_the_taps_of_a_convolution(heads, centre):
    ours = build(heads, random=False, locality_strength=200.0)
    ours.gate.fill_(math.inf)
    ours.out_proj.weight.copy_(torch.eye(8 * heads))
    ours.out_proj.bias.zero_()
    x = torch.randn(1, 25, 8 * heads, dtype=torch.float64)
    y = ours(x, grid=(5, 5)).view(5, 5, heads, 8)
    image, side = x.view(5, 5, heads, 8), math.isqrt(heads)
    for h1 in range(side):
        for h2 in range(side):
            head, dy, dx = h1 + side * h2, h1 - centre, h2 - centre
            rows, columns = (sorted({math.floor(2 + d), math.ceil(2 + d)}) for d in (dy, dx))
            taps = [image[r, c, head] for r in rows for c in columns]  # an offset of ½ is between places
            torch.testing.assert_close(y[2, 2, head], torch.stack(taps).mean(0))


def test_starts_as_in_the_release():
    ours = build(5, random=False, locality_strength=2.0)
    assert ours.position[:4].tolist() == [[-2, -2, -2], [-2, 2, -2], [2, -2, -2], [2, 2, -2]]
    assert torch.equal(ours.v_proj.weight, torch.eye(40).double())
    assert torch.equal(ours.gate, torch.ones(5).double())
    other = build(4, random=False, local_init=False)
    assert other.position.abs().max() < 0.2
    assert not torch.equal(other.v_proj.weight, torch.eye(32).double())


def test_axis_maps_have_unit_rows_and_multiply_to_the_map():
    rows, columns = build().axis_maps(3, 4)
    both = torch.einsum("hab,hcd->hacbd", rows, columns).flatten(3).flatten(1, 2)
    torch.testing.assert_close(both.sum(-1), torch.ones(2, 12).double())


def test_flops_by_hand():
    projections = 4 * 2 * 12 * 16 * 16
    assert build().flops(12, 12, grid=(3, 4)) == projections + 4 * 144 * 16 + 2 * 12 * 16 * 7
    assert build().flops(12, 12) == build().flops(12, 12, grid=(3, 4))
    assert build().flops(12, 12, grid=(1, 12)) == projections + 4 * 144 * 16 + 2 * 12 * 16 * 13


def test_wrong_calls_are_refused():
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    for grid in (None, (12,), (3, 5)):
        with pytest.raises(UsageError, match="expected \\(Gh, Gw\\) with Gh·Gw = 12"):
            build()(x, grid=grid)
    with pytest.raises(UsageError, match="locality_strength"):
        build(locality_strength=0.0)


@pytest.mark.parametrize("padding", [False, True])
def test_triton_agrees(padding):
    ours = build().float()
    x = torch.randn(1, 20, 16, requires_grad=True)
    padded = (torch.arange(20) % 4 == 1).unsqueeze(0) if padding else None
    results = []
    for backend in ("reference", "triton"):
        ours.backend = backend
        o = ours(x, grid=(4, 5), key_padding_mask=padded)
        wanted = [x, ours.position, ours.gate, ours.q_proj.weight]
        results.append((o, *torch.autograd.grad(o.square().sum(), wanted)))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
