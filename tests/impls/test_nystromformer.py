"""nystromformer against a direct evaluation of its formula and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear._segments import segment_means
from attnbench.impls.linear.nystromformer import pseudo_inverse

BACKENDS = ("reference", "torch")


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def run(q: Tensor, k: Tensor, v: Tensor, pattern: str, backend: str, **hyper: object) -> Tensor:
    return attnbench.attention(q, k, v, "nystromformer", pattern, backend, **hyper)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (scale * q @ k.transpose(-1, -2)).softmax(-1) @ v


def direct(q: Tensor, k: Tensor, v: Tensor, r: int, *, iterations: int = 6, cab: bool = False) -> Tensor:
    """The formula with an explicit start and explicit powers of X = F2 Z, as the paper has them."""
    scale = 1 / q.shape[-1] if cab else q.shape[-1] ** -0.5
    qb, kb = segment_means(q, r)[0], segment_means(k, r)[0]
    f1 = (scale * q @ kb.transpose(-1, -2)).softmax(-1)
    f2 = (scale * qb @ kb.transpose(-1, -2)).softmax(-1)
    f3 = (scale * qb @ k.transpose(-1, -2)).softmax(-1)
    norm = f2.sum(-2).amax() if cab else f2.sum(-2).amax(-1)[..., None, None]
    z = f2.transpose(-1, -2) / norm
    for _ in range(iterations):
        x = f2 @ z
        z = z @ (13 * torch.eye(r) - 15 * x + 7 * x @ x - x @ x @ x) / 4
    return f1 @ z @ f3 @ v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pattern", "n", "m"), [("NS", 24, 24), ("NS", 25, 25), ("NC", 11, 30)])
def test_equals_the_formula(pattern: str, n: int, m: int, backend: str) -> None:
    q, k, v = heads(n), heads(m), heads(m, 6)
    o = run(q, k, v, pattern, backend, num_landmarks=5)
    torch.testing.assert_close(o, direct(q, k, v, 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m"), [(6, 6), (3, 20), (20, 3), (1, 1)])
def test_few_tokens_give_softmax_attention(n: int, m: int, backend: str) -> None:
    q, k, v = heads(n), heads(m), heads(m)
    torch.testing.assert_close(run(q, k, v, "NC", backend, num_landmarks=6), softmax_attention(q, k, v))


def test_one_landmark_per_token_converges_to_softmax_attention() -> None:
    """With R = N the three factors are the same matrix, and its pseudo-inverse restores it."""
    q, k, v = heads(40), heads(40), heads(40)
    kernel = (8**-0.5 * q @ k.transpose(-1, -2)).softmax(-1)
    errors = []
    for iterations in (6, 30):
        o = kernel @ pseudo_inverse(kernel, iterations) @ kernel @ v
        errors.append((o - kernel @ v).abs().max().item())
    assert errors[0] < 0.5
    assert errors[1] < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_values_are_returned_as_the_iterations_grow(backend: str) -> None:
    q, k = heads(40), heads(40)
    v = torch.full_like(q, 3.0)
    worst = [
        (run(q, k, v, "NS", backend, num_landmarks=8, iterations=t) - v).abs().max().item()
        for t in (6, 12, 40)
    ]
    assert worst[0] > worst[1] > worst[2]
    assert worst[2] < 1e-9


def test_the_iteration_inverts_and_is_the_pseudo_inverse_of_singular_matrices() -> None:
    a = torch.randn(3, 2, 8, 8, dtype=torch.float64).softmax(-1)
    eye = torch.eye(8, dtype=torch.float64).expand_as(a)
    torch.testing.assert_close(pseudo_inverse(a, 30) @ a, eye, rtol=0, atol=1e-8)
    a[..., 3, :] = 0.0
    a[..., :, 5] = 0.0
    torch.testing.assert_close(pseudo_inverse(a, 40), torch.linalg.pinv(a), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_tokens_inside_a_segment_permutes_the_outputs(backend: str) -> None:
    q, k, v = heads(20), heads(20), heads(20)
    order = torch.arange(20)
    order[4:8] = torch.tensor([6, 4, 7, 5])
    o = run(q, k, v, "NS", backend, num_landmarks=5)
    permuted = run(q[:, :, order], k[:, :, order], v[:, :, order], "NS", backend, num_landmarks=5)
    torch.testing.assert_close(permuted, o[:, :, order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [4, 21])
def test_convolution_adds_a_filtered_v(n: int, backend: str) -> None:
    q, k, v = heads(n), heads(n), heads(n)
    module = attnbench.build("nystromformer", 16, 2, backend=backend, num_landmarks=5, conv_kernel=3).double()
    added = module.attend(q, k, v) - run(q, k, v, "NS", backend, num_landmarks=5)
    taps = module.conv.weight[:, 0, :, 0]
    padded = torch.nn.functional.pad(v, (0, 0, 1, 1))
    expected = sum(taps[:, t].view(1, 2, 1, 1) * padded[:, :, t : t + n] for t in range(3))
    torch.testing.assert_close(added, expected)


@pytest.mark.parametrize(("pattern", "kernel"), [("NS", 4), ("NC", 3)])
def test_convolutions_without_a_meaning_are_refused(pattern: str, kernel: int) -> None:
    with pytest.raises(UsageError, match=f"observed conv_kernel={kernel}"):
        attnbench.build("nystromformer", 8, 2, pattern=pattern, conv_kernel=kernel)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_elements_do_not_influence_each_other(backend: str) -> None:
    q, k, v = heads(20), heads(20), heads(20)
    alone = run(q[:1], k[:1], v[:1], "NS", backend, num_landmarks=5)
    torch.testing.assert_close(run(q, k, v, "NS", backend, num_landmarks=5)[:1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cab_variant_scales_by_the_head_dimension_and_starts_from_the_batch(backend: str) -> None:
    q, k, v = 4 * heads(20), 4 * heads(20), heads(20)
    o = run(q, k, v, "NS", backend, num_landmarks=5, variant="cab")
    torch.testing.assert_close(o, direct(q, k, v, 5, cab=True))
    few = run(q, k, v, "NS", backend, num_landmarks=20, variant="cab")
    torch.testing.assert_close(few, softmax_attention(q, k, v, 1 / 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "NC"])
def test_padding_equals_dropping_the_tokens(pattern: str, backend: str) -> None:
    q, k, v = heads(20), heads(20), heads(20)
    padded = torch.zeros(2, 20, dtype=torch.bool)
    padded[:, [0, 7, 8, 15, 16, 17, 18, 19]] = True
    kept = ~padded[0]
    options = {"num_landmarks": 5}
    module = attnbench.build("nystromformer", 16, 2, pattern=pattern, backend=backend, **options).double()
    o = module.attend(q, k, v, key_padding_mask=padded)
    queries = slice(None) if pattern == "NC" else kept
    expected = run(q[:, :, queries], k[:, :, kept], v[:, :, kept], pattern, backend, **options)
    torch.testing.assert_close(o[:, :, queries], expected)


def test_more_landmarks_than_kept_tokens_stay_finite_and_near_softmax() -> None:
    q, k, v = heads(12), heads(12), heads(12)
    padded = torch.zeros(2, 12, dtype=torch.bool)
    padded[0, 2:] = True
    padded[1, :] = True
    module = attnbench.build("nystromformer", 16, 2, num_landmarks=5, iterations=20, backend="reference")
    o = module.double().attend(q, k, v, key_padding_mask=padded)
    expected = softmax_attention(q[:1, :, :2], k[:1, :, :2], v[:1, :, :2])
    torch.testing.assert_close(o[:1, :, :2], expected, rtol=1e-6, atol=1e-6)
    assert (o[1] == 0).all()


def test_triton_agrees_with_fp64() -> None:
    q, k, v = heads(40, 16, b=1), heads(40, 16, b=1), heads(40, 16, b=1)
    o = run(q.float(), k.float(), v.float(), "NS", "triton", num_landmarks=6)
    expected = direct(q, k, v, 6)
    torch.testing.assert_close(o.double(), expected, rtol=1e-3, atol=1e-3)
