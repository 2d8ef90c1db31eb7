"""mamba2_ssd against its dense form, and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.mamba2_ssd import Mamba2SSD

BACKENDS = ("reference", "torch")


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def steps(n: int, *, b: int = 2, h: int = 2) -> Tensor:
    return 0.1 * torch.randn(b, h, n, dtype=torch.float64).exp()


def module(backend: str = "torch", h: int = 2, **hyper: object) -> Mamba2SSD:
    hyper = {"state": 6, **hyper}
    layer = attnbench.build("mamba2_ssd", 8 * h, h, pattern="CS", backend=backend, **hyper).double()
    torch.nn.init.normal_(layer.skip)
    return layer


def dense(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, layer: Mamba2SSD) -> Tensor:
    """The definition, one pair after the other."""
    a = -layer.log_rate.exp()
    o = layer.skip.view(-1, 1, 1) * v
    repeats = v.shape[1] // q.shape[1]
    for h in range(v.shape[1]):
        queries, keys = q[:, h // repeats], k[:, h // repeats]
        for i in range(v.shape[2]):
            for j in range(i + 1):
                decay = torch.exp(a[h] * dt[:, h, j + 1 : i + 1].sum(-1))
                weight = decay * dt[:, h, j] * (queries[:, i] * keys[:, j]).sum(-1)
                o[:, h, i] = o[:, h, i] + weight.unsqueeze(-1) * v[:, h, j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_the_dense_form_with_shared_queries_and_keys(groups: int, backend: str) -> None:
    layer = module(backend, 4)
    q, k, v, dt = heads(13, h=groups), heads(13, h=groups), heads(13, 5, h=4), steps(13, h=4)
    o = layer.attend(q, k, v, dt=dt)
    torch.testing.assert_close(o, dense(q, k, v, dt, layer))
    repeated = [x.repeat_interleave(4 // groups, 1) for x in (q, k)]
    torch.testing.assert_close(layer.attend(*repeated, v, dt=dt), o)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_decay_it_is_causal_linear_attention_and_with_equal_steps_lightning_attention(
    backend: str,
) -> None:
    layer = module(backend)
    q, k, v, dt = heads(21), heads(21), heads(21), steps(21)
    skip = layer.skip.view(-1, 1, 1) * v
    torch.nn.init.constant_(layer.log_rate, -torch.inf)
    expected = (q @ k.mT).tril() @ (dt.unsqueeze(-1) * v)
    torch.testing.assert_close(layer.attend(q, k, v, dt=dt) - skip, expected)
    slopes = torch.tensor([(1 + 1e-5) * 2**-4, (1 + 1e-5) * 2**-8], dtype=torch.float64)
    with torch.no_grad():
        layer.log_rate.copy_((slopes / 0.5).log())
    o = layer.attend(q, k, v, dt=torch.full_like(dt, 0.5)) - skip
    torch.testing.assert_close(o, attnbench.attention(q, k, 0.5 * v, "lightning_attention", "CS", backend))


def test_chunks_do_not_matter() -> None:
    q, k, v, dt = heads(150, b=1), heads(150, b=1), heads(150, b=1), steps(150, b=1)
    layer, whole = module("torch"), module("reference")
    whole.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.attend(q, k, v, dt=dt), whole.attend(q, k, v, dt=dt))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_anywhere_equals_dropping_the_tokens(backend: str) -> None:
    q, k, v, dt = heads(9), heads(9), heads(9), steps(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 3, 4]] = True
    kept = ~padded[0]
    layer = module(backend)
    o = layer.attend(q, k, v, dt=dt, key_padding_mask=padded)[:, :, kept]
    torch.testing.assert_close(o, layer.attend(*(x[:, :, kept] for x in (q, k, v)), dt=dt[:, :, kept]))


@pytest.mark.parametrize("hyper", [{}, {"groups": 2, "expand": 1, "conv_size": 2, "dt_limit": (0.02, 0.05)}])
def test_layer(hyper: dict[str, object]) -> None:
    layer, x = module("reference", **hyper), torch.randn(2, 7, 16, dtype=torch.float64)
    hp = layer.hp
    width, states = 16 * hp.expand, 6 * hp.groups
    y = x @ layer.in_proj.weight.T
    assert y.shape[-1] == 2 * width + 2 * states + 2
    z, mixed, raw = y[..., :width], y[..., width:-2], y[..., -2:]
    rows = F.pad(mixed.mT, (hp.conv_size - 1, 0))
    mixed = F.silu(F.conv1d(rows, layer.conv.weight, layer.conv.bias, groups=mixed.shape[-1]).mT)
    v, k, q = mixed[..., :width], mixed[..., width : width + states], mixed[..., width + states :]
    dt = torch.log1p(torch.exp(raw + layer.step_bias)).mT
    if hyper:
        dt = dt.clamp(0.02, 0.05)
    o = dense(layer.split(q, hp.groups), layer.split(k, hp.groups), layer.split(v, 2), dt, layer)
    gated = (layer.join(o) * F.silu(z)).unflatten(-1, (hp.groups, -1))
    normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = (normed.flatten(-2) * layer.norm_weight) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_groups_must_divide_the_heads() -> None:
    with pytest.raises(UsageError, match="observed groups=3, expected a divisor of 2 heads"):
        module(groups=3)


@pytest.mark.parametrize("groups", [1, 2])
def test_flops(groups: int) -> None:
    layer = module(groups=groups)
    assert layer.flops(100, 100) == 2 * 128 * (4 * 64 * 8 + 4 * 64)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 64, 16).double())
    shared = (2 - groups) * 2 * 64 * 64 * 6  # eager weighs the keys by Δ, so that no scores are shared
    assert counter.get_total_flops() == layer.layer_flops(64, 64) + shared


def test_triton_agrees_with_fp64() -> None:
    inputs = [heads(40, b=1, h=1), heads(40, b=1, h=1), heads(40, b=1), steps(40, b=1)]
    inputs = [x.requires_grad_() for x in inputs]
    single = [x.detach().float().requires_grad_() for x in inputs]
    layer, fast = module("reference"), module("triton").float()
    fast.load_state_dict(layer.state_dict())
    exact = layer.attend(*inputs[:3], dt=inputs[3])
    o = fast.attend(*single[:3], dt=single[3])
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-4)
    exact.square().sum().backward()
    o.square().sum().backward()
    pairs = [*zip(single, inputs, strict=True), (fast.log_rate, layer.log_rate), (fast.skip, layer.skip)]
    for x, y in pairs:
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-3)
