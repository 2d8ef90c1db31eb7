"""masked_cross_attention against loops over its definition, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.cross.masked_cross_attention import on_key_grid

ID = "masked_cross_attention"
BACKENDS = ("reference", "torch")


def heads(n: int, h: int = 2) -> Tensor:
    return torch.randn(2, h, n, 8, dtype=torch.float64)


def logits(n: int, m: int) -> Tensor:
    return torch.randn(2, n, m, dtype=torch.float64) - 1.0


def run(q: Tensor, k: Tensor, v: Tensor, backend: str, pattern: str = "NC", **options: object) -> Tensor:
    return attnbench.attention(q, k, v, ID, pattern, backend, **options)


def direct(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, threshold: float = 0.5, padded: Tensor | None = None
) -> Tensor:
    """One row at a time: its foreground without padding, or every key that is no padding."""
    o = torch.zeros_like(q)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(q.shape[1]) for i in range(q.shape[2])):
        real = [j for j in range(k.shape[2]) if padded is None or not padded[b, j]]
        seen = [j for j in real if 1 / (1 + math.exp(-float(p[b, i, j]))) >= threshold] or real
        weights = [math.exp(float(q[b, h, i] @ k[b, h, j]) / math.sqrt(8)) for j in seen]
        if seen:
            values = (w * v[b, h, j] for w, j in zip(weights, seen, strict=True))
            o[b, h, i] = sum(values) / sum(weights)
    return o


@pytest.mark.parametrize("threshold", [0.3, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NC", "CC"])
def test_equals_the_definition(pattern: str, backend: str, threshold: float) -> None:
    q, k, v, p = heads(6), heads(9), heads(9), logits(6, 9)
    p[0, 2] = -4.0  # an empty mask
    o = run(q, k, v, backend, pattern, mask_logits=p, threshold=threshold)
    torch.testing.assert_close(o, direct(q, k, v, p, threshold))


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_and_empty_masks_are_plain_attention_and_one_key_is_its_value(backend: str) -> None:
    q, k, v = heads(6), heads(9), heads(9)
    plain = attnbench.attention(q, k, v, "softmax", "NC", "reference")
    for sign in (0.0, 1.0, -1.0):  # the logit of the threshold itself is foreground
        full = torch.full((2, 6, 9), sign, dtype=torch.float64)
        torch.testing.assert_close(run(q, k, v, backend, mask_logits=full), plain)
    one = torch.full((2, 6, 9), -1.0, dtype=torch.float64)
    one[:, torch.arange(6), torch.arange(6) + 2] = 1.0
    torch.testing.assert_close(run(q, k, v, backend, mask_logits=one), v[:, :, 2:8])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_foreground_of_padding_counts_as_empty(backend: str) -> None:
    q, k, v, p = heads(6), heads(9), heads(9), logits(6, 9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[0, [0, 3, 8]] = True
    padded[1] = True
    p[0, 1] = torch.where(padded[0], 1.0, -1.0)
    o = run(q, k, v, backend, mask_logits=p, key_padding_mask=padded)
    torch.testing.assert_close(o, direct(q, k, v, p, padded=padded))
    assert (o[1] == 0).all()


def test_the_mask_is_a_constant() -> None:
    q, k, v, p = heads(6), heads(9), heads(9), logits(6, 9).requires_grad_()
    q.requires_grad_()
    o = run(q, k, v, "reference", mask_logits=p)
    assert torch.autograd.grad(o.sum(), (q, p), allow_unused=True)[1] is None


def test_logits_of_another_size_are_resized_before_the_threshold() -> None:
    """Twice the side: every place of the key grid is the mean of four."""
    p = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    means = p.unflatten(-1, (3, 2)).unflatten(-3, (4, 2)).mean((-1, -3))
    torch.testing.assert_close(on_key_grid(p, (4, 3)), means.flatten(-2))


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0])
def test_thresholds_that_are_no_probability_are_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold"):
        attnbench.build(ID, 16, 2, pattern="NC", threshold=threshold)


def test_missing_and_misshapen_logits_are_named() -> None:
    module = attnbench.build(ID, 16, 2, pattern="NC")
    x, c = torch.randn(2, 6, 16), torch.randn(2, 9, 16)
    with pytest.raises(UsageError, match="no mask_logits"):
        module(x, c)
    with pytest.raises(UsageError, match=r"expected \(B, 6, 9\)"):
        module(x, c, mask_logits=torch.zeros(2, 9, 6))


def test_flops_by_hand() -> None:
    module = attnbench.build(ID, 16, 2, pattern="NC")
    assert module.flops(6, 9) == 2 * 2 * 6 * 9 * 16
    assert module.extra_bytes(6, 9, 2) == 6 * 9 * 2 + 4 * 2 * 6


def test_triton_agrees_with_fp64() -> None:
    q, k, v = (heads(n, h)[:1].requires_grad_() for n, h in ((7, 2), (20, 1), (20, 1)))
    p = logits(7, 20)[:1]
    p[0, 3] = -4.0
    single = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected = run(q, k, v, "reference", mask_logits=p)
    got = run(*single, "triton", mask_logits=p)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for g, w in zip(torch.autograd.grad(got.square().sum(), single), wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-4)
