"""Densities and recall of selections, against masks counted by hand and softmax in fp64."""

import math

import pytest
import torch

from attnbench.harness import selection_report
from attnbench.kernels.selection import Selection
from tests.harness.contract_toys import Kept, SameRowOfTheGrid


def test_densities_of_blocks():
    mask = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)[None, None]
    blocks = Selection.from_block_mask(mask, 4, 4, 8, 8)
    found = selection_report.densities(blocks, causal=False, n=8, m=8, tile=(4, 4))
    assert found == {"density": 0.75, "block_density": 0.75, "executed_density": 0.75}
    causal = selection_report.densities(blocks, causal=True, n=8, m=8, tile=(4, 4))
    assert causal == {"density": 1.0, "block_density": 1.0, "executed_density": 48 / 36}


def test_density_of_a_dense_mask():
    mask = torch.eye(4, dtype=torch.bool).expand(2, 3, 4, 4)
    found = selection_report.densities(Kept(mask), causal=True, n=4, m=4)
    assert found == {"density": 0.4, "block_density": None, "executed_density": None}
    assert selection_report.dense_density(mask, causal=False) == 0.25


def test_a_mask_too_large_to_write_down_is_not_written_down():
    found = selection_report.densities(Kept(torch.empty(0)), causal=False, n=2**14, m=2**14)
    assert found["density"] is None


def test_recall_is_the_mass_of_the_kept_keys():
    dense = torch.zeros(100, dtype=torch.float64)
    sparse = torch.linspace(0.01, 1.0, 100, dtype=torch.float64).log()
    found = selection_report.recall(sparse, dense)
    expected = {"recall_mean": 0.505, "recall_p5": 0.05, "recall_p1": 0.01, "recall_min": 0.01}
    assert found == pytest.approx(expected)


def test_rows_that_keep_nothing_and_rows_without_keys():
    dense = torch.tensor([0.0, 0.0, -math.inf])
    found = selection_report.recall(torch.tensor([-math.inf, 0.0, -math.inf]), dense)
    assert (found["recall_min"], found["recall_mean"]) == (0.0, 0.5)
    assert set(selection_report.recall(dense[2:], dense[2:]).values()) == {None}


def test_report_of_a_mechanism():
    module = SameRowOfTheGrid(8, 2, backend="reference", projections=False).double()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 12, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    kept = torch.rand(2, 12, generator=generator) < 0.5
    found = selection_report.report(module, q, k, v, grid=(3, 4), kept=kept)
    mask = module.select(q, k, grid=(3, 4), kept=kept).to_dense_mask()
    mass = ((q @ k.transpose(-1, -2) / 2.0).softmax(-1) * mask).sum(-1)
    assert found["density"] == pytest.approx(mask.double().mean().item())
    assert found["recall_mean"] == pytest.approx(mass.mean().item())
    assert found["recall_min"] == pytest.approx(mass.min().item())


def test_the_selector_takes_at_most_all_of_the_time():
    assert selection_report.selector_share(2.0, 8.0) == {"selector_us": 2.0, "selector_share": 0.25}
    assert selection_report.selector_share(9.0, 8.0)["selector_share"] == 1.0
