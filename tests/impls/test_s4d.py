"""s4d: the convolution against the recurrence, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.s4d import S4D, _expm1, impulse_response

BACKENDS = ("reference", "torch")
C = 6


def tokens(n: int, *, b: int = 2) -> Tensor:
    return torch.randn(b, n, C, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "torch", **hyper: object) -> S4D:
    return attnbench.build("s4d", C, 2, pattern=pattern, backend=backend, **{"state": 8, **hyper}).double()


def filters(layer: S4D, read_out: Tensor, n: int) -> Tensor:
    """K (channels, C, n) by the formula, one power at a time."""
    a = torch.complex(-layer.log_decay.exp(), layer.frequency).expand(C, -1)
    step = layer.log_dt.exp().unsqueeze(-1) * a
    gain = torch.view_as_complex(read_out) * (torch.exp(step) - 1) / a
    return torch.stack([2 * (gain * torch.exp(l * step)).sum(-1).real for l in range(n)], -1)


def double_sum(layer: S4D, x: Tensor) -> Tensor:
    """y of the definition: every pair of tokens once, the reverse filter from the next token on."""
    n = x.shape[1]
    forward = filters(layer, layer.read_out, n)
    y = layer.skip * x.unsqueeze(2)
    for i in range(n):
        for j in range(i + 1):
            y[:, i] = y[:, i] + forward[..., i - j] * x[:, j].unsqueeze(1)
        if layer.pattern == "NS":
            backward = filters(layer, layer.read_out_reverse, n)
            for j in range(i + 1, n):
                y[:, i] = y[:, i] + backward[..., j - i - 1] * x[:, j].unsqueeze(1)
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
@pytest.mark.parametrize(("n", "channels"), [(1, 1), (2, 1), (13, 1), (16, 2)])
def test_equals_the_double_sum(pattern: str, n: int, channels: int, backend: str) -> None:
    layer = module(pattern, backend, channels=channels)
    x = tokens(n)
    torch.testing.assert_close(layer.convolve(x), double_sum(layer, x))


@pytest.mark.parametrize("pattern", ["NS", "CS"])
@pytest.mark.parametrize("hyper", [{}, {"init": "inv"}, {"variant": "cab"}, {"channels": 3}])
def test_convolution_equals_the_complex_recurrence(pattern: str, hyper: dict[str, object]) -> None:
    layer = module(pattern, "torch", **hyper)
    twin = module(pattern, "reference", **hyper)
    twin.load_state_dict(layer.state_dict())
    x = tokens(37)
    torch.testing.assert_close(layer(x), twin(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_read_out_leaves_the_skip_connection(backend: str) -> None:
    layer = module("NS", backend)
    torch.nn.init.zeros_(layer.read_out)
    torch.nn.init.zeros_(layer.read_out_reverse)
    x = tokens(9)
    torch.testing.assert_close(layer.convolve(x), (layer.skip * x.unsqueeze(2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impulse_returns_the_filter(backend: str) -> None:
    layer = module("CS", backend)
    torch.nn.init.zeros_(layer.skip)
    x = torch.zeros(1, 11, C, dtype=torch.float64)
    x[:, 0] = 1.0
    torch.testing.assert_close(layer.convolve(x)[0].permute(1, 2, 0), filters(layer, layer.read_out, 11))


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_before_the_activation_and_equivariant_to_shifts(backend: str) -> None:
    layer = module("CS", backend)
    x, y = tokens(14), tokens(14)
    torch.testing.assert_close(layer.convolve(2 * x - 3 * y), 2 * layer.convolve(x) - 3 * layer.convolve(y))
    shifted = torch.cat((torch.zeros_like(x[:, :3]), x[:, :-3]), 1)
    torch.testing.assert_close(layer.convolve(shifted)[:, 3:], layer.convolve(x)[:, :-3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_reverse_filter_noncausal_is_causal(backend: str) -> None:
    both = module("NS", backend)
    torch.nn.init.zeros_(both.read_out_reverse)
    causal = module("CS", backend)
    state = both.state_dict()
    state.pop("read_out_reverse")
    causal.load_state_dict(state)
    x = tokens(12)
    torch.testing.assert_close(both(x), causal(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_output_ignores_the_future(backend: str) -> None:
    layer = module("CS", backend)
    x = tokens(12)
    before = layer(x)
    x[:, 7:] = 5.0
    torch.testing.assert_close(layer(x)[:, :7], before[:, :7])
    assert (layer(x)[:, 7:] - before[:, 7:]).abs().max() > 1e-2


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100])
def test_two_level_powers_equal_the_powers(n: int) -> None:
    step = torch.complex(-torch.rand(3, 4, dtype=torch.float64), 3 * torch.randn(3, 4, dtype=torch.float64))
    gain = torch.randn(2, 3, 4, dtype=torch.complex128)
    powers = torch.exp(step.unsqueeze(-1) * torch.arange(n))
    expected = 2 * (gain.unsqueeze(-1) * powers).sum(-2).real
    torch.testing.assert_close(impulse_response(step, gain, n), expected)


def test_hold_is_accurate_for_tiny_steps() -> None:
    z = torch.tensor([1e-9 + 2e-9j, 0.3 - 1.2j], dtype=torch.complex128)
    expected = torch.stack((z[0] + z[0] ** 2 / 2, torch.exp(z[1]) - 1))
    torch.testing.assert_close(_expm1(z), expected, rtol=1e-14, atol=0.0)
    single = _expm1(z.to(torch.complex64))
    torch.testing.assert_close(single.to(torch.complex128), expected, rtol=1e-6, atol=0.0)


def test_initialisations() -> None:
    n = torch.arange(4, dtype=torch.float64)
    torch.testing.assert_close(module().frequency, (math.pi * n).expand(C, 4), rtol=1e-6, atol=1e-6)
    inverse = (8 / math.pi) * (8 / (2 * n + 1) - 1)
    torch.testing.assert_close(module(init="inv").frequency[0], inverse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module().log_decay.exp(), torch.full((C, 4), 0.5, dtype=torch.float64))
    dt = module().log_dt.exp()
    assert (dt >= 1e-3).all()
    assert (dt <= 1e-1).all()


def test_cab_variant_shares_the_dynamics_and_scales_the_read_out_by_b() -> None:
    layer = module(variant="cab", init="inv", state=16, output="linear")
    assert layer.log_decay.shape == layer.frequency.shape == (1, 8)
    assert layer.output.out_features == C
    # E|C_n|² = |B_n|² and 2 Σ_n |B_n/A_n|² = 1: the mean over many channels shows it
    wide = attnbench.build("s4d", 4000, 1, variant="cab", init="inv", state=16)
    power = torch.view_as_complex(wide.read_out.detach()).abs().square().mean((0, 1))
    a = torch.complex(-wide.log_decay.detach().exp(), wide.frequency.detach())[0]
    assert abs(2 * (power / a.abs().square()).sum() - 1) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_padded_tokens_count_as_zero(pattern: str, backend: str) -> None:
    layer = module(pattern, backend)
    x = tokens(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, 6:] = True
    torch.testing.assert_close(layer(x, key_padding_mask=padded)[:, :6], layer(x[:, :6]))


def test_half_precision_inputs_are_convolved_in_single_precision() -> None:
    layer = module().to(torch.bfloat16)
    x = tokens(20).to(torch.bfloat16)
    assert layer.convolve(x).dtype is torch.float32
    assert layer(x).dtype is torch.bfloat16


def test_odd_states_and_contexts_are_refused() -> None:
    with pytest.raises(UsageError, match="observed state=3, expected an even number"):
        module(state=3)
    with pytest.raises(UsageError, match="observed a context"):
        module()(tokens(4), tokens(4))


@pytest.mark.parametrize("pattern", ["NS", "CS"])
@pytest.mark.parametrize("hyper", [{}, {"channels": 2, "output": "linear"}])
def test_flops_are_the_counted_gemms_and_the_ffts(pattern: str, hyper: dict[str, object]) -> None:
    layer = module(pattern, **hyper)
    for n in (1, 24, 37):
        with FlopCounterMode(display=False) as counter:
            layer(tokens(n, b=1))
        length = 1 << (2 * n - 1).bit_length()
        transforms = C * (1 + 2 * layer.hp.channels)
        ffts = round(transforms * 2.5 * length * math.log2(length))
        assert counter.get_total_flops() + ffts == layer.flops(n, n)
