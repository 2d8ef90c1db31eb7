"""moh against its definition token by token, its gates, and the queries that Triton leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError

CALLS = [("NS", 7, 7), ("CS", 7, 7), ("NC", 5, 8), ("CC", 8, 5)]
SPLITS = [(0, 1), (0, 4), (1, 2), (2, 1), (2, 0), (4, 0), (1, 3)]


def build(pattern: str = "NS", *, backend: str = "reference", kv: int = 4, **hyper):
    ours = attnbench.build("moh", 32, 4, pattern=pattern, backend=backend, num_kv_heads=kv, **hyper)
    return ours.double().eval()


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 32, dtype=torch.float64)


def gate_oracle(ours, x: Tensor, q: Tensor) -> list[float]:
    """Gates of one token x (C,) with its queries q (H, D), in the words of the paper."""
    shared, routed, k = ours.shared, ours.routed, ours.active
    learned = ours.hp.router == "learned"
    on = [1.0] * shared
    if learned and shared > 1:
        on = [shared * p for p in (ours.to_shared.weight @ x).softmax(0).tolist()]
    off = [0.0] * routed
    if not k:
        return on + off
    if learned:
        a = (ours.to_routed.weight @ x).softmax(0).tolist()
    else:
        norms = [math.sqrt(sum(u * u for u in head)) for head in q[shared:].tolist()]
        mean = sum(norms) / routed
        std = math.sqrt(sum((u - mean) ** 2 for u in norms) / (routed - 1)) if routed > 1 else 1.0
        a = (torch.tensor(norms).double() / std).softmax(0).tolist()
    chosen = sorted(range(routed), key=lambda h: -a[h])[:k]
    total = sum(a[h] for h in chosen)
    for h in chosen:
        off[h] = k * a[h] / total if learned else 1.0
    if learned and shared:
        b = (ours.to_balance.weight @ x).softmax(0).tolist()
        on, off = [2 * b[0] * g for g in on], [2 * b[1] * g for g in off]
    return on + off


def oracle(ours, x: Tensor, c: Tensor) -> Tensor:
    q = ours.q_proj(x).unflatten(-1, (4, 8))
    k, v = (p(c).unflatten(-1, (ours.num_kv_heads, 8)) for p in (ours.k_proj, ours.v_proj))
    group = 4 // ours.num_kv_heads
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            gates = gate_oracle(ours, x[b, i], q[b, i])
            last = i + 1 if ours.pattern == "CS" else c.shape[1]
            heads = []
            for h in range(4):
                p = (k[b, :last, h // group] @ q[b, i, h] / math.sqrt(8)).softmax(0)
                heads.append(gates[h] * (p @ v[b, :last, h // group]))
            y[b, i] = ours.out_proj(torch.cat(heads))
    return y


def call(ours, x: Tensor, c: Tensor, **options) -> Tensor:
    return ours(x, c, **options) if ours.pattern.cross else ours(x, **options)


@pytest.mark.parametrize(("pattern", "n", "m"), CALLS)
@pytest.mark.parametrize("router", ["learned", "query_norm"])
@torch.no_grad()
def test_equals_the_definition(pattern, n, m, router):
    ours = build(pattern, kv=2, router=router)
    assert (ours.shared, ours.routed, ours.active) == (1, 3, 2)
    x = tokens(n)
    c = tokens(m) if ours.pattern.cross else x
    torch.testing.assert_close(call(ours, x, c), oracle(ours, x, c))


@pytest.mark.parametrize(("shared", "active"), SPLITS)
@pytest.mark.parametrize("router", ["learned", "query_norm"])
@torch.no_grad()
def test_every_split_of_the_heads(shared, active, router):
    ours = build(shared=shared, active=active, router=router)
    x = tokens(5)
    torch.testing.assert_close(ours(x), oracle(ours, x, x))
    gates = ours.route(x, ours.split(ours.q_proj(x), 4)).gates
    assert ((gates != 0).sum(-1) == shared + active).all()
    if router == "learned" and not shared:
        torch.testing.assert_close(gates.sum(-1), torch.full((2, 5), float(active)).double())
    if router == "learned" and shared and active:
        b = 2 * ours.to_balance(x).softmax(-1)
        torch.testing.assert_close(gates.sum(-1), shared * b[..., 0] + active * b[..., 1])


@pytest.mark.parametrize("hyper", [{"shared": 1, "active": 3}, {"shared": 0, "active": 4}, {"shared": 4}])
@pytest.mark.parametrize("router", ["learned", "query_norm"])
@torch.no_grad()
def test_all_heads_on_without_preference_is_softmax_attention(hyper, router):
    ours = build(router=router, **{"active": 0, **hyper})
    for name, parameter in ours.named_parameters():
        if name.startswith("to_"):
            parameter.zero_()
    x = tokens(6)
    q, k, v = (ours.split(p(x), 4) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    dense = attnbench.attention(q, k, v, "softmax", "NS", "reference")
    torch.testing.assert_close(ours(x), ours.out_proj(ours.join(dense)))


def test_the_router_learns_through_the_gates_that_are_on():
    ours = build(shared=1, active=2)
    ours(tokens(6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ours.parameters())
    single = build(shared=0, active=1)  # one head on has weight 1, whatever its probability
    single(tokens(6)).square().sum().backward()
    assert single.to_routed.weight.grad.abs().max() < 1e-12


def test_straight_through_gradients_are_those_of_the_probabilities():
    ours = build(shared=1, active=1, router="query_norm")
    x = tokens(4)
    q = torch.randn(2, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 4, 3, dtype=torch.float64)
    assert not ours.route(x, q).gates.requires_grad
    routing = ours.train().route(x, q)
    assert torch.equal(routing.gates, ours.eval().route(x, q).gates)
    (found,) = torch.autograd.grad((routing.gates[..., 1:] * weights).sum(), q, retain_graph=True)
    (expected,) = torch.autograd.grad((routing.probability * weights * routing.chosen).sum(), q)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_balance_loss_by_hand():
    ours = build(shared=1, active=1)
    x = tokens(6)
    a = ours.to_routed(x).softmax(-1).flatten(0, 1)
    chosen = torch.nn.functional.one_hot(a.argmax(-1), 3).double()
    expected = 9 * sum(a[:, h].mean() * chosen[:, h].mean() for h in range(3)) / 3
    torch.testing.assert_close(ours.balance_loss(x), expected)
    ours.to_routed.weight.zero_()
    torch.testing.assert_close(ours.balance_loss(x), torch.ones(()).double())
    assert build(shared=4, active=0).balance_loss(x) == 0


def test_zero_queries_and_a_single_routed_head_are_finite():
    for hyper in ({"shared": 1, "active": 2}, {"shared": 3, "active": 1}):
        ours = build(router="query_norm", **hyper)
        x = torch.zeros(1, 3, 32, dtype=torch.float64, requires_grad=True)
        ours.q_proj.bias.data.zero_()
        o = ours.train()(x)
        (gradient,) = torch.autograd.grad(o.square().sum(), x)
        assert o.isfinite().all()
        assert gradient.isfinite().all()


def test_flops_by_hand():
    projections, routers = 4 * 2 * 10 * 32 * 32, 2 * 10 * 32 * (3 + 2)
    assert build().flops(10, 10) == 4 * 100 * 3 * 8 + projections + routers
    assert build("CS").flops(10, 10) == 4 * 55 * 3 * 8 + projections + routers
    assert build("NC", shared=2, active=0).flops(10, 6) == (
        4 * 60 * 2 * 8 + 2 * 2 * (10 + 6) * 32 * 32 + 2 * 10 * 32 * 2
    )


@pytest.mark.parametrize(("shared", "active"), [(0, 0), (3, 2), (-1, 2), (5, 0), (1, -1)])
def test_impossible_splits_are_refused(shared, active):
    with pytest.raises(UsageError, match="expected at least one head on"):
        build(shared=shared, active=active)


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC", "CC"])
@torch.no_grad()
def test_sorted_queries_see_what_they_saw(pattern):
    """The path of the Triton kernels, on the reference operation in fp64."""
    ours = build(pattern, kv=2, shared=1, active=1)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    gates = ours.route(tokens(9), q.double()).gates
    padding = torch.zeros(2, 1, 9).index_fill_(-1, torch.tensor([4]), -math.inf)
    found = ours._attend_where_on(q.double(), k.double(), v.double(), gates, padding)
    dense = attnbench.attention(
        q.double(),
        k.repeat_interleave(2, 1).double(),
        v.repeat_interleave(2, 1).double(),
        "softmax",
        pattern,
        "reference",
        key_padding_mask=padding[:, 0] < 0,
    )
    torch.testing.assert_close(found, dense * (gates != 0).transpose(1, 2).unsqueeze(-1))


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC"])
def test_triton_agrees(pattern):
    ours = build(pattern, kv=2, shared=1, active=1).float()
    given = [torch.randn(1, length, 32, requires_grad=True) for length in (12, 17)]
    inputs = given if ours.pattern.cross else given[:1]
    results = []
    for backend in ("reference", "triton"):
        ours.backend = backend
        o = ours(*inputs)
        results.append((o, *torch.autograd.grad(o.square().sum(), [*inputs, *ours.parameters()])))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
