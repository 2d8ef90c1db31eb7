"""pointer_attention against loops over its definition, pointing step by step, and its special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.impls.cross import pointer_attention as pointer

ID = "pointer_attention"
BACKENDS = ("reference", "torch")


def build(pattern: str = "NC", backend: str = "reference", heads: int = 2) -> nn.Module:
    return attnbench.build(ID, 8 * heads, heads, pattern=pattern, backend=backend).double()


def heads(n: int, d: int = 8, h: int = 2) -> Tensor:
    return torch.randn(2, h, n, d, dtype=torch.float64)


@torch.no_grad()
def distribution(m: nn.Module, q: Tensor, k: Tensor, *, causal: bool = False) -> Tensor:
    """p, one score at a time; a row without a key is 0."""
    b, h, n, d = q.shape
    p = torch.zeros(b, h, n, k.shape[2], dtype=torch.float64)
    for e, g, i in ((e, g, i) for e in range(b) for g in range(h) for i in range(n)):
        last = i + k.shape[2] - n if causal else k.shape[2] - 1
        scores = [
            sum(
                float(m.score_weight[g, a]) * math.tanh(float(q[e, g, i, a] + k[e, g, j, a]))
                for a in range(d)
            )
            for j in range(last + 1)
        ]
        total = sum(math.exp(s) for s in scores)
        for j, s in enumerate(scores):
            p[e, g, i, j] = math.exp(s) / total
    return p


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pattern", "n", "m"), [("NS", 6, 6), ("CS", 6, 6), ("CS", 5, 3), ("NC", 4, 7), ("CC", 4, 7)]
)
def test_equals_the_definition(pattern: str, n: int, m: int, backend: str) -> None:
    module, q, k, v = build(pattern, backend), heads(n), heads(m), heads(m, 5)
    p = distribution(module, q, k, causal=pattern == "CS")
    torch.testing.assert_close(module.attend(q, k, v), p @ v)
    torch.testing.assert_close(module.log_probabilities(q, k).exp(), p)


def test_rows_in_parts_have_the_values_and_gradients_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointer, "PAIRS_AT_ONCE", 500)
    whole, parts = build("CS"), build("CS", "torch")
    parts.load_state_dict(whole.state_dict())
    inputs = [heads(11).requires_grad_() for _ in range(3)]
    results = [module.attend(*inputs) for module in (whole, parts)]
    torch.testing.assert_close(results[1], results[0])
    upstream = heads(11)
    gradients = [
        torch.autograd.grad(o, (*inputs, m.score_weight), upstream)
        for o, m in zip(results, (whole, parts), strict=True)
    ]
    for got, wanted in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, wanted)


@torch.no_grad()
def test_special_cases() -> None:
    module, q, k, v = build(), heads(4), heads(7), heads(7)
    same = module.attend(q[:, :, :1].expand(-1, -1, 4, -1), k, v)  # W₂ = 0: no query differs
    torch.testing.assert_close(same, same[:, :, :1].expand_as(same))
    order = torch.randperm(7)
    permuted = module.log_probabilities(q, k[:, :, order])
    torch.testing.assert_close(permuted, module.log_probabilities(q, k)[..., order])
    bound = module.score_weight.abs().sum(-1)[:, None, None]
    assert (module._scores(100 * q, 100 * k, None).abs() <= bound).all()
    module.score_weight.zero_()
    torch.testing.assert_close(module.attend(q, k, v), v.mean(2, keepdim=True).expand(-1, -1, 4, -1))


@torch.no_grad()
def test_pointing_step_by_step_never_chooses_a_key_twice() -> None:
    """Each step forbids what was chosen; the last one has a single key left, with probability 1."""
    module, k = build(heads=1), heads(5, h=1)
    allowed = torch.ones(2, 1, 5, dtype=torch.bool)
    chosen = []
    for step in range(5):
        log_p = module.log_probabilities(heads(1, h=1), k, allowed=allowed)
        assert (log_p[:, 0][~allowed] == -math.inf).all()
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 1, 1, dtype=torch.float64))
        chosen.append(log_p[:, 0, 0].argmax(-1))
        allowed = allowed.scatter(-1, chosen[-1][:, None, None], False)
        if step == 4:
            torch.testing.assert_close(log_p[:, 0, 0].amax(-1), torch.zeros(2, dtype=torch.float64))
    assert torch.stack(chosen).sort(0).values.T.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert (module.log_probabilities(heads(1, h=1), k, allowed=allowed) == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_keys_have_no_probability(backend: str) -> None:
    module, q, k, v = build("NC", backend), heads(4), heads(7), heads(7)
    padded = torch.zeros(2, 7, dtype=torch.bool)
    padded[:, [1, 6]] = True
    kept = ~padded[0]
    p = module.log_probabilities(q, k, key_padding_mask=padded).exp()
    torch.testing.assert_close(p[..., kept], distribution(module, q, k[:, :, kept]))
    assert (p[..., padded[0]] == 0).all()
    torch.testing.assert_close(module.attend(q, k, v, key_padding_mask=padded), p @ v)


def test_one_head_without_a_bias_is_the_paper() -> None:
    layer = attnbench.build(ID, 8, 1, pattern="NC", bias=False, backend="reference").double()
    d, e = (torch.randn(2, n, 8, dtype=torch.float64) for n in (3, 5))
    w2, w1 = layer.q_proj.weight, layer.k_proj.weight
    u = torch.tanh((e @ w1.T).unsqueeze(1) + (d @ w2.T).unsqueeze(2)) @ layer.score_weight[0]
    expected = u.softmax(-1) @ layer.v_proj(e) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(d, e), expected)


def test_flops_by_hand() -> None:
    """Two heads of width 8: 4 operations a channel for the score, a multiply-add for the value."""
    assert build().flops(4, 7) == 2 * (4 * 7) * 8 * (4 + 2)
    assert build("CS").flops(4, 4) == 2 * (1 + 2 + 3 + 4) * 8 * (4 + 2)
    assert build("CS").pairs(5, 3) == 0 + 0 + 1 + 2 + 3
    assert build().counted_flops(4, 7) == 2 * 2 * 4 * 7 * 8
