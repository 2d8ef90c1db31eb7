"""The q, k, v that operations are timed and judged on, by the name of their distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attnbench.errors import unknown_name
from attnbench.tasks.data.recorded import recorded_qkv
from attnbench.tasks.data.structured import structured_qkv

Generate = Callable[
    [int, int, int, int, int, int, int, torch.device, torch.Generator], tuple[Tensor, Tensor, Tensor]
]


def gaussian_qkv(
    b: int,
    h: int,
    hkv: int,
    n: int,
    m: int,
    d: int,
    dv: int,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent standard normal q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), fp32."""
    shapes = ((b, h, n, d), (b, hkv, m, d), (b, hkv, m, dv))
    q, k, v = (torch.randn(shape, device=device, generator=generator) for shape in shapes)
    return q, k, v


DISTRIBUTIONS: Mapping[str, Generate] = {
    "gaussian": gaussian_qkv,
    "structured": structured_qkv,
    "recorded": recorded_qkv,
}


def make_qkv(
    dist: str,
    b: int,
    h: int,
    hkv: int,
    n: int,
    m: int,
    d: int,
    dv: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, N, D), keys (B, Hkv, M, D), values (B, Hkv, M, Dv) of distribution ``dist``, contiguous.

    Drawn in fp32 from ``generator`` (which lives on ``device``) and rounded to ``dtype``, so that two dtypes
    see the same numbers. Any N and M; Hkv divides H. Raises UsageError for an unknown distribution.
    """
    if dist not in DISTRIBUTIONS:
        raise unknown_name("input distribution", dist, DISTRIBUTIONS)
    q, k, v = DISTRIBUTIONS[dist](b, h, hkv, n, m, d, dv, torch.device(device), generator)
    return q.to(dtype).contiguous(), k.to(dtype).contiguous(), v.to(dtype).contiguous()
