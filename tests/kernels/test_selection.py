"""Selections against their definition in dense masks, and the selector toolbox against loops over rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnbench.kernels.selection import (
    Selection,
    blocks_holding,
    diagonal,
    first_blocks,
    last_blocks,
    pool,
    thr,
    topk,
    topp,
    visible,
)

CPU = torch.device("cpu")
SIZES = [(70, 90, 32, 16), (1, 1, 16, 16), (64, 64, 16, 16), (90, 33, 16, 24), (17, 64, 5, 7)]


def _blocks(n: int, m: int, block_q: int, block_k: int) -> tuple[int, int]:
    return -(-n // block_q), -(-m // block_k)


def _random(n: int, m: int, block_q: int, block_k: int, b: int = 2, heads: int = 3) -> Tensor:
    return torch.rand(b, heads, *_blocks(n, m, block_q, block_k)) < 0.5


def _dense(mask: Tensor, n: int, m: int, block_q: int, block_k: int) -> Tensor:
    return mask[..., torch.arange(n)[:, None] // block_q, torch.arange(m)[None, :] // block_k]


def _causal(n: int, m: int) -> Tensor:
    return torch.arange(m)[None, :] <= torch.arange(n)[:, None] + (m - n)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
class TestSelection:
    def test_lists_hold_the_selected_blocks_in_order(self, sizes: tuple[int, int, int, int]) -> None:
        n, m, block_q, block_k = sizes
        mask = _random(*sizes)
        selection = Selection.from_block_mask(mask, block_q, block_k, n, m)
        assert selection.indices.shape[-1] == mask.shape[-1]
        for row in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
            expected = mask[tuple(row)].nonzero().flatten().tolist()
            count = int(selection.counts[tuple(row)])
            found = selection.indices[tuple(row)].tolist()
            assert found == expected + [-1] * (mask.shape[-1] - count)
        assert torch.equal(selection.block_mask, mask)

    def test_dense_mask(self, sizes: tuple[int, int, int, int]) -> None:
        n, m, block_q, block_k = sizes
        mask = _random(*sizes)
        selection = Selection.from_block_mask(mask, block_q, block_k, n, m)
        assert torch.equal(selection.to_dense_mask(), _dense(mask, n, m, block_q, block_k))

    def test_transpose(self, sizes: tuple[int, int, int, int]) -> None:
        n, m, block_q, block_k = sizes
        mask = _random(*sizes)
        full = mask & _random(*sizes)
        selection = Selection.from_block_mask(mask, block_q, block_k, n, m, full=full)
        turned = selection.transpose()
        assert (turned.n, turned.m, turned.block_q, turned.block_k) == (m, n, block_k, block_q)
        assert torch.equal(turned.to_dense_mask(), selection.to_dense_mask().transpose(2, 3))
        assert torch.equal(turned._scattered(turned.full), full.transpose(2, 3))
        back = turned.transpose()
        assert torch.equal(back.indices, selection.indices)
        assert torch.equal(back.full, selection.full)

    @pytest.mark.parametrize("causal", [False, True])
    def test_densities(self, sizes: tuple[int, int, int, int], causal: bool) -> None:
        n, m, block_q, block_k = sizes
        mask = _random(*sizes) & visible(n, m, block_q, block_k, causal, CPU)
        selection = Selection.from_block_mask(mask, block_q, block_k, n, m)
        allowed = _causal(n, m) if causal else torch.ones(n, m, dtype=torch.bool)
        lists = mask.shape[0] * mask.shape[1]
        kept = int((_dense(mask, n, m, block_q, block_k) & allowed).sum())
        pairs = int(allowed.sum()) * lists
        assert float(selection.density(causal)) == pytest.approx(kept / pairs)
        blocks = int(visible(n, m, block_q, block_k, causal, CPU).sum()) * lists
        assert float(selection.block_density(causal)) == pytest.approx(int(mask.sum()) / blocks)
        executed = int(mask.sum()) * (-(-block_q // 16) * 16) * (-(-block_k // 8) * 8)
        assert float(selection.executed_density(causal, 16, 8)) == pytest.approx(executed / pairs)

    @pytest.mark.parametrize("causal", [False, True])
    def test_visible_and_diagonal(self, sizes: tuple[int, int, int, int], causal: bool) -> None:
        n, m, block_q, block_k = sizes
        allowed = _causal(n, m) if causal else torch.ones(n, m, dtype=torch.bool)
        on_diagonal = torch.arange(m)[None, :] == torch.arange(n)[:, None] + (m - n)
        seen, held = visible(*sizes, causal, CPU), diagonal(*sizes, CPU)
        for i in range(seen.shape[0]):
            for j in range(seen.shape[1]):
                rows, columns = slice(i * block_q, (i + 1) * block_q), slice(j * block_k, (j + 1) * block_k)
                assert bool(seen[i, j]) == bool(allowed[rows, columns].any())
                assert bool(held[i, j]) == bool(on_diagonal[rows, columns].any())


class TestSelectionErrors:
    def test_mask_of_another_size(self) -> None:
        with pytest.raises(ValueError, match=r"observed \(1, 1, 2, 2\), expected \(B, Hs, 3, 2\)"):
            Selection.from_block_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, 16, 33, 32)

    def test_counts_of_another_type(self) -> None:
        with pytest.raises(ValueError, match=r"counts: observed torch\.int64"):
            Selection(torch.ones(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, 1).int(), 16, 16, 16, 16)

    def test_k_max_is_an_upper_bound(self) -> None:
        mask = torch.tensor([[[[True, False, True]]]])
        selection = Selection.from_block_mask(mask, 16, 16, 16, 48, k_max=2)
        assert selection.indices.tolist() == [[[[0, 2]]]]
        with pytest.raises(RuntimeError, match="k_max = 1"):
            Selection.from_block_mask(mask, 16, 16, 16, 48, k_max=1)


class TestPool:
    @pytest.mark.parametrize("reduce", ["mean", "max", "min"])
    @pytest.mark.parametrize(("n", "block"), [(10, 4), (8, 4), (3, 5), (1, 1)])
    def test_every_block_over_its_tokens(self, reduce: str, n: int, block: int) -> None:
        x = torch.randn(2, 3, n, 5, dtype=torch.float64)
        parts = x.split(block, 2)
        expected = {"mean": lambda p: p.mean(2), "max": lambda p: p.amax(2), "min": lambda p: p.amin(2)}
        torch.testing.assert_close(
            pool(x, block, reduce), torch.stack([expected[reduce](p) for p in parts], 2)
        )

    @pytest.mark.parametrize("reduce", ["mean", "max", "min"])
    def test_gradient(self, reduce: str) -> None:
        x = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: pool(x, 2, reduce), (x,))

    def test_sums_of_fp16_do_not_overflow(self) -> None:
        assert float(pool(torch.full((1, 1, 64, 1), 6e4, dtype=torch.float16), 64)) == pytest.approx(
            6e4, rel=1e-3
        )

    def test_unknown_reduction(self) -> None:
        with pytest.raises(ValueError, match="observed 'median'"):
            pool(torch.zeros(1, 1, 2, 1), 2, "median")


def _topk_rows(score: Tensor, k: int, seen: Tensor, forced: Tensor, count_forced: bool) -> Tensor:
    kept = forced & seen
    for row in range(score.shape[0]):
        free = [j for j in range(score.shape[1]) if seen[row, j] and not forced[row, j]]
        free.sort(key=lambda j: (-float(score[row, j]), j))
        left = max(0, k - int(kept[row].sum())) if count_forced else k
        kept[row, free[:left]] = True
    return kept


class TestTopk:
    @pytest.mark.parametrize("k", [0, 1, 3, 99])
    @pytest.mark.parametrize("count_forced", [True, False])
    def test_against_a_loop(self, k: int, count_forced: bool) -> None:
        score = torch.randint(-2, 3, (40, 9)).float()
        score[score == -2] = -math.inf
        seen, forced = torch.rand(40, 9) < 0.7, torch.rand(40, 9) < 0.2
        found = topk(score, k, seen, forced, count_forced=count_forced)
        assert torch.equal(found, _topk_rows(score, k, seen, forced, count_forced))

    def test_ties_go_to_the_lower_index(self) -> None:
        seen = torch.ones(1, 6, dtype=torch.bool)
        assert topk(torch.zeros(1, 6), 2, seen).nonzero()[:, 1].tolist() == [0, 1]

    def test_k_per_head(self) -> None:
        seen = torch.ones(2, 4, 6, dtype=torch.bool)
        kept = topk(torch.randn(2, 4, 6), torch.tensor([1, 5]).view(2, 1, 1), seen)
        assert kept.sum(-1).tolist() == [[1] * 4, [5] * 4]


def _topp_rows(p: Tensor, gamma: float, seen: Tensor, forced: Tensor, policy: str) -> Tensor:
    kept = forced & seen
    lead = kept if policy == "first" else torch.zeros_like(kept)
    kept = kept.clone()
    for row in range(p.shape[0]):
        order = [j for j in range(p.shape[1]) if seen[row, j]]
        order.sort(key=lambda j: (not lead[row, j], 0.0 if lead[row, j] else -float(p[row, j]), j))
        total, mass = sum(float(p[row, j]) for j in order), 0.0
        for j in order:
            if mass >= gamma:
                break
            kept[row, j] = True
            mass += float(p[row, j]) / total
    return kept


class TestTopp:
    @pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.5])
    @pytest.mark.parametrize("policy", ["first", "after"])
    def test_against_a_loop(self, gamma: float, policy: str) -> None:
        p = torch.randint(1, 5, (40, 9)).double()
        seen, forced = torch.rand(40, 9) < 0.7, torch.rand(40, 9) < 0.2
        seen[:, 0] = True
        found = topp(p, gamma, seen, forced, policy=policy)
        assert torch.equal(found, _topp_rows(p, gamma, seen, forced, policy))

    def test_includes_the_element_that_reaches_gamma(self) -> None:
        p, seen = torch.tensor([[0.25, 0.5, 0.25]]), torch.ones(1, 3, dtype=torch.bool)
        assert topp(p, 0.5, seen).tolist() == [[False, True, False]]
        assert topp(p, 0.51, seen).tolist() == [[True, True, False]]

    def test_renormalises_over_what_is_visible(self) -> None:
        p, seen = torch.tensor([[0.1, 0.1, 0.8]]), torch.tensor([[True, True, False]])
        assert topp(p, 0.5, seen).tolist() == [[True, False, False]]

    def test_keeps_all_where_gamma_is_not_reached(self) -> None:
        p, seen = torch.zeros(1, 3), torch.tensor([[True, False, True]])
        assert torch.equal(topp(p, 0.5, seen), seen)

    def test_unknown_policy(self) -> None:
        with pytest.raises(ValueError, match="observed 'last'"):
            topp(torch.ones(1, 1), 0.5, torch.ones(1, 1, dtype=torch.bool), policy="last")


class TestOtherSets:
    def test_threshold(self) -> None:
        p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
        seen, forced = torch.tensor([[True, True, True, False]]), torch.tensor([[True, False, False, True]])
        assert thr(p, 0.2, seen).tolist() == [[False, False, True, False]]
        assert thr(p, 0.2, seen, forced).tolist() == [[True, False, True, False]]

    def test_first_and_last_visible_blocks(self) -> None:
        seen = visible(64, 64, 16, 16, True, CPU)
        assert first_blocks(seen, 1).int().tolist() == [[1, 0, 0, 0]] * 4
        expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
        assert last_blocks(seen, 2).int().tolist() == expected

    def test_blocks_holding_tokens(self) -> None:
        tokens = torch.zeros(1, 10, dtype=torch.bool)
        tokens[0, [0, 9]] = True
        assert blocks_holding(tokens, 4).tolist() == [[True, False, True]]
