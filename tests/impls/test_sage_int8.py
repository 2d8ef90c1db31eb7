"""sage_int8: integers and scales by loops, what smoothing is for, and causality with frozen scales."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.kernels import Unsupported

SIZES = {"NS": (37, 37), "CS": (37, 37), "NC": (9, 37)}


def heads(n: int, h: int = 2) -> Tensor:
    return torch.randn(1, h, n, 8)


def module(pattern: str = "NS", backend: str = "reference", **hyper):
    options = {"block_q": 16, "block_k": 16, **hyper}
    return attnbench.build("sage_int8", 16, 2, pattern=pattern, backend=backend, **options)


def integers(x: Tensor, block: int) -> tuple[list[list[int]], list[float]]:
    """Integers of one head, and the scale of every row."""
    ints, scales = [], []
    for start in range(0, len(x), block):
        rows = x[start : start + block].float()
        scale = rows.abs().max() / 127
        for row in rows:
            ratio = (row / scale).tolist()
            ints.append([int(math.copysign(math.floor(abs(r) + 0.5), r)) for r in ratio])
            scales.append(float(scale))
    return ints, scales


def rows_of(q: Tensor, k: Tensor, v: Tensor, pattern: str, smooth: bool) -> Tensor:
    """The output by the definition, in fp64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for h in range(q.shape[1]):
        keys = k[0, h] - k[0, h].mean(0) if smooth else k[0, h]
        q_ints, q_scale = integers(q[0, h] * (math.log2(math.e) / math.sqrt(8)), 16)
        k_ints, k_scale = integers(keys, 16)
        for i in range(q.shape[2]):
            seen = range(i + 1) if pattern == "CS" else range(k.shape[2])
            dots = [sum(a * b for a, b in zip(q_ints[i], k_ints[j], strict=True)) for j in seen]
            scores = torch.tensor([d * q_scale[i] * k_scale[j] for d, j in zip(dots, seen, strict=True)])
            weights = (scores.double() * math.log(2)).softmax(-1)
            out[0, h, i] = weights @ v[0, h, list(seen)].half().double()
    return out


def error(o: Tensor, exact: Tensor) -> float:
    return float((o - exact).norm() / exact.norm())


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("pattern", SIZES)
def test_rows_are_those_of_the_definition(pattern, smooth):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m)
    o = module(pattern, smooth_k=smooth).attend(q, k, v)
    torch.testing.assert_close(o.double(), rows_of(q, k, v, pattern, smooth), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("pattern", SIZES)
def test_frozen_ranges_give_the_same_integers(pattern):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m).half().float()
    padded = torch.zeros(1, m, dtype=torch.bool)
    padded[:, -5:] = True
    mixer = module(pattern)
    for mask in (None, padded):
        ranges = mixer.select(q, k, mask)
        frozen = mixer.attend(q, k, v, key_padding_mask=mask, selection=ranges)
        torch.testing.assert_close(frozen, mixer.attend(q, k, v, key_padding_mask=mask), atol=1e-5, rtol=1e-4)


def test_later_tokens_matter_through_the_ranges_only():
    q, k, v = heads(37), heads(37), heads(37)
    mixer = module("CS")
    ranges = mixer.select(q, k)
    before, frozen = mixer.attend(q, k, v), mixer.attend(q, k, v, selection=ranges)
    later = [torch.cat([x[:, :, :20], 3 * x[:, :, 20:]], 2) for x in (q, k, v)]
    assert torch.equal(mixer.attend(*later, selection=ranges)[:, :, :20], frozen[:, :, :20])
    moved = (mixer.attend(*later) - before)[:, :, :20].abs().max()
    assert 0 < moved < 0.1


def test_smoothing_removes_what_all_keys_share():
    q, k, v = heads(37), heads(37), heads(37)
    exact = attnbench.attention(*(x.double() for x in (q, k, v)), "softmax", "NS", "reference")
    assert error(module().attend(q, k, v), exact) < 0.02
    loud = k + torch.tensor([40.0, -40.0, 0, 0, 25.0, 0, 0, 0])
    smooth, rough = (error(module(smooth_k=s).attend(q, loud, v), exact) for s in (True, False))
    assert smooth < 0.02 < 3 * smooth < rough


def test_constant_values_and_padded_keys():
    q, k = heads(37), heads(37)
    torch.testing.assert_close(module().attend(q, k, torch.full_like(k, 0.75)), torch.full_like(q, 0.75))
    padded = torch.zeros(1, 37, dtype=torch.bool)
    padded[:, 3] = True
    v = heads(37)
    before = module().attend(q, k, v, key_padding_mask=padded)
    k[:, :, 3], v[:, :, 3] = 1e4, 1e4
    assert torch.equal(module().attend(q, k, v, key_padding_mask=padded), before)


def test_costs_and_refusals():
    assert module("NC").flops(9, 37) == 4 * 2 * 9 * 37 * 8
    assert module("CS").flops(4, 4) == 4 * 2 * 10 * 8
    with pytest.raises(Unsupported, match="gradients"):
        module().attend(heads(5).requires_grad_(), heads(5), heads(5))
    with pytest.raises(UsageError, match="block_q"):
        module(block_q=20)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("pattern", SIZES)
def test_backends_agree(pattern, backend):
    n, m = SIZES[pattern]
    q, k, v = heads(n)[:, :1], heads(m)[:, :1], heads(m)[:, :1]
    ours, expected = (
        attnbench.attention(q, k, v, "sage_int8", pattern, b, block_q=16, block_k=16)
        for b in (backend, "reference")
    )
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
