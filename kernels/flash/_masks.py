"""Masks as tensors for the backends that need one, built once, so that no timed call builds a mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnbench.kernels.flash.mask import Mask, RelativeBias

T = TypeVar("T")


@dataclass(frozen=True)
class Band:
    """Which keys the queries see, but for their positions: hashable, so that masks are cached by it.

    A query at position p sees the keys p − left .. p + right, a side that is None being unbounded.
    """

    n: int
    m: int
    left: int | None
    right: int | None
    device: torch.device

    @property
    def everything(self) -> bool:
        """Whether every query sees every key."""
        return self.left is None and self.right is None


def band(q: Tensor, k: Tensor, causal: bool, window: tuple[int, int] | None) -> Band:
    """The band of a call: causal is a right side of 0, and −1 in a window is unbounded."""
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0
    bounds = (side if side >= 0 else None for side in (left, right))
    return Band(q.shape[2], k.shape[2], *bounds, q.device)


class MaskCache(Generic[T]):
    """Masks by band and, with positions, by the tensor of positions, as long as nobody writes to it."""

    def __init__(self, build: Callable[[Band, Tensor | None], T], size: int = 4) -> None:
        self._build = build
        self._by_band = lru_cache(maxsize=size)(lambda where: self._built(where, None))
        self._by_positions = WeakTensorKeyDictionary()

    def get(self, where: Band, q_pos: Tensor | None) -> T:
        """The mask of a band, for the queries' own positions i + M − N or for the given ones."""
        if q_pos is None:
            return self._by_band(where)
        if q_pos.is_inference():  # such a tensor does not tell when it is written to
            return self._built(where, q_pos)
        version, masks = self._by_positions.get(q_pos, (None, None))
        if version != q_pos._version:
            masks = {}
            self._by_positions[q_pos] = (q_pos._version, masks)
        if where not in masks:
            masks[where] = self._built(where, q_pos)
        return masks[where]

    def _built(self, where: Band, q_pos: Tensor | None) -> T:
        with torch.inference_mode(False), torch.no_grad():  # a cached mask must serve training, too
            return self._build(where, q_pos)


@dataclass(frozen=True)
class DenseMask:
    """A mask as bool (B or 1, H or 1, N, M), True where visible, and whether some query sees no key."""

    visible: Tensor
    has_blind_query: bool


def _band_mask(where: Band, q_pos: Tensor | None) -> Mask:
    """A band as a mask by positions."""
    keys = torch.arange(where.m, device=where.device)
    position = torch.arange(where.n, device=where.device) + (where.m - where.n) if q_pos is None else q_pos
    # 2³⁰ is wider than any sequence, and position ± window stays a 32-bit number
    left, right = (-1 if side is None else min(side, 2**30) for side in (where.left, where.right))
    return Mask.window(position, keys, left=left, right=right)


def _whole_mask(where: Band, q_pos: Tensor | None, mask: Mask | None) -> Mask:
    return _band_mask(where, q_pos) if mask is None else mask & _band_mask(where, q_pos)


_BANDS = MaskCache(partial(_whole_mask, mask=None))


def whole_mask(where: Band, q_pos: Tensor | None, mask: Mask | None) -> Mask | None:
    """Everything that a call says about visibility as one mask; None where every query sees every key."""
    if where.everything:
        return mask
    if mask is None:
        return _BANDS.get(where, q_pos)
    if "band" not in mask.cache:
        mask.cache["band"] = MaskCache(partial(_whole_mask, mask=mask))
    return mask.cache["band"].get(where, q_pos)


def dense_mask(where: Band, q_pos: Tensor | None, mask: Mask | None = None) -> DenseMask | None:
    """The mask as a tensor, None where every key is visible to every query."""
    whole = whole_mask(where, q_pos, mask)
    if whole is None:
        return None
    key = ("dense", where.n, where.m)
    if key not in whole.cache:
        with torch.inference_mode(False), torch.no_grad():
            visible = whole.dense(where.n, where.m)
            whole.cache[key] = DenseMask(visible, not bool(visible.any(-1).all()))
    return whole.cache[key]


def all_biases(bias: Tensor | None, rel_bias: RelativeBias | None) -> Tensor | None:
    """The biases of pairs as one tensor that broadcasts to (B, H, N, M), for backends that read no table."""
    if rel_bias is None:
        return bias
    return rel_bias.dense() if bias is None else bias + rel_bias.dense()


def sdpa_mask(
    visible: Tensor | None, key_bias: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """What ``scaled_dot_product_attention`` takes as attn_mask, four-dimensional and broadcastable.

    A mask alone stays bool and a bias alone stays as small as it is; together they fill an N×M tensor.
    """
    if key_bias is None and bias is None:
        return visible
    terms = [
        _four_dimensional(x).to(dtype)
        for x in (None if key_bias is None else key_bias.unsqueeze(-2), bias)
        if x is not None
    ]
    total = sum(terms[1:], terms[0])
    return total if visible is None else torch.where(visible, total, -math.inf)


def _four_dimensional(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())]
