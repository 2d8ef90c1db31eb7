"""Check flex as a backend of block_sparse: the definition computed with a block mask that is built once."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from attnbench.kernels import Selection, Unsupported, block_sparse


def _selection(n: int, m: int, heads: int = 1) -> Selection:
    mask = torch.rand(1, heads, -(-n // 32), -(-m // 16)) < 0.6
    return Selection.from_block_mask(mask, 32, 16, n, m)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(70, 70), (33, 90), (90, 33), (64, 64)])
@pytest.mark.parametrize("list_heads", [1, 4])
def test_forward(causal: bool, n: int, m: int, list_heads: int) -> None:
    q, k, v = torch.randn(2, 4, n, 16), torch.randn(2, 2, m, 16), torch.randn(2, 2, m, 16)
    options: dict[str, Any] = {"causal": causal, "key_bias": torch.randn(4, m) if causal else None}
    selection = _selection(n, m, list_heads)
    expected = block_sparse(q, k, v, selection, **options, backend="reference")
    found = block_sparse(q, k, v, selection, **options, backend="flex")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_block_mask_is_that_of_the_lists_and_is_kept() -> None:
    peers = importlib.import_module("attnbench.kernels.block_sparse.peers")
    n, m = 70, 90
    selection = _selection(n, m)
    mask = peers._block_mask(selection, True, 2)
    assert peers._block_mask(selection, True, 2) is mask
    assert torch.equal(mask.to_dense().bool(), selection.block_mask.expand(1, 2, -1, -1))
    visible = torch.arange(m)[None, :] <= torch.arange(n)[:, None] + (m - n)
    seen = 0
    for i in range(selection.query_blocks):
        for j in mask.full_kv_indices[0, 0, i, : mask.full_kv_num_blocks[0, 0, i]].tolist():
            block = visible[i * 32 : (i + 1) * 32, j * 16 : (j + 1) * 16]
            assert bool(block.all())
            assert block.shape[1] == 16
            seen += 1
    assert seen > 0


@pytest.mark.parametrize("option", ["q_pos", "k_pos", "row_threshold"])
def test_refuses_what_it_cannot(option: str) -> None:
    q = torch.randn(1, 1, 16, 16)
    options = {option: torch.zeros(16, dtype=torch.int32), "key_bias": torch.zeros(16), "causal": True}
    with pytest.raises(Unsupported, match=option):
        block_sparse(q, q, q, _selection(16, 16), **options, backend="flex")


def test_refuses_gradients_on_cpu() -> None:
    q = torch.randn(1, 1, 16, 16, requires_grad=True)
    with pytest.raises(Unsupported, match="require gradients"):
        block_sparse(q, q, q, _selection(16, 16), backend="flex")
