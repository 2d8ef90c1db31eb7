"""Sign-hash attention: the cases of its definition that hold exactly, in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench import UsageError, attention
from attnbench.impls.registry import mechanism

B, H, N, M, D = 2, 2, 12, 15, 8
ID = "sign_hash_attention"


def _module(pattern: str = "NC", **hyper: Any) -> Any:
    kind = mechanism(ID)
    built = kind(H * D, H, pattern=pattern, backend="torch", projections=False, **hyper)
    return built.double()


def _drawn(n: int = N, m: int = M) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(B, H, size, D, dtype=torch.float64) for size in (n, m, m))
    return q, k, v


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC", "CC"])
def test_one_bucket_is_softmax_attention(pattern: str) -> None:
    q, k, v = _drawn(N, M if pattern in ("NC", "CC") else N)
    want = attention(q, k, v, "softmax", pattern=pattern, backend="torch")
    torch.testing.assert_close(_module(pattern, n_buckets=1).attend(q, k, v), want)


def test_with_equal_keys_equal_hashes_read_the_mean_and_others_the_first_key() -> None:
    q, k, v = _drawn()
    module, same = _module(n_buckets=2), k[:, :, :1].expand_as(k)
    hit = (module.hash(q) == module.hash(same)[:, :, :1]).unsqueeze(-1)
    assert hit.any()
    assert not hit.all()
    want = torch.where(hit, v.mean(2, keepdim=True), v[:, :, :1])
    torch.testing.assert_close(module.attend(q, same, v), want)


def test_the_order_of_keys_does_not_matter_but_for_the_first() -> None:
    q, k, v = _drawn()
    order = torch.cat((torch.zeros(1, dtype=torch.long), 1 + torch.randperm(M - 1)))
    module = _module()
    torch.testing.assert_close(module.attend(q, k[:, :, order], v[:, :, order]), module.attend(q, k, v))


def test_scales_and_shifts_do_not_change_the_selection() -> None:
    q, k, _ = _drawn()
    module = _module()
    kept = module.select(q, k).to_dense_mask()
    assert torch.equal(module.select(3 * q, 0.25 * k + 1.0).to_dense_mask(), kept)


def test_a_query_without_a_key_of_its_hash_reads_itself() -> None:
    q, _, v = _drawn(N, N)
    for pattern in ("NS", "CS"):  # opposite keys have all signs changed
        module = _module(pattern, n_buckets=2)
        k = -q[:, :, :1].expand_as(q) if pattern == "NS" else -q
        away = ~(module.hash(q).unsqueeze(-1) == module.hash(k).unsqueeze(-2))
        blind = (away if pattern == "NS" else away | ~torch.ones(N, N).tril().bool()).all(-1)
        assert blind.any()
        torch.testing.assert_close(module.attend(q, k, v)[blind], v[blind])


def test_constant_values_come_back() -> None:
    q, k, v = _drawn()
    o = _module().attend(q, k, torch.ones_like(v))
    torch.testing.assert_close(o, torch.ones_like(o))


def test_the_future_changes_nothing() -> None:
    q, k, v = _drawn(N, N)
    module = _module("CS", n_buckets=4)
    o = module.attend(q, k, v)
    for x in (q, k, v):
        x[:, :, 7:] = torch.randn_like(x[:, :, 7:])
    torch.testing.assert_close(module.attend(q, k, v)[:, :, :7], o[:, :, :7])


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC"])
def test_density_is_that_of_the_dense_mask(pattern: str) -> None:
    q, k, _ = _drawn(N, M if pattern == "NC" else N)
    selection = _module(pattern).select(q, k)
    allowed = torch.ones(N, k.shape[2]).tril() if pattern == "CS" else torch.ones(N, k.shape[2])
    want = (selection.to_dense_mask() * allowed).sum().double() / (B * H * allowed.sum())
    torch.testing.assert_close(selection.density(pattern == "CS"), want)


def test_the_projection_is_orthonormal_and_bounded_by_the_width() -> None:
    u = _module(n_buckets=31).directions
    torch.testing.assert_close(u.mT @ u, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match="n_buckets: observed 512"):
        _module(n_buckets=512)
