"""The contract kit: what every mechanism must hold, checked for ours and for a user's own."""

from attnbench.harness.contract.kit import Check, checks, run_kit
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable, Outcome, Summary, summary
from attnbench.harness.contract.probe import Target, targets

__all__ = [
    "Check",
    "CheckFailed",
    "NotApplicable",
    "Outcome",
    "Summary",
    "Target",
    "checks",
    "run_kit",
    "summary",
    "targets",
]
