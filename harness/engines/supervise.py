"""Hands groups to a pool of machines that may vanish, and sees that every case still ends as one row.

Pure: what runs where is behind :class:`Pool`. A group whose machine is lost is handed out again from its
first unfinished case; a case that loses its machine again and again becomes a row that says so.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from attnbench.errors import AttnbenchWarning
from attnbench.harness.engines.group import Group, exceeded_by, lost
from attnbench.harness.plan import Planned
from attnbench.results.rows import Row

LOSSES: Final = 3
"""How often a case may be running on a machine that is lost before it is held to be the cause."""


@dataclass(frozen=True)
class Finished:
    """A group came to its end."""

    group: Group


@dataclass(frozen=True)
class Measured:
    """A case of a group has a row."""

    group: Group
    row: Row


@dataclass(frozen=True)
class Lost:
    """The machine of a group is gone, or its process there; ``why`` in words."""

    group: Group
    why: str


class Pool(Protocol):
    """Machines that measure groups at the same time."""

    def submit(self, group: Group) -> None:
        """Queue a group."""

    def wait(self) -> Finished | Measured | Lost:
        """The next thing that happens; at least one group is queued or running."""


def supervise(groups: Iterable[Group], pool: Pool, losses: int = LOSSES) -> Generator[Row]:
    """Every row of ``groups`` as the pool gives them.

    A case is handed out until it was lost ``losses`` times. Every loss is an AttnbenchWarning.
    """
    waiting = 0
    for group in groups:
        pool.submit(group)
        waiting += 1
    done: dict[tuple[str, int], Row] = {}
    times_lost: Counter[tuple[str, int]] = Counter()
    machines: dict[str, Row] = {}  # device → the latest row from it
    while waiting:
        event = pool.wait()
        group = event.group
        if isinstance(event, Measured):
            key = (event.row["case_key"], event.row["block"])
            if key not in done:
                done[key] = machines[group.device] = event.row
                yield event.row
            continue
        waiting -= 1
        left = [item for item in group.cases if item.key not in done]
        if isinstance(event, Finished) or not left:
            continue
        warnings.warn(
            f"a machine or process was lost: {event.why}; {len(left)} cases are handed out again",
            AttnbenchWarning,
            stacklevel=2,
        )
        first = left[0]
        times_lost[first.key] += 1
        if times_lost[first.key] == losses:
            reason = f"its machine or process was lost {losses} times while it was measured: {event.why}"
            done[first.key] = lost(group, first, reason, _machine(machines.get(group.device)))
            yield done[first.key]
            del left[0]
        if left:
            pool.submit(_rest(group, left, done))
            waiting += 1


def _rest(group: Group, left: Sequence[Planned], done: Mapping[tuple[str, int], Row]) -> Group:
    """The group without its finished cases, which have shown what they have shown."""
    finished = [done[item.key] for item in group.cases if item.key in done]
    shown = exceeded_by(group.cases, finished) if group.request.infer else {}
    exceeded = {**group.exceeded, **{series: what for (_, series), what in shown.items()}}
    return replace(group, cases=tuple(left), exceeded=exceeded)


def _machine(row: Row | None) -> Mapping[str, Any]:
    """What the latest row from a device says of its machine; nothing is known of one lost before any."""
    return {} if row is None else dict(json.loads(row["environment"]))
