"""selective_self_attention against its definition token by token, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError

CALLS = [("NS", 9, 9), ("CS", 9, 9), ("CS", 4, 9), ("CS", 7, 4), ("NC", 5, 8), ("CC", 8, 5)]


def build(pattern: str = "NS", *, kv: int = 2, backend: str = "reference", random: bool = True, **hyper):
    ours = attnbench.build(
        "selective_self_attention",
        16,
        2,
        pattern=pattern,
        backend=backend,
        num_kv_heads=kv,
        projections=False,
        **hyper,
    )
    if random:
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter)
    return ours.double()


def heads(n: int, count: int = 2) -> Tensor:
    return torch.randn(2, count, n, 8, dtype=torch.float64)


def oracle(ours, q: Tensor, k: Tensor, v: Tensor, padded: Tensor | None = None) -> Tensor:
    """Loops over batch, head, query and key."""
    (batch, count, n, d), m = q.shape, k.shape[2]
    group = count // k.shape[1]
    there = torch.ones(batch, m, dtype=torch.bool) if padded is None else ~padded
    o = torch.zeros_like(q)

    def tau(name: str, h: int, x: Tensor, number: int) -> Tensor:
        if name not in ours.directions:
            return torch.ones(())
        position = torch.sigmoid(ours.alphas[name]) * math.log(max(number, 1))
        return torch.tanh(ours.directions[name][h] @ x) + 1 + position

    for b in range(batch):
        place = there[b].cumsum(0)
        for h in range(count):
            g = h // group
            for i in range(n):
                seen = [j for j in range(m) if there[b, j] and (ours.pattern != "CS" or j <= i + m - n)]
                if not seen:
                    continue
                t = tau("q", h, q[b, h, i], len(seen))
                keys = [tau("k", g, k[b, g, j], int(place[j])) * k[b, g, j] for j in seen]
                values = [tau("v", g, v[b, g, j], int(place[j])) * v[b, g, j] for j in seen]
                p = torch.stack([t * (q[b, h, i] @ x) / math.sqrt(d) for x in keys]).softmax(0)
                o[b, h, i] = p @ torch.stack(values)
    return o


@pytest.mark.parametrize(("pattern", "n", "m"), CALLS)
@pytest.mark.parametrize("hyper", [{}, {"value_temp": False}, {"key_temp": True}], ids=["qv", "q", "qkv"])
@torch.no_grad()
def test_equals_the_definition(pattern, n, m, hyper):
    ours = build(pattern, kv=1, **hyper)
    q, k, v = heads(n), heads(m, 1), heads(m, 1)
    torch.testing.assert_close(ours.attend(q, k, v), oracle(ours, q, k, v))


@torch.no_grad()
def test_padding_is_not_counted():
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[0, [2, 5, 8]] = True
    for pattern in ("NS", "CS"):
        ours = build(pattern)
        q, k, v = heads(9), heads(9), heads(9)
        torch.testing.assert_close(
            ours.attend(q, k, v, key_padding_mask=padded), oracle(ours, q, k, v, padded)
        )


@pytest.mark.parametrize("pattern", ["NS", "CS"])
@torch.no_grad()
def test_zero_directions_and_no_position_are_softmax_attention(pattern):
    q, k, v = heads(7), heads(7), heads(7)
    ours = build(pattern, random=False, alpha_init=-math.inf)
    dense = attnbench.attention(q, k, v, "softmax", pattern, "reference")
    torch.testing.assert_close(ours.attend(q, k, v), dense)


@torch.no_grad()
def test_position_form_is_the_token_form_without_tokens():
    beta = 1.5
    share = math.exp(-math.exp(beta))
    q, k, v = heads(7), heads(7), heads(7)
    token = build("CS", random=False, value_temp=False, alpha_init=math.log(share / (1 - share))).attend(
        q, k, v
    )
    position = build("CS", random=False, form="position", beta_init=beta)
    torch.testing.assert_close(position.attend(q, k, v), token)
    assert [name for name, _ in position.named_parameters()] == ["beta"]
    assert abs(torch.sigmoid(torch.tensor(-4.47)).item() - share) < 1e-4


@torch.no_grad()
def test_temperature_zero_is_the_mean_of_the_scaled_values():
    ours = build("NC", alpha_init=-math.inf)
    ours.alphas["q"].fill_(-math.inf)
    ours.directions["q"].fill_(-1e3)
    q, k, v = torch.ones(1, 2, 3, 8).double(), heads(6)[:1], heads(6)[:1]
    logs = torch.arange(1.0, 7.0).double().log()
    tau = ours.temperature("v", v, logs)
    expected = (tau.unsqueeze(-1) * v).mean(2, keepdim=True).expand(-1, -1, 3, -1)
    torch.testing.assert_close(ours.attend(q, k, v), expected)


@torch.no_grad()
def test_first_causal_row_does_not_know_alpha():
    q, k, v = heads(6), heads(6), heads(6)
    outputs = [build("CS", random=False, alpha_init=a).attend(q, k, v) for a in (-4.0, 4.0)]
    torch.testing.assert_close(outputs[0][:, :, 0], outputs[1][:, :, 0])
    assert not torch.allclose(outputs[0][:, :, 1:], outputs[1][:, :, 1:])


def test_flops_by_hand():
    assert build("NS").flops(10, 10) == 4 * 2 * 100 * 8 + 2 * 8 * 2 * (10 + 10)
    assert build("CS", value_temp=False).flops(10, 10) == 4 * 2 * 55 * 8 + 2 * 8 * 2 * 10
    assert build("NC", kv=1, key_temp=True).flops(10, 6) == 4 * 2 * 60 * 8 + 2 * 8 * (20 + 12)
    assert build("NS", form="position").flops(10, 10) == 4 * 2 * 100 * 8


def test_key_temperature_needs_the_token_form():
    with pytest.raises(UsageError, match="expected form='token'"):
        build(form="position", key_temp=True)


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC", "CC"])
def test_triton_agrees(pattern):
    n, m = (24, 24) if pattern in ("NS", "CS") else (20, 33)
    given = [heads(length)[:1].float().requires_grad_() for length in (n, m, m)]
    ours = build(pattern).float()
    results = []
    for backend in ("reference", "triton"):
        ours.backend = backend
        o = ours.attend(*given)
        wanted = [*given, *ours.parameters()]
        results.append((o, *torch.autograd.grad(o.square().sum(), wanted)))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
