"""retention against its dense form, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.retention import Retention, rotated, rotation

BACKENDS = ("reference", "torch")


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def module(backend: str = "torch", d: int = 8, **hyper: object) -> Retention:
    return attnbench.build("retention", 2 * d, 2, pattern="CS", backend=backend, **hyper).double()


def turned(u: Tensor, offset: int = 0) -> Tensor:
    """Rotation of the pairs as complex numbers."""
    d = u.shape[-1]
    pairs = torch.view_as_complex(u.unflatten(-1, (-1, 2)).contiguous())
    theta = torch.tensor([10000.0 ** (-p / max(d // 2 - 1, 1)) for p in range(d // 2)], dtype=torch.float64)
    angle = (torch.arange(u.shape[2], dtype=torch.float64) + offset).unsqueeze(-1) * theta
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def scores(q: Tensor, k: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
    """(q̂ k̂ᵀ) and the decays γ^(i−j), 0 above the diagonal."""
    n = q.shape[2]
    gamma = torch.tensor([1 - 2**-5, 1 - 2**-6], dtype=torch.float64).view(2, 1, 1)
    distance = torch.arange(n).unsqueeze(-1) - torch.arange(n)
    decay = (gamma ** distance.clamp_min(0)).tril()
    return turned(q, offset) @ turned(k, offset).mT / math.sqrt(q.shape[-1]), decay


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0, 7])
@pytest.mark.parametrize("d", [2, 8])
def test_equals_the_dense_form_at_any_offset_of_the_positions(d: int, offset: int, backend: str) -> None:
    q, k, v = heads(21, d), heads(21, d), heads(21, 6)
    products, decay = scores(q, k, offset)
    torch.testing.assert_close(module(backend, d).attend(q, k, v), (products * decay) @ v)


def test_chunks_do_not_matter() -> None:
    q, k, v = heads(150, b=1), heads(150, b=1), heads(150, b=1)
    products, decay = scores(q, k)
    torch.testing.assert_close(module().attend(q, k, v), (products * decay) @ v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_row_norm_scales_rows_as_the_parallel_form_does(masked: bool, backend: str) -> None:
    q, k, v = 3 * heads(11), heads(11), heads(11)
    padded = torch.zeros(2, 11, dtype=torch.bool)
    products, decay = scores(q, k)
    if masked:
        padded[:, 9:] = True
        decay = decay.masked_fill(padded[:, None, None], 0.0)
    weights = products * decay / decay.sum(-1, keepdim=True).sqrt()
    weights = weights / weights.sum(-1, keepdim=True).abs().clamp_min(1.0)
    mask = padded if masked else None
    o = module(backend, row_norm=True).attend(q, k, v, key_padding_mask=mask)
    torch.testing.assert_close(o[:, :, :9], (weights @ v)[:, :, :9])
    assert (weights.sum(-1).abs() > 0.999).any()  # some rows are divided by their sum


def test_the_norm_of_the_layer_removes_the_row_norm() -> None:
    plain, scaled = module("reference"), module("reference", row_norm=True)
    scaled.load_state_dict(plain.state_dict())
    x = 100 * torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(scaled(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [1, 2])
def test_layer_has_wide_values_a_norm_per_head_and_a_gate(factor: int) -> None:
    layer, x = module("reference", value_factor=factor), torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = (layer.split(p(x), 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert v.shape[-1] == 8 * factor
    products, decay = scores(q, k)
    o = (products * decay) @ v
    o = layer.join(o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(layer(x), (F.silu(layer.gate(x)) * o) @ layer.out_proj.weight.T)


def test_positions_keep_their_digits_in_half_precision() -> None:
    cos, sin = rotation(4096, 8, torch.device("cpu"), torch.float32)
    angle = 4095.0
    assert abs(cos[-1, 0].item() - math.cos(angle)) < 1e-6
    u = torch.randn(1, 1, 4096, 8, dtype=torch.bfloat16)
    assert rotated(u, cos, sin).dtype is torch.bfloat16


def test_an_odd_head_dim_is_refused() -> None:
    with pytest.raises(UsageError, match="observed head dim 7, expected an even one"):
        module(d=7)


def test_flops() -> None:
    assert module().flops(100, 100) == 2 * 128 * (4 * 64 * 8 + 4 * 8 * 8)
    # q, k: 16 → 16; v, gate: 16 → 32; output 32 → 16; values of 16 a head, one chunk of 10
    projections = 2 * 10 * (2 * 16 * 16 + 3 * 16 * 32)
    assert module().layer_flops(10, 10) == projections + 2 * 10 * (2 * 10 * (8 + 16) + 4 * 8 * 16)


def test_triton_agrees_with_fp64() -> None:
    q, k, v = (heads(40, b=1).requires_grad_() for _ in range(3))
    exact = module("reference").attend(q, k, v)
    single = [x.detach().float().requires_grad_() for x in (q, k, v)]
    o = module("triton").attend(*single)
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-4)
    exact.square().sum().backward()
    o.square().sum().backward()
    for x, y in zip(single, (q, k, v), strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-2)
