"""crossvit_cross_attention against its five steps token by token, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.errors import UsageError

ID = "crossvit_cross_attention"
BACKENDS = ("reference", "torch")
PROJECTIONS = ("separate", "absorbed")


def build(pattern: str = "NC", backend: str = "reference", **hyper: object) -> nn.Module:
    module = attnbench.build(ID, 12, 2, pattern=pattern, backend=backend, **hyper).double()
    for parameter in module.parameters():  # weights of 0.02 and biases of 0 would hide mistakes
        nn.init.normal_(parameter, std=0.5)
    return module


def tokens(n: int, c: int = 12) -> Tensor:
    return torch.randn(2, n, c, dtype=torch.float64)


def direct(m: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """Steps 1 to 5, one score at a time."""
    out = x.clone()
    width = m.width // m.num_heads
    for b in range(x.shape[0]):
        y = m.enter(nn.functional.gelu(m.norm_in(x[b, 0])))
        z = [m.norm(row) for row in (y, *c[b])]
        q, keys, values = m.q_proj(z[0]), [m.k_proj(row) for row in z], [m.v_proj(row) for row in z]
        read = []
        for h in range(m.num_heads):
            part = slice(h * width, (h + 1) * width)
            weights = [math.exp(float(q[part] @ k[part]) / math.sqrt(width)) for k in keys]
            read.append(sum(w * v[part] for w, v in zip(weights, values, strict=True)) / sum(weights))
        out[b, 0] = m.leave(nn.functional.gelu(m.norm_out(y + m.out_proj(torch.cat(read)))))
    return out


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "NC", "CC"])
def test_equals_the_steps(pattern: str, backend: str, projection: str) -> None:
    module, x, c = build(pattern, backend, projection=projection), tokens(4), tokens(7)
    with torch.no_grad():
        o = module(x) if pattern == "NS" else module(x, c)
        torch.testing.assert_close(o, direct(module, x, x[:, 1:] if pattern == "NS" else c))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_other_branch_may_have_another_width(projection: str) -> None:
    module, x, c = build(context_dim=8, projection=projection), tokens(3), tokens(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(module(x, c), direct(module, x, c))


def test_absorbed_weights_are_the_same_weights() -> None:
    separate, absorbed = build(), build(projection="absorbed")
    absorbed.load_state_dict(separate.state_dict(), strict=False)
    x, c = tokens(2), tokens(9)
    torch.testing.assert_close(absorbed(x, c), separate(x, c))


def test_other_rows_pass_through_unchanged() -> None:
    x = tokens(6)
    o = build()(x, tokens(5))
    assert torch.equal(o[:, 1:], x[:, 1:])
    assert not torch.equal(o[:, 0], x[:, 0])


def test_without_context_the_token_reads_itself() -> None:
    module, x = build(), tokens(1)
    y = module.enter(nn.functional.gelu(module.norm_in(x)))
    y = y + module.out_proj(module.v_proj(module.norm(y)))
    expected = module.leave(nn.functional.gelu(module.norm_out(y)))
    torch.testing.assert_close(module(x, x[:, :0]), expected)
    torch.testing.assert_close(build("NS")(x).shape, x.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "NC"])
def test_padding_equals_dropping_the_tokens(pattern: str, backend: str) -> None:
    module, x = build(pattern, backend), tokens(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, [2, 5, 8]] = True
    if pattern == "NS":
        o, alone = module(x, key_padding_mask=padded), module(x[:, ~padded[0]])
    else:
        first = tokens(1)
        o, alone = module(first, x, key_padding_mask=padded), module(first, x[:, ~padded[0]])
    torch.testing.assert_close(o[:, 0], alone[:, 0])


@pytest.mark.parametrize(
    ("pattern", "hyper", "said"), [("NC", {"context_dim": 7}, "multiple"), ("NS", {"context_dim": 8}, "NS")]
)
def test_widths_that_do_not_fit_are_refused(pattern: str, hyper: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build(pattern, **hyper)


def test_flops_by_hand() -> None:
    """C = 12, C_b = 8, H = 2, one own key and 5 of the context."""
    changes = 2 * 12 * 8 * 2
    q_and_out, k_and_v, scores_and_values = 2 * 2 * 8 * 8, 2 * 2 * 6 * 8 * 8, 2 * 2 * 6 * 8
    separate = changes + q_and_out + k_and_v + scores_and_values
    assert build(context_dim=8).flops(3, 5) == separate
    absorbed = changes + q_and_out + 2 * 2 * 8 * 8 + 2 * 2 * 2 * 6 * 8
    assert build(context_dim=8, projection="absorbed").flops(3, 5) == absorbed


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_triton_agrees_with_fp64(projection: str) -> None:
    truth = build(projection=projection)
    fast = attnbench.build(ID, 12, 2, pattern="NC", backend="triton", projection=projection)
    fast.load_state_dict(truth.state_dict())
    x, c = tokens(3).requires_grad_(), tokens(21).requires_grad_()
    single = [t.detach().float().requires_grad_() for t in (x, c)]
    expected, got = truth(x, c), fast(*single)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    wanted = torch.autograd.grad(expected.square().sum(), (x, c))
    for g, w in zip(torch.autograd.grad(got.square().sum(), single), wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-3)
