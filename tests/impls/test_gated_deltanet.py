"""gated_deltanet against its recurrence, its exact special cases and DeltaNet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.impls.linear.gated_deltanet import GatedDeltaNet

BACKENDS = ("reference", "torch")
PATTERNS = ("CS", "NC", "CC")


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def rates(n: int, *, b: int = 2, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """β and g (B, H, n)."""
    beta = torch.rand(b, 2, n, dtype=torch.float64)
    return beta, strength * F.logsigmoid(torch.randn(b, 2, n, dtype=torch.float64))


def module(pattern: str = "CS", backend: str = "torch", **hyper: object) -> GatedDeltaNet:
    return attnbench.build("gated_deltanet", 16, 2, pattern=pattern, backend=backend, **hyper).double()


def unit(u: Tensor) -> Tensor:
    return u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def direct(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, pattern: str) -> Tensor:
    """S_t = α_t (I − β_t k̂_t k̂_tᵀ) S_{t−1} + β_t k̂_t v_tᵀ with an explicit transition matrix."""
    q, k = unit(q) / q.shape[-1] ** 0.5, unit(k)
    d = k.shape[-1]
    state = torch.zeros(*k.shape[:2], d, v.shape[-1], dtype=torch.float64)
    rows = []
    for t in range(k.shape[2]):
        key, strength = k[:, :, t].unsqueeze(-1), beta[:, :, t, None, None]
        transition = g[:, :, t, None, None].exp() * (torch.eye(d) - strength * key @ key.mT)
        state = transition @ state + strength * key @ v[:, :, t].unsqueeze(-2)
        rows.append(q[:, :, t : t + 1] @ state if pattern == "CS" else None)
    return torch.cat(rows, 2) if pattern == "CS" else q @ state


def sizes(pattern: str) -> tuple[int, int]:
    return (21, 21) if pattern == "CS" else (5, 21)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("strength", [0.1, 20.0])
def test_equals_the_recurrence(pattern: str, strength: float, backend: str) -> None:
    n, m = sizes(pattern)
    q, k, v, (beta, g) = heads(n), heads(m), heads(m, 6), rates(m, strength=strength)
    o = module(pattern, backend).attend(q, k, v, beta=beta, g=g)
    torch.testing.assert_close(o, direct(q, k, v, beta, g, pattern))


def test_chunks_do_not_matter() -> None:
    q, k, v, (beta, g) = heads(150, b=1), heads(150, b=1), heads(150, b=1), rates(150, b=1, strength=0.1)
    torch.testing.assert_close(module().attend(q, k, v, beta=beta, g=g), direct(q, k, v, beta, g, "CS"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_open_gates_are_deltanet_and_shut_ones_leave_the_own_token(backend: str) -> None:
    q, k, v, (beta, g) = heads(21), heads(21), heads(21), rates(21)
    layer = module(backend=backend)
    plain = attnbench.attention(q, k, v, "deltanet", "CS", backend, beta=beta)
    torch.testing.assert_close(layer.attend(q, k, v, beta=beta, g=torch.zeros_like(g)), plain)
    torch.testing.assert_close(layer.attend(q, k, v, beta=beta), plain)
    shut = layer.attend(q, k, v, beta=beta, g=torch.full_like(g, -torch.inf))
    own = (unit(q) * unit(k)).sum(-1, keepdim=True) * beta.unsqueeze(-1) / 8**0.5
    torch.testing.assert_close(shut, own * v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_writes_the_memory_only_decays(backend: str) -> None:
    k, v, (beta, g) = heads(9), heads(9), rates(9)
    beta[:, :, 4:] = 0.0
    probe = heads(1).expand(-1, -1, 9, -1)
    o = module(backend=backend).attend(probe, k, v, beta=beta, g=g)
    decays = g[:, :, 4:].cumsum(-1).exp().unsqueeze(-1)
    torch.testing.assert_close(o[:, :, 4:], decays * o[:, :, 3:4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_anywhere_equals_dropping_the_tokens(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    q, k, v, (beta, g) = heads(n), heads(m), heads(m), rates(m)
    padded = torch.zeros(2, m, dtype=torch.bool)
    padded[:, [0, 3, 4, m - 1]] = True
    kept = ~padded[0]
    rows = kept if n == m else slice(None)
    o = module(pattern, backend).attend(q, k, v, beta=beta, g=g, key_padding_mask=padded)
    short = [x[:, :, kept] for x in (k, v, beta, g)]
    torch.testing.assert_close(o[:, :, rows], direct(q[:, :, rows], *short, pattern))


def test_layer_gates_the_memory_and_the_output() -> None:
    layer, x = module(backend="reference"), torch.randn(2, 7, 16, dtype=torch.float64)
    parts = []
    for name in ("q", "k", "v"):
        y = (x @ getattr(layer, f"{name}_proj").weight.T).mT
        conv = getattr(layer, f"{name}_conv").weight
        y = F.conv1d(F.pad(y, (3, 0)), conv, groups=conv.shape[0])
        parts.append(layer.split(F.silu(y.mT), 2))
    assert parts[2].shape[-1] == 16
    beta = torch.sigmoid(x @ layer.beta_proj.weight.T).mT
    steps = torch.log1p(torch.exp(x @ layer.step_proj.weight.T + layer.step_bias))
    g = -(layer.log_rate.exp() * steps).mT
    o = direct(*parts, beta, g, "CS")
    o = layer.join(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(layer(x), (o * F.silu(layer.gate(x))) @ layer.out_proj.weight.T)


def test_initial_rates_and_step_sizes() -> None:
    layer = attnbench.build("gated_deltanet", 512, 512, pattern="CS")
    rate, step = layer.log_rate.exp(), F.softplus(layer.step_bias)
    assert 0 < rate.min() < 1 < 15 < rate.max() <= 16
    assert 0.9e-3 < step.min() < 2e-3 < 0.05 < step.max() < 0.101
    assert abs(step.log().median().exp() - 0.01) < 3e-3  # log-uniform


def test_flops_of_the_layer_equal_the_counter() -> None:
    layer = module()
    assert layer.flops(100, 100) == 2 * 128 * (2 * 64 * 8 * 3 + 64 * 16 + 6 * 64)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 64, 16).double())
    scans = 2 * 64 * 64 * (8 + 16)  # the triangular solve, which the counter does not see
    assert abs(counter.get_total_flops() / (layer.layer_flops(64, 64) - scans) - 1) < 1e-2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_triton_agrees_with_fp64(pattern: str) -> None:
    n, m = (40, 40) if pattern == "CS" else (9, 40)
    inputs = [x.requires_grad_() for x in (heads(n, b=1), heads(m, b=1), heads(m, b=1), *rates(m, b=1))]
    single = [x.detach().float().requires_grad_() for x in inputs]
    exact = module(pattern, "reference").attend(*inputs[:3], beta=inputs[3], g=inputs[4])
    o = module(pattern, "triton").attend(*single[:3], beta=single[3], g=single[4])
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-5)
    exact.square().sum().backward()
    o.square().sum().backward()
    for x, y in zip(single, inputs, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-4)
