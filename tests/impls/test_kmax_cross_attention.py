"""kmax_cross_attention against loops over its assignment, and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.impls.cross._unread import with_zero_gradient

ID = "kmax_cross_attention"
BACKENDS = ("reference", "torch")


def heads(n: int, d: int = 8) -> Tensor:
    return torch.randn(2, 2, n, d, dtype=torch.float64)


def run(q: Tensor, k: Tensor, v: Tensor, backend: str, pattern: str = "NC", **options: object) -> Tensor:
    return attnbench.attention(q, k, v, ID, pattern, backend, **options)


def direct(q: Tensor, k: Tensor, v: Tensor, *, mean: bool = False) -> Tensor:
    """Every key goes to the first of its best queries."""
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    count = torch.zeros(q.shape[:3], dtype=torch.float64)
    for b, h, j in ((b, h, j) for b in range(2) for h in range(2) for j in range(k.shape[2])):
        scores = [float(row @ k[b, h, j]) for row in q[b, h]]
        best = scores.index(max(scores))
        o[b, h, best] += v[b, h, j]
        count[b, h, best] += 1
    return o / count.clamp_min(1).unsqueeze(-1) if mean else o


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pattern", "n", "m"), [("NS", 9, 9), ("NC", 4, 21), ("NC", 21, 4)])
def test_equals_the_assignment(pattern: str, n: int, m: int, backend: str, mean: bool) -> None:
    q, k, v = heads(n), heads(m), heads(m, 5)
    torch.testing.assert_close(run(q, k, v, backend, pattern, mean=mean), direct(q, k, v, mean=mean))


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_cases(backend: str) -> None:
    q, k, v = heads(4), heads(21), heads(21)
    o = run(q, k, v, backend)
    torch.testing.assert_close(o.sum(2), v.sum(2))  # mass is conserved
    torch.testing.assert_close(run(q[:, :, :1], k, v, backend), v.sum(2, keepdim=True))
    torch.testing.assert_close(run(3.7 * q, k, v, backend), o)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(run(q[:, :, order], k, v, backend), o[:, :, order])
    constant = torch.randn(2, 2, 1, 8, dtype=torch.float64)  # the same for all queries of a key
    torch.testing.assert_close(run(q + constant, k, v, backend), o)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_to_the_first_query(backend: str) -> None:
    q, k, v = heads(4), heads(6), heads(6)
    o = run(q[:, :, :1].expand(-1, -1, 4, -1), k, v, backend)
    torch.testing.assert_close(o[:, :, 0], v.sum(2))
    assert (o[:, :, 1:] == 0).all()


def test_it_is_the_limit_of_a_softmax_over_queries() -> None:
    q, k, v = heads(4), heads(21), heads(21)
    soft = (q @ k.transpose(-1, -2) / 1e-6).softmax(-2) @ v
    torch.testing.assert_close(run(q, k, v, "reference"), soft)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_keys_are_not_assigned_and_padded_tokens_do_not_compete(backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 4, 5]] = True
    kept = ~padded[0]
    cross = run(q, k, v, backend, "NC", key_padding_mask=padded)
    torch.testing.assert_close(cross, direct(q, k[:, :, kept], v[:, :, kept]))
    alone = run(q, k, v, backend, "NS", key_padding_mask=padded)
    torch.testing.assert_close(alone[:, :, kept], direct(q[:, :, kept], k[:, :, kept], v[:, :, kept]))
    assert (alone[:, :, padded[0]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_values_have_a_gradient(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in (heads(4), heads(21), heads(21)))
    upstream = heads(4)
    d_q, d_k, d_v = torch.autograd.grad(run(q, k, v, backend), (q, k, v), upstream)
    assert (d_q == 0).all()
    assert (d_k == 0).all()
    owners = (q @ k.transpose(-1, -2)).argmax(-2)
    torch.testing.assert_close(d_v, upstream.gather(2, owners.unsqueeze(-1).expand(-1, -1, -1, 8)))


def test_unread_tensors_get_zeros_and_only_where_asked() -> None:
    o, read, fixed = (torch.randn(3, dtype=torch.float64) for _ in range(3))
    o.requires_grad_()
    read.requires_grad_()
    same = with_zero_gradient(2 * o, read, fixed)
    same.sum().backward()
    assert torch.equal(same, 2 * o)
    assert torch.equal(o.grad, torch.full_like(o, 2.0))
    assert torch.equal(read.grad, torch.zeros_like(read))
    assert fixed.grad is None


def test_costs_by_hand() -> None:
    """C = 16: 4 × 21 scores of 16 products in two heads, 21 values of 16 channels."""
    module = attnbench.build(ID, 16, 2, pattern="NC")
    assert module.flops(4, 21) == 2 * 4 * 21 * 16 + 21 * 16
    assert module.counted_flops(4, 21) == 2 * 2 * 4 * 21 * 16
    assert module.extra_bytes(4, 21, 2) == 4 * 2 * 21


@pytest.mark.parametrize("pattern", ["NS", "NC"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    n, m = (20, 20) if pattern == "NS" else (5, 20)
    q, k, v = heads(n)[:1], heads(m)[:1], heads(m)[:1]
    padded = torch.arange(m).unsqueeze(0) >= m - 3
    expected = run(q, k, v.requires_grad_(), "reference", pattern, key_padding_mask=padded)
    values = v.detach().float().requires_grad_()
    got = run(q.float(), k.float(), values, "triton", pattern, key_padding_mask=padded)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), v)[0]
    actual = torch.autograd.grad(got.square().sum(), values)[0]
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)
