"""How noisy is this machine? A comparison of this version with itself, and what it says about every other.

The threshold below which a slow-down cannot be told from noise is measured here, not assumed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from attnbench.errors import UsageError
from attnbench.results.compare import DEFAULT, Pair, Rule, Verdict, decide
from attnbench.results.comparison import Comparison
from attnbench.results.student import t_quantile

POWER = 0.9
FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """The noise of a machine, over the cases of one comparison of identical code.

    ``sd`` is the standard deviation of the log-ratio of a pair (median over cases), ``worst_sd`` the largest;
    ``autocorrelation`` that of successive pairs; ``false_alarms`` the share of cases called slower or faster;
    ``detectable`` the smallest relative slow-down found with 90 % power from ``pairs`` pairs in a median
    case.
    """

    pairs: int
    cases: int
    sd: float
    worst_sd: float
    autocorrelation: float
    false_alarms: float
    detectable: float
    software_key: str

    def rule(self, rule: Rule = DEFAULT) -> Rule:
        """``rule`` with a δ that is not below the bound on the mean of a typical case of this machine."""
        floor = t_quantile(rule.level, self.pairs - 1) * self.sd / math.sqrt(self.pairs)
        delta = max(rule.delta, math.expm1(floor))
        return replace(rule, delta=delta, equivalence=max(rule.equivalence, 2 * delta))


def calibrate(log_ratios: Sequence[Sequence[float]], software_key: str, rule: Rule = DEFAULT) -> Calibration:
    """The calibration from the log-ratios of the pairs of every case, all with the same number of pairs.

    Raises UsageError for no case or fewer than three pairs.
    """
    pairs = min((len(d) for d in log_ratios), default=0)
    if pairs < 3:
        raise UsageError(
            f"observed {len(log_ratios)} cases with {pairs} pairs, expected three pairs at least"
        )
    sds = [statistics.stdev(d) for d in log_ratios]
    alarms = sum(_called(d, rule) for d in log_ratios)
    sd = statistics.median(sds)
    return Calibration(
        pairs=pairs,
        cases=len(log_ratios),
        sd=sd,
        worst_sd=max(sds),
        autocorrelation=statistics.fmean(_lag_one(d) for d in log_ratios),
        false_alarms=alarms / len(log_ratios),
        detectable=detectable(sd, pairs, rule),
        software_key=software_key,
    )


def detectable(sd: float, pairs: int, rule: Rule = DEFAULT) -> float:
    """Smallest relative slow-down that the rule calls slower in 90 % of comparisons.

    δ plus the reach of the bound plus that of the power, both in standard errors: a normal approximation.
    """
    reach = (t_quantile(rule.level, pairs - 1) + t_quantile(POWER, pairs - 1)) * sd / math.sqrt(pairs)
    return math.expm1(math.log1p(rule.delta) + reach)


def _called(d: Sequence[float], rule: Rule) -> bool:
    found = decide([Pair(1.0, math.exp(x)) for x in d], replace(rule, min_pairs=3))
    return found.verdict in (Verdict.SLOWER, Verdict.FASTER)


def _lag_one(d: Sequence[float]) -> float:
    mean = statistics.fmean(d)
    power = math.fsum((x - mean) ** 2 for x in d)
    return math.fsum((a - mean) * (b - mean) for a, b in pairwise(d)) / power if power else 0.0


def of_comparison(found: Comparison, rule: Rule = DEFAULT) -> Calibration:
    """The calibration from a comparison of a version with itself; cases that were not timed do not count."""
    return calibrate([c.log_ratios for c in found.cases if c.log_ratios], found.software_key, rule)


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration as JSON. Raises UsageError when the path cannot be written."""
    try:
        path.write_text(json.dumps({"format": FORMAT, **asdict(calibration)}, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def load(path: Path) -> Calibration:
    """Read a calibration. Raises UsageError for a file that is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found.pop("format") != FORMAT:
            raise ValueError("another format")
        return Calibration(**found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path}: observed no calibration ({error}), expected a file of `attnbench calibrate`"
        ) from None
