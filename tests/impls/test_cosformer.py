"""cosformer against its dense form and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.kernels.features import feature

BACKENDS = ("reference", "torch")


def heads(n: int, d: int = 4, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def run(q: Tensor, k: Tensor, v: Tensor, pattern: str, backend: str, **hyper: object) -> Tensor:
    return attnbench.attention(q, k, v, "cosformer", pattern, backend, **hyper)


def cosine(n: int, m: int, scale: int) -> Tensor:
    i, j = torch.arange(n, dtype=torch.float64), torch.arange(m, dtype=torch.float64)
    return torch.cos(math.pi * (i[:, None] - j) / (2 * scale))


def dense(q: Tensor, k: Tensor, v: Tensor, scale: int, *, causal: bool = False, act: str = "relu") -> Tensor:
    weights = feature(q, act) @ feature(k, act).transpose(-1, -2) * cosine(q.shape[2], k.shape[2], scale)
    if causal:
        weights = weights.tril()
    return (weights @ v) / weights.sum(-1, keepdim=True).clamp_min(1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ["relu", "elu1"])
@pytest.mark.parametrize(
    ("pattern", "n", "m"), [("NS", 70, 70), ("CS", 70, 70), ("NC", 9, 21), ("NC", 21, 9), ("CC", 21, 9)]
)
def test_equals_the_dense_form_with_cosine_weights(
    pattern: str, n: int, m: int, act: str, backend: str
) -> None:
    q, k, v = heads(n), heads(m), heads(m, 6)
    o = run(q, k, v, pattern, backend, act=act)
    torch.testing.assert_close(o, dense(q, k, v, max(n, m), causal=pattern == "CS", act=act))


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_max_len_is_relu_linear_attention(backend: str) -> None:
    q, k, v = heads(12), heads(12), heads(12)
    for pattern in ("NS", "CS"):
        o = run(q, k, v, pattern, backend, max_len=10**9)
        plain = attnbench.attention(
            q, k, v, "linear_transformer", pattern, backend, feature_map="relu", eps=1e-12
        )
        torch.testing.assert_close(o, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_queries_and_keys_give_pure_cosine_weights(backend: str) -> None:
    v = heads(15)
    ones = torch.full_like(v, 2.0)
    weights = cosine(15, 15, 15)
    torch.testing.assert_close(run(ones, ones, v, "NS", backend), weights @ v / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_values_are_returned_unless_the_row_is_zero(backend: str) -> None:
    q, k = heads(8).abs(), heads(8).abs()
    q[:, :, 3] *= -1
    v = torch.full_like(q, 3.0)
    for pattern in ("NS", "CS"):
        o = run(q, k, v, pattern, backend)
        assert (o[:, :, 3] == 0).all()
        live = [i for i in range(8) if i != 3]
        torch.testing.assert_close(o[:, :, live], v[:, :, live])


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_keys_matters_only_through_their_positions(backend: str) -> None:
    q, k, v = heads(12).abs(), heads(12).abs(), heads(12)
    flipped = (q, k.flip(2), v.flip(2))
    assert (run(*flipped, "NS", backend) - run(q, k, v, "NS", backend)).abs().max() > 1e-3
    far = run(*flipped, "NS", backend, max_len=10**9)
    torch.testing.assert_close(far, run(q, k, v, "NS", backend, max_len=10**9), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_outputs_do_not_change_when_tokens_are_appended(backend: str) -> None:
    q, k, v = heads(20), heads(20), heads(20)
    whole = run(q, k, v, "CS", backend, max_len=32)
    prefix = run(q[:, :, :7], k[:, :, :7], v[:, :, :7], "CS", backend, max_len=32)
    torch.testing.assert_close(whole[:, :, :7], prefix)


@pytest.mark.parametrize("pattern", ["CS", "CC"])
def test_causal_patterns_need_a_constant_position_scale(pattern: str) -> None:
    with pytest.raises(UsageError, match="max_len"):
        attnbench.build("cosformer", 8, 2, pattern=pattern)


def test_a_longer_sequence_than_max_len_is_refused() -> None:
    q = heads(9)
    with pytest.raises(UsageError, match="observed length 9, expected at most max_len=8"):
        run(q, q, q, "NS", "reference", max_len=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_padded_keys_have_no_weight(pattern: str, backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 4, 7]] = True
    module = attnbench.build("cosformer", 8, 2, pattern=pattern, backend=backend, max_len=9)
    o = module.attend(q, k, v, key_padding_mask=padded)
    without = k.masked_fill(padded[:, None, :, None], -1.0)  # relu of it is 0
    torch.testing.assert_close(o, run(q, without, v, pattern, backend, max_len=9))


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    q, k, v = heads(70, 16, b=1), heads(70, 16, b=1), heads(70, 16, b=1)
    o = run(q.float(), k.float(), v.float(), pattern, "triton")
    expected = dense(q, k, v, 70, causal=pattern == "CS")
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-4)
