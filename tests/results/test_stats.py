"""Statistics: definitions against numpy and exact probabilities, claims against simulation."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.results import stats

samples = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=60)


# ---- one block -------------------------------------------------------------------------------------------


@given(samples, st.floats(0, 1))
def test_quantile_is_numpys(values, p):
    assert stats.quantile(values, p) == pytest.approx(np.quantile(values, p), rel=1e-9)


@pytest.mark.parametrize(("values", "p"), [([], 0.5), ([1.0], -0.1), ([1.0], 1.1)])
def test_quantile_of_nothing_is_refused(values, p):
    with pytest.raises(ValueError, match="expected p in"):
        stats.quantile(values, p)


def test_median_interval_has_the_documented_ranks():
    values = [float(x) for x in range(1, 31)]  # the value is its rank
    assert stats.median_interval(values[::-1]) == (
        math.floor(15 - 0.98 * math.sqrt(30)),
        math.ceil(15 + 1 + 0.98 * math.sqrt(30)),
    )


def test_median_interval_covers_at_least_95_percent_for_every_number_of_samples():
    """Exact coverage: the number of samples below the median is Binomial(n, 1/2)."""
    for n in [*range(8, 200), 500, 1001, 2000]:
        low, high = stats.median_interval(range(1, n + 1))
        inside = sum(math.comb(n, k) for k in range(low, high)) / 2**n
        assert 0.95 <= inside < 0.9985, n


@pytest.mark.parametrize("n", range(1, 8))
def test_few_samples_have_no_interval(n):
    assert stats.median_interval([1.0] * n) is None
    assert stats.describe([1.0] * n).lo is None


def test_mad_is_unscaled():
    assert stats.mad([1.0, 2.0, 3.0, 4.0, 100.0]) == 1.0


def test_outliers_are_counted_by_both_fences():
    body = [float(x) for x in range(1, 12)]  # quartiles 3.5 and 8.5 without the outliers
    q1, q3 = stats.quantile([*body, 20.0, 40.0], 0.25), stats.quantile([*body, 20.0, 40.0], 0.75)
    assert q3 + 1.5 * (q3 - q1) < 20.0 < q3 + 3 * (q3 - q1) < 40.0
    assert stats.tukey_outliers([*body, 20.0, 40.0]) == (2, 1)
    assert stats.tukey_outliers([*body, -30.0]) == (1, 1)
    assert stats.tukey_outliers([5.0] * 30) == (0, 0)


@given(st.lists(st.floats(0.1, 1e6), min_size=8, max_size=60))
def test_describe_says_the_same_as_each_function_and_does_not_sort_its_input(values):
    before = list(values)
    d = stats.describe(values)
    assert values == before
    assert (d.n, d.min) == (len(values), min(values))
    assert d.mean == pytest.approx(np.mean(values))
    assert d.median == pytest.approx(np.median(values))
    assert d.mad == pytest.approx(np.median(np.abs(np.array(values) - np.median(values))), abs=1e-9)
    assert d.min <= d.p5 <= d.p25 <= d.median <= d.p75 <= d.p95 <= max(values)
    assert (d.lo, d.hi) == stats.median_interval(values)
    assert d.lo <= d.median <= d.hi
    assert (d.n_outliers_mild, d.n_outliers_severe) == stats.tukey_outliers(values)
    assert 0 <= d.n_outliers_severe <= d.n_outliers_mild <= d.n


def test_describe_takes_arrays_and_gives_python_floats():
    d = stats.describe(np.arange(1, 21, dtype=np.float32))
    assert type(d.median) is float
    assert d.median == 10.5


def test_describe_of_no_samples_is_refused():
    with pytest.raises(ValueError, match="0 samples"):
        stats.describe([])


# ---- modes -----------------------------------------------------------------------------------------------


def modes_found(draw, n, repetitions=300):
    rng = np.random.default_rng(0)
    return (
        sum(stats.largest_gap(1000 + 10 * draw(rng, n)) is not None for _ in range(repetitions)) / repetitions
    )


@pytest.mark.parametrize("n", [20, 30, 300])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.normal(size=n),
        lambda rng, n: rng.exponential(size=n),
        lambda rng, n: rng.normal(size=n) + np.linspace(0, 6, n),
        lambda rng, n: rng.normal(size=n) + 30 * (np.arange(n) < 2),
    ],
    ids=["normal", "exponential", "drift", "two outliers"],
)
def test_one_mode_is_rarely_taken_for_two(draw, n):
    assert modes_found(draw, n) <= 0.02


@pytest.mark.parametrize("n", [30, 300])
def test_two_modes_are_found(n):
    assert modes_found(lambda rng, n: rng.normal(size=n) + 12 * (np.arange(n) % 5 < 2), n) >= 0.97


def test_the_gap_is_given_by_its_ends():
    low, high = [100.0 + 0.1 * i for i in range(15)], [150.0 + 0.1 * i for i in range(15)]
    assert stats.largest_gap(high + low) == (low[-1], high[0])


def test_steps_of_the_timer_and_tiny_gaps_are_no_modes():
    assert stats.largest_gap([5.0, 5.5] * 20) is None  # two ticks of a coarse timer
    assert stats.largest_gap([1000.0 + 1e-4 * i for i in range(20)] + [1005.0] * 20) is None  # 0.5 %
    assert stats.largest_gap([7.0] * 40) is None
    assert stats.largest_gap([1.0] * 9 + [9.0] * 10) is None  # too few samples to say


# ---- between blocks --------------------------------------------------------------------------------------


def test_geometric_mean_and_cv():
    assert stats.geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)
    assert stats.between_cv([9.0, 10.0, 11.0]) == pytest.approx(0.1)
    assert stats.between_cv([9.0]) is None
    for wrong in ([], [1.0, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="logarithms of"):
            stats.geometric_mean(wrong)


def test_t_interval_by_hand():
    lo, hi = stats.t_interval([1.0, 2.0, 3.0])
    half = 4.302652729749464 * 1.0 / math.sqrt(3)
    assert (lo, hi) == (pytest.approx(2.0 - half), pytest.approx(2.0 + half))
    assert stats.t_interval([1.0, 2.0]) is None


def test_block_interval_is_the_t_interval_of_logarithms():
    medians = [100.0, 105.0, 98.0, 101.0]
    lo, hi = stats.t_interval([math.log(x) for x in medians])
    assert stats.block_interval(medians) == (pytest.approx(math.exp(lo)), pytest.approx(math.exp(hi)))
    assert stats.block_interval(medians[:2]) is None
    scaled = stats.block_interval([1e3 * x for x in medians])
    assert scaled == pytest.approx([1e3 * math.exp(lo), 1e3 * math.exp(hi)])  # units do not matter


def coverage(interval_of, truth, repetitions=2000):
    rng = np.random.default_rng(1)
    found = [interval_of(rng) for _ in range(repetitions)]
    return sum(lo <= truth <= hi for lo, hi in found) / repetitions


@pytest.mark.parametrize("k", [3, 8])
def test_block_interval_covers_95_percent_of_noisy_blocks(k):
    share = coverage(lambda rng: stats.block_interval(100 * np.exp(0.05 * rng.normal(size=k))), 100.0)
    assert share == pytest.approx(0.95, abs=0.015)


def test_ratio_interval_covers_at_least_95_percent_of_unequal_noise():
    def interval_of(rng):
        slow = 200 * np.exp(0.08 * rng.normal(size=4))
        fast = 100 * np.exp(0.02 * rng.normal(size=6))
        found = stats.ratio_interval(slow, fast)
        return found.lo, found.hi

    assert 0.94 <= coverage(interval_of, 2.0) <= 0.98


def test_ratio_of_two_sets_by_hand():
    over, under = [200.0, 210.0, 190.0], [100.0, 101.0, 99.0]
    found = stats.ratio_interval(over, under)
    assert found.value == 2.0
    a, b = ([math.log(x) for x in side] for side in (over, under))
    va, vb = statistics.variance(a) / 3, statistics.variance(b) / 3
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 2)
    assert 2.0 < freedom < 4.0
    t = stats.t_quantile(0.975, freedom)
    expected = math.exp(statistics.fmean(a) - statistics.fmean(b) - t * math.sqrt(va + vb))
    assert found.lo == pytest.approx(expected)
    inverse = stats.ratio_interval(under, over)
    assert (inverse.lo, inverse.hi) == (pytest.approx(1 / found.hi), pytest.approx(1 / found.lo))


def test_ratio_without_noise_is_a_point_and_with_few_blocks_nothing():
    found = stats.ratio_interval([2.0] * 3, [1.0] * 3)
    assert (found.value, found.lo, found.hi) == pytest.approx((2.0, 2.0, 2.0))
    assert stats.ratio_interval([2.0] * 2, [1.0] * 3) is None
    assert stats.ratio_interval([2.0] * 3, [1.0] * 2) is None
