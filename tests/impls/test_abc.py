"""abc against its direct form, prefix by prefix, and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.kernels import Unsupported

BACKENDS = ("reference", "torch")
PATTERNS = ("NS", "CS", "NC", "CC")


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def module(pattern: str, backend: str = "reference", **hyper: object) -> torch.nn.Module:
    hyper = {"slots": 3, **hyper}
    return attnbench.build("abc", 16, 2, pattern=pattern, backend=backend, **hyper).double()


def pooled(q: Tensor, k: Tensor, v: Tensor, abc: torch.nn.Module) -> Tensor:
    """The noncausal definition."""
    slot_k = (k @ abc.control_k).softmax(2).transpose(-1, -2) @ k
    slot_v = (v @ abc.control_v).softmax(2).transpose(-1, -2) @ v
    return (q.shape[-1] ** -0.5 * q @ slot_k.transpose(-1, -2)).softmax(-1) @ slot_v


def direct(q: Tensor, k: Tensor, v: Tensor, abc: torch.nn.Module) -> Tensor:
    """The definition; under CS every query pools its own prefix."""
    if abc.pattern != "CS":
        return pooled(q, k, v, abc)
    rows = [pooled(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], abc) for i in range(q.shape[2])]
    return torch.cat(rows, 2)


def sizes(pattern: str) -> tuple[int, int]:
    return (5, 11) if pattern in ("NC", "CC") else (21, 21)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_formula(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    q, k, v = heads(n), heads(m), heads(m)
    abc = module(pattern, backend)
    torch.testing.assert_close(abc.attend(q, k, v), direct(q, k, v, abc))


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_of_the_recurrence_do_not_matter(backend: str) -> None:
    q, k, v = heads(150, b=1), heads(150, b=1), heads(150, b=1)
    abc = module("CS", backend)
    torch.testing.assert_close(abc.attend(q, k, v), direct(q, k, v, abc))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_slot_ignores_the_query(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    k, v = heads(m), heads(m)
    abc = module(pattern, backend, slots=1)
    weights = (v @ abc.control_v).exp()
    if pattern == "CS":
        expected = (weights * v).cumsum(2) / weights.cumsum(2)
    else:
        expected = ((weights * v).sum(2, keepdim=True) / weights.sum(2, keepdim=True)).expand(2, 2, n, 8)
    for q in (heads(n), heads(n)):
        torch.testing.assert_close(abc.attend(q, k, v), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_zero_control_gives_the_mean_value(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    q, k, v = heads(n), heads(m), heads(m)
    abc = module(pattern, backend)
    torch.nn.init.zeros_(abc.control_v)
    count = torch.arange(1, m + 1, dtype=torch.float64).view(-1, 1)
    expected = v.cumsum(2) / count if pattern == "CS" else v.mean(2, keepdim=True).expand(2, 2, n, 8)
    torch.testing.assert_close(abc.attend(q, k, v), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_constant_values_are_returned(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    v = heads(1).expand(-1, -1, m, -1)
    o = module(pattern, backend).attend(heads(n), heads(m), v)
    torch.testing.assert_close(o, v[:, :, :1].expand_as(o))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_causal_row_is_the_noncausal_one(backend: str) -> None:
    q, k, v = heads(21), heads(21), heads(21)
    causal, whole = module("CS", backend), module("NS", backend)
    whole.load_state_dict(causal.state_dict())
    torch.testing.assert_close(causal.attend(q, k, v)[:, :, -1], whole.attend(q, k, v)[:, :, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_anywhere_equals_dropping_the_tokens(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    q, k, v = heads(n), heads(m), heads(m)
    padded = torch.zeros(2, m, dtype=torch.bool)
    padded[:, [0, 1, 4, m - 1]] = True
    kept = ~padded[0]
    rows = kept if n == m else slice(None)
    abc = module(pattern, backend)
    loud = [u.masked_fill(padded[:, None, :, None], 70.0) for u in (k, v)]
    o = abc.attend(q, *loud, key_padding_mask=padded)
    expected = direct(q[:, :, rows], k[:, :, kept], v[:, :, kept], abc)
    torch.testing.assert_close(o[:, :, rows], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_a_key_the_output_is_zero_and_gradients_are_finite(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    q, k, v = (u.requires_grad_() for u in (heads(n), heads(m), heads(m)))
    padded = torch.zeros(2, m, dtype=torch.bool)
    padded[0] = True
    abc = module(pattern, backend)
    o = abc.attend(q, k, v, key_padding_mask=padded)
    assert not o[0].any()
    o.square().sum().backward()
    for leaf in (q, k, v, *abc.parameters()):
        assert leaf.grad is None or leaf.grad.isfinite().all()
    assert not k.grad[0].any()
    assert k.grad[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_controls_neither_overflow_nor_lose_the_prefix(backend: str) -> None:
    q, k, v = heads(40), 30 * heads(40), 30 * heads(40)
    abc = module("CS", backend)
    exact = direct(q, k, v, abc)
    torch.testing.assert_close(abc.attend(q, k, v), exact)
    single = abc.float().attend(q.float(), k.float(), v.float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_gradients_of_inputs_and_controls(pattern: str) -> None:
    q, k, v = (heads(6, b=1).requires_grad_() for _ in range(3))
    abc = module(pattern)

    def attend(q: Tensor, k: Tensor, v: Tensor, control_k: Tensor, control_v: Tensor) -> Tensor:
        x = {"control_k": control_k, "control_v": control_v}
        return torch.func.functional_call(Attend(abc), {f"abc.{n}": w for n, w in x.items()}, (q, k, v))

    torch.autograd.gradcheck(attend, (q, k, v, abc.control_k, abc.control_v))


class Attend(torch.nn.Module):
    """Calls attend where functional_call calls forward."""

    def __init__(self, abc: torch.nn.Module) -> None:
        super().__init__()
        self.abc = abc

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.abc.attend(q, k, v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_control_by_the_token_pools_keys_and_values_alike(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    abc = module(pattern, backend, control="x")
    x = torch.randn(2, n, 16, dtype=torch.float64)
    context = torch.randn(2, m, 16, dtype=torch.float64) if n != m else None
    source = x if context is None else context
    padded = torch.zeros(2, m, dtype=torch.bool)
    padded[:, [0, 3]] = True
    kept = ~padded[0]
    q, k, v, logits = (
        abc.split(layer(u), 2)
        for layer, u in ((abc.q_proj, x), (abc.k_proj, source), (abc.v_proj, source), (abc.control, source))
    )
    rows = []
    for i in range(n):
        seen = kept & (torch.arange(m) <= i) if pattern == "CS" else kept
        weights = logits[:, :, seen].softmax(2).transpose(-1, -2)
        p = (8**-0.5 * q[:, :, i : i + 1] @ (weights @ k[:, :, seen]).transpose(-1, -2)).softmax(-1)
        rows.append(p @ (weights @ v[:, :, seen]))
    expected = abc.out_proj(abc.join(torch.cat(rows, 2)))
    torch.testing.assert_close(abc(x, context, key_padding_mask=padded), expected)


def test_control_by_the_token_needs_its_logits_and_only_it() -> None:
    q, k, v, logits = heads(4), heads(4), heads(4, 6), heads(4, 3)
    by_token = module("NS", control="x")
    weights = logits.softmax(2).transpose(-1, -2)
    expected = (8**-0.5 * q @ (weights @ k).transpose(-1, -2)).softmax(-1) @ (weights @ v)
    torch.testing.assert_close(by_token.attend(q, k, v, slot_logits=logits), expected)
    with pytest.raises(UsageError, match="observed slot_logits none"):
        by_token.attend(q, k, v)
    with pytest.raises(UsageError, match="expected none"):
        module("NS").attend(q, k, k, slot_logits=logits)


def test_control_logits_of_a_token_are_bounded() -> None:
    abc, x = module("NS", control="x"), torch.randn(2, 5, 16, dtype=torch.float64)
    torch.nn.init.constant_(abc.control.weight, 1e3)
    k, v = (abc.split(layer(x), 2) for layer in (abc.k_proj, abc.v_proj))
    logits = (abc.control.weight.sign()[0] @ x.mT).sign() * 32.0
    o = abc.attend(abc.split(abc.q_proj(x), 2), k, v, slot_logits=logits[:, None, :, None].expand(2, 2, 5, 3))
    torch.testing.assert_close(abc(x), abc.out_proj(abc.join(o)))


def test_cab_variant_reads_only_the_own_token() -> None:
    q, k, v = heads(9), heads(9), heads(9)
    abc = module("CS", variant="cab")
    weights = [(u @ w).exp() for u, w in ((k, abc.control_k), (v, abc.control_v))]
    write_k, write_v = (w / w.cumsum(2) for w in weights)
    p = (8**-0.5 * (q * k).sum(-1, keepdim=True) * write_k).softmax(-1)
    expected = (p * write_v).sum(-1, keepdim=True) * v
    torch.testing.assert_close(abc.attend(q, k, v), expected)
    same = module("NS", variant="cab")
    torch.testing.assert_close(same.attend(q, k, v), direct(q, k, v, same))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_another_width_are_refused(backend: str) -> None:
    with pytest.raises(Unsupported, match="Dv = 6"):
        module("NS", backend).attend(heads(4), heads(4), heads(4, 6))


@pytest.mark.parametrize("pattern", ["NS", "CS", "CC"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    q, k, v = heads(40, b=1), heads(40, b=1), heads(40, b=1)
    abc = module(pattern, "triton")
    exact = direct(q, k, v, abc)
    o = abc.float().attend(q.float(), k.float(), v.float())
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-4)
