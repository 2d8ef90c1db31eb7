"""softmax against its dense form and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.kernels import flash, merge

BACKENDS = ("reference", "torch")
PATTERNS = ("NS", "CS", "NC", "CC")
SIZES = {"NS": [(1, 1), (9, 9)], "CS": [(1, 1), (9, 9)], "NC": [(5, 12), (12, 5)], "CC": [(5, 12), (12, 5)]}
CALLS = [(pattern, n, m) for pattern, sizes in SIZES.items() for n, m in sizes]


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 4) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def run(q: Tensor, k: Tensor, v: Tensor, pattern: str, backend: str, **hyper: object) -> Tensor:
    return attnbench.attention(q, k, v, "softmax", pattern, backend, **hyper)


def module(pattern: str, backend: str, *, kv_heads: int = 4, **hyper: object) -> torch.nn.Module:
    return attnbench.build(
        "softmax", 32, 4, pattern=pattern, backend=backend, num_kv_heads=kv_heads, **hyper
    ).double()


def scores(q: Tensor, k: Tensor, pattern: str, scale: float | None = None) -> Tensor:
    """Masked scores; under CS query i sees the keys j ≤ i + M − N."""
    s = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.transpose(-1, -2)
    n, m = s.shape[-2:]
    hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
    return s.masked_fill(hidden, -math.inf) if pattern == "CS" else s


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pattern", "n", "m"), CALLS)
def test_equals_the_formula(pattern: str, n: int, m: int, backend: str) -> None:
    q, k, v = heads(n), heads(m), heads(m, 6)
    torch.testing.assert_close(run(q, k, v, pattern, backend), scores(q, k, pattern).softmax(-1) @ v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m"), [(3, 8), (8, 3)])
def test_causal_masks_are_aligned_at_the_last_token(n: int, m: int, backend: str) -> None:
    q, k, v = heads(n), heads(m), heads(m)
    o = run(q, k, v, "CS", backend)
    for i in range(n):
        seen = max(0, i + 1 + m - n)
        row = (
            run(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen], "NC", backend)
            if seen
            else 0 * o[:, :, :1]
        )
        torch.testing.assert_close(o[:, :, i : i + 1], row)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_ones(kv_heads: int, backend: str) -> None:
    q, k, v = heads(7), heads(7, h=kv_heads), heads(7, h=kv_heads)
    expanded = (u.repeat_interleave(4 // kv_heads, 1) for u in (k, v))
    torch.testing.assert_close(run(q, k, v, "CS", backend), run(q, *expanded, "CS", backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_zero_gives_the_mean_of_the_values(backend: str) -> None:
    q, k, v = heads(6), heads(6), heads(6)
    mean = v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(run(q, k, v, "NS", backend, scale=0.0), mean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_zero_give_the_mean_of_the_visible_values(backend: str) -> None:
    k, v = heads(6), heads(6)
    count = torch.arange(1, 7, dtype=torch.float64).view(-1, 1)
    torch.testing.assert_close(run(torch.zeros_like(k), k, v, "CS", backend), v.cumsum(2) / count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_returns_its_value(backend: str) -> None:
    q, k, v = heads(5), heads(1), heads(1)
    torch.testing.assert_close(run(q, k, v, "NC", backend), v.expand_as(q))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_soft_cap_bends_the_scores_before_the_mask(pattern: str, backend: str) -> None:
    q, k, v = 4 * heads(7), 4 * heads(7), heads(7)
    capped = (2.0 * torch.tanh(scores(q, k, "NS") / 2.0)).masked_fill(
        scores(q, k, pattern).isneginf(), -math.inf
    )
    torch.testing.assert_close(run(q, k, v, pattern, backend, softcap=2.0), capped.softmax(-1) @ v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_off_by_one_is_a_gate_on_the_log_sum_exp(backend: str) -> None:
    q, k, v = heads(7), heads(9), heads(9)
    o, lse = flash(q, k, v, backend="reference")
    gated = o * torch.sigmoid(lse).unsqueeze(-1)
    torch.testing.assert_close(run(q, k, v, "NC", backend, sink="off_by_one"), gated)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NC", "CS"])
def test_sink_logits_enlarge_the_denominator_unscaled(pattern: str, backend: str) -> None:
    q, k, v = heads(7), heads(7), heads(7)
    attention = module(pattern, backend, sink="logit", scale=0.3)
    assert not attention.sink_logit.any()
    torch.nn.init.normal_(attention.sink_logit)
    weights = scores(q, k, pattern, 0.3).exp()
    den = weights.sum(-1, keepdim=True) + attention.sink_logit.exp().view(1, 4, 1, 1)
    torch.testing.assert_close(attention.attend(q, k, v), weights / den @ v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vanishing_sink_logit_is_no_sink(backend: str) -> None:
    q, k, v = heads(7), heads(7), heads(7)
    attention = module("NS", backend, sink="logit")
    torch.nn.init.constant_(attention.sink_logit, -200.0)
    torch.testing.assert_close(attention.attend(q, k, v), run(q, k, v, "NS", backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sink_pairs_are_keys_that_every_query_sees(pattern: str, backend: str) -> None:
    q, k, v = heads(6), heads(6, h=2), heads(6, h=2)
    attention = module(pattern, backend, kv_heads=2, sink="kv", n_sink=3)
    assert not attention.sink_value.any()
    torch.nn.init.normal_(attention.sink_value)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    sink_k, sink_v = (
        u.repeat_interleave(2, 0).expand(2, -1, -1, -1) for u in (attention.sink_key, attention.sink_value)
    )
    s = torch.cat((scores(q, sink_k, "NS"), scores(q, k, pattern)), -1)
    expected = s.softmax(-1) @ torch.cat((sink_v, v), 2)
    torch.testing.assert_close(attention.attend(q, k[:, ::2], v[:, ::2]), expected)


def test_sink_pairs_refuse_values_of_another_width() -> None:
    with pytest.raises(UsageError, match="observed values of width 6"):
        module("NS", "reference", sink="kv").attend(heads(4), heads(4), heads(4, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_sink_pair_is_off_by_one(backend: str) -> None:
    q, k, v = heads(7), heads(7), heads(7)
    attention = module("CS", backend, sink="kv")
    torch.nn.init.zeros_(attention.sink_key)
    torch.testing.assert_close(attention.attend(q, k, v), run(q, k, v, "CS", backend, sink="off_by_one"))


@pytest.mark.parametrize("sink", ["logit", "kv"])
def test_sinks_receive_gradients(sink: str) -> None:
    attention = module("CS", "reference", sink=sink)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    learned = {name: p for name, p in attention.named_parameters() if name.startswith("sink")}
    assert learned

    def loss(*values: Tensor) -> Tensor:
        return (
            torch.func.functional_call(attention, dict(zip(learned, values, strict=True)), (x,))
            .square()
            .sum()
        )

    x = attention.join(heads(5))
    torch.autograd.gradcheck(loss, tuple(learned.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_keys_merge_to_the_whole(backend: str) -> None:
    q, k, v = heads(5), heads(12), heads(12)
    parts = [flash(q, k[:, :, a:b], v[:, :, a:b], backend=backend) for a, b in ((0, 3), (3, 4), (4, 12))]
    o, lse = parts[0]
    for more in parts[1:]:
        o, lse = merge(o, lse, *more)
    torch.testing.assert_close(o, run(q, k, v, "NC", backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sink", ["none", "off_by_one", "kv"])
def test_padding_equals_dropping_the_keys(sink: str, backend: str) -> None:
    q, k, v = heads(5), heads(8), heads(8)
    padded = torch.zeros(2, 8, dtype=torch.bool)
    padded[:, [1, 6]] = True
    attention = module("NC", backend, sink=sink)
    expected = attention.attend(q, k[:, :, ~padded[0]], v[:, :, ~padded[0]])
    torch.testing.assert_close(attention.attend(q, k, v, key_padding_mask=padded), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sink", ["none", "off_by_one"])
def test_a_row_without_keys_is_zero(sink: str, backend: str) -> None:
    q, k, v = heads(5), heads(8), heads(8)
    padded = torch.zeros(2, 8, dtype=torch.bool)
    padded[0] = True
    o = module("NC", backend, sink=sink).attend(q, k, v, key_padding_mask=padded)
    assert not o[0].any()
    assert o[1].all()


def test_flops_count_what_the_mask_leaves() -> None:
    attention = module("CS", "reference", sink="kv", n_sink=2)
    for n, m in ((5, 5), (3, 8), (8, 3)):
        q, k = heads(n), heads(m)
        visible = int((~scores(q, k, "CS")[0, 0].isneginf()).sum())
        assert attention.flops(n, m) == 4 * 4 * 8 * (visible + 2 * n)


@pytest.mark.parametrize("sink", ["none", "kv"])
def test_triton_agrees_with_fp64(sink: str) -> None:
    q, k, v = heads(40, b=1), heads(40, b=1, h=2), heads(40, b=1, h=2)
    exact = module("CS", "reference", kv_heads=2, sink=sink)
    single = module("CS", "triton", kv_heads=2, sink=sink)
    single.load_state_dict(exact.state_dict())
    o = single.float().attend(q.float(), k.float(), v.float())
    torch.testing.assert_close(o.double(), exact.attend(q, k, v), rtol=1e-4, atol=1e-5)
