"""Correlations of scores: against CAB's figures, on known series, and the cells that must stay empty."""

from __future__ import annotations

import pytest

from attnbench.results import cab2023, correlation, scores
from attnbench.results.correlation import Correlation


@pytest.fixture(scope="module")
def cab() -> dict[str, dict[str, float]]:
    """CAB's pool: FlashAttention repeats softmax attention and is not in it."""
    indices = scores.compositional_index(cab2023.raw_scores(), cab2023.constants())
    kept = [i for i in indices if i.mechanism != "FlashAttention"]
    return correlation.by_pattern(kept)


def test_patterns_of_cab_correlate_as_its_figure_says_where_the_labels_are_put_right(cab):
    """In the figure the rows LRA and NS are exchanged: what we compute for NS stands in row LRA."""
    published = cab2023.correlations("pattern")
    found = correlation.correlate(cab["NS"], cab["NC"])
    assert found.n == 4
    assert found.pearson == pytest.approx(published["LRA", "NC"], abs=0.01)
    common = sorted(set(cab["NC"]) & set(cab["CC"]))
    r = correlation.pearson([cab["NC"][m] for m in common], [cab["CC"][m] for m in common])
    assert r == pytest.approx(published["NC", "CC"], abs=0.01)


def test_what_cab_prints_from_two_or_three_mechanisms_is_left_blank(cab):
    cells = correlation.matrix(cab)
    assert cells["NC", "CC"] == Correlation(3)
    assert cells["CS", "NC"].pearson is None
    assert abs(cab2023.correlations("pattern")["CS", "NC"]) == 1.0


def test_interval_of_four_mechanisms_says_how_little_they_are(cab):
    found = correlation.correlate(cab["NS"], cab["NC"])
    assert found.lo < -0.9
    assert found.hi > 0.8


def test_known_series():
    a = {"p": 1.0, "q": 2.0, "r": 3.0, "s": 4.0, "only here": 9.0}
    b = {"p": 1.0, "q": 4.0, "r": 9.0, "s": 16.0}
    found = correlation.correlate(a, b)
    assert found.n == 4
    assert found.spearman == pytest.approx(1.0)
    assert found.pearson == pytest.approx(0.984374, abs=1e-6)
    assert found.lo < found.pearson < found.hi
    line = correlation.correlate(a, {m: 2 * x for m, x in a.items()})
    assert (line.pearson, line.lo, line.hi) == (1.0, 1.0, 1.0)


def test_constant_or_few_scores_have_no_correlation():
    a = dict(zip("pqrs", (1.0, 2.0, 3.0, 4.0), strict=True))
    assert correlation.correlate(a, dict.fromkeys(a, 1.0)) == Correlation(4)
    assert correlation.correlate(a, {}) == Correlation(0)


def test_ties_share_their_ranks():
    assert correlation.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]


def test_tasks_are_columns_of_their_pattern():
    indices = scores.compositional_index(cab2023.raw_scores(), cab2023.constants())
    columns = correlation.by_task(indices)
    assert set(columns) == {
        *(f"NS:{t}" for t in ("TTS", "Sum", "SR", "MLM")),
        *(f"CS:{t}" for t in ("TTS", "Sum", "LM")),
        *(f"NC:{t}" for t in ("PCC", "LSTF")),
        *(f"CC:{t}" for t in ("TTS", "Sum")),
    }
