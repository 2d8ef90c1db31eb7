"""performer against its dense form, the kernel it estimates, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.performer import Performer, random_rows

BACKENDS = ("reference", "torch")
M_FEATURES = 24


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "reference", **hyper: object) -> Performer:
    hyper = {"num_features": M_FEATURES, **hyper}
    return attnbench.build("performer", 16, 2, pattern=pattern, backend=backend, **hyper).double()


def exponents(u: Tensor, w: Tensor) -> Tensor:
    scaled = u * u.shape[-1] ** -0.25
    return scaled @ w.transpose(-1, -2) - scaled.square().sum(-1, keepdim=True) / 2


def dense(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *, eps: float, causal: bool = False) -> Tensor:
    lq, lk = exponents(q, w), exponents(k, w)
    fq = torch.exp(lq - lq.amax(-1, keepdim=True)) + eps
    fk = torch.exp(lk - lk.amax((-1, -2), keepdim=True)) + eps
    weights = fq @ fk.transpose(-1, -2)
    if causal:
        weights = weights.tril()
    return weights @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "NC", "CC"])
def test_equals_the_row_normalised_dense_form(pattern: str, backend: str) -> None:
    q, k, v = heads(21 if pattern == "NS" else 5), heads(21), heads(21, 6)
    performer = module(pattern, backend, eps=1e-3)
    o = performer.attend(q, k, v)
    torch.testing.assert_close(o, dense(q, k, v, performer.directions, eps=1e-3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_form_is_the_unstabilised_estimate_over_the_past(backend: str) -> None:
    q, k, v = heads(70), heads(70), heads(70)
    performer = module("CS", backend)
    o = performer.attend(q, k, v)
    torch.testing.assert_close(o, dense(q, k, v, performer.directions, eps=0.0, causal=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_form_survives_keys_of_very_different_norms(backend: str) -> None:
    q, k, v = heads(20), heads(20), heads(20)
    k[:, :, :10] *= 40.0  # exponents near −10⁴: e to it is 0 even in fp64 without the running maximum
    performer = module("CS", backend)
    o = performer.attend(q, k, v)
    torch.testing.assert_close(performer.attend(q, k, torch.ones_like(v)), torch.ones_like(v))
    expected = dense(q[:, :, :10], k[:, :, :10], v[:, :, :10], performer.directions, eps=0.0)
    torch.testing.assert_close(o[:, :, 9], expected[:, :, 9])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_constant_values_are_returned(pattern: str, backend: str) -> None:
    q, k = heads(9), heads(9)
    v = torch.full_like(q, 3.0)
    torch.testing.assert_close(module(pattern, backend).attend(q, k, v), v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_equal_keys_give_the_mean_of_the_values(pattern: str, backend: str) -> None:
    q, v = heads(9), heads(9)
    k = heads(1).expand_as(q)
    count = torch.arange(1, 10, dtype=torch.float64).unsqueeze(-1)
    expected = v.cumsum(2) / count if pattern == "CS" else v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(module(pattern, backend).attend(q, k, v), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_keys_with_values_changes_nothing(backend: str) -> None:
    q, k, v = heads(5), heads(11), heads(11)
    order = torch.randperm(11)
    performer = module("NC", backend)
    torch.testing.assert_close(performer.attend(q, k[:, :, order], v[:, :, order]), performer.attend(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", ["softmax", "relu"])
def test_causal_output_ignores_the_future_exactly(backend: str, features: str) -> None:
    q, k, v = heads(20), heads(20), heads(20)
    performer = module("CS", backend, features=features)
    before = performer.attend(q, k, v)
    q[:, :, 12:], k[:, :, 12:], v[:, :, 12:] = 30.0, 30.0, 1e6
    assert torch.equal(performer.attend(q, k, v)[:, :, :12], before[:, :, :12])


@pytest.mark.parametrize("ortho", [True, False])
def test_mean_over_directions_is_the_softmax_kernel(ortho: bool) -> None:
    """The estimate of exp(q·k/√D) lies within 5 standard errors of it, over 4000 draws of W."""
    d, count = 8, 8
    q, k = torch.randn(2, d, dtype=torch.float64)
    q, k = q / q.norm(), k / k.norm()
    w = random_rows(4000, count, d, torch.Generator().manual_seed(3), ortho=ortho).double()
    estimate = torch.exp(exponents(q, w) + exponents(k, w)).mean(-1)
    error = estimate.std() / math.sqrt(len(estimate))
    assert abs(estimate.mean() - math.exp(q @ k / math.sqrt(d))) < 5 * error


def test_orthogonal_directions_are_orthogonal_in_blocks_and_uniform() -> None:
    w = random_rows(3000, 10, 4, torch.Generator().manual_seed(0), ortho=True)
    gram = w[:, :4] @ w[:, :4].transpose(-1, -2)
    assert (gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    # without the sign correction of QR one coordinate of each row has always the same sign
    assert w.mean(0).abs().max() < 5 / math.sqrt(3000)
    assert abs(w.square().sum(-1).mean() - 4) < 0.15


def test_variance_of_the_orthogonal_estimate_is_smaller() -> None:
    q = k = torch.ones(8, dtype=torch.float64) * 8**-0.5
    variance = {}
    for ortho in (True, False):
        w = random_rows(4000, 8, 8, torch.Generator().manual_seed(1), ortho=ortho).double()
        variance[ortho] = torch.exp(exponents(q, w) + exponents(k, w)).mean(-1).var().item()
    assert variance[True] < variance[False]


def test_directions_depend_on_the_seed_only_and_are_saved() -> None:
    torch.manual_seed(5)
    first = module()
    torch.manual_seed(6)
    assert torch.equal(first.directions, module().directions)
    assert not torch.equal(first.directions, module(seed=1).directions)
    assert "directions" in first.state_dict()


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_features_equal_their_dense_form(backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    for pattern in ("NS", "CS"):
        performer = module(pattern, backend, features="relu")
        w = performer.directions

        def phi(u: Tensor, w: Tensor = w) -> Tensor:
            return (u * 8**-0.25 @ w.transpose(-1, -2)).relu() * M_FEATURES**-0.5 + 1e-3

        weights = phi(q) @ phi(k).transpose(-1, -2)
        weights = weights.tril() if pattern == "CS" else weights
        torch.testing.assert_close(performer.attend(q, k, v), weights @ v / weights.sum(-1, keepdim=True))


def test_redraw_in_training_changes_directions_but_not_in_evaluation() -> None:
    q = heads(6)
    performer = module(redraw="every_forward")
    assert not torch.equal(performer.attend(q, q, q), performer.attend(q, q, q))
    again = module(redraw="every_forward")
    assert torch.equal(again.attend(q, q, q), module(redraw="every_forward").attend(q, q, q))
    performer.eval()
    assert torch.equal(performer.attend(q, q, q), performer.attend(q, q, q))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cab_variant_clamps_the_denominator_at_a_tenth(backend: str) -> None:
    q, k, v = heads(7), heads(7), heads(7)
    performer = module("NS", backend, variant="cab").eval()

    def phi(u: Tensor, over: tuple[int, ...]) -> Tensor:
        scaled = u * 8**-0.25
        projected = scaled @ performer.directions.transpose(-1, -2)
        norm = scaled.square().sum(-1, keepdim=True) / 2
        return M_FEATURES**-0.5 * (torch.exp(projected - norm - projected.amax(over, keepdim=True)) + 1e-4)

    weights = phi(q, (-1,)) @ phi(k, (-1, -2)).transpose(-1, -2)
    expected = weights @ v / weights.sum(-1, keepdim=True).clamp_min(0.1)
    torch.testing.assert_close(performer.attend(q, k, v), expected)
    assert (weights.sum(-1) < 0.1).any()
    with pytest.raises(UsageError, match="CAB has no causal self form"):
        module("CS", variant="cab")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
@pytest.mark.parametrize("features", ["softmax", "relu"])
def test_padding_equals_dropping_the_keys(pattern: str, features: str, backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 1, 5]] = True
    k = k.masked_fill(padded[:, None, :, None], 50.0)
    kept = ~padded[0]
    performer = module(pattern, backend, features=features)
    o = performer.attend(q, k, v, key_padding_mask=padded)[:, :, kept]
    torch.testing.assert_close(o, performer.attend(q[:, :, kept], k[:, :, kept], v[:, :, kept]))


def test_half_precision_inputs_keep_the_range_of_the_features() -> None:
    q, k, v = heads(9), heads(9), heads(9)
    for pattern in ("NS", "CS"):
        performer = module(pattern).half().eval()
        o = performer.attend((4 * q).half(), (4 * k).half(), torch.ones_like(v).half())
        assert o.dtype is torch.float16
        torch.testing.assert_close(o, torch.ones_like(o), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    q, k, v = heads(40, b=1), heads(40, b=1), heads(40, b=1)
    single = module(pattern, "triton").float()
    o = single.attend(q.float(), k.float(), v.float())
    expected = module(pattern, "reference").attend(q, k, v)
    torch.testing.assert_close(o.double(), expected, rtol=1e-3, atol=1e-4)
