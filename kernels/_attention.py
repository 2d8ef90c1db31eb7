"""What the attention operations share outside their kernels: checks, memory layouts, the eager softmax."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from attnbench.kernels.backends import Unsupported

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the Triton kernels read; their sums are in fp32."""

MAX_HEAD_DIM = 256
"""Beyond it the accumulators of one tile do not fit the registers of one block."""

MAX_STRIDE = 2**22
"""Offsets inside a tile are 32-bit: 256 rows or columns of this stride stay below 2³¹."""


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k, v are (B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv) and Hkv divides H."""
    if not (
        q.dim() == k.dim() == v.dim() == 4
        and k.shape == (q.shape[0], *k.shape[1:3], q.shape[3])
        and v.shape[:3] == k.shape[:3]
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
    ):
        shapes = " and ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"q, k, v: observed {shapes}, expected (B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv), "
            "Hkv dividing H"
        )


def check_tensors(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise Unsupported unless the Triton kernels of ``op`` can read these tensors (…, D), by name.

    They have one dtype of :data:`DTYPES`, one device, and D up to :data:`MAX_HEAD_DIM`. The first sets dtype
    and device.
    """
    leader, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise Unsupported(f"{op}/triton dtype of {name}", x.dtype, "float16, bfloat16 or float32")
        if x.dtype is not first.dtype or x.device != first.device:
            here, there = f"{x.dtype} on {x.device}", f"{first.dtype} on {first.device} as {leader}"
            raise Unsupported(f"{op}/triton {name}", here, there)
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise Unsupported(f"{op}/triton head dim of {name}", x.shape[-1], f"1 to {MAX_HEAD_DIM}")


def near(x: Tensor) -> Tensor:
    """Return x (B, H, N, D), or a copy where offsets inside a tile would not be 32-bit numbers."""
    return x if max(x.stride()[2:]) <= MAX_STRIDE else x.contiguous()


def empty(like: Tensor, d: int) -> Tensor:
    """(B, H, N, d) in the memory order of ``like``, so that (B, N, H, D) callers get their layout back."""
    b, h, n, _ = like.shape
    if like.stride(2) > like.stride(1):
        return torch.empty(b, n, h, d, device=like.device, dtype=like.dtype).transpose(1, 2)
    return torch.empty(b, h, n, d, device=like.device, dtype=like.dtype)


def reduced(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    """The gradient of a tensor that was expanded, in its shape and dtype; summed before it is rounded."""
    return None if gradient is None or of is None else gradient.sum_to_size(of.shape).to(of.dtype)


def scaled_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale·q kᵀ as (B, H, N, M) in fp32 or fp64; the query heads of a group are rows of one product."""
    b, h, n, d = q.shape
    kv_heads, m = k.shape[1:3]
    rows = q.reshape(b * kv_heads, -1, d)
    columns = k.reshape(b * kv_heads, m, d).transpose(1, 2)
    scores = torch.baddbmm(q.new_zeros(()), rows, columns, beta=0, alpha=scale).view(b, h, n, m)
    return scores if scores.dtype is torch.float64 else scores.float()


def softmax_product(scores: Tensor, v: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Turn scores, which are overwritten, into o and lse; a row of −inf gives 0, −inf and zero gradients."""
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(torch.isneginf(peak), 0.0)  # −inf − −inf would be NaN
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)
    lse = (peak + total.log()).squeeze(-1)
    share = 1.0 / total
    if sink is not None:  # of the row's mass, the part that is not the sink's
        share = share * torch.sigmoid(lse - sink.to(lse.dtype)).unsqueeze(-1)
    b, h, n, m = weights.shape
    kv_heads, dv = v.shape[1], v.shape[3]
    rows = (weights * share).to(v.dtype).view(b * kv_heads, -1, m)
    o = torch.bmm(rows, v.reshape(b * kv_heads, m, dv)).view(b, h, n, dv)
    return o, lse.masked_fill(blind.squeeze(-1), -math.inf)


@lru_cache
def capability(device: torch.device) -> int:
    """Compute capability such as 90; Ampere's where Triton interprets and there is no GPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
