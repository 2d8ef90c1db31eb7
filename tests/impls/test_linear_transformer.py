"""linear_transformer against its dense form and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.kernels.features import feature

BACKENDS = ("reference", "torch")
PATTERNS = ("NS", "CS", "NC", "CC")


def heads(n: int, d: int = 4, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def run(q: Tensor, k: Tensor, v: Tensor, pattern: str, backend: str, **hyper: object) -> Tensor:
    return attnbench.attention(q, k, v, "linear_transformer", pattern, backend, **hyper)


def dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, name: str = "elu1", eps: float = 1e-6) -> Tensor:
    weights = feature(q, name) @ feature(k, name).transpose(-1, -2)
    if causal:
        weights = weights.tril()
    if name == "identity":
        return weights @ v
    return (weights @ v) / (weights.sum(-1, keepdim=True) + eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["elu1", "relu", "squared_relu", "exp", "identity"])
def test_equals_the_row_normalised_dense_form(pattern: str, backend: str, name: str) -> None:
    n, m = (71, 71) if pattern in ("NS", "CS") else (9, 71)
    q, k, v = heads(n), heads(m), heads(m, 6)
    o = run(q, k, v, pattern, backend, feature_map=name)
    torch.testing.assert_close(o, dense(q, k, v, causal=pattern == "CS", name=name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_queries_and_keys_give_the_mean(backend: str) -> None:
    v = heads(13)
    zero = torch.zeros_like(v)
    mean = v.mean(2, keepdim=True).expand_as(v)
    prefix_mean = v.cumsum(2) / torch.arange(1, 14, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(run(zero, zero, v, "NS", backend, eps=0.0), mean)
    torch.testing.assert_close(run(zero, zero, v, "CS", backend, eps=0.0), prefix_mean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_constant_values_are_returned_up_to_eps(pattern: str, backend: str) -> None:
    q, k = heads(12), heads(12)
    v = torch.full_like(q, 3.0)
    torch.testing.assert_close(run(q, k, v, pattern, backend, eps=0.0), v)
    assert ((v - run(q, k, v, pattern, backend, eps=1e-2)) > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_keys_with_values_changes_nothing(backend: str) -> None:
    q, k, v = heads(5), heads(11), heads(11)
    order = torch.randperm(11)
    permuted = run(q, k[:, :, order], v[:, :, order], "NC", backend)
    torch.testing.assert_close(permuted, run(q, k, v, "NC", backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_a_query_feature_changes_nothing_without_eps(backend: str) -> None:
    q, k, v = heads(6).abs(), heads(6).abs(), heads(6)
    o = run(q, k, v, "NS", backend, eps=0.0, feature_map="relu")
    scaled = run(7.0 * q, k, v, "NS", backend, eps=0.0, feature_map="relu")
    torch.testing.assert_close(scaled, o)


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_causal_row_equals_the_last_noncausal_row(backend: str) -> None:
    q, k, v = heads(70), heads(70), heads(70)
    torch.testing.assert_close(run(q, k, v, "CS", backend)[:, :, -1], run(q, k, v, "NS", backend)[:, :, -1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_output_ignores_the_future(backend: str) -> None:
    q, k, v = heads(70), heads(70), heads(70)
    before = run(q, k, v, "CS", backend)
    q[:, :, 40:], k[:, :, 40:], v[:, :, 40:] = 9.0, -9.0, 1e6
    assert torch.equal(run(q, k, v, "CS", backend)[:, :, :40], before[:, :, :40])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_padding_equals_dropping_the_keys(pattern: str, backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 4, 7]] = True
    kept = ~padded[0]
    module = attnbench.build("linear_transformer", 8, 2, pattern=pattern, backend=backend)
    o = module.attend(q, k, v, key_padding_mask=padded)[:, :, kept]
    torch.testing.assert_close(o, run(q[:, :, kept], k[:, :, kept], v[:, :, kept], pattern, backend))


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    q, k, v = heads(70, 16, b=1), heads(70, 16, b=1), heads(70, 16, b=1)
    o = run(q.float(), k.float(), v.float(), pattern, "triton")
    torch.testing.assert_close(o.double(), dense(q, k, v, causal=pattern == "CS"), rtol=1e-4, atol=1e-5)
