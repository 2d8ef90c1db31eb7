"""lightning_attention against its dense form, its slopes and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.lightning_attention import LightningAttention, alibi_slopes

BACKENDS = ("reference", "torch")


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def module(backend: str = "torch", h: int = 2, **hyper: object) -> LightningAttention:
    return attnbench.build("lightning_attention", 8 * h, h, pattern="CS", backend=backend, **hyper).double()


def dense(q: Tensor, k: Tensor, v: Tensor, slopes: list[float], scale: float = 1.0) -> Tensor:
    """The definition, one output after the other."""
    o = torch.zeros_like(v)
    for h, slope in enumerate(slopes):
        for i in range(q.shape[2]):
            for j in range(i + 1):
                weight = scale * math.exp(-slope * (i - j)) * (q[:, h, i] * k[:, h, j]).sum(-1)
                o[:, h, i] += weight.unsqueeze(-1) * v[:, h, j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["alibi", "linear"])
@pytest.mark.parametrize("layer", [0, 5])
def test_equals_the_dense_form(kind: str, layer: int, backend: str) -> None:
    q, k, v = heads(13), heads(13), heads(13, 6)
    share = 1 - layer / 11 + 1e-5
    slopes = [share * 2**-4, share * 2**-8] if kind == "alibi" else [0.0, 4 * (1 - layer / 12)]
    o = module(backend, slopes=kind, layer=layer, scale=0.3).attend(q, k, v)
    torch.testing.assert_close(o, dense(q, k, v, slopes, 0.3))


def test_a_head_without_decay_is_causal_linear_attention_over_chunks() -> None:
    q, k, v = heads(150, b=1), heads(150, b=1), heads(150, b=1)
    o = module(slopes="linear").attend(q, k, v)[:, 0]
    torch.testing.assert_close(o, (q @ k.mT).tril()[:, 0] @ v[:, 0])


def test_slopes_of_heads_that_are_no_power_of_two_interleave() -> None:
    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    gate = module(h=6).log_decay(torch.device("cpu"), torch.float64)
    torch.testing.assert_close(gate, -(1 + 1e-5) * torch.tensor(alibi_slopes(6), dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_anywhere_equals_dropping_the_tokens(backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 3, 4]] = True
    kept = ~padded[0]
    layer = module(backend, slopes="linear")
    o = layer.attend(q, k, v, key_padding_mask=padded)[:, :, kept]
    torch.testing.assert_close(o, layer.attend(q[:, :, kept], k[:, :, kept], v[:, :, kept]))


@pytest.mark.parametrize("norm", ["layer", "srms"])
def test_layer_normalises_and_gates(norm: str) -> None:
    layer, x = module("reference", norm=norm), torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = (layer.split(F.silu(p(x)), 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = layer.join(dense(q, k, v, [(1 + 1e-5) * 2**-4, (1 + 1e-5) * 2**-8]))
    if norm == "layer":
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    else:
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gate = torch.sigmoid(x @ layer.gate[0].weight.T @ layer.gate[1].weight.T)
    torch.testing.assert_close(layer(x), (o * gate) @ layer.out_proj.weight.T)
    assert all("bias" not in name or name == "norm.bias" for name, _ in layer.named_parameters())


def test_a_layer_beyond_the_last_is_refused() -> None:
    with pytest.raises(UsageError, match="observed layer=12, expected 0 to n_layers − 1 = 11"):
        module(layer=12)


def test_flops() -> None:
    # two chunks of 64, 2 heads of 8: scores and values 4·64·8, state and read 4·64 a step
    assert module().flops(100, 100) == 2 * 128 * (4 * 64 * 8 + 4 * 8 * 8)
    assert module().layer_flops(10, 10) == module().flops(10, 10) + 8 * 10 * 16 * 16 + 4 * 10 * 16 * 8


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
