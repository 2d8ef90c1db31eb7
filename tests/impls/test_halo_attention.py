"""halo_attention against its definition pair by pair and its exact special cases."""

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
    built = attnbench.build("halo_attention", 16, 2, pattern=pattern, backend=backend, **hyper)
    return built.double()


def definition(q: Tensor, k: Tensor, v: Tensor, built, grid: tuple, *, causal: bool = False) -> Tensor:
    """With border="upstream" keys of the window that lie outside the grid have score q·R and value 0."""
    hp, rank, n = built.hp, len(grid), q.shape[2]
    tables = built.relative.split(built.rows)[-rank:] if hp.rel else ()
    places = {p: j for j, p in enumerate(product(*map(range, grid)))}
    wide = [range(-hp.halo, -(-g // hp.block) * hp.block + hp.halo) for g in grid]
    scale = 1 / math.sqrt(q.shape[-1])
    rows = []
    for p, i in places.items():
        if any(a % hp.q_stride for a in p):
            continue
        scores, values = [], []
        for r in product(*wide):
            inside = [a // hp.block * hp.block - hp.halo <= b < (a // hp.block + 1) * hp.block + hp.halo
                      for a, b in zip(p, r, strict=True)]  # fmt: skip
            j = places.get(r)
            if not all(inside) or (j is None and hp.border == "masked") or (causal and j > i):
                continue
            score = torch.zeros(q.shape[:2], dtype=q.dtype)
            for a, b, table in zip(p, r, tables, strict=False):
                embedding = table[b - a + hp.block - 1 + hp.halo]
                score = score + (q[:, :, i] @ embedding) * (scale if hp.scale_rel else 1.0)
            if j is not None:
                score = score + scale * (q[:, :, i] * k[:, :, j]).sum(-1)
            scores.append(score)
            values.append(torch.zeros_like(v[:, :, 0]) if j is None else v[:, :, j])
        weights = torch.stack(scores, -1).softmax(-1)
        rows.append((weights[..., None] * torch.stack(values, -2)).sum(-2))
    assert len(places) == n
    return torch.stack(rows, 2)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("pattern", "hyper"),
    [
        ("NS", {}),
        ("CS", {"scale_rel": True}),
        ("CC", {}),
        ("NC", {"border": "upstream"}),
        ("NS", {"q_stride": 2, "block": 2}),
        ("NS", {"q_stride": 2, "block": 4, "border": "upstream"}),
        ("NS", {"rel": False}),
    ],
)
@pytest.mark.parametrize("grid", [(8,), (4, 5), (2, 3, 3)])
def test_equals_the_definition(grid, pattern, hyper, backend):
    n = math.prod(grid)
    q, k, v = heads(n), heads(n), heads(n, 6)
    built = module(pattern, backend, **{"block": 3, "halo": 1, **hyper})
    with torch.no_grad():
        found = built.attend(q, k, v, grid=grid)
        torch.testing.assert_close(
            found, definition(q, k, v, built, grid, causal=pattern in ("CS", "CC")), rtol=1e-6, atol=1e-8
        )


def test_special_cases():
    grid, n = (5, 4), 20
    q, k, v = heads(n), heads(n), heads(n)
    dense = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    torch.testing.assert_close(
        module(block=2, halo=5, rel=False).attend(q, k, v, grid=grid), dense
    )  # a halo over the whole grid
    swin = attnbench.build("swin_window_attention", 16, 2, window=3, backend="reference").double()
    torch.nn.init.zeros_(swin.tables.weight)
    torch.testing.assert_close(
        module(block=3, halo=0, rel=False).attend(q, k, v, grid=grid), swin.attend(q, k, v, grid=grid)
    )
    built = module(block=2, halo=1)
    before = built.attend(q, k, v, grid=grid)
    with torch.no_grad():
        built.relative[-built.rows[-1] :] += torch.randn(8, dtype=torch.float64)  # q·c on all scores
    torch.testing.assert_close(built.attend(q, k, v, grid=grid), before)


def test_inner_blocks_are_strided_neighborhoods():
    """With window b + 2h and stride b; at a border a neighborhood is moved and a halo is cut."""
    grid, n = (12, 8), 96
    q, k, v = heads(n), heads(n), heads(n)
    halo = module(block=2, halo=1, rel=False).attend(q, k, v, grid=grid).unflatten(2, grid)
    gna = attnbench.attention(
        q, k, v, "generalized_neighborhood_attention", grid=grid, window=4, stride=2, backend="reference"
    ).unflatten(2, grid)
    torch.testing.assert_close(halo[:, :, 2:-2, 2:-2], gna[:, :, 2:-2, 2:-2])
    assert not torch.allclose(halo[:, :, 0], gna[:, :, 0])


def test_upstream_borders_lose_mass_to_the_zeros():
    constant = torch.ones(2, 2, 12, 8, dtype=torch.float64)
    built = module(block=2, halo=1, border="upstream", rel=False)
    o = built.attend(heads(12), torch.zeros_like(constant), constant, grid=(12,))
    expected = torch.tensor([3, 3, *[4] * 8, 3, 3], dtype=torch.float64) / 4
    torch.testing.assert_close(o[0, 0, :, 0], expected)
    hidden = torch.zeros(2, 12, dtype=torch.bool)
    hidden[:, 5] = True
    dropped = built.attend(heads(12), torch.zeros_like(constant), constant, key_padding_mask=hidden)
    torch.testing.assert_close(dropped[0, 0, 4:8, 0], torch.ones(4, dtype=torch.float64))


def test_strided_queries_downsample_a_layer():
    x = torch.randn(2, 35, 16, dtype=torch.float64)
    built = module(block=4, halo=1, q_stride=2)
    y = built(x, grid=(5, 7))
    assert y.shape == (2, 12, 16)
    whole = module(block=4, halo=1)
    whole.load_state_dict(built.state_dict())
    every = whole(x, grid=(5, 7)).unflatten(1, (5, 7))
    torch.testing.assert_close(y, every[:, ::2, ::2].flatten(1, 2))


def test_embeddings_per_axis():
    assert module(block=3, halo=1).relative.shape == (3 * 7, 8)
    built = module(block=(2, 4), halo=(0, 3))
    assert built.rows == (3, 13)
    with pytest.raises(UsageError, match="rank 1: observed block="):
        built.attend(heads(5), heads(5), heads(5))
    assert not list(module(rel=False).named_parameters())[8:]  # the projections only


@pytest.mark.parametrize(
    ("pattern", "hyper", "message"),
    [
        ("NS", {"block": 0}, "at least 1"),
        ("NS", {"halo": -1}, "at least 0"),
        ("NS", {"block": 3, "q_stride": 2}, "q_stride dividing the block"),
        ("NS", {"block": (3, 3), "halo": (1, 1, 1)}, "settings of one rank"),
        ("CS", {"border": "upstream"}, "expected 1 and 'masked'"),
        ("CC", {"q_stride": 2}, "expected 1 and 'masked'"),
    ],
)
def test_wrong_settings_are_refused(pattern, hyper, message):
    with pytest.raises(UsageError, match=message):
        module(pattern, **hyper)


def test_flops_count_pairs_and_relative_scores():
    """Five tokens in blocks of 2 with a halo of 1 see 3, 3, 4, 4 and 2 keys; R has 5 rows."""
    assert module(block=2, halo=1).flops(5, 5) == 4 * 16 * 16 + 2 * 5 * 16 * 5
    assert module(block=2, halo=1, rel=False).flops(5, 5) == 4 * 16 * 16
    assert module(block=2, halo=1, rel=False, border="upstream").flops(5, 5) == 4 * 16 * 4 * 5
    built = module("CS", block=2, halo=1, rel=False)
    pairs = int(built.visible(35, 35, torch.device("cpu"), grid=(5, 7)).sum())
    assert built.cost("flops", 35, 35, grid=(5, 7)) == 4 * 16 * pairs


def test_visible_is_where_the_gradient_is():
    grid, n = (4, 5), 20
    built = module(block=2, halo=1, border="upstream")
    q, k, v = heads(n, b=1), heads(n, b=1), heads(n, b=1).requires_grad_()
    o = built.attend(q, k, v, grid=grid)
    mask = built.visible(n, n, torch.device("cpu"), grid=grid)
    for i in (0, 7, 19):
        (gradient,) = torch.autograd.grad(o[:, :, i].sum(), v, retain_graph=True)
        assert torch.equal(gradient[0, 0].abs().sum(-1) > 0, mask[i])


@pytest.mark.parametrize(
    ("pattern", "grid"), [("NS", (5, 4)), ("CS", (13,)), ("NC", (2, 3, 3)), ("CC", (4, 4))]
)
def test_triton_agrees(pattern, grid):
    n = math.prod(grid)
    given = [heads(n, b=1).float().requires_grad_() for _ in range(3)]
    truth = [x.detach().double().requires_grad_() for x in given]
    options = {"block": 3, "halo": 1, "border": "upstream" if pattern == "NS" else "masked"}
    exact = module(pattern, **options)
    fast = attnbench.build("halo_attention", 16, 2, pattern=pattern, backend="triton", **options)
    fast.load_state_dict(exact.state_dict())
    upstream = torch.randn(1, 2, n, 8, dtype=torch.float64)
    outputs = fast.attend(*given, grid=grid), exact.attend(*truth, grid=grid)
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-4, atol=1e-5)
    outputs[0].backward(upstream.float())
    outputs[1].backward(upstream)
    pairs = [(a.grad, b.grad) for a, b in zip(given, truth, strict=True)]
    for got, want in [*pairs, (fast.relative.grad, exact.relative.grad)]:
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_padded_keys_of_an_upstream_border_stay_hidden():
    """The mask grows with the border: key 3 of the grid, not of the padded grid."""
    q, k, v = heads(9), heads(9), heads(9)
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[:, 3] = True
    built = module(block=3, halo=1, border="upstream")
    before = built.attend(q, k, v, grid=(3, 3), key_padding_mask=hidden)
    k, v = (x + F.pad(torch.full((1, 8), 9.0), (0, 0, 3, 5)) for x in (k, v))
    torch.testing.assert_close(built.attend(q, k, v, grid=(3, 3), key_padding_mask=hidden), before)
