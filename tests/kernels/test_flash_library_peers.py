"""The peers of optional libraries, with modules in their place that compute what their documentation says."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Mask, RelativeBias, Unsupported, flash
from attnbench.kernels.backends import REQUIREMENTS
from attnbench.kernels.flash import library_peers

DEFAULTS: dict[str, Any] = {
    "causal": False, "window": None, "q_pos": None, "mask": None, "scale": 0.3, "softcap": 0.0,
    "key_bias": None, "bias": None, "rel_bias": None, "sink": None, "need_lse": True,
}  # fmt: skip
FLASH_ATTENTION = ("flash_attn", "flash_attn3", "flash_attn4")
PEERS = (*FLASH_ATTENTION, "xformers", "flashinfer")


def _definition(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Attention on (B, N, H, D), as the libraries have it."""
    o, lse = flash(*(x.transpose(1, 2) for x in (q, k, v)), **options, backend="reference")
    return o.transpose(1, 2), lse


class _FlashAttention:
    """``flash_attn_func`` of three versions: each has its own names and its own way to return lse."""

    def __init__(self, version: int) -> None:
        self.version, self.calls = version, []

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool,
        window_size: tuple[int | None, int | None], softcap: float, deterministic: bool, **named: bool,
    ) -> Any:  # fmt: skip
        self.calls.append(window_size)
        assert deterministic is False
        unbounded = None if self.version == 4 else -1
        sides = [-1 if side is unbounded or side == unbounded else side for side in window_size]
        if causal:
            sides[1] = 0
        o, lse = _definition(q, k, v, window=tuple(sides), scale=softmax_scale, softcap=softcap)
        wanted = named.pop("return_lse" if self.version == 4 else "return_attn_probs")
        assert not named
        lse = lse.masked_fill(lse.isneginf(), math.inf)  # what it writes for a query without keys
        if self.version == 4:
            return o, lse if wanted else None
        if not wanted:
            return o
        return (o, lse, None) if self.version == 2 else (o, lse)


class _Xformers:
    """``xformers.ops``: grouped heads in five dimensions, lse by group and padded."""

    class LowerTriangularFromBottomRightMask:
        sides = (-1, 0)

    class LocalAttentionFromBottomRightMask:
        def __init__(self, window_left: int, window_right: int) -> None:
            self.sides = (window_left, window_right)

    def __init__(self) -> None:
        biases = SimpleNamespace(
            LowerTriangularFromBottomRightMask=self.LowerTriangularFromBottomRightMask,
            LocalAttentionFromBottomRightMask=self.LocalAttentionFromBottomRightMask,
        )
        self.fmha = SimpleNamespace(
            attn_bias=biases, memory_efficient_attention_forward_requires_grad=self._with_lse
        )

    def memory_efficient_attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return self._with_lse(q, k, v, **options)[0]

    def _with_lse(self, q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any, scale: float) -> Any:
        assert k.shape[2:-1] == q.shape[2:-1]
        window = None if attn_bias is None else attn_bias.sides
        o, lse = _definition(*(x.flatten(2, -2) for x in (q, k, v)), window=window, scale=scale)
        lse = torch.nn.functional.pad(lse, (0, 5)).unflatten(1, q.shape[2:-1])
        return o.unflatten(2, q.shape[2:-1]), lse


