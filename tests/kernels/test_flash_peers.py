"""The peers of flash: exactly the named kernel or Unsupported, and masks that are built once."""

from __future__ import annotations

import gc

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention import SDPBackend

from attnbench.kernels import Unsupported, flash, recording
from attnbench.kernels.flash._masks import Band, MaskCache, band, dense_mask, sdpa_mask
from attnbench.kernels.flash.peers import _sdpa_visibility, compiled_per_shape
from attnbench.kernels.flash.reference import visible_pairs

CPU = torch.device("cpu")
SDPA = ("sdpa_math", "sdpa_flash")


def _qkv(n: int = 6, m: int = 8, h: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, h, n, 16), torch.randn(1, 2, m, 16), torch.randn(1, 2, m, 16)


@pytest.mark.parametrize("backend", SDPA)
@pytest.mark.parametrize(
    "option",
    [{"need_lse": True}, {"softcap": 2.0, "need_lse": False}, {"sink": torch.zeros(2, 1), "need_lse": False}],
    ids=["lse", "softcap", "sink"],
)
def test_sdpa_refuses_what_it_has_no_option_for(backend: str, option: dict) -> None:
    with pytest.raises(Unsupported, match="SDPA has no such option"):
        flash(*_qkv(), **option, backend=backend)


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_an_sdpa_kernel_that_cannot_serve_does_not_fall_back() -> None:
    q, k, v = _qkv()
    with recording() as used, pytest.raises(Unsupported, match="sdpa_flash"):
        flash(q, k, v[..., :8], need_lse=False, backend="sdpa_flash")
    assert used == []


def test_an_error_that_is_no_refusal_is_not_hidden() -> None:
    q, k, v = _qkv()
    with pytest.raises(RuntimeError, match="size") as caught:
        flash(q, k[..., :8], v, need_lse=False, backend="sdpa_math")
    assert not isinstance(caught.value, Unsupported)


@pytest.mark.parametrize("backend", ["sdpa_efficient", "sdpa_cudnn"])
def test_kernels_of_cuda_are_unsupported_on_cpu(backend: str) -> None:
    with pytest.raises(Unsupported, match="cuda"):
        flash(*_qkv(), need_lse=False, backend=backend)


def test_causal_is_aligned_to_the_last_key() -> None:
    """SDPA's own is_causal is aligned to the first key: it may be used for square calls only."""
    square, wide = Band(8, 8, None, 0, CPU), Band(6, 8, None, 0, CPU)
    cuda = Band(6, 8, None, 0, torch.device("cuda"))

    def visibility(kernel: SDPBackend, where: Band) -> tuple[Tensor | None, bool]:
        return _sdpa_visibility(kernel, "", where, None, None, None, None, torch.float32, 1.0)

    assert visibility(SDPBackend.MATH, square) == (None, True)
    mask, is_causal = visibility(SDPBackend.MATH, wide)
    assert not is_causal
    assert torch.equal(mask[0, 0], visible_pairs(6, 8, causal=True, window=None, q_pos=None, device=CPU))
    bias, is_causal = visibility(SDPBackend.FLASH_ATTENTION, cuda)
    assert not is_causal
    assert (bias.variant.name, bias.seq_len_q, bias.seq_len_kv) == ("LOWER_RIGHT", 6, 8)


def test_cudnn_is_not_asked_for_queries_without_keys() -> None:
    with pytest.raises(Unsupported, match="sees no key"):
        _sdpa_visibility(
            SDPBackend.CUDNN_ATTENTION, "cudnn", Band(8, 6, None, 0, CPU), *(None,) * 4, torch.half, 1.0
        )


def test_flex_has_no_backward_on_cpu() -> None:
    q, k, v = _qkv()
    with pytest.raises(Unsupported, match="gradient"):
        flash(q.requires_grad_(), k, v, backend="flex")
    with torch.no_grad():
        flash(q, k, v, backend="flex")


# ---- masks -------------------------------------------------------------------------------------------------


def test_bands() -> None:
    q, k, _ = _qkv()
    assert band(q, k, False, None).everything
    assert band(q, k, False, (-1, -1)).everything
    assert band(q, k, True, (3, 9)) == Band(6, 8, 3, 0, CPU)
    assert dense_mask(band(q, k, False, None), None) is None
    assert dense_mask(band(q, k, True, None), None).has_blind_query is False
    assert dense_mask(band(k, q, True, None), None).has_blind_query is True


def test_masks_are_built_once_and_again_when_positions_change() -> None:
    built = []
    cache = MaskCache(lambda where, q_pos: built.append(where) or len(built))
    causal, window = Band(6, 8, None, 0, CPU), Band(6, 8, 2, 0, CPU)
    assert [cache.get(causal, None), cache.get(window, None), cache.get(causal, None)] == [1, 2, 1]
    q_pos = torch.arange(6, dtype=torch.int32)
    assert [cache.get(causal, q_pos), cache.get(window, q_pos), cache.get(causal, q_pos)] == [3, 4, 3]
    assert cache.get(causal, q_pos.clone()) == 5
    q_pos += 1
    assert [cache.get(causal, q_pos), cache.get(window, q_pos)] == [6, 7]
    with torch.inference_mode():
        unversioned = torch.arange(6)
    assert [cache.get(causal, unversioned), cache.get(causal, unversioned)] == [8, 9]
    del q_pos
    gc.collect()
    assert len(cache._by_positions) == 0


def test_a_mask_built_in_inference_mode_serves_training() -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(n=7, m=9))
    with torch.inference_mode():
        flash(q, k, v, causal=True, backend="torch")
    flash(q, k, v, causal=True, backend="torch")[0].sum().backward()
    assert torch.isfinite(q.grad).all()


def test_sdpa_masks_stay_as_small_as_they_can() -> None:
    visible = torch.ones(6, 8, dtype=torch.bool).tril()
    assert sdpa_mask(None, None, None, torch.half) is None
    assert sdpa_mask(visible, None, None, torch.half).dtype is torch.bool
    assert sdpa_mask(None, torch.zeros(8), None, torch.half).shape == (1, 1, 1, 8)
    both = sdpa_mask(visible, torch.ones(2, 1, 8), torch.ones(6, 1), torch.half)
    assert both.shape == (2, 1, 6, 8)
    assert both.dtype is torch.half
    assert torch.equal(both == 2, visible.expand_as(both))
    assert torch.equal(torch.isneginf(both), ~visible.expand_as(both))


def test_compiled_functions_take_more_shapes_than_dynamo_allows() -> None:
    with torch._dynamo.config.patch(recompile_limit=2):  # monkeypatch would leave the setting hidden
        plus_one = compiled_per_shape(lambda x: x + 1, backend="eager")
        for size in (2, 3, 4, 5, 3):
            assert torch.equal(plus_one(torch.ones(size)), torch.full((size,), 2.0))
        assert torch._dynamo.config.recompile_limit == 2
