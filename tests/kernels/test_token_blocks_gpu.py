"""token_blocks at real sizes on a GPU: both walks, bf16, bitwise determinism, no wait for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnbench.kernels import TokenBlocks, token_blocks

pytestmark = pytest.mark.gpu
SHAPES = {"by query": (4096, 32, 2, 2, 64, 8), "by key": (4096, 8, 2, 8, 256, 3)}
"""N, H, Hkv, Hs, keys of a block, blocks of a list."""


def _run(shape: str, dtype: torch.dtype, backend: str, compute: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    n, h, kv_heads, list_heads, block_k, width = SHAPES[shape]
    own = torch.arange(n, device="cuda") // block_k
    blocks = torch.arange(-(-n // block_k), device="cuda")
    score = torch.rand(1, list_heads, n, blocks.numel(), device="cuda")
    score = score.masked_fill(blocks > own[:, None], -1.0).masked_fill(blocks == own[:, None], 2.0)
    best = score.topk(width)
    selection = TokenBlocks.from_indices(best.indices.masked_fill(best.values < 0, -1), block_k, n)
    heads = (h, kv_heads, kv_heads, h)
    q, k, v, do = (torch.randn(1, x, n, 128, device="cuda", dtype=dtype).to(compute) for x in heads)
    given = [x.requires_grad_() for x in (q, k, v)]
    o, lse = token_blocks(*given, selection, causal=True, backend=backend)
    return [o, lse, *torch.autograd.grad(o, given, do)]


def _relative(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
class TestOnGpu:
    def test_triton_at_real_size(self, dtype: torch.dtype, shape: str) -> None:
        truth = _run(shape, dtype, "reference", torch.float64)
        first, second = (_run(shape, dtype, "triton", dtype) for _ in range(2))
        for x, y, expected in zip(first, second, truth, strict=True):
            assert torch.equal(x, y), "two runs differ"
            assert _relative(x, expected) < 8 * torch.finfo(dtype).eps

    def test_flex_at_real_size(self, dtype: torch.dtype, shape: str) -> None:
        truth = _run(shape, dtype, "reference", torch.float64)
        for x, expected in zip(_run(shape, dtype, "flex", dtype), truth, strict=True):
            assert _relative(x, expected) < 8 * torch.finfo(dtype).eps

    def test_nothing_waits_for_the_device(self, dtype: torch.dtype, shape: str) -> None:
        _run(shape, dtype, "triton", dtype)  # compiled and allocated
        torch.cuda.set_sync_debug_mode("error")
        try:
            _run(shape, dtype, "triton", dtype)
        finally:
            torch.cuda.set_sync_debug_mode("default")
