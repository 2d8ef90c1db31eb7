"""Student's t against published tables, closed forms and its own inverse."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.results.student import incomplete_beta, t_cdf, t_quantile


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),
    [  # NIST/SEMATECH e-Handbook 1.3.6.7.2, extended to more digits by closed forms below
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.975, 9, 2.262),
        (0.975, 30, 2.042),
        (0.975, 100, 1.984),
        (0.95, 5, 2.015),
        (0.99, 7, 2.998),
        (0.995, 12, 3.055),
        (0.999, 4, 7.173),
        (0.90, 20, 1.325),
    ],
)
def test_quantiles_equal_the_published_table(p, freedom, expected):
    assert t_quantile(p, freedom) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("p", [0.501, 0.6, 0.9, 0.975, 0.99, 0.9995, 1 - 1e-6])
def test_quantiles_equal_the_closed_forms_for_one_and_two_degrees(p):
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    assert t_quantile(p, 2) == pytest.approx(2 * (p - 0.5) * math.sqrt(2 / (4 * p * (1 - p))), rel=1e-9)


def test_many_degrees_of_freedom_approach_the_normal_quantile():
    assert t_quantile(0.975, 1e7) == pytest.approx(1.959963984540054, rel=1e-6)


@settings(max_examples=80, deadline=None)
@given(st.floats(1e-6, 1 - 1e-6), st.floats(0.5, 500.0))
def test_quantile_inverts_the_distribution_and_is_odd(p, freedom):
    t = t_quantile(p, freedom)
    assert t_cdf(t, freedom) == pytest.approx(p, rel=1e-9, abs=1e-12)
    assert t_quantile(1 - p, freedom) == pytest.approx(-t, rel=1e-6, abs=1e-9)


def test_incomplete_beta_equals_binomial_sums():
    """I_x(a, b) for whole a, b is the probability of at least a successes in a + b - 1 trials."""
    for a, b in [(1, 1), (2, 5), (7, 3), (20, 30)]:
        n = a + b - 1
        for x in (0.0, 0.05, 0.4, 0.9, 1.0):
            exact = sum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1))
            assert incomplete_beta(a, b, x) == pytest.approx(exact, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("p", "freedom"), [(0.0, 3), (1.0, 3), (0.5, 0), (0.5, -1)])
def test_arguments_without_a_quantile_are_refused(p, freedom):
    with pytest.raises(ValueError, match="t quantile for p"):
        t_quantile(p, freedom)
