"""What a run tells whoever watches it. A progress bar implements it; the driver knows no other output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from attnbench.harness.plan import Planned


class Listener(Protocol):
    """What shows progress. All methods are called from the driver's thread."""

    def planned(self, total: int, done: int) -> None:
        """The plan stands: ``total`` cases, ``done`` of them finished in an earlier attempt."""

    def started(self, case: Planned) -> None:
        """A case is about to be measured. Engines that measure elsewhere do not say so."""

    def step(self, case: Planned, done: int, of: int) -> None:
        """A task case has taken ``done`` of ``of`` training steps."""

    def finished(self, row: Mapping[str, Any]) -> None:
        """A row is in the journal."""


class Silent:
    """A listener that shows nothing."""

    def planned(self, total: int, done: int) -> None:
        """Show nothing."""

    def started(self, case: Planned) -> None:
        """Show nothing."""

    def step(self, case: Planned, done: int, of: int) -> None:
        """Show nothing."""

    def finished(self, row: Mapping[str, Any]) -> None:
        """Show nothing."""
