"""Counts of visible pairs that several mechanisms share."""

import pytest

from attnbench.impls.base import causal_pairs


@pytest.mark.parametrize("n", [1, 2, 5, 9])
@pytest.mark.parametrize("m", [1, 2, 5, 9])
def test_causal_pairs_are_those_that_the_rule_lets_through(n, m):
    assert causal_pairs(n, m) == sum(j <= i + m - n for i in range(n) for j in range(m))
