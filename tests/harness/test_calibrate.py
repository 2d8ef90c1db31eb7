"""The noise of a machine from a comparison of a version with itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attnbench.errors import UsageError
from attnbench.harness import calibrate
from attnbench.harness.compare import in_turns
from attnbench.harness.versions import HERE, Version
from attnbench.results.compare import DEFAULT, Pair, Verdict, decide


def ratios(sd: float, cases: int = 200, pairs: int = 8) -> list[list[float]]:
    return [list(map(float, d)) for d in np.random.default_rng(0).normal(0, sd, (cases, pairs))]


def test_noise_and_false_alarms_are_those_of_the_series():
    found = calibrate.calibrate(ratios(0.01), "key")
    assert found.sd == pytest.approx(0.01, rel=0.1)
    assert found.worst_sd > found.sd
    assert found.false_alarms <= 0.01
    assert abs(found.autocorrelation + 1 / 8) < 0.05  # the mean of 8 is taken from the same 8
    assert (found.cases, found.pairs, found.software_key) == (200, 8, "key")


def test_what_is_said_to_be_detectable_is_detected():
    """In simulation: nine in ten comparisons call the slow-down that the calibration names."""
    slowdown = calibrate.detectable(0.01, 8)
    shifted = np.random.default_rng(1).normal(math.log1p(slowdown), 0.01, (2000, 8))
    called = [decide([Pair(1.0, math.exp(x)) for x in d]).verdict is Verdict.SLOWER for d in shifted]
    assert 0.85 <= np.mean(called) <= 0.95


def test_a_noisy_machine_has_a_higher_threshold_and_a_quiet_one_the_default():
    assert calibrate.calibrate(ratios(0.0005), "").rule() == DEFAULT
    noisy = calibrate.calibrate(ratios(0.1), "").rule()
    assert noisy.delta > 0.05
    assert noisy.equivalence == 2 * noisy.delta


def test_calibration_survives_its_file(tmp_path):
    found = calibrate.calibrate(ratios(0.01), "key")
    calibrate.save(found, tmp_path / "noise.json")
    assert calibrate.load(tmp_path / "noise.json") == found
    with pytest.raises(UsageError, match="cannot be written"):
        calibrate.save(found, tmp_path / "missing" / "noise.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "pairs": 8}', '{"format": 9}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "noise.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="expected a file of `attnbench calibrate`"):
        calibrate.load(path)


def test_calibration_comes_from_a_comparison(make_row, tmp_path):
    jitter = iter(np.random.default_rng(0).normal(0, 0.01, 100))

    def measure(version, block):
        return [make_row(block=block, time_us=100 * math.exp(next(jitter)), software_key="k")]

    here = Version(HERE, tmp_path)
    found = calibrate.of_comparison(in_turns(here, here, measure, 8, 8))
    assert (found.cases, found.pairs, found.software_key) == (1, 8, "k")
    with pytest.raises(UsageError, match="three pairs at least"):
        calibrate.of_comparison(in_turns(here, here, measure, 2, 2))
