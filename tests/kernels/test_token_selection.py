"""Lists per query, by block and by key, and shared lists, against their definition in dense masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnbench.kernels import SharedKeys, TokenBlocks, TokenKeys

SIZES = [(7, 20, 8), (1, 1, 16), (9, 9, 1), (12, 5, 4), (5, 64, 16)]


def _causal(n: int, m: int) -> Tensor:
    return torch.arange(m)[None, :] <= torch.arange(n)[:, None] + (m - n)


def _random(n: int, m: int, block_k: int) -> Tensor:
    return torch.rand(2, 3, n, -(-m // block_k)) < 0.5


@pytest.mark.parametrize("sizes", SIZES, ids=str)
class TestTokenBlocks:
    def test_lists_hold_the_selected_blocks_in_order(self, sizes: tuple[int, int, int]) -> None:
        n, m, block_k = sizes
        mask = _random(*sizes)
        selection = TokenBlocks.from_block_mask(mask, block_k, m)
        for row in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
            expected = mask[tuple(row)].nonzero().flatten().tolist()
            found = selection.indices[tuple(row)].tolist()
            assert found == expected + [-1] * (mask.shape[-1] - len(expected))
            assert int(selection.counts[tuple(row)]) == len(expected)
        assert selection.n == n
        assert torch.equal(selection.block_mask, mask)

    def test_dense_mask(self, sizes: tuple[int, int, int]) -> None:
        _, m, block_k = sizes
        mask = _random(*sizes)
        found = TokenBlocks.from_block_mask(mask, block_k, m).to_dense_mask()
        assert torch.equal(found, mask[..., torch.arange(m) // block_k])

    def test_indices_in_any_order_with_holes(self, sizes: tuple[int, int, int]) -> None:
        _, m, block_k = sizes
        mask = _random(*sizes)
        order = torch.rand(mask.shape).argsort(-1)
        indices = order.masked_fill(~mask.gather(-1, order), -1)
        found = TokenBlocks.from_indices(indices, block_k, m)
        expected = TokenBlocks.from_block_mask(mask, block_k, m)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.counts, expected.counts)

    def test_by_block_is_the_transpose(self, sizes: tuple[int, int, int]) -> None:
        n, m, block_k = sizes
        selection = TokenBlocks.from_block_mask(_random(*sizes), block_k, m)
        order, starts = selection.by_block
        width = selection.indices.shape[-1]
        for b, h in ((0, 0), (1, 2)):
            for block in range(selection.key_blocks):
                entries = order[b, h, starts[b, h, block] : starts[b, h, block + 1]].tolist()
                assert [selection.indices[b, h, x // width, x % width] for x in entries] == [block] * len(
                    entries
                )
                queries = [x // width for x in entries]
                assert queries == selection.block_mask[b, h, :, block].nonzero().flatten().tolist()
        assert order.shape == (2, 3, n * width)

    @pytest.mark.parametrize("entries", [1, 3, 16])
    def test_tiles_cover_every_entry_once(self, sizes: tuple[int, int, int], entries: int) -> None:
        selection = TokenBlocks.from_block_mask(_random(*sizes), sizes[2], sizes[1])
        starts = selection.by_block[1]
        tiles = selection.tiles(entries)
        for b, h in ((0, 0), (1, 2)):
            covered = []
            for item, (block, start, stop) in enumerate(
                zip(*(x[b, h].tolist() for x in tiles[:3]), strict=True)
            ):
                assert 0 <= stop - start <= entries
                if start < stop:
                    assert starts[b, h, block] <= start
                    assert stop <= starts[b, h, block + 1]
                    assert tiles.first[b, h, block] <= item < tiles.first[b, h, block + 1]
                covered += range(start, stop)
            assert covered == list(range(int(starts[b, h, -1])))
            assert int(tiles.first[b, h, -1]) <= tiles.block.shape[2]

    @pytest.mark.parametrize("causal", [False, True])
    def test_density(self, sizes: tuple[int, int, int], causal: bool) -> None:
        n, m, block_k = sizes
        selection = TokenBlocks.from_block_mask(_random(*sizes), block_k, m)
        allowed = _causal(n, m) if causal else torch.ones(n, m, dtype=torch.bool)
        kept = selection.to_dense_mask() & allowed
        torch.testing.assert_close(selection.density(causal), kept.sum().double() / (6 * allowed.sum()))
        blocks = torch.stack([x.any(-1) for x in allowed.split(block_k, -1)], -1)
        expected = selection.counts.sum().double() / (6 * blocks.sum())
        torch.testing.assert_close(selection.block_density(causal), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_density_of_keys(causal: bool) -> None:
    n, m = 6, 11
    allowed = _causal(n, m) if causal else torch.ones(n, m, dtype=torch.bool)
    per_query = TokenKeys.from_mask(torch.rand(2, 3, n, m) < 0.4)
    shared = SharedKeys.from_mask(torch.rand(2, 3, m) < 0.4, n)
    for selection in (per_query, shared):
        kept = selection.to_dense_mask() & allowed
        torch.testing.assert_close(selection.density(causal), kept.sum().double() / (6 * allowed.sum()))


def test_keys_of_masks_and_of_indices_agree() -> None:
    per_query, shared = torch.rand(2, 3, 6, 11) < 0.4, torch.rand(2, 3, 11) < 0.4
    assert torch.equal(TokenKeys.from_mask(per_query).to_dense_mask(), per_query)
    lists = SharedKeys.from_mask(shared, 6)
    assert torch.equal(lists.to_dense_mask(), shared.unsqueeze(2).expand(2, 3, 6, 11))
    again = SharedKeys.from_indices(lists.indices.flip(-1), 6, 11)
    assert torch.equal(again.indices, lists.indices)
    assert torch.equal(again.counts, lists.counts)
    keys = TokenKeys.from_mask(per_query)
    assert torch.equal(TokenKeys.from_indices(keys.indices.flip(-1), 11).indices, keys.indices)


def test_a_complete_list_needs_no_counts() -> None:
    selection = SharedKeys.from_indices(torch.tensor([[[3, 0, 2]]]), 4, 5, complete=True)
    assert selection.counts is None
    assert selection.indices.tolist() == [[[0, 2, 3]]]
    assert selection.key_mask.tolist() == [[[True, False, True, True, False]]]


def test_a_list_longer_than_k_max_is_an_error() -> None:
    mask = torch.ones(1, 1, 2, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="more than k_max = 3"):
        TokenBlocks.from_block_mask(mask, 2, 8, k_max=3)
    assert TokenBlocks.from_block_mask(mask[..., :2], 4, 8, k_max=2).indices.shape[-1] == 2


def test_errors_say_what_was_expected() -> None:
    counts, indices = torch.ones(1, 1, 3).int(), torch.zeros(1, 1, 3, 2).int()
    with pytest.raises(ValueError, match=r"indices: observed torch\.int64, expected torch\.int32"):
        TokenBlocks(counts, indices.long(), 4, 8)
    with pytest.raises(ValueError, match=r"observed \(1, 1, 2\) and \(1, 1, 3, 2\), expected \(B, Hs, N\)"):
        TokenKeys(counts[..., :2], indices, 8)
    with pytest.raises(ValueError, match=r"block_k, m: observed \(0, 8\), expected positive"):
        TokenBlocks(counts, indices, 0, 8)
    with pytest.raises(ValueError, match=r"block mask: observed \(1, 1, 3, 2\), expected \(B, Hs, N, 3\)"):
        TokenBlocks.from_block_mask(indices.bool(), 4, 9)
    with pytest.raises(ValueError, match=r"none 0"):
        SharedKeys(None, torch.zeros(1, 1, 0).int(), 3, 8)
