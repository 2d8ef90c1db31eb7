"""What a check can say: passed, failed with observed against expected, or not applicable with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "not applicable"]


class CheckFailed(Exception):
    """A mechanism breaks the contract: what was observed, what was expected."""

    def __init__(self, observed: str, expected: str) -> None:
        super().__init__(f"observed {observed}, expected {expected}")
        self.observed, self.expected = observed, expected


@dataclass(frozen=True)
class NotApplicable:
    """Returned by a check that the mechanism's definition exempts; the reason names the declaration."""

    reason: str


@dataclass(frozen=True)
class Outcome:
    """Result of one check on one target.

    ``detail`` is what was observed and expected (failed), why the check does not apply (not applicable), or
    what was reduced on this target (passed; mostly empty). ``computes`` is False for a check that reads
    declarations only.
    """

    check: str
    status: Status
    detail: str = ""
    computes: bool = True


@dataclass(frozen=True)
class Summary:
    """Counts over the outcomes of one target or several, with what a reader must not miss."""

    passed: int
    failed: int
    not_applicable: int
    failures: tuple[Outcome, ...]
    verdict: Literal["passed", "failed", "nothing computed"]
    reason: str

    @property
    def text(self) -> str:
        """One line: verdict, counts and, where nothing was computed, why."""
        counts = f"{self.passed} passed, {self.failed} failed, {self.not_applicable} not applicable"
        return f"{self.verdict}: {counts}" + (f" ({self.reason})" if self.reason else "")


def summary(outcomes: Sequence[Outcome]) -> Summary:
    """Summarise outcomes; the verdict is ``nothing computed`` when no computing check passed or failed.

    ``reason`` is then the most frequent reason why not, and empty otherwise.
    """
    failures = tuple(o for o in outcomes if o.status == "failed")
    absent = [o for o in outcomes if o.status == "not applicable"]
    computed = any(o.computes and o.status != "not applicable" for o in outcomes)
    reasons = Counter(o.detail for o in absent if o.computes)
    return Summary(
        passed=len(outcomes) - len(failures) - len(absent),
        failed=len(failures),
        not_applicable=len(absent),
        failures=failures,
        verdict="failed" if failures else "passed" if computed else "nothing computed",
        reason="" if computed or not reasons else reasons.most_common(1)[0][0],
    )
