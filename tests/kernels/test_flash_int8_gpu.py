"""INT8 attention on a GPU at real sizes: Triton and SageAttention against the definition, and determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, flash_int8

pytestmark = pytest.mark.gpu


def _qkv(n: int, m: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    offset = 4 * torch.randn(d, device="cuda")
    q, k, v = (torch.randn(1, h, x, d, device="cuda") for h, x in ((4, n), (2, m), (2, m)))
    return [x.to(dtype) for x in (q, k + offset, v)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(2048, 2048, 64), (1000, 3000, 128), (1024, 1024, 256)])
@pytest.mark.parametrize("causal", [False, True])
def test_triton(n: int, m: int, d: int, causal: bool, dtype: torch.dtype) -> None:
    qkv = _qkv(n, m, d, dtype)
    expected, expected_lse = flash_int8(*qkv, causal=causal, backend="reference")
    o, lse = flash_int8(*qkv, causal=causal, backend="triton")
    tolerance = 2e-2 if dtype is torch.bfloat16 else 4e-3
    torch.testing.assert_close(o, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
    assert torch.equal(o, flash_int8(*qkv, causal=causal, backend="triton")[0])


def test_listed_blocks() -> None:
    qkv = _qkv(1000, 1000, 64, torch.float16)
    options: dict[str, Any] = {"block_q": 64, "block_k": 64, "causal": True}
    options["blocks"] = torch.rand(1, 4, 16, 16, device="cuda") > 0.5
    options["key_padding_mask"] = torch.arange(1000, device="cuda")[None] >= 900
    expected, _ = flash_int8(*qkv, **options, backend="reference")
    o, _ = flash_int8(*qkv, **options, backend="triton")
    torch.testing.assert_close(o, expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_sage(causal: bool) -> None:
    qkv = _qkv(2048, 2048, 64, torch.float16)
    try:
        o, lse = flash_int8(*qkv, causal=causal, backend="sage")
    except Unsupported as why:
        pytest.skip(str(why))
    expected, expected_lse = flash_int8(*qkv, causal=causal, backend="reference")
    torch.testing.assert_close(o, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=1e-2)
