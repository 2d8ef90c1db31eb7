"""Attention over a sequence that is split among several devices: the suite ``context_parallel``.

One call is computed by as many processes as there are ranks, each with a device and a part of the tokens.
"""

from attnbench.harness.parallel.suite import RANKS, SUITE, cases, ranks_of, why_not

__all__ = ["RANKS", "SUITE", "cases", "ranks_of", "why_not"]
