"""Efficiency lengths: CAB's procedure against its published values, crossings of known curves."""

from __future__ import annotations

import math

import pytest

from attnbench.results import cab2023, efficiency
from attnbench.results.efficiency import Crossing

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


def power(scale: float, exponent: float, lengths=LENGTHS) -> dict[int, float]:
    return {n: scale * n**exponent for n in lengths}


@pytest.mark.parametrize(("quantity", "skip"), [("time", (256,)), ("memory", ())])
def test_cabs_procedure_gives_cabs_length(quantity, skip):
    curves = cab2023.cost_curves(quantity)
    found = efficiency.fitted_length(curves["ABC"], curves["vanilla"], skip=skip)
    assert round(found.length) == cab2023.efficiency_lengths()["ABC", quantity]


def test_the_published_lengths_carry_their_problems():
    curves = cab2023.cost_curves("time")
    time = efficiency.fitted_length(curves["ABC"], curves["vanilla"], skip=(256,))
    assert time.r2 > 0.999  # what CAB looked at; a point is half off all the same
    assert time.residual == pytest.approx(0.485, abs=1e-3)
    assert time.other_root == pytest.approx(473.6, abs=0.1)
    assert "a point is 48% off its fit, more than 15%" in time.problems
    assert "the fitted parabola falls before it rises" in time.problems
    memory = cab2023.cost_curves("memory")
    found = efficiency.fitted_length(memory["ABC"], memory["vanilla"])
    assert found.problems == ("extrapolated: 70 is outside the measured 256 to 8192",)


def test_the_measured_curves_cross_where_the_fit_does_not_say():
    curves = cab2023.cost_curves("time")
    found = efficiency.crossing(curves["ABC"], curves["vanilla"])
    assert found.side == "crosses"
    assert 256 < found.length < 512
    memory = cab2023.cost_curves("memory")
    assert efficiency.crossing(memory["ABC"], memory["vanilla"]) == Crossing("always", 256.0)


def test_an_exact_parabola_and_line_meet_where_they_meet():
    baseline = {n: 0.001 * n * n + 0.5 * n + 100 for n in LENGTHS}
    curve = {n: 2.0 * n + 400.0 for n in LENGTHS}
    expected = (1.5 + math.sqrt(1.5**2 + 4 * 0.001 * 300)) / 0.002
    for weighted in (False, True):
        found = efficiency.fitted_length(curve, baseline, weighted=weighted)
        assert found.length == pytest.approx(expected, rel=1e-6)
        assert found.residual < 1e-8
        assert found.problems == ()


def test_curves_that_never_meet_have_no_length():
    none = efficiency.fitted_length({n: 0.01 * n + 0.5 for n in LENGTHS}, {n: n * n + 100.0 for n in LENGTHS})
    assert none.length is None
    assert "do not meet" in none.problems[0]
    with pytest.raises(ValueError, match="expected at least 3"):
        efficiency.fitted_length({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0})


def test_crossing_of_power_laws_is_exact():
    found = efficiency.crossing(power(700.0, 1), power(1.0, 2))
    assert (found.side, found.length) == ("crosses", pytest.approx(700.0))


def test_crossing_is_the_last_one():
    curve = {1: 0.5, 2: 2.0, 4: 0.5, 8: 2.0, 16: 0.5}
    found = efficiency.crossing(curve, dict.fromkeys(curve, 1.0))
    assert 8 < found.length < 16


def test_never_always_and_nothing_in_common():
    assert efficiency.crossing(power(1e9, 1), power(1.0, 2)) == Crossing("never", None)
    assert efficiency.crossing(power(1.0, 1), power(1.0, 2)) == Crossing("always", 256.0)
    assert efficiency.crossing({4: 1.0}, {4: 1.0}) == Crossing("never", None)  # equal is not below
    with pytest.raises(ValueError, match="expected a common one"):
        efficiency.crossing({1: 1.0}, {2: 1.0})


def test_interval_covers_the_crossing_and_is_reproducible():
    spread = (0.97, 0.99, 1.0, 1.01, 1.03)
    curve = {n: [y * f for f in spread] for n, y in power(700.0, 1).items()}
    baseline = {n: [y * f for f in spread] for n, y in power(1.0, 2).items()}
    found = efficiency.crossing_interval(curve, baseline)
    assert found.lo < 700 < found.hi
    assert found.lo > 650
    assert found.hi < 750
    assert found == efficiency.crossing_interval(curve, baseline)
    once = efficiency.crossing_interval({n: ys[:1] for n, ys in curve.items()}, baseline)
    assert (once.side, once.lo, once.hi) == ("crosses", None, None)


def test_interval_says_when_the_curves_need_not_cross():
    curve = {n: [0.9, 1.0, 1.1] for n in LENGTHS}
    baseline = {n: [0.95, 1.0, 1.05] for n in LENGTHS}
    found = efficiency.crossing_interval(curve, baseline)
    assert found.hi == math.inf


def test_scaling_exponent():
    assert efficiency.scaling_exponent(power(3.0, 2)) == pytest.approx(2.0)
    assert efficiency.scaling_exponent(power(3.0, 1, (1, 2))) is None
