"""combiner against sets of tokens and spans by loops, and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.combiner import Combiner

BACKENDS = ("reference", "torch")
PATTERNS = ("NS", "CS")
VARIANTS = ("fixed", "logsparse", "axial_rowmajor", "axial_mixture")


def heads(n: int, d: int = 4, *, b: int = 1, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def module(pattern: str, backend: str = "torch", d: int = 4, **hyper: object) -> Combiner:
    return attnbench.build("combiner", 2 * d, 2, pattern=pattern, backend=backend, **hyper).double()


Set = list[int]


def around(index: int, members: Set, *, causal: bool) -> list[Set]:
    """What lies before ``index``, and after it unless causal; empty sets left out."""
    sides = [[j for j in members if j < index], [] if causal else [j for j in members if j > index]]
    return [side for side in sides if side]


def aligned_blocks(i: int) -> list[Set]:
    """The blocks of the set bits of i, which tile 0..i − 1."""
    blocks = []
    for level in range(i.bit_length()):
        if i >> level & 1:
            end = (i >> level) << level
            blocks.append(list(range(end - (1 << level), end)))
    return blocks


def sets(i: int, n: int, width: int, variant: str, *, causal: bool) -> tuple[Set, list[Set]]:
    """Direct tokens and spans of query i by the definition (axial_rowmajor: its rows)."""
    row = [j for j in range(n) if j // width == i // width]
    if variant == "logsparse":
        spans = aligned_blocks(i)
        if not causal:
            spans += [[n - 1 - j for j in block] for block in aligned_blocks(n - 1 - i)]
        return [i], spans
    seen = [j for j in row if j <= i or not causal]
    rows = {j // width for j in range(n)}
    others = [r for r in sorted(rows) if r < i // width or (not causal and r > i // width)]
    if variant in ("fixed", "axial_rowmajor"):
        return seen, [[j for j in range(n) if j // width == r] for r in others]
    column = [j for j in range(n) if j % width == i % width]
    direct = seen + [j for part in around(i, column, causal=causal) for j in part]
    spans = []
    for u in range(width):
        if u != i % width:
            at = i // width * width + u
            spans += around(at, [j for j in range(n) if j % width == u], causal=causal)
    for r in others:
        at = r * width + i % width
        members = [j for j in range(n) if j // width == r]
        spans += around(at, members, causal=False)
    return direct, spans


def direct_form(
    q: Tensor, k: Tensor, v: Tensor, width: int, variant: str, *, causal: bool, summary: str = "none"
) -> Tensor:
    """One softmax per query over its direct tokens and its spans, span by span."""
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    rows = []
    for i in range(n):
        near, spans = sets(i, n, width, variant, causal=causal)
        keys, values = [k[:, :, near]], [v[:, :, near]]
        for span in spans:
            if variant == "axial_rowmajor":
                at = span[0] // width * width + i % width
                if at >= n:  # a cell without a token summarises nothing
                    continue
                query, key = q[:, :, [at]], k[:, :, [at]]
            else:
                query, key = (x[:, :, span].amax(2, keepdim=True) for x in (q, k))
            weights = (scale * query @ k[:, :, span].mT).softmax(-1)
            keys.append(weights @ k[:, :, span] if summary == "wsum" else key)
            values.append(weights @ v[:, :, span])
        scores = scale * q[:, :, i : i + 1] @ torch.cat(keys, 2).mT
        rows.append(scores.softmax(-1) @ torch.cat(values, 2))
    return torch.cat(rows, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "width"), [(12, 4), (15, 5), (14, 4), (3, 4)])
def test_equals_the_definition(n: int, width: int, variant: str, pattern: str, backend: str) -> None:
    q, k, v = heads(n), heads(n), heads(n, 3)
    o = module(pattern, backend, variant=variant, width=width).attend(q, k, v)
    width = min(width, n)
    torch.testing.assert_close(o, direct_form(q, k, v, width, variant, causal=pattern == "CS"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_mean_keys_of_rows(pattern: str, backend: str) -> None:
    q, k, v = heads(14), heads(14), heads(14, 3)
    layer = module(pattern, backend, variant="axial_rowmajor", row_summary="wsum", width=4)
    expected = direct_form(q, k, v, 4, "axial_rowmajor", causal=pattern == "CS", summary="wsum")
    torch.testing.assert_close(layer.attend(q, k, v), expected)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("variant", "n", "width"),
    [
        ("fixed", 11, 11),
        ("fixed", 11, 1),
        ("fixed", 11, 99),
        ("axial_rowmajor", 11, 11),
        ("axial_mixture", 11, 11),
        ("logsparse", 2, None),
        ("logsparse", 1, None),
    ],
)
def test_one_row_rows_of_one_token_and_two_tokens_are_softmax_attention(
    variant: str, n: int, width: int | None, pattern: str
) -> None:
    if variant == "axial_mixture":
        n = width = 1  # beside the row itself its halves are spans of no other row
    q, k, v = heads(n), heads(n), heads(n)
    o = module(pattern, variant=variant, width=width).attend(q, k, v)
    torch.testing.assert_close(o, softmax_attention(q, k, v, causal=pattern == "CS"))


def test_a_span_counts_once_whatever_its_length() -> None:
    v = heads(12)
    o = module("CS", width=4).attend(torch.zeros_like(v), heads(12), v)
    means = v.unflatten(2, (3, 4)).mean(3)
    for i in range(12):
        r, c = divmod(i, 4)
        total = v[:, :, 4 * r : i + 1].sum(2) + means[:, :, :r].sum(2)
        torch.testing.assert_close(o[:, :, i], total / (c + 1 + r))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_at_the_end_is_dropped_and_constant_values_come_out(variant: str, pattern: str) -> None:
    q, k, v = heads(16), heads(16), heads(16)
    padded = torch.zeros(1, 16, dtype=torch.bool)
    padded[:, 12:] = True  # a whole row of 4
    layer = module(pattern, variant=variant, width=4)
    o = layer.attend(q, k, v, key_padding_mask=padded)[:, :, :12]
    if variant != "logsparse" or pattern == "CS":  # the mirrored blocks are aligned at the end
        torch.testing.assert_close(o, layer.attend(q[:, :, :12], k[:, :, :12], v[:, :, :12]))
    scattered = torch.zeros(1, 16, dtype=torch.bool)
    scattered[:, [1, 4, 5, 6, 7, 13]] = True  # the second row has no token
    constant = heads(1).expand_as(v)
    o = layer.attend(q, k, constant, key_padding_mask=scattered)[:, :, ~scattered[0]]
    torch.testing.assert_close(o, constant[:, :, : o.shape[2]])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_finite_where_nothing_is_seen(variant: str, pattern: str) -> None:
    q, k, v = (heads(14).requires_grad_() for _ in range(3))
    everything = torch.ones(1, 14, dtype=torch.bool)
    o = module(pattern, variant=variant, width=4).attend(q, k, v, key_padding_mask=everything)
    o.square().sum().backward()
    assert not o.any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_outputs_ignore_the_future_and_noncausal_ones_do_not(variant: str, pattern: str) -> None:
    layer, (q, k, v) = module(pattern, variant=variant, width=4), (heads(16) for _ in range(3))
    before = layer.attend(q, k, v)
    for x in (q, k, v):
        x[:, :, 10:] = 5 * torch.randn_like(x[:, :, 10:])
    moved = (layer.attend(q, k, v) - before)[:, :, :10].abs().amax((0, 1, 3))
    assert (moved < 1e-12).all() if pattern == "CS" else (moved > 1e-6).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("variant", [*VARIANTS, "wsum"])
def test_flops(variant: str, pattern: str) -> None:
    hyper = (
        {"variant": "axial_rowmajor", "row_summary": "wsum"} if variant == "wsum" else {"variant": variant}
    )
    layer = module(pattern, "reference", width=4, **hyper)
    q = heads(16)
    with FlopCounterMode(display=False) as counter:
        layer.attend(q, q, q)
    assert counter.get_total_flops() == layer.counted_flops(16, 16)
    if variant == "wsum":
        return
    items = 0
    causal = pattern == "CS"
    for i in range(16):
        near, spans = sets(i, 16, 4, variant, causal=causal)
        items += len(near) + len(spans)
    pooled = {  # tokens read for summaries
        "fixed": 16,
        "logsparse": 3 * 16 * (1 if causal else 2),
        "axial_rowmajor": 64 if causal else 0,
        "axial_mixture": 24 * (1 if causal else 2) + 48,
    }[variant]
    expected = 4 * 4 * 2 * (items + pooled)
    assert layer.flops(16, 16) == expected


def test_widths_below_one_are_refused_and_the_default_is_the_root() -> None:
    with pytest.raises(UsageError, match="observed width=0"):
        module("NS", width=0)
    q, k, v = heads(14), heads(14), heads(14)
    torch.testing.assert_close(module("CS").attend(q, k, v), module("CS", width=4).attend(q, k, v))


@pytest.mark.parametrize(
    ("variant", "pattern", "n"),
    [
        ("fixed", "NS", 5),
        ("fixed", "CS", 5),
        ("logsparse", "CS", 5),
        ("axial_rowmajor", "NS", 4),
        ("axial_mixture", "CS", 4),
    ],
)
def test_triton_agrees_with_fp64(variant: str, pattern: str, n: int) -> None:
    q, k, v = (heads(n, 8, h=1).requires_grad_() for _ in range(3))
    single = [x.detach().float().requires_grad_() for x in (q, k, v)]
    hyper = {"variant": variant, "width": 2, "pattern": pattern}
    layers = [attnbench.build("combiner", 8, 1, backend=b, **hyper) for b in ("reference", "triton")]
    exact = layers[0].double().attend(q, k, v)
    o = layers[1].attend(*single)
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-5)
    exact.square().sum().backward()
    o.square().sum().backward()
    for x, y in zip(single, (q, k, v), strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-4)
