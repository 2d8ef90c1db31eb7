"""gla against its recurrence, and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.gla import GLA

BACKENDS = ("reference", "torch")


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def gates(n: int, d: int = 8, *, b: int = 2, strength: float = 1.0) -> Tensor:
    return strength * F.logsigmoid(heads(n, d, b=b))


def module(backend: str = "torch", **hyper: object) -> GLA:
    return attnbench.build("gla", 16, 2, pattern="CS", backend=backend, **hyper).double()


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=torch.float64)
    outputs = []
    for t in range(q.shape[2]):
        state = g[:, :, t].exp().unsqueeze(-1) * state
        state = state + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        outputs.append((q[:, :, t].unsqueeze(-2) @ state).squeeze(-2) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "strength"), [(1, 1.0), (21, 1.0), (150, 0.05), (70, 30.0)])
def test_equals_the_recurrence(n: int, strength: float, backend: str) -> None:
    q, k, v, g = heads(n), heads(n), heads(n, 6), gates(n, strength=strength)
    torch.testing.assert_close(module(backend).attend(q, k, v, g=g), recurrence(q, k, v, g))


@pytest.mark.parametrize("backend", BACKENDS)
def test_open_gates_give_causal_linear_attention(backend: str) -> None:
    q, k, v = heads(21), heads(21), heads(21)
    expected = (q @ k.mT).tril() @ v / 8**0.5
    layer = module(backend)
    torch.testing.assert_close(layer.attend(q, k, v, g=torch.zeros_like(k)), expected)
    torch.testing.assert_close(layer.attend(q, k, v), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shut_gates_leave_the_own_token(backend: str) -> None:
    q, k, v = heads(21), heads(21), heads(21)
    o = module(backend).attend(q, k, v, g=torch.full_like(k, -torch.inf))
    torch.testing.assert_close(o, (q * k).sum(-1, keepdim=True) * v / 8**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_gates_are_a_scalar_gate(backend: str) -> None:
    q, k, v, g = heads(21), heads(21), heads(21), gates(21, 1)
    steps = g.squeeze(-1).cumsum(-1)
    decay = (steps.unsqueeze(-1) - steps.unsqueeze(-2)).tril().exp().tril()
    o = module(backend).attend(q, k, v, g=g.expand(-1, -1, -1, 8))
    torch.testing.assert_close(o, (q @ k.mT * decay) @ v / 8**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_anywhere_equals_dropping_the_tokens(backend: str) -> None:
    q, k, v, g = heads(9), heads(9), heads(9), gates(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 3, 4]] = True
    kept = ~padded[0]
    layer = module(backend)
    o = layer.attend(q, k, v, g=g, key_padding_mask=padded)[:, :, kept]
    torch.testing.assert_close(o, layer.attend(*(x[:, :, kept] for x in (q, k, v)), g=g[:, :, kept]))


def test_feature_map_is_applied_to_queries_and_keys() -> None:
    q, k, v, g = heads(9), heads(9), heads(9), gates(9)
    o = module("reference", feature_map="relu").attend(q, k, v, g=g)
    torch.testing.assert_close(o, recurrence(q.relu(), k.relu(), v, g))


@pytest.mark.parametrize("hyper", [{}, {"clamp_min": -0.02, "expand_k": 1.0, "expand_v": 2.0}])
def test_layer(hyper: dict[str, float]) -> None:
    layer, x = module("reference", **hyper), torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = (layer.split(p(x), 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    dk, dv = (8, 16) if hyper else (4, 8)
    assert (q.shape[-1], v.shape[-1]) == (dk, dv)
    logits = x @ layer.decay[0].weight.T @ layer.decay[1].weight.T + layer.decay[1].bias
    g = layer.split(torch.sigmoid(logits).log() / 16, 2)
    if hyper:
        assert (g < -0.02).any()
        g = g.clamp_min(-0.02)
    o = recurrence(q, k, v, g)
    o = layer.join(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(layer(x), (o * F.silu(layer.gate(x))) @ layer.out_proj.weight.T)


def test_widths_that_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"observed head dims 2\.4 of keys"):
        module(expand_k=0.3)


def test_flops() -> None:
    # chunks of 64 in 4 sub-blocks of 16: 10 of 16 blocks of scores, 80 keys a query counted once
    assert module().flops(100, 100) == 2 * 128 * (80 * 8 + 2 * 64 * 8 + 4 * 8 * 8)
    projections = 2 * 10 * (16 * (8 + 8 + 16 + 16 + 16 + 16) + 16 * 8)
    assert module().layer_flops(10, 10) == projections + 2 * 10 * (20 * 4 + 2 * 10 * 8 + 4 * 4 * 8)


def test_triton_agrees_with_fp64() -> None:
    inputs = [x.requires_grad_() for x in (heads(40, b=1), heads(40, b=1), heads(40, b=1), gates(40, b=1))]
    single = [x.detach().float().requires_grad_() for x in inputs]
    exact = module("reference").attend(*inputs[:3], g=inputs[3])
    o = module("triton").attend(*single[:3], g=single[3])
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-4)
    exact.square().sum().backward()
    o.square().sum().backward()
    for x, y in zip(single, inputs, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-3)
