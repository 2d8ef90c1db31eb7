"""abmil_gated_pooling against loops over its definition, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.errors import UsageError

ID = "abmil_gated_pooling"
BACKENDS = ("reference", "torch")


def build(pattern: str = "NC", backend: str = "reference", **hyper: object) -> nn.Module:
    hyper = {"branches": 3, "hidden": 5, **hyper}
    module = attnbench.build(ID, 12, 2, pattern=pattern, backend=backend, **hyper).double()
    nn.init.normal_(module.readers)
    return module


def tokens(n: int, c: int = 12) -> Tensor:
    return torch.randn(2, n, c, dtype=torch.float64)


def direct(m: nn.Module, bag: Tensor, branches: int) -> Tensor:
    """Every branch scores every instance."""
    o = torch.zeros(bag.shape[0], branches, bag.shape[-1], dtype=torch.float64)
    for b, k in ((b, k) for b in range(bag.shape[0]) for k in range(branches)):
        weights = []
        for h in bag[b]:
            u = torch.tanh(m.signal(h))
            if m.gate is not None:
                u = u * torch.sigmoid(m.gate(h))
            weights.append(math.exp(float(m.readers[k] @ u)))
        o[b, k] = sum(w * h for w, h in zip(weights, bag[b], strict=True)) / sum(weights)
    return o


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_equals_the_definition(backend: str, gated: bool) -> None:
    module, bag = build("NC", backend, gated=gated), tokens(9)
    expected = direct(module, bag, 3)
    torch.testing.assert_close(module(tokens(3), bag), expected)
    torch.testing.assert_close(module(tokens(2), bag), expected[:, :2])  # x only says how many
    torch.testing.assert_close(module.pooled(bag, 3), expected)


@torch.no_grad()
def test_self_attention_pools_x() -> None:
    module, bag = build("NS", branches=9), tokens(9)
    torch.testing.assert_close(module(bag), direct(module, bag, 9))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_special_cases(backend: str) -> None:
    module, bag = build("NC", backend), tokens(9)
    o = module.pooled(bag, 3)
    torch.testing.assert_close(module.pooled(torch.cat((bag, bag), 1), 3), o)
    torch.testing.assert_close(module.pooled(bag[:, torch.randperm(9)], 3), o)
    alike = bag[:, :1].expand(-1, 7, -1)
    torch.testing.assert_close(module.pooled(alike, 3), bag[:, :1].expand(-1, 3, -1))
    module.readers.zero_()
    torch.testing.assert_close(module.pooled(bag, 3), bag.mean(1, keepdim=True).expand(-1, 3, -1))


@torch.no_grad()
def test_an_open_gate_is_no_gate() -> None:
    gated, plain, bag = build(), build(gated=False), tokens(9)
    plain.load_state_dict(gated.state_dict(), strict=False)
    gated.gate.bias.fill_(60.0)
    torch.testing.assert_close(gated.pooled(bag, 3), plain.pooled(bag, 3))


@torch.no_grad()
def test_padding_equals_dropping_the_instances() -> None:
    module, bag = build(), tokens(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 4, 8]] = True
    torch.testing.assert_close(module.pooled(bag, 3, padded), module.pooled(bag[:, ~padded[0]], 3))
    assert (module.pooled(bag, 3, torch.ones_like(padded)) == 0).all()


@torch.no_grad()
def test_instances_wider_than_a_kernel_are_pooled_in_parts() -> None:
    module = attnbench.build(ID, 514, 1, pattern="NC", branches=2, hidden=5, backend="reference").double()
    nn.init.normal_(module.readers)
    bag = tokens(4, 514)
    torch.testing.assert_close(module.pooled(bag, 2), direct(module, bag, 2))
    parts = module._parts()
    assert 514 // parts <= 256
    assert module.flops(2, 4) == 2 * 2 * 4 * 514 * 5 + parts * 2 * 4 * 5 * 2 + 2 * 4 * 2 * 514


def test_more_rows_than_branches_and_sizes_without_a_meaning_are_refused() -> None:
    with pytest.raises(UsageError, match="observed 4 rows of x, expected at most branches=3"):
        build()(tokens(4), tokens(9))
    for wrong in ({"branches": 0}, {"hidden": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            build(**wrong)


def test_x_gets_a_gradient_of_zero() -> None:
    x, bag = tokens(3).requires_grad_(), tokens(9).requires_grad_()
    d_x, d_bag = torch.autograd.grad(build()(x, bag).square().sum(), (x, bag))
    assert (d_x == 0).all()
    assert (d_bag != 0).any()


def test_flops_by_hand() -> None:
    """C = 12, L = 5: 9 instances through two layers, 3 readers."""
    assert build().flops(3, 9) == 2 * 2 * 9 * 12 * 5 + 2 * 9 * 5 * 3 + 2 * 9 * 3 * 12
    assert build(gated=False).flops(3, 9) == 2 * 9 * 12 * 5 + 2 * 9 * 5 * 3 + 2 * 9 * 3 * 12


@pytest.mark.parametrize("pattern", ["NS", "NC"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    truth = build(pattern, branches=20)
    fast = attnbench.build(ID, 12, 2, pattern=pattern, backend="triton", branches=20, hidden=5)
    fast.load_state_dict(truth.state_dict())
    bag = tokens(20).requires_grad_()
    single = bag.detach().float().requires_grad_()
    few = () if pattern == "NS" else (tokens(3),)
    expected = truth(*few, bag)
    got = fast(*(x.float() for x in few), single)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), bag)[0]
    actual = torch.autograd.grad(got.square().sum(), single)[0]
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-3, atol=1e-4)