class _FlashInfer:
    """``flashinfer``: ragged batches, a plan before the run, lse in log 2 by token."""

    def __init__(self) -> None:
        self.plans = 0

    def BatchPrefillWithRaggedKVCacheWrapper(self, workspace: Tensor, layout: str) -> Any:
        assert layout == "NHD"
        assert workspace.dtype is torch.uint8
        planned: dict[str, Any] = {}

        def plan(q_starts: Tensor, k_starts: Tensor, h: int, kv_heads: int, d: int, **options: Any) -> None:
            self.plans += 1
            planned.update(options, q_starts=q_starts, k_starts=k_starts, sizes=(h, kv_heads, d))

        def run(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool) -> Any:
            assert planned["sizes"] == (q.shape[1], k.shape[1], q.shape[2])
            assert planned["head_dim_vo"] == v.shape[2]
            parts = []
            for i in range(len(planned["q_starts"]) - 1):
                rows = slice(*planned["q_starts"][i : i + 2].tolist())
                columns = slice(*planned["k_starts"][i : i + 2].tolist())
                window = (planned["window_left"], 0 if planned["causal"] else -1)
                parts.append(
                    _definition(
                        q[None, rows], k[None, columns], v[None, columns], window=window,
                        scale=planned["sm_scale"], softcap=planned["logits_soft_cap"],
                    )
                )  # fmt: skip
            o = torch.cat([o[0] for o, _ in parts])
            lse = torch.cat([lse[0].T for _, lse in parts]) / math.log(2)
            return (o, lse) if return_lse else o

        return SimpleNamespace(plan=plan, run=run)


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    fakes = {
        "flash_attn": _FlashAttention(2), "flash_attn_interface": _FlashAttention(3),
        "flash_attn.cute": _FlashAttention(4), "xformers": ModuleType("xformers"),
        "xformers.ops": _Xformers(), "flashinfer": _FlashInfer(),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(library_peers, "_capability", lambda device: 90)
    library_peers._flashinfer_plan.cache_clear()
    return fakes


def _qkv(n: int = 9, m: int = 14, h: int = 4, kv_heads: int = 2, d: int = 16, dv: int = 16) -> list[Tensor]:
    shapes = (2, h, n, d), (2, kv_heads, m, d), (2, kv_heads, m, dv)
    return [torch.randn(shape).half() for shape in shapes]


def _peer(name: str, qkv: list[Tensor], **options: Any) -> tuple[Tensor, Tensor | None]:
    return getattr(library_peers, name)(*qkv, **(DEFAULTS | options))


OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": (4, -1)},
    "window": {"window": (3, 2)},
    "wide window": {"window": (50, 50)},
    "to the left": {"window": (3, -1)},
    "softcap": {"softcap": 2.0, "causal": True},
}
UNSERVED = {
    ("xformers", "causal window"): None,
    ("xformers", "softcap"): "softcap",
    ("xformers", "to the left"): "window",
    ("flashinfer", "window"): "window",
    ("flashinfer", "to the left"): "window",
}


