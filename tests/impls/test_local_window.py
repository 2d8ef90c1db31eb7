"""local_window against an explicit mask and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError

BACKENDS = ("reference", "torch")
SIZES = {"NS": [(1, 1), (11, 11)], "CS": [(1, 1), (11, 11)]}
SIZES["NC"] = SIZES["CC"] = [(1, 7), (7, 1), (5, 16), (16, 5), (9, 9)]
CALLS = [(pattern, n, m) for pattern, sizes in SIZES.items() for n, m in sizes]


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def run(q: Tensor, k: Tensor, v: Tensor, pattern: str, backend: str, window: int) -> Tensor:
    return attnbench.attention(q, k, v, "local_window", pattern, backend, window=window)


def module(pattern: str, backend: str = "reference", **hyper: object) -> torch.nn.Module:
    return attnbench.build("local_window", 16, 2, pattern=pattern, backend=backend, **hyper).double()


def sees(pattern: str, i: int, j: int, n: int, m: int, w: int) -> bool:
    """The definition, pair by pair."""
    if pattern == "NS":
        return abs(i - j) <= w
    if pattern == "CS":
        return 0 <= i - j < w
    if pattern == "CC":
        return abs(min(i, m - 1) - j) <= w
    centre = m - 1 if n == 1 else math.floor(i * (m - 1) / (n - 1) + 0.5)
    return abs(centre - j) <= w


def mask_of(pattern: str, n: int, m: int, w: int) -> Tensor:
    return torch.tensor([[sees(pattern, i, j, n, m, w) for j in range(m)] for i in range(n)])


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = q.shape[-1] ** -0.5 * q @ k.transpose(-1, -2)
    return s.masked_fill(~mask, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pattern", "n", "m"), CALLS)
@pytest.mark.parametrize("w", [1, 3])
def test_equals_the_explicit_mask(pattern: str, n: int, m: int, w: int, backend: str) -> None:
    q, k, v = heads(n), heads(m), heads(m, 6)
    mask = mask_of(pattern, n, m, w)
    torch.testing.assert_close(run(q, k, v, pattern, backend, w), masked_attention(q, k, v, mask))


@pytest.mark.parametrize(("pattern", "n", "m"), CALLS)
@pytest.mark.parametrize("w", [1, 3, 40])
def test_declared_mask_and_pairs_are_those_of_the_definition(pattern: str, n: int, m: int, w: int) -> None:
    local = module(pattern, window=w)
    mask = mask_of(pattern, n, m, w)
    assert torch.equal(local.visible(n, m, torch.device("cpu")), mask)
    assert local.pairs(n, m) == mask.sum()
    assert local.flops(n, m) == 4 * 2 * 8 * int(mask.sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pattern", "w"), [("NS", 8), ("CS", 9)])
def test_a_window_over_everything_is_softmax_attention(pattern: str, w: int, backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    whole = attnbench.attention(q, k, v, "softmax", pattern, "reference")
    torch.testing.assert_close(run(q, k, v, pattern, backend, w), whole)
    assert not torch.allclose(run(q, k, v, pattern, backend, w - 1), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pattern", "w"), [("NS", 0), ("CS", 1)])
def test_a_window_of_one_key_returns_its_value(pattern: str, w: int, backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    torch.testing.assert_close(run(q, k, v, pattern, backend, w), v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_a_changed_token_moves_only_the_rows_that_see_it(pattern: str, backend: str) -> None:
    q, k, v = heads(12), heads(12), heads(12)
    before = run(q, k, v, pattern, backend, 3)
    k[:, :, 6] += 1.0
    v[:, :, 6] += 1.0
    moved = (run(q, k, v, pattern, backend, 3) != before).any(-1).any(1).any(0)
    assert torch.equal(moved, mask_of(pattern, 12, 12, 3)[:, 6])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_interior_rows_shift_with_the_tokens(pattern: str, backend: str) -> None:
    q, k, v = heads(14), heads(14), heads(14)
    o = run(q, k, v, pattern, backend, 3)
    shifted = run(*(u.roll(2, 2) for u in (q, k, v)), pattern, backend, 3)
    torch.testing.assert_close(shifted[:, :, 5:11], o[:, :, 3:9])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NC", "CC"])
def test_cross_windows_of_equal_lengths_are_those_of_self_attention(pattern: str, backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    torch.testing.assert_close(run(q, k, v, pattern, backend, 2), run(q, k, v, "NS", backend, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_keys_are_removed_and_a_row_without_keys_is_zero(backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[:, :3] = True
    o = module("NS", backend, window=1).attend(q, k, v, key_padding_mask=padded)
    assert not o[:, :, :2].any()
    mask = mask_of("NS", 9, 9, 1) & ~padded[0]
    torch.testing.assert_close(o[:, :, 2:], masked_attention(q[:, :, 2:], k, v, mask[2:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_equal_repeated_ones(backend: str) -> None:
    q, k, v = heads(9, h=4), heads(9, h=2), heads(9, h=2)
    repeated = (u.repeat_interleave(2, 1) for u in (k, v))
    torch.testing.assert_close(run(q, k, v, "CS", backend, 3), run(q, *repeated, "CS", backend, 3))


@pytest.mark.parametrize(("pattern", "window"), [("NS", -1), ("CS", 0), ("NC", -2)])
def test_windows_without_a_key_are_refused(pattern: str, window: int) -> None:
    with pytest.raises(UsageError, match=f"observed window={window}"):
        module(pattern, window=window)


@pytest.mark.parametrize(("pattern", "n", "m"), [("NS", 70, 70), ("CS", 70, 70), ("NC", 20, 70)])
def test_triton_agrees_with_fp64(pattern: str, n: int, m: int) -> None:
    q, k, v = heads(n, b=1), heads(m, b=1), heads(m, b=1)
    o = run(q.float(), k.float(), v.float(), pattern, "triton", 9)
    expected = masked_attention(q, k, v, mask_of(pattern, n, m, 9))
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-5)
