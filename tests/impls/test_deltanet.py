"""deltanet against its recurrence, and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.deltanet import DeltaNet

BACKENDS = ("reference", "torch")
PATTERNS = ("CS", "NC", "CC")


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def strengths(n: int, *, b: int = 2) -> Tensor:
    return torch.rand(b, 2, n, dtype=torch.float64)


def module(pattern: str = "CS", backend: str = "torch", **hyper: object) -> DeltaNet:
    return attnbench.build("deltanet", 16, 2, pattern=pattern, backend=backend, **hyper).double()


def unit(u: Tensor) -> Tensor:
    return u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def states(k: Tensor, v: Tensor, beta: Tensor) -> list[Tensor]:
    """S_1 … S_M by the definition."""
    k = unit(k)
    state = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=torch.float64)
    found = []
    for t in range(k.shape[2]):
        key = k[:, :, t].unsqueeze(-1)
        error = v[:, :, t].unsqueeze(-2) - key.mT @ state
        state = state + beta[:, :, t, None, None] * key @ error
        found.append(state)
    return found


def direct(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, pattern: str) -> Tensor:
    found, q = states(k, v, beta), unit(q) / q.shape[-1] ** 0.5
    if pattern != "CS":
        return q @ found[-1]
    return torch.cat([q[:, :, t : t + 1] @ s for t, s in enumerate(found)], 2)


def sizes(pattern: str) -> tuple[int, int]:
    return (21, 21) if pattern == "CS" else (5, 21)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_recurrence(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    q, k, v, beta = heads(n), heads(m), heads(m, 6), strengths(m)
    o = module(pattern, backend).attend(q, k, v, beta=beta)
    torch.testing.assert_close(o, direct(q, k, v, beta, pattern))


def test_chunks_do_not_matter() -> None:
    q, k, v, beta = heads(150, b=1), heads(150, b=1), heads(150, b=1), strengths(150, b=1)
    torch.testing.assert_close(module().attend(q, k, v, beta=beta), direct(q, k, v, beta, "CS"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_just_written_is_read_back_and_a_second_write_changes_nothing(backend: str) -> None:
    k, v = heads(6), heads(6)
    layer = module(backend=backend)
    o = layer.attend(k, k, v)  # β = 1
    torch.testing.assert_close(o * 8**0.5, v, rtol=1e-4, atol=1e-4)
    again = [torch.cat((x, x[:, :, -1:]), 2) for x in (k, v)]
    probe = heads(7)
    twice = layer.attend(probe, *again)[:, :, -1]
    once = direct(probe[:, :, 6:], k, v, torch.ones(2, 2, 6), "NC")[:, :, 0]
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_orthonormal_keys_give_causal_linear_attention(backend: str) -> None:
    keys = torch.linalg.qr(heads(8))[0]
    q, v = heads(8), heads(8)
    o = module(backend=backend).attend(q, keys, v)
    expected = (unit(q) @ keys.mT).tril() @ v / 8**0.5
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dimension_is_a_moving_average_and_no_write_leaves_nothing(backend: str) -> None:
    layer = attnbench.build("deltanet", 2, 2, pattern="CS", backend=backend).double()
    ones, v = torch.full((2, 2, 9, 1), 1e4, dtype=torch.float64), heads(9, 1)
    beta = torch.full((2, 2, 9), 0.3, dtype=torch.float64)
    average, expected = torch.zeros(2, 2, 1, dtype=torch.float64), []
    for t in range(9):
        average = 0.7 * average + 0.3 * v[:, :, t]
        expected.append(average)
    torch.testing.assert_close(layer.attend(ones, ones, v, beta=beta), torch.stack(expected, 2))
    assert not layer.attend(ones, ones, v, beta=torch.zeros_like(beta)).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_anywhere_equals_dropping_the_tokens(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    q, k, v, beta = heads(n), heads(m), heads(m), strengths(m)
    padded = torch.zeros(2, m, dtype=torch.bool)
    padded[:, [0, 3, 4, m - 1]] = True
    kept = ~padded[0]
    rows = kept if n == m else slice(None)
    for given in (beta, None):
        options = {} if given is None else {"beta": given}
        o = module(pattern, backend).attend(q, k, v, key_padding_mask=padded, **options)
        short = (torch.ones_like(beta) if given is None else given)[:, :, kept]
        expected = direct(q[:, :, rows], k[:, :, kept], v[:, :, kept], short, pattern)
        torch.testing.assert_close(o[:, :, rows], expected)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution of x (B, N, E) by a loop over the taps, the last one on the token."""
    size = weight.shape[-1]
    y = torch.zeros_like(x)
    for lag in range(size):
        y[:, lag:] += weight[:, 0, size - 1 - lag] * x[:, : x.shape[1] - lag]
    return y


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"use_gate": True, "expand_v": 2.0, "negative_eigenvalues": True, "qk_activation": "relu"},
        {"conv_size": 0, "use_beta": False, "qk_activation": "identity", "expand_k": 0.5},
    ],
)
def test_layer(pattern: str, hyper: dict[str, object]) -> None:
    layer = module(pattern, "reference", **hyper)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    context = torch.randn(2, 9, 16, dtype=torch.float64) if pattern != "CS" else None
    source = x if context is None else context
    activation = {"relu": F.relu, "identity": lambda u: u}.get(layer.hp.qk_activation, F.silu)
    parts = []
    for name, tokens, act in (("q", x, activation), ("k", source, activation), ("v", source, F.silu)):
        y = tokens @ getattr(layer, f"{name}_proj").weight.T
        if layer.hp.conv_size:
            y = convolved(y, getattr(layer, f"{name}_conv").weight)
        parts.append(layer.split(act(y), 2))
    beta = torch.ones(2, 2, source.shape[1], dtype=torch.float64)
    if layer.hp.use_beta:
        beta = torch.sigmoid(source @ layer.beta_proj.weight.T).mT
        beta = 2 * beta if layer.hp.negative_eigenvalues else beta
    o = direct(*parts, beta, pattern)
    o = layer.join(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    if layer.hp.use_gate:
        o = o * F.silu(x @ layer.gate.weight.T)
    torch.testing.assert_close(layer(x, context), o @ layer.out_proj.weight.T)


def test_widths_that_are_not_whole_are_refused() -> None:
    with pytest.raises(UsageError, match=r"observed head dims 2\.4 of keys"):
        module(expand_k=0.3)


def test_flops() -> None:
    # 2 heads, two chunks of 64: k kᵀ, q kᵀ, values, the solve, and three products with the state
    step = 2 * 64 * 8 * 3 + 64 * 16 + 6 * 64
    assert module().flops(100, 100) == 2 * 128 * step
    # NC: k kᵀ, the solve and two products with the state per key, one per query
    assert module("NC").flops(5, 100) == 2 * (128 * (2 * 64 * 8 + 64 * 16 + 4 * 64) + 5 * 2 * 64)
    layer = module("NC", use_gate=True)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 64, 16).double(), torch.randn(1, 128, 16).double())
    rest = layer.layer_flops(64, 128) - layer.flops(64, 128)
    assert counter.get_total_flops() == rest + layer.counted_flops(64, 128)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_triton_agrees_with_fp64(pattern: str) -> None:
    n, m = (40, 40) if pattern == "CS" else (9, 40)
    inputs = [heads(n, b=1), heads(m, b=1), heads(m, b=1), strengths(m, b=1)]
    inputs = [x.requires_grad_() for x in inputs]
    single = [x.detach().float().requires_grad_() for x in inputs]
    exact = module(pattern, "reference").attend(*inputs[:3], beta=inputs[3])
    o = module(pattern, "triton").attend(*single[:3], beta=single[3])
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-5)
    exact.square().sum().backward()
    o.square().sum().backward()
    for x, y in zip(single, inputs, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-4)
