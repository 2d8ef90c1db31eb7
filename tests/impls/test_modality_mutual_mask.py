"""modality_mutual_mask against its rule pair by pair: causal, and rectangles from images to questions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.synthetic import Dims, make_all

TWO_IMAGES = [0, 1, 1, 1, 0, -1, -1, 0, 2, 2, 1, -2, -1, -2, 0, 0]


def module(backend: str = "reference"):
    return attnbench.build("modality_mutual_mask", 16, 2, backend=backend)


def heads(n: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 2, n, 8, dtype=torch.float64)


def one_image(n: int, a: int, b: int, e: int) -> Tensor:
    """An image in [a, b), its question in [b, e)."""
    return torch.tensor([[1 if a <= i < b else -1 if b <= i < e else 0 for i in range(n)]])


def explicit(spans: Tensor) -> Tensor:
    n = spans.shape[1]
    rows = [
        [[j <= i or (g[i] > 0 and g[j] == -g[i]) for j in range(n)] for i in range(n)] for g in spans.tolist()
    ]
    return torch.tensor(rows).unsqueeze(1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_explicit_mask_of_each_sample(backend):
    spans = torch.cat((torch.tensor([TWO_IMAGES]), one_image(16, 2, 7, 12), torch.zeros(1, 16).long()))
    q, k, v = heads(16, 3), heads(16, 3), heads(16, 3)
    mask = explicit(spans)
    ours = module(backend)
    assert torch.equal(ours.visible(16, 16, torch.device("cpu"), spans=spans), mask)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(ours.attend(q, k, v, spans=spans), scores.softmax(-1) @ v)


@pytest.mark.parametrize(("a", "b", "e"), [(2, 7, 12), (0, 1, 16), (0, 8, 8), (4, 4, 9)])
def test_one_image_is_the_triangle_and_a_rectangle(a, b, e):
    mask = module().visible(16, 16, torch.device("cpu"), spans=one_image(16, a, b, e))[0, 0]
    expected = torch.ones(16, 16, dtype=torch.bool).tril()
    expected[a:b, b:e] = True
    assert torch.equal(mask, expected)


def test_without_an_image_or_a_question_it_is_causal():
    q, k, v = heads(12), heads(12), heads(12)
    causal = attnbench.attention(q, k, v, "softmax", "CS", "reference")
    for spans in (one_image(12, 3, 3, 8), one_image(12, 3, 8, 8), torch.zeros(1, 12).long()):
        torch.testing.assert_close(module().attend(q, k, v, spans=spans), causal)


def test_first_row_of_an_image_of_one_token():
    q, k, v = heads(9), heads(9), heads(9)
    o = module().attend(q, k, v, spans=one_image(9, 0, 1, 5))
    p = (q[:, :, :1] @ k[:, :, :5].mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(o[:, :, :1], p @ v[:, :, :5])


def test_the_answer_stays_unseen_and_the_question_reaches_the_image():
    q, k, v = heads(14), heads(14), heads(14)
    spans = one_image(14, 2, 6, 10)
    before = module().attend(q, k, v, spans=spans)

    def moved(token: int) -> list[int]:
        other = v.clone()
        other[:, :, token] += 1.0
        changed = (module().attend(q, k, other, spans=spans) - before).abs().amax((0, 1, 3)) > 0
        return changed.nonzero().flatten().tolist()

    assert moved(11) == [11, 12, 13]
    assert moved(8) == [2, 3, 4, 5, *range(8, 14)]


@pytest.mark.parametrize("n", [1, 5, 16, 37, 64])
def test_costs_count_the_synthetic_layout(n):
    ours = module()
    dims = Dims(1, n, n, 2, 2, 8)
    spans = make_all(ours.spec, "op", dims, torch.Generator(), torch.float32, "cpu")["spans"]
    assert ours.pairs(n, n) == ours.visible(n, n, torch.device("cpu"), spans=spans).sum()
    assert ours.flops(64, 64) == 4 * 2 * 8 * (64 * 65 // 2 + 28 * 16)


def test_wrong_spans_are_refused():
    q = heads(8)
    with pytest.raises(UsageError, match="observed no spans"):
        module().attend(q, q, q)
    with pytest.raises(UsageError, match=r"observed spans \(1, 7\) for 8 queries"):
        module().attend(q, q, q, spans=torch.zeros(1, 7).long())
    with pytest.raises(UsageError, match="expected \\(B, N\\) with N = M"):
        module().attend(q[:, :, 4:], q, q, spans=torch.zeros(1, 4).long())


def test_triton_agrees():
    spans = torch.cat((one_image(36, 3, 17, 30), one_image(36, 0, 5, 36)))
    given = [heads(36, 2).float().requires_grad_() for _ in range(3)]
    results = []
    for backend in ("reference", "triton"):
        o = module(backend).attend(*given, spans=spans)
        results.append((o, *torch.autograd.grad(o.square().sum(), given)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
