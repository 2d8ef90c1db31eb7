"""The rule that calls a slow-down: by hand on small series, and in simulation for its two error rates.

The noise model is that of an ordinary GPU: an offset of every process, autocorrelated jitter inside it, drift
over the session and rare spikes. What is tested is a rate over many repetitions under a fixed seed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from attnbench.results import compare
from attnbench.results.compare import Decision, Finding, Pair, Rule, Verdict

SAMPLES = 30


def blocks(rng: np.random.Generator, repetitions: int, k: int) -> np.ndarray:
    """Medians of 2k blocks in the order of their measurement, (repetitions, 2k), around 100 µs."""
    shape = (repetitions, 2 * k)
    offset = rng.normal(0, 0.006, shape)
    drift = np.linspace(0, 0.01, 2 * k) * rng.normal(0, 1, (repetitions, 1))
    jitter = np.zeros((*shape, SAMPLES))
    noise = rng.normal(0, 0.01, jitter.shape)
    for t in range(1, SAMPLES):
        jitter[..., t] = 0.6 * jitter[..., t - 1] + noise[..., t]
    spikes = (rng.random(jitter.shape) < 0.01) * rng.exponential(0.2, jitter.shape)
    return 100 * np.median(np.exp(offset[..., None] + drift[..., None] + jitter + spikes), axis=-1)


def pairs_of(medians: np.ndarray, slowdown: float) -> list[Pair]:
    """Pairs from blocks measured in the order A B B A A B B A."""
    found = []
    for b in range(len(medians) // 2):
        first, second = float(medians[2 * b]), float(medians[2 * b + 1])
        base, head = (first, second) if b % 2 == 0 else (second, first)
        found.append(Pair(base, head * (1 + slowdown)))
    return found


def rate(slowdown: float, verdict: Verdict, repetitions: int = 1000, k: int = 8) -> float:
    medians = blocks(np.random.default_rng(1), repetitions, k)
    return sum(compare.decide(pairs_of(m, slowdown)).verdict == verdict for m in medians) / repetitions


def test_identical_code_is_hardly_ever_called_slower_or_faster():
    assert rate(0.0, Verdict.SLOWER) <= 0.01
    assert rate(0.0, Verdict.FASTER) <= 0.01


def test_three_percent_slower_is_found():
    assert rate(0.03, Verdict.SLOWER) >= 0.95
    assert rate(-0.03, Verdict.FASTER) >= 0.95


def test_a_pooled_test_of_samples_would_not_keep_this_promise():
    """Why blocks: two identical programs, one process each, differ by more than 1 % in many comparisons."""
    medians = blocks(np.random.default_rng(1), 1000, 1)
    apart = np.abs(np.log(medians[:, 0] / medians[:, 1])) > 0.01
    assert apart.mean() > 0.1


def test_one_percent_slower_is_never_called_the_same_and_slower_at_once():
    verdicts = [compare.decide(pairs_of(m, 0.01)).verdict for m in blocks(np.random.default_rng(2), 300, 8)]
    assert sum(v == Verdict.SLOWER for v in verdicts) <= 0.02 * 300  # δ itself is not beyond δ


def series(*ratios: float, **options) -> list[Pair]:
    return [Pair(100.0, 100.0 * r, **options) for r in ratios]


STEADY = (1.0, 1.001, 0.999, 1.0, 1.001, 0.999)


def scaled(factor: float) -> list[Pair]:
    return series(*(factor * r for r in STEADY))


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        (scaled(1.0), Verdict.SAME),
        (scaled(1.03), Verdict.SLOWER),
        (scaled(0.97), Verdict.FASTER),
        (series(0.8, 1.2, 0.9, 1.1, 1.0, 1.05), Verdict.UNCERTAIN),
        (series(*[1.05] * 6), Verdict.SLOWER),
        (series(*[1.0] * 6), Verdict.SAME),
    ],
)
def test_verdicts(pairs, verdict):
    found = compare.decide(pairs)
    assert found.verdict == verdict
    assert found.lo <= found.ratio <= found.hi
    assert bool(found.reason) is (verdict == Verdict.UNCERTAIN)


def test_ratio_and_bounds_are_those_of_the_t_distribution():
    found = compare.decide(scaled(1.03))
    d = [math.log(1.03 * r) for r in STEADY]
    mean, sd = np.mean(d), np.std(d, ddof=1)
    assert found.ratio == pytest.approx(math.exp(mean))
    assert found.lo == pytest.approx(
        math.exp(mean - 3.36493 * sd / math.sqrt(6)), rel=1e-6
    )  # t at 99 %, 5 d.o.f.


def test_signs_must_agree():
    """One pair ten times slower must not outvote five that are faster, however the mean lies."""
    rule = Rule(level=0.5, delta=0.0)
    found = compare.decide(series(0.99, 0.99, 0.99, 0.99, 0.99, 10.0), rule)
    assert found.verdict == Verdict.UNCERTAIN
    assert found.reason == "slower in 1 of 6 pairs, expected 80%"


def test_lopsided_pairs_are_dropped_and_counted():
    capped = Pair(100.0, 200.0, head_flags=frozenset({"power_capped"}))
    both = Pair(100.0, 100.0, frozenset({"drift", "load"}), frozenset({"drift"}))
    found = compare.decide([*scaled(1.0), capped, both])
    assert (found.verdict, found.pairs, found.dropped) == (Verdict.SAME, 7, 1)
    few = compare.decide([*scaled(1.03)[:5], capped])
    assert few == Decision(
        Verdict.UNCERTAIN, None, None, None, 5, 1, reason="5 usable pairs, expected at least 6"
    )


def test_a_slow_clock_is_not_slow_code():
    time_only = [Pair(100.0, 105.0 * r, base_cycles=1e5, head_cycles=1e5 * r) for r in STEADY]
    found = compare.decide(time_only)
    assert found.verdict == Verdict.UNCERTAIN
    assert found.reason == "clock, not code: in cycles it is same"
    both = [Pair(100.0, 105.0 * r, base_cycles=1e5, head_cycles=1.05e5 * r) for r in STEADY]
    assert compare.decide(both).verdict == Verdict.SLOWER


def test_family_of_cases_controls_false_discoveries():
    rng = np.random.default_rng(3)
    null = {f"null {i}": pairs_of(m, 0.009) for i, m in enumerate(blocks(rng, 400, 8))}
    real = {f"real {i}": pairs_of(m, 0.05) for i, m in enumerate(blocks(rng, 20, 8))}
    together = compare.decide_all({**null, **real})
    called = [key for key, d in together.items() if d.verdict == Verdict.SLOWER]
    assert sum(key.startswith("real") for key in called) == 20
    assert sum(key.startswith("null") for key in called) <= 2


def test_a_case_that_only_stands_alone_becomes_uncertain():
    marginal = [Pair(100.0, 100.0 * r) for r in (1.02, 1.03, 1.018, 1.035, 1.016, 1.03)]
    assert compare.decide(marginal).verdict == Verdict.SLOWER
    family = {"marginal": marginal, **{f"same {i}": scaled(1.0) for i in range(400)}}
    found = compare.decide_all(family)["marginal"]
    assert found.verdict == Verdict.UNCERTAIN
    assert "not among 401 cases" in found.reason
    assert compare.decide_all({}) == {}


ROW = {
    "status": "ok",
    "mem_peak_bytes": 1000,
    "n_launches": 3,
    "flops": 10,
    "err_ratio": 1.0,
    "kernels": ["a", "b"],
}


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({}, []),
        ({"mem_peak_bytes": 1010}, []),
        ({"mem_peak_bytes": 1011}, ["mem_peak_bytes"]),
        ({"n_launches": 4, "flops": 11}, ["n_launches", "flops"]),
        ({"err_ratio": 1.5}, []),
        ({"err_ratio": 1.51}, ["err_ratio"]),
        ({"kernels": ["a", "c"]}, ["kernels"]),
        ({"kernels": ["a"]}, []),
        ({"mem_peak_bytes": None, "kernels": None}, []),
        ({"status": "incorrect"}, ["status"]),
    ],
)
def test_what_is_compared_exactly(change, columns):
    assert [f.column for f in compare.exact_findings(ROW, {**ROW, **change})] == columns


def test_a_case_that_failed_before_is_no_finding_now():
    failed = {"status": "oom"}
    assert compare.exact_findings(failed, failed) == []
    assert compare.exact_findings(failed, ROW) == []
    assert compare.exact_findings(ROW, failed) == [Finding("status", "ok", "oom", "ok")]
