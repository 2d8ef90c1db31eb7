"""INT8 attention: the arithmetic of the definition, its error bound, and each backend against it."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, flash, flash_int8
from attnbench.kernels.backends import OWN
from attnbench.kernels.flash_int8 import peers
from attnbench.kernels.flash_int8._configs import candidates
from attnbench.kernels.flash_int8._quantise import LOG2E, expand_scale, key_mean, quantise

EMPTY = torch.empty
every_backend = pytest.mark.parametrize("backend", OWN)
SMALL = {"block_q": 32, "block_k": 16}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: what a backend forgets to write is seen."""

    def empty(*shape: Any, **options: Any) -> Tensor:
        x = EMPTY(*shape, **options)
        return x.fill_(math.nan) if x.is_floating_point() else x.fill_(77)

    monkeypatch.setattr(torch, "empty", empty)


def _qkv(
    n: int = 37, m: int = 50, h: int = 2, kv_heads: int = 2, d: int = 24, dv: int = 40, b: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    shapes = (b, h, n, d), (b, kv_heads, m, d), (b, kv_heads, m, dv)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _removed(b: int, m: int, last: int) -> Tensor:
    mask = torch.zeros(b, m, dtype=torch.bool)
    mask[:, -last:] = True
    return mask


# ---- the definition ----------------------------------------------------------------------------------------


def test_integers_by_hand() -> None:
    x = torch.tensor([[0.5, -127.0], [1.5, -2.5], [0.0, 0.0], [0.0, 0.0], [4.0, 1.0]])
    ints, scale = quantise(x, 2)
    assert ints.tolist() == [[1, -127], [2, -3], [0, 0], [0, 0], [127, 32]]
    assert scale[0] == 1.0
    assert scale[2] == torch.tensor(4.0) / 127


@pytest.mark.parametrize("causal", [False, True])
def test_the_definition_pair_by_pair(causal: bool) -> None:
    q, k, v = _qkv(n=3, m=19, h=2, kv_heads=1, d=3, dv=2)
    o, lse = flash_int8(q, k, v, causal=causal, block_q=16, block_k=16, backend="reference")
    shifted = k - k.mean(2, keepdim=True)
    for h in range(2):
        rows = q[0, h] * (3**-0.5 * LOG2E)
        row_scale = rows.abs().max() / 127
        for i in range(3):
            scores = []
            for j in range(19):
                block = shifted[0, 0, :16] if j < 16 else shifted[0, 0, 16:]
                scale = block.abs().max() / 127
                ints = [
                    round(float(a / s))
                    for x, s in ((rows[i], row_scale), (shifted[0, 0, j], scale))
                    for a in x
                ]
                product = sum(a * b for a, b in zip(ints[:3], ints[3:], strict=True))
                scores.append(product * float(row_scale) * float(scale) * math.log(2))
            seen = scores[: i + 17] if causal else scores
            weights = torch.tensor(seen).softmax(0)
            torch.testing.assert_close(
                o[0, h, i], weights @ v[0, 0, : len(seen)].half().float(), rtol=1e-5, atol=1e-5
            )
            shift = float(q[0, h, i] @ k[0, 0].mean(0)) * 3**-0.5
            assert abs(float(lse[0, h, i]) - shift - float(torch.tensor(seen).logsumexp(0))) < 1e-5


def test_scores_are_within_the_bound() -> None:
    q, k, _ = _qkv(n=70, m=90)
    q = q * (24**-0.5 * LOG2E)
    q_ints, q_scale = quantise(q, 32)
    k_ints, k_scale = quantise(k, 16)
    a_q, a_k = expand_scale(q_scale, 32, 70)[..., None], expand_scale(k_scale, 16, 90)[..., None]
    assert ((q - q_ints * a_q).abs() <= a_q / 2 * (1 + 1e-5)).all()
    assert ((k - k_ints * a_k).abs() <= a_k / 2 * (1 + 1e-5)).all()
    error = ((q_ints * a_q) @ (k_ints * a_k).mT - q @ k.mT).abs()
    most_q, most_k = q.abs().amax(-1, keepdim=True), k.abs().amax(-1).unsqueeze(-2)
    bound = 24 * ((a_q * most_k + a_k.mT * most_q) / 2 + a_q * a_k.mT / 4)
    assert (error <= bound).all()
    assert error.max() > 0


def test_smoothing_is_what_keeps_keys_with_an_offset_accurate() -> None:
    q, k, v = _qkv(n=64, m=64)
    k = k + 20 * torch.randn(24)
    exact, exact_lse = flash(q, k, v, backend="reference")

    def error(smooth_k: bool) -> tuple[float, float]:
        o, lse = flash_int8(q, k, v, smooth_k=smooth_k, backend="torch")
        return float((o - exact).norm() / exact.norm()), float((lse - exact_lse).abs().max())

    assert error(True)[0] < 0.03 < 4 * error(True)[0] < error(False)[0]
    assert error(True)[1] < 0.1


# ---- backends ----------------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "default blocks": ({"n": 130, "m": 70, "h": 1, "kv_heads": 1}, {"block_q": 128, "block_k": 64}),
    "causal": ({"n": 50}, {"causal": True}),
    "causal N<M": ({}, {"causal": True}),
    "causal N>M has blind queries": ({"n": 50, "m": 20}, {"causal": True}),
    "one of each": ({"n": 1, "m": 1}, {}),
    "grouped": ({"n": 20, "h": 4}, {"smooth_k": False}),
    "padding": ({"b": 2}, {"causal": True, "key_padding_mask": _removed(2, 50, 20)}),
    "padding removes all": ({}, {"key_padding_mask": _removed(1, 50, 50)}),
    "blocks": ({"h": 4}, {"blocks": torch.arange(32).view(1, 4, 2, 4) % 3 > 0}),
    "blocks and causal": ({"n": 50}, {"causal": True, "blocks": torch.arange(8).view(1, 1, 2, 4) % 3 != 1}),
    "wide": ({"d": 130, "dv": 17}, {}),
    "narrow": ({"d": 5, "dv": 3}, {"scale": 2.0}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_backends_compute_the_definition(case: str, backend: str, dtype: torch.dtype) -> None:
    sizes, options = CASES[case]
    q, k, v = _qkv(**sizes, dtype=dtype)
    options = SMALL | options
    expected, expected_lse = flash_int8(q, k, v, **options, backend="reference")
    o, lse = flash_int8(q, k, v, **options, backend=backend)
    assert o.dtype is dtype
    assert lse.dtype is torch.float32
    torch.testing.assert_close(o, expected, rtol=2e-3, atol=2e-3)  # p is rounded to fp16
    torch.testing.assert_close(lse, expected_lse, rtol=2e-5, atol=2e-5)


def test_triton_quantises_as_the_definition() -> None:
    from attnbench.kernels.flash_int8.triton import quantised

    _, k, _ = _qkv(m=50, b=2)
    k[:, :, 32:48] = 0.0
    removed = _removed(2, 50, 9)
    mean = key_mean(k, removed)
    ints, scale = quantised(k, mean, removed.to(torch.int8), 1.0, 16)
    expected, expected_scale = quantise((k - mean).masked_fill(removed[:, None, :, None], 0.0), 16)
    assert torch.equal(ints, expected)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0.0)


@every_backend
def test_special_cases(backend: str) -> None:
    q, k, v = _qkv(n=20, h=1, kv_heads=1)
    o, lse = flash_int8(q, k, v, **SMALL, backend=backend)
    constant, _ = flash_int8(q, k, v[:, :, :1].expand_as(v), **SMALL, backend=backend)
    torch.testing.assert_close(constant, v[:, :, :1].expand_as(constant), rtol=2e-3, atol=2e-3)
    moved, moved_lse = flash_int8(q, k + torch.randn(24), v, **SMALL, backend=backend)
    assert (moved - o).abs().max() < 0.02  # smoothing removes it up to rounding
    assert (moved_lse - lse).abs().max() > 0.1
    order = torch.cat([part[torch.randperm(len(part))] for part in torch.arange(50).split(16)])
    same, _ = flash_int8(q, k[:, :, order], v[:, :, order], **SMALL, backend=backend)
    torch.testing.assert_close(same, o, rtol=2e-3, atol=2e-3)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(flash_int8(*strided, **SMALL, backend=backend)[0], o)


# ---- refusals ----------------------------------------------------------------------------------------------


def test_no_backend_has_a_gradient() -> None:
    q, k, v = _qkv()
    with pytest.raises(Unsupported, match="forward pass"):
        flash_int8(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert torch.isfinite(flash_int8(q, k, v)[0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 48}, "block_q: observed 48"),
        ({"key_padding_mask": torch.zeros(1, 3, dtype=torch.bool)}, "key_padding_mask"),
        ({"blocks": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "blocks"),
        ({"k": torch.randn(1, 2, 50, 8)}, "q, k, v"),
    ],
)
def test_what_does_not_match_is_an_error(change: dict[str, Any], message: str) -> None:
    q, k, v = _qkv()
    with pytest.raises(ValueError, match=message):
        flash_int8(**{"q": q, "k": k, "v": v} | change)


def test_what_triton_refuses() -> None:
    with pytest.raises(Unsupported, match="head dim"):
        flash_int8(*_qkv(d=257), backend="triton")
    with pytest.raises(Unsupported, match="dtype"):
        flash_int8(*_qkv(dtype=torch.double), backend="triton")


def test_tiles_of_queries_divide_the_blocks() -> None:
    for head_dim in (32, 64, 128, 256):
        for block_q in (16, 32, 64, 128):
            found = candidates(head_dim, block_q, 64)
            assert len(found) <= 13
            assert all(block_q % config.block_m == 0 for config in found)


def test_sage_gets_exactly_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(*qkv: Tensor, **options: Any) -> Any:
        calls.append((qkv, options))
        return (qkv[0], qkv[0][..., 0]) if options["return_lse"] else qkv[0]

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn_qk_int8_pv_fp16_triton=kernel))
    q, k, v = _qkv(n=9, m=9, d=64, dv=64, dtype=torch.float16)
    options: dict[str, Any] = {
        "causal": True, "scale": 0.3, "smooth_k": False, "block_q": 128, "block_k": 64,
        "key_padding_mask": None, "blocks": None, "need_lse": True,
    }  # fmt: skip
    peers.sage(q, k, v, **options)
    assert calls[0][0] == (q, k, v)
    assert calls[0][1] == {
        "tensor_layout": "HND", "quantization_backend": "triton", "is_causal": True, "sm_scale": 0.3,
        "smooth_k": False, "return_lse": True,
    }  # fmt: skip
    assert peers.sage(q, k, v, **options | {"need_lse": False}) == (q, None)
    for change in (
        {"block_q": 64},
        {"key_padding_mask": _removed(1, 9, 2)},
        {"blocks": torch.ones(1, 1, 1, 1, dtype=torch.bool)},
    ):
        with pytest.raises(Unsupported, match="flash_int8/sage"):
            peers.sage(q, k, v, **options | change)
    with pytest.raises(Unsupported, match="N = M"):
        peers.sage(q[:, :, :4], k, v, **options)
    with pytest.raises(Unsupported, match="dtype"):
        peers.sage(q.float(), k.float(), v.float(), **options)
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(Unsupported, match="library sageattention"):
        flash_int8(q, k, v, backend="sage")
