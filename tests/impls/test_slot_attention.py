"""slot_attention against loops over its definition, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.errors import UsageError

ID = "slot_attention"
BACKENDS = ("reference", "torch")


def build(pattern: str = "NC", backend: str = "reference", **hyper: object) -> nn.Module:
    return attnbench.build(ID, 8, 2, pattern=pattern, backend=backend, **hyper).double()


def tokens(n: int, b: int = 2) -> Tensor:
    return torch.randn(b, n, 8, dtype=torch.float64)


def gru(cell: nn.GRUCell, u: Tensor, s: Tensor) -> Tensor:
    """The cell by its equations: reset, update and new gate."""
    r, z, n = (cell.weight_ih @ u + cell.bias_ih).chunk(3)
    hr, hz, hn = (cell.weight_hh @ s + cell.bias_hh).chunk(3)
    update = torch.sigmoid(z + hz)
    return (1 - update) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + update * s


def averages(m: nn.Module, slots: Tensor, c: Tensor, eps: float) -> list[Tensor]:
    """What every slot (S, C) receives from the inputs (M, C): steps 1 to 4, one weight at a time."""
    inputs = [m.norm_inputs(row) for row in c]
    keys, values = [m.k_proj(row) for row in inputs], [m.v_proj(row) for row in inputs]
    q = [m.q_proj(m.norm_slots(s)) for s in slots]
    weights = []
    for k in keys:
        raw = [math.exp(float(row @ k) / math.sqrt(8)) for row in q]
        weights.append([x / sum(raw) + eps for x in raw])
    return [
        sum(w[s] * v for w, v in zip(weights, values, strict=True)) / sum(w[s] for w in weights)
        for s in range(len(slots))
    ]


def direct(m: nn.Module, slots: Tensor, c: Tensor, *, rounds: int = 3, eps: float = 1e-8) -> Tensor:
    for _ in range(rounds):
        received = averages(m, slots, c, eps)
        slots = torch.stack([gru(m.gru, u, s) for u, s in zip(received, slots, strict=True)])
        slots = slots + m.mlp(m.norm_mlp(slots))
    return slots


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pattern", "rounds", "eps"), [("NS", 3, 1e-8), ("NC", 1, 0.1), ("NC", 2, 0.0)])
@torch.no_grad()
def test_equals_the_rounds(pattern: str, rounds: int, eps: float, backend: str) -> None:
    module = build(pattern, backend, iterations=rounds, eps=eps)
    x, c = tokens(4), tokens(9)
    o = module(x) if pattern == "NS" else module(x, c)
    source = x if pattern == "NS" else c
    expected = torch.stack([direct(module, x[b], source[b], rounds=rounds, eps=eps) for b in range(2)])
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_special_cases(backend: str) -> None:
    module, x, c = build("NC", backend), tokens(4), tokens(9)
    o = module(x, c)
    torch.testing.assert_close(module(x, c[:, torch.randperm(9)]), o)
    torch.testing.assert_close(module(x, torch.cat((c, c), 1)), o)
    order = torch.tensor([2, 3, 0, 1])
    torch.testing.assert_close(module(x[:, order], c), o[:, order])
    alike = module(x[:, :1].expand(-1, 4, -1), c)
    torch.testing.assert_close(alike, alike[:, :1].expand_as(alike))  # nothing breaks their symmetry
    torch.testing.assert_close(alike[:, :1], module(x[:, :1], c))  # every one gets the uniform mean


@torch.no_grad()
def test_a_lone_slot_receives_the_mean() -> None:
    module, x, c = build("NC", iterations=1), tokens(1, b=1), tokens(9, b=1)
    mean = module.v_proj(module.norm_inputs(c[0])).mean(0)
    updated = gru(module.gru, mean, x[0, 0])
    torch.testing.assert_close(module(x, c)[0, 0], updated + module.mlp(module.norm_mlp(updated)))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_padding_equals_dropping_the_inputs(backend: str) -> None:
    x, c = tokens(4), tokens(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [0, 4, 8]] = True
    kept = ~padded[0]
    module = build("NC", backend)
    torch.testing.assert_close(module(x, c, key_padding_mask=padded), module(x, c[:, kept]))
    module = build("NS", backend)
    torch.testing.assert_close(module(c, key_padding_mask=padded)[:, kept], module(c[:, kept]))


@torch.no_grad()
def test_slots_from_noise() -> None:
    sampled, given = build(init="noise"), build()
    given.load_state_dict(sampled.state_dict(), strict=False)
    nn.init.normal_(sampled.log_std)
    x, c = tokens(4), tokens(9)
    slots = sampled.mean + sampled.log_std.exp() * x
    torch.testing.assert_close(sampled(x, c), given(slots, c))


def test_truncated_gradients_are_those_of_the_last_round() -> None:
    whole, cut, last = build(), build(truncated=True), build(iterations=1)
    for module in (cut, last):
        module.load_state_dict(whole.state_dict())
    x, c = tokens(4).requires_grad_(), tokens(9)
    torch.testing.assert_close(cut(x, c), whole(x, c))
    assert (torch.autograd.grad(cut(x, c).sum(), x)[0] == 0).all()
    assert (torch.autograd.grad(whole(x, c).sum(), x)[0] != 0).any()
    with torch.no_grad():
        before = whole._round(whole._round(x, *_kv(whole, c), None), *_kv(whole, c), None)
    got = torch.autograd.grad(cut(x, c).square().sum(), list(cut.gru.parameters()))
    wanted = torch.autograd.grad(last(before, c).square().sum(), list(last.gru.parameters()))
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w)


def _kv(module: nn.Module, c: Tensor) -> tuple[Tensor, Tensor]:
    inputs = module.norm_inputs(c)
    return module.k_proj(inputs).unsqueeze(1), module.v_proj(inputs).unsqueeze(1)


@pytest.mark.parametrize("hyper", [{"iterations": 0}, {"mlp_ratio": 0}, {"eps": -1.0}])
def test_values_without_a_meaning_are_refused(hyper: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="slot_attention"):
        build(**hyper)


def test_flops_by_hand() -> None:
    """C = 8: keys and values of 9 inputs, then twice 4 slots: W_q, scores and sums, GRU, MLP of 24."""
    per_round = 2 * 4 * 8 * 8 + 2 * 2 * 9 * 4 * 8 + 2 * 4 * 6 * 8 * 8 + 2 * 2 * 4 * 8 * 24
    assert build(iterations=2, mlp_ratio=3).flops(4, 9) == 2 * 2 * 9 * 8 * 8 + 2 * per_round


@pytest.mark.parametrize("pattern", ["NS", "NC"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    truth = build(pattern, iterations=2)
    fast = attnbench.build(ID, 8, 2, pattern=pattern, backend="triton", iterations=2)
    fast.load_state_dict(truth.state_dict())
    inputs = [tokens(20, b=1).requires_grad_()]
    if pattern == "NC":
        inputs.insert(0, tokens(4, b=1).requires_grad_())
    single = [t.detach().float().requires_grad_() for t in inputs]
    padded = torch.arange(20).unsqueeze(0) == 7
    expected, got = (f(*t, key_padding_mask=padded) for f, t in ((truth, inputs), (fast, single)))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for g, w in zip(torch.autograd.grad(got.square().sum(), single), wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-4)
