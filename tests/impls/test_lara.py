"""lara against a direct evaluation of its estimator and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear._segments import segment_means
from attnbench.impls.linear.lara import Lara

BACKENDS = ("reference", "torch")
D = 8
S = D**-0.5


def heads(n: int, d: int = D, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "reference", **hyper: object) -> Lara:
    hyper = {"num_landmarks": 5, "proposal": "seg_means", **hyper}
    return attnbench.build("lara", 2 * D, 2, pattern=pattern, backend=backend, **hyper).double().eval()


def log_kernel(u: Tensor, w: Tensor) -> Tensor:
    """l(u, w) for all pairs: (…, U, D) and (…, R, D) → (…, R, U)."""
    return S * (w @ u.transpose(-1, -2) - u.square().sum(-1).unsqueeze(-2) / 2)


def direct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mean_q: Tensor,
    mean_k: Tensor,
    *,
    weighting: str,
    alpha: float = 1.0,
    noise: Tensor | None = None,
) -> Tensor:
    """The estimator as written, with every matrix explicit and indexed (…, R, tokens)."""
    mu = mean_q + mean_k
    w = mu if noise is None else mu + noise
    of_keys = log_kernel(k, w)
    kappa = of_keys.softmax(-1) @ v
    proposals = log_kernel(mu, w)
    own = proposals.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    mixture = proposals.logsumexp(-1, keepdim=True)
    if weighting == "cab":
        log_alpha, density = S * mu @ q.transpose(-1, -2), own
    elif weighting == "mis_bh":
        log_alpha, density = 0.0, mixture
    else:
        preference = (S * mean_q @ q.transpose(-1, -2)).softmax(-1)
        heuristic = torch.exp(own - mixture)
        weights = heuristic + alpha * (preference - preference.mean(-2, keepdim=True))
        log_alpha, density = weights.clamp_min(1e-8).log(), own
    logits = log_alpha + log_kernel(q, w) + of_keys.logsumexp(-1, keepdim=True) - density
    return logits.softmax(-2).transpose(-1, -2) @ kappa


WEIGHTINGS = [
    ("mis_opt", {}),
    ("mis_opt", {"alpha": 2.0}),
    ("mis_bh", {"weighting": "mis_bh"}),
    ("cab", {"variant": "cab"}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weighting", "hyper"), WEIGHTINGS)
@pytest.mark.parametrize(("pattern", "n", "m"), [("NS", 23, 23), ("NS", 3, 3), ("NC", 11, 30)])
def test_equals_the_estimator(
    pattern: str, n: int, m: int, weighting: str, hyper: dict[str, object], backend: str
) -> None:
    q, k, v = heads(n), heads(m), heads(m, 6)
    r = min(5, n)
    expected = direct(
        q,
        k,
        v,
        segment_means(q, r)[0],
        segment_means(k, r)[0],
        weighting=weighting,
        alpha=float(hyper.get("alpha", 1.0)),
    )
    torch.testing.assert_close(module(pattern, backend, **hyper).attend(q, k, v), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weighting", "hyper"), WEIGHTINGS)
def test_constant_values_are_returned(weighting: str, hyper: dict[str, object], backend: str) -> None:
    q, k = heads(12), heads(12)
    v = torch.full_like(q, 3.0)
    torch.testing.assert_close(module("NS", backend, **hyper).attend(q, k, v), v)
    assert weighting


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weighting", "hyper"), WEIGHTINGS)
def test_one_landmark_gives_all_queries_the_same_output(
    weighting: str, hyper: dict[str, object], backend: str
) -> None:
    q, k, v = heads(12), heads(12), heads(12)
    o = module("NS", backend, num_landmarks=1, **hyper).attend(q, k, v)
    w = q.mean(2, keepdim=True) + k.mean(2, keepdim=True)
    kappa = log_kernel(k, w).softmax(-1) @ v
    torch.testing.assert_close(o, kappa.expand_as(o))
    assert weighting


@pytest.mark.parametrize("backend", BACKENDS)
def test_cab_logits_reduce_to_twice_the_product_with_the_proposal(backend: str) -> None:
    """In evaluation w = μ, and the logits are 2 s μ·q + Z − s|μ|²/2 up to a constant per query."""
    q, k, v = heads(15), heads(15), heads(15)
    mu = segment_means(q, 5)[0] + segment_means(k, 5)[0]
    of_keys = log_kernel(k, mu)
    logits = 2 * S * mu @ q.transpose(-1, -2) + of_keys.logsumexp(-1, keepdim=True)
    logits = logits - S * mu.square().sum(-1, keepdim=True) / 2
    expected = logits.softmax(-2).transpose(-1, -2) @ (of_keys.softmax(-1) @ v)
    torch.testing.assert_close(module("NS", backend, variant="cab").attend(q, k, v), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_tokens_inside_a_segment_permutes_the_outputs(backend: str) -> None:
    q, k, v = heads(20), heads(20), heads(20)
    order = torch.arange(20)
    order[4:8] = torch.tensor([6, 4, 7, 5])
    lara = module("NS", backend)
    permuted = lara.attend(q[:, :, order], k[:, :, order], v[:, :, order])
    torch.testing.assert_close(permuted, lara.attend(q, k, v)[:, :, order])


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("weighting", "hyper"), WEIGHTINGS)
def test_training_samples_around_the_proposals(
    weighting: str, hyper: dict[str, object], antithetic: bool
) -> None:
    q, k, v = heads(12), heads(12), heads(12)
    lara = module(antithetic=antithetic, seed=7, **hyper).train()
    mean_q, mean_k = segment_means(q, 5)[0], segment_means(k, 5)[0]
    noise = torch.randn(mean_q.shape, generator=torch.Generator().manual_seed(7)).double()
    if antithetic:
        mean_q, mean_k = torch.cat((mean_q, mean_q), 2), torch.cat((mean_k, mean_k), 2)
        noise = torch.cat((noise, -noise), 2)
    alpha = float(hyper.get("alpha", 1.0))
    expected = direct(q, k, v, mean_q, mean_k, weighting=weighting, alpha=alpha, noise=noise)
    first = lara.attend(q, k, v)
    torch.testing.assert_close(first, expected)
    assert not torch.equal(lara.attend(q, k, v), first)


def test_evaluation_is_deterministic_and_training_repeats_under_a_seed() -> None:
    q = heads(12)
    lara = module()
    assert torch.equal(lara.attend(q, q, q), lara.attend(q, q, q))
    assert torch.equal(module().train().attend(q, q, q), module().train().attend(q, q, q))
    assert not torch.equal(module().train().attend(q, q, q), module(seed=1).train().attend(q, q, q))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "NC"])
def test_adaptive_proposal_projects_the_tokens_before_the_means(pattern: str, backend: str) -> None:
    q, k, v = heads(12), heads(12), heads(12)
    lara = module(pattern, backend, proposal="adaptive_1d")
    mean_q, mean_k = segment_means(lara.landmark_q(q), 5)[0], segment_means(lara.landmark_k(k), 5)[0]
    expected = direct(q, k, v, mean_q, mean_k, weighting="mis_opt")
    torch.testing.assert_close(lara.attend(q, k, v), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("proposal", ["pool", "pool_mixed"])
def test_pooled_proposals_average_the_tiles_of_the_grid(proposal: str, backend: str) -> None:
    q, k, v = heads(24), heads(24), heads(24)
    lara = module("NS", backend, proposal=proposal, num_landmarks=4)

    def tiles(u: Tensor) -> Tensor:
        grid = u.unflatten(2, (2, 2, 2, 3))  # (rows of tiles, rows, columns of tiles, columns)
        return grid.mean((3, 5)).flatten(2, 3)

    mean_q, mean_k = lara.landmark_q(tiles(q)), lara.landmark_k(tiles(k))
    if proposal == "pool_mixed":
        mean_k = (S * mean_k @ mean_k.transpose(-1, -2)).softmax(-1) @ mean_k
    expected = direct(q, k, v, mean_q, mean_k, weighting="mis_opt")
    torch.testing.assert_close(lara.attend(q, k, v, grid=(4, 6)), expected)


def test_pooled_proposals_need_a_grid_a_square_and_one_sequence() -> None:
    q = heads(24)
    with pytest.raises(UsageError, match="observed grid None for 24 tokens"):
        module(proposal="pool", num_landmarks=4).attend(q, q, q)
    with pytest.raises(UsageError, match="observed num_landmarks=5, expected a square number"):
        module(proposal="pool")
    with pytest.raises(UsageError, match="the keys of another sequence have no grid"):
        module("NC", proposal="pool", num_landmarks=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "NC"])
@pytest.mark.parametrize(("weighting", "hyper"), WEIGHTINGS)
def test_padding_equals_dropping_the_tokens(
    pattern: str, weighting: str, hyper: dict[str, object], backend: str
) -> None:
    q, k, v = heads(20), heads(20), heads(20)
    padded = torch.zeros(2, 20, dtype=torch.bool)
    padded[:, [0, 7, 8, 15, 16, 17, 18, 19]] = True
    kept = ~padded[0]
    lara = module(pattern, backend, **hyper)
    queries = slice(None) if pattern == "NC" else kept
    o = lara.attend(q, k, v, key_padding_mask=padded)[:, :, queries]
    torch.testing.assert_close(o, lara.attend(q[:, :, queries], k[:, :, kept], v[:, :, kept]))
    assert weighting


@pytest.mark.parametrize("hyper", [{}, {"proposal": "pool_mixed", "num_landmarks": 4}])
def test_padding_of_whole_landmarks_and_of_whole_elements(hyper: dict[str, object]) -> None:
    q, k, v = heads(16), heads(16), heads(16)
    padded = torch.zeros(2, 16, dtype=torch.bool)
    padded[0, 2:] = True
    padded[1, :] = True
    lara = module(**hyper)
    o = lara.attend(q, k, v, grid=(4, 4), key_padding_mask=padded)
    assert torch.isfinite(o).all()
    assert (o[1] == 0).all()
    if not hyper:
        kept = [u[:1, :, :2] for u in (q, k, v)]
        torch.testing.assert_close(o[:1, :, :2], lara.attend(*kept))


def test_triton_agrees_with_fp64() -> None:
    q, k, v = heads(24, b=1), heads(24, b=1), heads(24, b=1)
    o = module("NS", "triton").float().attend(q.float(), k.float(), v.float())
    torch.testing.assert_close(o.double(), module().attend(q, k, v), rtol=1e-3, atol=1e-4)
