"""minimal_attention: every variant against its definition row by row, and what a missing matrix implies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError

CALLS = [("NS", 7, 7), ("CS", 7, 7), ("NC", 5, 8), ("CC", 8, 5)]
VARIANTS = [(qk, vo) for qk in ("collapsed", "symmetric", "separate") for vo in (False, True)]


def build(pattern: str = "NS", *, heads: int = 2, backend: str = "reference", **hyper):
    return attnbench.build("minimal_attention", 16, heads, pattern=pattern, backend=backend, **hyper).double()


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 16, dtype=torch.float64)


def oracle(ours, x: Tensor, c: Tensor) -> Tensor:
    """Loops over batch, head and query."""
    qk, vo, n, m = ours.hp.qk, ours.hp.vo, x.shape[1], c.shape[1]
    heads = 1 if qk == "collapsed" else ours.num_heads
    d = 16 // heads
    w_q = ours.to_q.weight.T
    q = x @ w_q
    k = {"collapsed": lambda: c, "symmetric": lambda: c @ w_q, "separate": lambda: c @ ours.to_k.weight.T}[
        qk
    ]()
    v = c @ ours.to_v.weight.T if vo else c
    y = torch.zeros_like(x)
    for b in range(2):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for i in range(n):
                last = i + 1 if ours.pattern == "CS" else m
                p = (k[b, :last, part] @ q[b, i, part] / math.sqrt(d)).softmax(0)
                y[b, i, part] = p @ v[b, :last, part]
    return y @ ours.to_out.weight.T if vo else y


@pytest.mark.parametrize(("pattern", "n", "m"), CALLS)
@pytest.mark.parametrize(("qk", "vo"), VARIANTS)
@torch.no_grad()
def test_equals_the_definition(pattern, n, m, qk, vo):
    ours = build(pattern, qk=qk, vo=vo)
    x = tokens(n)
    c = tokens(m) if ours.pattern.cross else x
    found = ours(x, c) if ours.pattern.cross else ours(x)
    torch.testing.assert_close(found, oracle(ours, x, c))


@torch.no_grad()
def test_collapsed_is_the_product_of_query_and_key_matrix():
    whole = build("NC", heads=1, qk="separate", vo=True)
    one = build("NC", qk="collapsed", vo=True)
    one.to_q.weight.copy_(whole.to_k.weight.T @ whole.to_q.weight)
    one.to_v.load_state_dict(whole.to_v.state_dict())
    one.to_out.load_state_dict(whole.to_out.state_dict())
    x, c = tokens(5), tokens(8)
    torch.testing.assert_close(one(x, c), whole(x, c))


@pytest.mark.parametrize("qk", ["collapsed", "symmetric"])
@torch.no_grad()
def test_without_v_and_o_outputs_are_convex_combinations(qk):
    ours = build("NC", qk=qk)
    x, c = tokens(6), tokens(9)
    y = ours(x, c)
    assert (y <= c.amax(1, keepdim=True) + 1e-12).all()
    assert (y >= c.amin(1, keepdim=True) - 1e-12).all()
    constant = c[:, :1].expand(-1, 9, -1).contiguous()
    torch.testing.assert_close(ours(x, constant), constant[:, :6])


@torch.no_grad()
def test_identity_is_attention_of_the_tokens_themselves():
    x, c = tokens(6), tokens(9)
    expected = (x @ c.mT / 4.0).softmax(-1) @ c
    for hyper in ({"qk": "collapsed"}, {"qk": "symmetric", "heads": 1}):
        ours = build("NC", **hyper)
        ours.to_q.weight.copy_(torch.eye(16))
        torch.testing.assert_close(ours(x, c), expected)


@torch.no_grad()
def test_symmetric_queries_of_equal_norm_read_themselves_most():
    ours = build("NS", heads=1, qk="symmetric")
    ours.to_q.weight.copy_(torch.linalg.qr(ours.to_q.weight).Q)
    x = torch.nn.functional.normalize(tokens(6), dim=-1)
    s = ours.to_q(x) @ ours.to_q(x).mT
    torch.testing.assert_close(s, s.mT)
    assert torch.equal(s.argmax(-1), torch.arange(6).expand(2, -1))


@pytest.mark.parametrize(
    ("qk", "vo", "matrices"),
    [
        ("separate", True, 4),
        ("symmetric", True, 3),
        ("collapsed", True, 3),
        ("symmetric", False, 1),
        ("collapsed", False, 1),
    ],
)
def test_parameters_and_flops_by_hand(qk, vo, matrices):
    ours = build("NS", qk=qk, vo=vo)
    assert sum(p.numel() for p in ours.parameters()) == matrices * 256
    assert ours.flops(10, 10) == 4 * 100 * 16 + matrices * 2 * 10 * 256
    assert build("CS", qk=qk, vo=vo).flops(10, 10) == 4 * 55 * 16 + matrices * 2 * 10 * 256


def test_cross_flops_by_hand():
    core = 4 * 10 * 6 * 16
    assert build("NC").flops(10, 6) == core + 2 * 10 * 256
    assert build("NC", qk="symmetric").flops(10, 6) == core + 2 * 16 * 256
    assert build("NC", qk="separate", vo=True).flops(10, 6) == core + 2 * (20 + 12) * 256


def test_wrong_heads_and_variants_are_refused():
    with pytest.raises(UsageError, match="1 key heads for 2 query heads"):
        attnbench.build("minimal_attention", 16, 2, num_kv_heads=1, qk="symmetric")
    with pytest.raises(UsageError, match="qk='none'"):
        build(qk="none")


@pytest.mark.parametrize(("pattern", "qk"), [("NS", "symmetric"), ("CS", "collapsed"), ("NC", "collapsed")])
def test_triton_agrees(pattern, qk):
    ours = build(pattern, qk=qk).float()
    given = [torch.randn(1, length, 16, requires_grad=True) for length in (24, 33)]
    inputs = given if ours.pattern.cross else given[:1]
    results = []
    for backend in ("reference", "triton"):
        ours.backend = backend
        o = ours(*inputs)
        results.append((o, *torch.autograd.grad(o.square().sum(), [*inputs, *ours.parameters()])))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
