"""gather at real sizes on a GPU: lists per query and shared lists, bf16, bitwise determinism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnbench.kernels import SharedKeys, TokenKeys, gather

pytestmark = pytest.mark.gpu


def _run(shared: bool, dtype: torch.dtype, backend: str, compute: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    n, h, kv_heads, width = 2048, 8, 2, 64
    selection: TokenKeys | SharedKeys
    if shared:
        best = torch.rand(1, kv_heads, n, device="cuda").topk(width).indices
        selection = SharedKeys.from_indices(best, n, n, complete=True)
    else:
        best = torch.rand(1, kv_heads, n, n, device="cuda").topk(width).indices
        selection = TokenKeys.from_indices(best, n)
    heads = (h, kv_heads, kv_heads, h)
    q, k, v, do = (torch.randn(1, x, n, 64, device="cuda", dtype=dtype).to(compute) for x in heads)
    given = [x.requires_grad_() for x in (q, k, v)]
    o, lse = gather(*given, selection, causal=True, backend=backend)
    seen = ~torch.isneginf(lse)
    return [o, lse.where(seen, 0.0), *torch.autograd.grad(o, given, do)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_triton_at_real_size(dtype: torch.dtype, shared: bool) -> None:
    truth = _run(shared, dtype, "reference", torch.float64)
    first, second = (_run(shared, dtype, "triton", dtype) for _ in range(2))
    for x, y, expected in zip(first, second, truth, strict=True):
        assert torch.equal(x, y), "two runs differ"
        assert float((x.double() - expected).norm() / expected.norm()) < 8 * torch.finfo(dtype).eps
