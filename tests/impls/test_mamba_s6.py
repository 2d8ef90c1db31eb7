"""mamba_s6 against its recurrence by loops, and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.mamba_s6 import MambaS6

BACKENDS = ("reference", "torch")
C = 6


def tokens(n: int, *, b: int = 2) -> Tensor:
    return torch.randn(b, n, C, dtype=torch.float64)


def module(backend: str = "torch", **hyper: object) -> MambaS6:
    hyper = {"state": 3, "dt_rank": 2, **hyper}
    return attnbench.build("mamba_s6", C, 2, pattern="CS", backend=backend, **hyper).double()


def inner(layer: MambaS6, x: Tensor) -> tuple[Tensor, Tensor]:
    """Input u of the scan and gate z, (B, N, E)."""
    width = layer.width
    both = x @ layer.in_proj.weight.T
    u0, conv = both[..., :width], layer.terms.conv
    u = conv.bias.expand_as(u0).clone()
    size = conv.weight.shape[-1]
    for lag in range(size):
        u[:, lag:] += conv.weight[:, 0, size - 1 - lag] * u0[:, : x.shape[1] - lag]
    return F.silu(u), both[..., width:]


def scanned(layer: MambaS6, u: Tensor) -> Tensor:
    """y (B, N, E) of the definition, one token after the other, before the gate."""
    terms = layer.terms
    rank, state, _ = terms.sizes
    projected = u @ terms.select.weight.T
    delta = F.softplus(projected[..., :rank] @ terms.step.weight.T + terms.step_bias)
    b, c = projected[..., rank : rank + state], projected[..., rank + state :]
    a = -terms.log_rate.exp()
    h = torch.zeros(u.shape[0], u.shape[2], state, dtype=u.dtype)
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta * u)[:, t, :, None] * b[:, t, None]
        outputs.append((h * c[:, t, None]).sum(-1) + terms.skip * u[:, t])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "hyper"), [(1, {}), (13, {}), (70, {"state": 5, "expand": 1, "conv_size": 2})])
def test_equals_the_recurrence(n: int, hyper: dict[str, object], backend: str) -> None:
    layer, x = module(backend, **hyper), tokens(n)
    torch.nn.init.normal_(layer.terms.skip)
    u, z = inner(layer, x)
    torch.testing.assert_close(layer(x), (scanned(layer, u) * F.silu(z)) @ layer.out_proj.weight.T)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("silent", ["writes", "steps"])
def test_without_writes_or_steps_only_the_skip_is_left(silent: str, backend: str) -> None:
    layer, x = module(backend), tokens(9)
    with torch.no_grad():
        if silent == "writes":
            layer.terms.select.weight[2:5] = 0.0
        else:
            layer.terms.step_bias.fill_(-torch.inf)
    u, z = inner(layer, x)
    torch.testing.assert_close(layer(x), (layer.terms.skip * u * F.silu(z)) @ layer.out_proj.weight.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_terms_are_a_convolution(backend: str) -> None:
    """With Δ, B and C that do not depend on the token, y is u under K[l] = Σ_n C_n Δ B_n e^{lΔA_n}."""
    layer, x = module(backend), tokens(9)
    terms = layer.terms
    with torch.no_grad():
        terms.conv.weight.zero_()
        terms.conv.weight[:, :, -1] = 1.0
        terms.conv.bias.zero_()
        layer.in_proj.weight[0] = 0.0
        terms.step.weight.zero_()
        terms.skip.zero_()
        # channel 0 is constant, silu(3); only it feeds B and C
        terms.conv.bias[0] = 3.0
        terms.select.weight[:, 1:] = 0.0
    u, z = inner(layer, x)
    b, c = (terms.select.weight[i : i + 3, 0] * u[0, 0, 0] for i in (2, 5))
    delta, a = F.softplus(terms.step_bias), -terms.log_rate.exp()
    y = torch.zeros_like(u)
    for lag in range(9):
        kernel = (c * b * delta.unsqueeze(-1) * torch.exp(lag * delta.unsqueeze(-1) * a)).sum(-1)
        y[:, lag:] += kernel * u[:, : 9 - lag]
    torch.testing.assert_close(layer(x), (y * F.silu(z)) @ layer.out_proj.weight.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padded_token_makes_no_step(backend: str) -> None:
    layer, x = module(backend, conv_size=1), tokens(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 3, 4]] = True
    kept = ~padded[0]
    torch.testing.assert_close(layer(x, key_padding_mask=padded)[:, kept], layer(x[:, kept]))


def test_initial_values() -> None:
    layer = attnbench.build("mamba_s6", 512, 1, pattern="CS")
    terms = layer.terms
    assert terms.sizes == (32, 16, 16)
    torch.testing.assert_close(terms.log_rate.exp(), torch.arange(1.0, 17).expand(1024, 16))
    assert (terms.skip == 1).all()
    assert terms.step.weight.abs().max() <= 32**-0.5
    step = F.softplus(terms.step_bias)
    assert 0.9e-3 < step.min() < 2e-3 < 0.05 < step.max() < 0.101


def test_a_context_is_refused() -> None:
    with pytest.raises(UsageError, match="observed a context"):
        module()(tokens(4), tokens(4))


def test_flops() -> None:
    layer = module()
    with FlopCounterMode(display=False) as counter:
        layer(tokens(20, b=1))
    assert counter.get_total_flops() == layer.counted_flops(20, 20)
    assert layer.flops(20, 20) == layer.counted_flops(20, 20) + 9 * 20 * 12 * 3


def test_triton_agrees_with_fp64() -> None:
    layer, fast = module("reference"), module("triton").float()
    fast.load_state_dict(layer.state_dict())
    x = tokens(37, b=1).requires_grad_()
    single = x.detach().float().requires_grad_()
    exact, y = layer(x), fast(single)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-5)
    exact.square().sum().backward()
    y.square().sum().backward()
    pairs = [(single, x), *zip(fast.parameters(), layer.parameters(), strict=True)]
    for got, want in pairs:
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-3, atol=1e-4)