@pytest.mark.parametrize("need_lse", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("peer", PEERS)
def test_what_they_compute_is_the_definition(peer: str, options: str, need_lse: bool) -> None:
    qkv = _qkv()
    refused = UNSERVED.get((peer, options))
    if refused:
        with pytest.raises(Unsupported, match=f"flash/{peer} {refused}"):
            _peer(peer, qkv, **OPTIONS[options])
        return
    o, lse = _peer(peer, qkv, **OPTIONS[options], need_lse=need_lse)
    expected, expected_lse = flash(*qkv, **(DEFAULTS | OPTIONS[options]), backend="reference")
    torch.testing.assert_close(o, expected, rtol=1e-3, atol=1e-3)
    if need_lse:
        torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
    else:
        assert lse is None


@pytest.mark.parametrize("peer", FLASH_ATTENTION)
def test_blind_queries_have_lse_of_minus_infinity(peer: str) -> None:
    qkv = _qkv(n=14, m=9)
    o, lse = _peer(peer, qkv, causal=True)
    assert not o[:, :, :5].any()
    assert torch.isneginf(lse[:, :, :5]).all()
    assert torch.isfinite(lse[:, :, 5:]).all()


@pytest.mark.parametrize("peer", ["xformers", "flashinfer"])
def test_blind_queries_are_refused(peer: str) -> None:
    with pytest.raises(Unsupported, match="lengths"):
        _peer(peer, _qkv(n=14, m=9), causal=True)


def test_sides_of_windows_that_hide_nothing_are_unbounded(libraries: dict[str, Any]) -> None:
    _peer("flash_attn", _qkv(), window=(13, 8))
    _peer("flash_attn", _qkv(), window=(12, 7))
    _peer("flash_attn4", _qkv(), window=(13, 7))
    assert libraries["flash_attn"].calls == [(-1, -1), (12, 7)]
    assert libraries["flash_attn.cute"].calls == [(None, 7)]
    with pytest.raises(Unsupported, match="window"):
        _peer("flash_attn", _qkv(n=30, m=9), window=(2, 10))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": Mask.upto(torch.arange(9), torch.arange(14))}, "options: observed mask"),
        ({"key_bias": torch.zeros(14)}, "options: observed key_bias"),
        ({"bias": torch.zeros(9, 14)}, "options: observed bias"),
        ({"sink": torch.zeros(4, 1)}, "options: observed sink"),
        ({"rel_bias": RelativeBias(torch.zeros(4, 3), torch.arange(9), torch.arange(14))}, "rel_bias"),
        ({"causal": True, "q_pos": torch.arange(9, dtype=torch.int32)}, "q_pos"),
        ({"scale": -1.0}, "scale"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_options_that_no_library_has_are_refused(peer: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        _peer(peer, _qkv(), **change)


@pytest.mark.parametrize("peer", PEERS)
def test_inputs_that_no_library_has_are_refused(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for qkv, message in (
        ([x.float() for x in _qkv()], "dtype"),
        (_qkv(d=20, dv=20), "head dim"),
        (_qkv(d=264, dv=264), "head dim"),
        (_qkv(m=0), "lengths"),
    ):
        with pytest.raises(Unsupported, match=message):
            _peer(peer, qkv, need_lse=False)
    trained = [x.requires_grad_() for x in _qkv()]
    with pytest.raises(Unsupported, match="gradient"):
        _peer(peer, trained, need_lse=True)
    monkeypatch.setattr(library_peers, "_capability", lambda device: 75)
    with pytest.raises(Unsupported, match="compute capability"):
        _peer(peer, _qkv())


def test_training_without_lse() -> None:
    for peer in PEERS:
        trained = [x.requires_grad_() for x in _qkv()]
        if peer == "flashinfer":
            with pytest.raises(Unsupported, match="no backward"):
                _peer(peer, trained, need_lse=False)
        else:
            o, _ = _peer(peer, trained, need_lse=False, causal=True)
            o.sum().backward()
            assert all(torch.isfinite(x.grad).all() for x in trained)


def test_unequal_head_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in ("xformers", "flashinfer"):
        qkv = _qkv(d=16, dv=24)
        o, _ = _peer(peer, qkv)
        torch.testing.assert_close(o, flash(*qkv, scale=0.3, backend="reference")[0], rtol=1e-3, atol=1e-3)
    for peer in FLASH_ATTENTION:
        with pytest.raises(Unsupported, match="D = Dv"):
            _peer(peer, _qkv(d=16, dv=24))
    deepseek = _qkv(d=192, dv=128)
    with pytest.raises(Unsupported, match="Hopper"):
        _peer("flash_attn4", deepseek)
    monkeypatch.setattr(library_peers, "_capability", lambda device: 100)
    assert _peer("flash_attn4", deepseek)[0].shape == (2, 4, 9, 128)
    with pytest.raises(Unsupported, match="observed 100, expected 90"):
        _peer("flash_attn3", _qkv())


def test_flashinfer_plans_once_per_shape(libraries: dict[str, Any]) -> None:
    for _ in range(2):
        _peer("flashinfer", _qkv())
    _peer("flashinfer", _qkv(), causal=True)
    assert libraries["flashinfer"].plans == 2


@pytest.mark.parametrize("peer", PEERS)
def test_a_library_that_cannot_be_imported_is_unsupported(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "flash_attn", "flash_attn_interface", "flash_attn.cute", "xformers", "xformers.ops", "flashinfer"
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unsupported, match="importable"):
        _peer(peer, _qkv())
    assert REQUIREMENTS[peer].devices == ("cuda",)
    with pytest.raises(Unsupported, match=f"flash/{peer}"):
        flash(*_qkv(), backend=peer)
