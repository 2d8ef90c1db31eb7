"""tensor_attention, exact and as a polynomial, against sums over all pairs of keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.dense import _tensor_taylor

CALLS = [("NS", 6, 6), ("CS", 6, 6), ("CS", 3, 6), ("CS", 6, 4), ("NC", 4, 7), ("CC", 7, 4)]


def build(pattern: str = "NS", *, backend: str = "reference", dim: int = 4, **hyper):
    return attnbench.build(
        "tensor_attention", 2 * dim, 2, pattern=pattern, backend=backend, projections=False, **hyper
    )


def tokens(n: int, dim: int = 4) -> Tensor:
    return torch.randn(2, 2, n, dim, dtype=torch.float64)


def weight(score: float, form: str, order: int) -> float:
    return math.exp(score) if form == "exact" else sum(score**r / math.factorial(r) for r in range(order + 1))


def oracle(ours, q, k1, v1, k2, v2, padded=None) -> Tensor:
    """Loops over batch, head, query and pair of keys; nothing visible gives 0."""
    (n, d), m1, m2 = q.shape[2:], k1.shape[2], k2.shape[2]
    scale = 1 / d if ours.hp.scale is None else ours.hp.scale
    o = torch.zeros_like(q)
    for b in range(2):
        for h in range(2):
            for i in range(n):
                total, mixed = 0.0, torch.zeros(d).double()
                for j in range(m1):
                    for l in range(m2):
                        late = ours.pattern == "CS" and (j > i + m1 - n or l > i + m2 - n)
                        if late or (padded is not None and (padded[b, j] or padded[b, l])):
                            continue
                        s = scale * (q[b, h, i] * k1[b, h, j] * k2[b, h, l]).sum().item()
                        w = weight(s, ours.hp.form, ours.hp.order)
                        total, mixed = total + w, mixed + w * v1[b, h, j] * v2[b, h, l]
                if total:
                    o[b, h, i] = mixed / total
    return o


@pytest.mark.parametrize(("pattern", "n", "m"), CALLS)
@pytest.mark.parametrize("hyper", [{}, {"form": "taylor"}, {"form": "taylor", "order": 4, "scale": 0.5}])
@torch.no_grad()
def test_equals_the_sum_over_pairs(pattern, n, m, hyper):
    ours = build(pattern, **hyper)
    q, k1, v1, k2, v2 = (tokens(x) for x in (n, m, m, m, m))
    torch.testing.assert_close(ours.attend(q, k1, v1, k2=k2, v2=v2), oracle(ours, q, k1, v1, k2, v2))


@pytest.mark.parametrize("form", ["exact", "taylor"])
@pytest.mark.parametrize("pattern", ["CS", "NC"])
@torch.no_grad()
def test_padding_is_that_of_both_sets(form, pattern):
    ours = build(pattern, form=form)
    q, k1, v1, k2, v2 = (tokens(5) for _ in range(5))
    padded = torch.tensor([[False, True, False, True, False], [True] * 5])
    found = ours.attend(q, k1, v1, k2=k2, v2=v2, key_padding_mask=padded)
    torch.testing.assert_close(found, oracle(ours, q, k1, v1, k2, v2, padded))


@pytest.mark.parametrize(
    ("pattern", "n", "m"), [("NS", 13, 13), ("CS", 13, 13), ("CS", 7, 13), ("CS", 13, 7)]
)
def test_polynomial_in_blocks_with_gradients(pattern, n, m, monkeypatch):
    """Sums over blocks of keys and of queries, shorter than the lengths, against explicit weights."""
    monkeypatch.setattr(_tensor_taylor, "TOKENS", 4)
    monkeypatch.setattr(_tensor_taylor, "PREFIXES", 5)
    ours = build(pattern, form="taylor")
    given = [tokens(x).requires_grad_() for x in (n, m, m, m, m)]
    q, k1, v1, k2, v2 = given
    s = torch.einsum("bhid,bhjd,bhld->bhijl", q, k1, k2) / 4
    w = 1 + s + s**2 / 2
    if pattern == "CS":
        late = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
        w = w.masked_fill(late[:, :, None] | late[:, None, :], 0.0)
    total = w.sum((-2, -1)).clamp_min(1e-9).unsqueeze(-1)
    expected = torch.einsum("bhijl,bhjd,bhld->bhid", w, v1, v2) / total
    found = ours.attend(q, k1, v1, k2=k2, v2=v2)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, given, upstream),
        torch.autograd.grad(expected, given, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("pattern", ["NS", "CS"])
@torch.no_grad()
def test_ones_and_a_single_key_are_softmax_attention(pattern):
    q, k, v = tokens(6), tokens(6), tokens(6)
    one = torch.ones_like(k)
    dense = attnbench.attention(q, k, v, "softmax", pattern, "reference", scale=0.25)
    torch.testing.assert_close(build(pattern).attend(q, one, one, k2=k, v2=v), dense)
    torch.testing.assert_close(build(pattern).attend(q, k, v, k2=one, v2=one), dense)
    if pattern == "NS":
        k1, v1 = tokens(1), tokens(1)
        single = attnbench.attention(q * k1, k, v * v1, "softmax", "NS", "reference", scale=0.25)
        torch.testing.assert_close(build().attend(q, k1, v1, k2=k, v2=v), single)


@pytest.mark.parametrize("form", ["exact", "taylor"])
@torch.no_grad()
def test_symmetries(form):
    ours = build("NC", form=form)
    q, k1, v1, k2, v2 = (tokens(x) for x in (5, 6, 6, 6, 6))
    o = ours.attend(q, k1, v1, k2=k2, v2=v2)
    torch.testing.assert_close(ours.attend(q, k2, v2, k2=k1, v2=v1), o)
    order = torch.randperm(6)
    torch.testing.assert_close(ours.attend(q, k1[:, :, order], v1[:, :, order], k2=k2, v2=v2), o)
    a, b = (x[:, :, :1].expand_as(x) for x in (v1, v2))
    torch.testing.assert_close(ours.attend(q, k1, a, k2=k2, v2=b), (a * b)[:, :, :5])
    means = v1.mean(2, keepdim=True) * v2.mean(2, keepdim=True)
    zero = ours.attend(torch.zeros_like(q), k1, v1, k2=k2, v2=v2)
    torch.testing.assert_close(zero, means.expand_as(q))


@torch.no_grad()
def test_the_polynomial_nears_the_exponential_for_small_scores():
    q, k1, v1, k2, v2 = (tokens(6) for _ in range(5))
    errors = []
    for scale in (0.1, 0.01):
        exact, taylor = (
            build(form=form, scale=scale).attend(q, k1, v1, k2=k2, v2=v2) for form in ("exact", "taylor")
        )
        errors.append((exact - taylor).abs().max().item())
    assert errors[1] < errors[0] / 500  # third order: a factor of 1000
    fourth = build(form="taylor", order=4, scale=0.1).attend(q, k1, v1, k2=k2, v2=v2)
    assert (build(scale=0.1).attend(q, k1, v1, k2=k2, v2=v2) - fourth).abs().max() < errors[0] / 5


@torch.no_grad()
def test_the_layer_projects_the_context_four_times():
    layer = attnbench.build(
        "tensor_attention", 8, 2, pattern="NC", backend="reference", num_kv_heads=1
    ).double()
    x, c = torch.randn(2, 4, 8).double(), torch.randn(2, 6, 8).double()
    k1, v1, k2, v2 = (
        p(c).unflatten(-1, (1, 4)).transpose(1, 2).expand(-1, 2, -1, -1)
        for p in (layer.k_proj, layer.v_proj, layer.k2_proj, layer.v2_proj)
    )
    q = layer.q_proj(x).unflatten(-1, (2, 4)).transpose(1, 2)
    o = oracle(layer, q, k1, v1, k2, v2)
    torch.testing.assert_close(layer(x, c), layer.out_proj(o.transpose(1, 2).flatten(-2)))


def test_flops_by_hand():
    assert build().flops(10, 10) == 4 * 2 * 1000 * 4
    assert build("CS").flops(10, 10) == 4 * 2 * 4 * sum(i * i for i in range(1, 11))
    assert build("CS").flops(3, 10) == 4 * 2 * 4 * (64 + 81 + 100)
    assert build("CS").flops(10, 3) == 4 * 2 * 4 * (1 + 4 + 9)
    assert build("NC", form="taylor").flops(10, 6) == 2 * 2 * 22 * 15 * 5
    layer = attnbench.build("tensor_attention", 8, 2, pattern="NC")
    assert layer.layer_flops(10, 6) == layer.flops(10, 6) + 2 * 64 * (2 * 10 + 4 * 6)


@pytest.mark.parametrize(("pattern", "n", "m"), [("NC", 10, 6), ("CS", 6, 10), ("CS", 8, 8)])
def test_flops_of_the_polynomial_are_those_counted(pattern, n, m):
    ours = build(pattern, form="taylor")
    given = [tokens(x)[:1] for x in (n, m, m, m, m)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours.attend(*given[:3], k2=given[3], v2=given[4])
    assert counter.get_total_flops() == ours.counted_flops(n, m)
    assert pattern == "CS" or ours.counted_flops(n, m) == ours.flops(n, m)


def test_wrong_calls_are_refused():
    q, short, padded = tokens(4), tokens(3), torch.zeros(2, 4, dtype=torch.bool)
    exact = build()
    with pytest.raises(UsageError, match="observed no k2 or no v2"):
        exact.attend(q, q, q)
    with pytest.raises(UsageError, match="4 and 3 keys with padding"):
        exact.attend(q, q, q, k2=short, v2=short, key_padding_mask=padded)
    with pytest.raises(UsageError, match="observed order=3"):
        build(form="taylor", order=3)
    with pytest.raises(UsageError, match="observed backend 'triton'"):
        build(form="taylor", backend="triton")


@pytest.mark.parametrize(("pattern", "n", "m"), [("CS", 6, 6), ("NC", 5, 7)])
def test_triton_agrees(pattern, n, m):
    given = [tokens(x)[:1].float().requires_grad_() for x in (n, m, m, m, m)]
    results = []
    for backend in ("reference", "triton"):
        q, k1, v1, k2, v2 = given
        o = build(pattern, backend=backend).attend(q, k1, v1, k2=k2, v2=v2)
        results.append((o, *torch.autograd.grad(o.square().sum(), given)))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
