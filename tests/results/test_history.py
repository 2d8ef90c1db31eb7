"""Steps of synthetic series: found where they were put, not found where there are none."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from attnbench.results import history
from attnbench.results.history import Level


def noisy(rng: np.random.Generator, *pieces: tuple[int, float], sd: float = 0.005) -> list[float]:
    return [float(x) for n, level in pieces for x in level * np.exp(rng.normal(0, sd, n))]


def test_exact_steps_are_exact():
    values = [1.0] * 5 + [1.1] * 4 + [0.9] * 6
    assert history.levels(values) == [Level(0, 5, 1.0), Level(5, 9, 1.1), Level(9, 15, 0.9)]
    up, down = history.changes(values)
    assert (up.at, up.ratio) == (5, pytest.approx(1.1))
    assert (down.at, down.ratio) == (9, pytest.approx(9 / 11))


def test_steps_are_found_where_they_are():
    hits = 0
    for seed in range(50):
        found = history.changes(noisy(np.random.default_rng(seed), (30, 1.0), (30, 1.05)))
        hits += len(found) == 1 and abs(found[0].at - 30) <= 1
    assert hits >= 48


def test_no_step_is_found_in_noise():
    alarms = sum(bool(history.changes(noisy(np.random.default_rng(s), (60, 1.0)))) for s in range(100))
    assert alarms == 0


def test_autocorrelated_noise_is_no_step():
    """A slow wander makes runs of neighbours alike; counted as independent they would look like levels."""
    alarms = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = np.zeros(80)
        for t in range(1, 80):
            x[t] = 0.6 * x[t - 1] + rng.normal(0, 0.006)
        alarms += bool(history.changes(list(np.exp(x))))
    assert alarms <= 3


def test_outliers_are_not_levels():
    values = noisy(np.random.default_rng(0), (40, 1.0))
    values[10] = values[25] = 3.0
    assert history.changes(values) == []


def test_a_real_but_tiny_step_is_a_level_and_no_change():
    values = noisy(np.random.default_rng(0), (40, 1.0), (40, 1.015), sd=0.001)
    assert len(history.levels(values)) == 2
    assert history.changes(values) == []


def test_short_series_have_one_level():
    assert history.levels([]) == []
    assert history.levels([2.0]) == [Level(0, 1, 2.0)]
    assert history.levels([1.0, 9.0, 1.0, 9.0, 1.0]) == [Level(0, 5, 1.0)]
    assert history.changes([]) == []
    with pytest.raises(ValueError, match="expected positive values"):
        history.levels([1.0, 0.0])


def test_the_fit_is_the_best_there_is():
    """Against every way to cut a short series in three."""
    rng = np.random.default_rng(4)
    xs = [math.log(x) for x in noisy(rng, (4, 1.0), (4, 1.3), (4, 1.1), sd=0.1)]

    def cost(piece):
        return sum(abs(x - np.median(piece)) for x in piece)

    cuts = [c for c in itertools.combinations(range(3, 10), 2) if c[1] - c[0] >= 3]
    best = min(cost(xs[:a]) + cost(xs[a:b]) + cost(xs[b:]) for a, b in cuts)
    total, ends = history._best_fits(history._piece_costs(xs, 3), 3)[2]
    assert total == pytest.approx(best)
    assert ends[-1] == 12
