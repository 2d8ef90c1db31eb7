"""vim against two Mamba blocks, one on the reversed sequence, and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.impls.linear.mamba_s6 import MambaS6
from attnbench.impls.linear.vim import Vim

BACKENDS = ("reference", "torch")
C = 6


def tokens(n: int, *, b: int = 2) -> Tensor:
    return torch.randn(b, n, C, dtype=torch.float64)


def module(backend: str = "torch", **hyper: object) -> Vim:
    hyper = {"state": 3, "dt_rank": 2, **hyper}
    return attnbench.build("vim", C, 2, pattern="NS", backend=backend, **hyper).double()


def one_way(layer: Vim, direction: int) -> MambaS6:
    """The Mamba block with the weights of one direction."""
    hyper = {"state": 3, "dt_rank": 2, "conv_size": layer.hp.conv_size}
    block = attnbench.build("mamba_s6", C, 2, pattern="CS", backend="reference", **hyper).double()
    block.in_proj, block.out_proj = layer.in_proj, layer.out_proj
    block.terms = (layer.forward_terms, layer.backward_terms)[direction]
    return block


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("divide", [True, False])
def test_equals_mamba_in_both_directions(n: int, divide: bool, backend: str) -> None:
    layer, x = module(backend, divide=divide), tokens(n)
    forward = one_way(layer, 0)(x)
    backward = one_way(layer, 1)(x.flip(1)).flip(1)
    expected = (forward + backward) / 2 if divide else forward + backward
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reversing_tokens_and_exchanging_directions_reverses_the_output(backend: str) -> None:
    layer, x = module(backend), tokens(11)
    before = layer(x)
    layer.forward_terms, layer.backward_terms = layer.backward_terms, layer.forward_terms
    torch.testing.assert_close(layer(x.flip(1)).flip(1), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_silent_direction_leaves_half_of_mamba(backend: str) -> None:
    layer, x = module(backend), tokens(11)
    torch.nn.init.zeros_(layer.backward_terms.select.weight)
    torch.nn.init.zeros_(layer.backward_terms.skip)
    torch.testing.assert_close(layer(x), one_way(layer, 0)(x) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padded_token_makes_no_step(backend: str) -> None:
    layer, x = module(backend, conv_size=1), tokens(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 3, 4, 8]] = True
    kept = ~padded[0]
    torch.testing.assert_close(layer(x, key_padding_mask=padded)[:, kept], layer(x[:, kept]))


def test_flops() -> None:
    layer = module()
    with FlopCounterMode(display=False) as counter:
        layer(tokens(20, b=1))
    assert counter.get_total_flops() == layer.counted_flops(20, 20)
    assert layer.flops(20, 20) == layer.counted_flops(20, 20) + 2 * 9 * 20 * 12 * 3


def test_triton_agrees_with_fp64() -> None:
    layer, fast = module("reference"), module("triton").float()
    fast.load_state_dict(layer.state_dict())
    x = tokens(37, b=1).requires_grad_()
    single = x.detach().float().requires_grad_()
    exact, y = layer(x), fast(single)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-5)
    exact.square().sum().backward()
    y.square().sum().backward()
    pairs = [(single, x), *zip(fast.parameters(), layer.parameters(), strict=True)]
    for got, want in pairs:
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-3, atol=1e-4)
