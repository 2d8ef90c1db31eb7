"""Looks at results of calls while they are timed: that they were computed, and by what passed the gate.

An impl cannot know which calls are looked at. Between samples one input changes its sign, which costs nothing
inside them: a result that was kept from an earlier call does not follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import SystemRandom

import torch
from torch import Tensor

from attnbench.harness import accuracy
from attnbench.harness.subject import Subject

_random = SystemRandom()
_equal = torch.equal
"""Bound before any impl is imported."""


class Witness:
    """``first`` is the output of the first call and ``tolerance`` how far from it another may be."""

    def __init__(self, subject: Subject, first: Tensor, tolerance: float) -> None:
        self._subject, self._tolerance = subject, tolerance
        self._outputs = {False: first}
        self._turned = False
        self._seen, self._next = 0, 1
        self.wrong = ""

    def __call__(self, result: object) -> None:
        """Look at the result of the call that ended a sample, if it is this sample's turn.

        The gaps between looks grow with the number of samples and are random.
        """
        self._seen += 1
        if self.wrong or self._seen < self._next:
            return
        self._next = self._seen + 1 + _random.randrange(self._seen)
        assert isinstance(result, Sequence)
        self.wrong = self._judged(result[0])
        self._turn()
        self._subject.step()  # the next sample finds the caches as the others do

    def finish(self) -> str:
        """Put the input back; what was wrong, or nothing."""
        if self._turned:
            self._turn()
        return self.wrong

    def _judged(self, output: Tensor) -> str:
        known = self._outputs.get(self._turned)
        if known is not None:
            return accuracy.unlike(output, known, self._tolerance)
        before = self._outputs[False]
        if _equal(output, before) and before.any():
            return "the output of a timed call did not follow its input: it was not computed"
        self._outputs[True] = output.detach().clone()
        return ""

    def _turn(self) -> None:
        with torch.no_grad():
            self._subject.inputs[-1].neg_()
        self._turned = not self._turned
