"""ip_adapter_decoupled_cross_attention against loops over its sum of two softmaxes, and its special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.kernels import flash, merge

ID = "ip_adapter_decoupled_cross_attention"
BACKENDS = ("reference", "torch")


def heads(n: int, h: int = 2) -> Tensor:
    return torch.randn(2, h, n, 8, dtype=torch.float64)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One row at a time."""
    o = torch.zeros_like(q)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(q.shape[1]) for i in range(q.shape[2])):
        weights = [math.exp(float(q[b, h, i] @ row) / math.sqrt(8)) for row in k[b, h]]
        o[b, h, i] = sum(w * row for w, row in zip(weights, v[b, h], strict=True)) / sum(weights)
    return o


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NC", "CC"])
def test_equals_the_sum(pattern: str, backend: str, scale: float) -> None:
    q, k, v, k2, v2 = heads(5), heads(7), heads(7), heads(3), heads(3)
    o = attnbench.attention(q, k, v, ID, pattern, backend, k2=k2, v2=v2, scale=scale)
    expected = softmax_attention(q, k, v) + scale * softmax_attention(q, k2, v2)
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_contexts_scale_and_a_single_image_token_is_added(backend: str) -> None:
    q, k, v = heads(5), heads(7), heads(7)
    one = attnbench.attention(q, k, v, ID, "NC", backend, k2=k, v2=v, scale=0.5)
    torch.testing.assert_close(one, 1.5 * softmax_attention(q, k, v))
    k2, v2 = heads(1), heads(1)
    single = attnbench.attention(q, k, v, ID, "NC", backend, k2=k2, v2=v2)
    torch.testing.assert_close(single, softmax_attention(q, k, v) + v2)


def test_it_is_not_one_softmax_over_both_contexts() -> None:
    q, k, v, k2, v2 = heads(5), heads(7), heads(7), heads(3), heads(3)
    o = attnbench.attention(q, k, v, ID, "NC", "reference", k2=k2, v2=v2)
    (o1, lse1), (o2, lse2) = flash(q, k, v), flash(q, k2, v2)
    joint = merge(o1, lse1, o2, lse2)[0]
    torch.testing.assert_close(joint, softmax_attention(q, torch.cat((k, k2), 2), torch.cat((v, v2), 2)))
    assert (o - joint).abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_that_of_the_text_alone(backend: str) -> None:
    q, k, v, k2, v2 = heads(5), heads(7), heads(7), heads(3), heads(3)
    padded = torch.zeros(2, 7, dtype=torch.bool)
    padded[:, [0, 3]] = True
    o = attnbench.attention(q, k, v, ID, "NC", backend, k2=k2, v2=v2, key_padding_mask=padded)
    kept = ~padded[0]
    expected = softmax_attention(q, k[:, :, kept], v[:, :, kept]) + softmax_attention(q, k2, v2)
    torch.testing.assert_close(o, expected)
    all_padded = torch.ones_like(padded)
    o = attnbench.attention(q, k, v, ID, "NC", backend, k2=k2, v2=v2, key_padding_mask=all_padded)
    torch.testing.assert_close(o, softmax_attention(q, k2, v2))


def test_the_layer_projects_the_image_prompt_from_copied_weights() -> None:
    layer = attnbench.build(ID, 16, 2, pattern="NC", bias=False, backend="reference").double()
    assert torch.equal(layer.k2_proj.weight, layer.k_proj.weight)
    assert torch.equal(layer.v2_proj.weight, layer.v_proj.weight)
    torch.nn.init.normal_(layer.v2_proj.weight)
    x, text, image = (torch.randn(2, n, 16, dtype=torch.float64) for n in (4, 6, 3))
    q, k, v = layer.q_proj(x), layer.k_proj(text), layer.v_proj(text)
    k2, v2 = image @ layer.k2_proj.weight.T, image @ layer.v2_proj.weight.T
    q, k, v, k2, v2 = (t.detach().unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v, k2, v2))
    read = softmax_attention(q, k, v) + softmax_attention(q, k2, v2)
    expected = read.transpose(1, 2).flatten(-2) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x, text, context2=image), expected)


def test_missing_prompts_are_named() -> None:
    layer = attnbench.build(ID, 16, 2, pattern="NC")
    x = torch.randn(1, 3, 16)
    with pytest.raises(UsageError, match="context2"):
        layer(x, x)
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(UsageError, match="k2"):
        layer.attend(q, q, q)


def test_flops_by_hand() -> None:
    """C = 16, H = 2, Hkv = 1: 5 queries over 7 + 4 keys, and the projections of both contexts."""
    layer = attnbench.build(ID, 16, 2, pattern="NC", num_kv_heads=1)
    op = 2 * 2 * 5 * (7 + 4) * 16
    assert layer.flops(5, 7) == op
    assert layer.layer_flops(5, 7) == op + 2 * 2 * 5 * 16 * 16 + 2 * 2 * (7 + 4) * 16 * 8


def test_triton_agrees_with_fp64() -> None:
    inputs = [heads(n, h).requires_grad_() for n, h in ((9, 2), (20, 1), (20, 1), (4, 1), (4, 1))]
    single = [t.detach().float().requires_grad_() for t in inputs]

    def run(tensors: list[Tensor], backend: str) -> Tensor:
        q, k, v, k2, v2 = tensors
        return attnbench.attention(q, k, v, ID, "NC", backend, k2=k2, v2=v2, scale=0.7)

    expected, got = run(inputs, "reference"), run(single, "triton")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for g, w in zip(torch.autograd.grad(got.square().sum(), single), wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-4)
