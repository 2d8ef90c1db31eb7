"""Flags: what makes a number less certain, each with the observed value and the limit it crossed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """One flag, e.g. ``not_converged``; ``text`` is what a row stores and a reader sees."""

    name: str
    observed: str
    limit: str

    @property
    def text(self) -> str:
        """``name: observed …, limit …``, in one line."""
        return f"{self.name}: observed {self.observed}, limit {self.limit}"
