"""Machines that vanish, simulated: every planned case still ends as exactly one row."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from attnbench.errors import AttnbenchWarning
from attnbench.harness.config import RunConfig
from attnbench.harness.engines.group import Group, exceeded_by, grouped, lost
from attnbench.harness.engines.supervise import Finished, Lost, Measured, supervise
from attnbench.harness.plan import Planned
from attnbench.impls.case import Case, Workload
from attnbench.results.schema import problems

SHAPE = Workload("tiny", 1, 4, 4, 32)


def _planned(n: int, backend: str = "torch", device: str = "cpu", unsupported: str = "") -> Planned:
    return Planned(Case("softmax", backend, "NS", SHAPE, n, n, "float32", "fwd", device), 0, unsupported)


def _group(*items: Planned) -> Group:
    return Group("run-a", RunConfig(), items, Path("checkpoints"))


def _row(group: Group, item: Planned, status: str = "ok") -> dict[str, Any]:
    return lost(group, item, "a reason", {"cpu_model": "fake"}) | {"status": status}


class Machines:
    """A pool of one machine that is lost at chosen cases: (n of the case, how often)."""

    def __init__(self, losses: dict[int, int], statuses: dict[int, str] | None = None) -> None:
        self.losses, self.statuses = losses, statuses or {}
        self.events: deque[Finished | Measured | Lost] = deque()
        self.submitted: list[Group] = []

    def submit(self, group: Group) -> None:
        self.submitted.append(group)
        for item in group.cases:
            if self.losses.get(item.case.n, 0):
                self.losses[item.case.n] -= 1
                self.events.append(Lost(group, "the node died"))
                return
            status = (
                "skipped" if item.case.series() in group.exceeded else self.statuses.get(item.case.n, "ok")
            )
            self.events.append(Measured(group, _row(group, item, status)))
        self.events.append(Finished(group))

    def wait(self) -> Finished | Measured | Lost:
        return self.events.popleft()


def _run(machines: Machines, *groups: Group) -> list[dict[str, Any]]:
    return list(supervise(groups, machines))


def _ns(rows: list[dict[str, Any]]) -> list[int]:
    return [row["n"] for row in rows]


def test_without_losses_every_case_has_a_row() -> None:
    groups = _group(_planned(16), _planned(32)), _group(_planned(16, "reference"))
    rows = _run(Machines({}), *groups)
    assert sorted(row["case_key"] for row in rows) == sorted(i.case.key() for g in groups for i in g.cases)


def test_a_lost_group_goes_on_from_its_first_unfinished_case() -> None:
    machines = Machines({32: 1})
    with pytest.warns(AttnbenchWarning, match="the node died; 2 cases"):
        rows = _run(machines, _group(_planned(16), _planned(32), _planned(48)))
    assert _ns(rows) == [16, 32, 48]
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert [item.case.n for item in machines.submitted[1].cases] == [32, 48]


def test_a_case_that_takes_its_machine_down_every_time_becomes_a_row() -> None:
    machines = Machines({32: 99})
    with pytest.warns(AttnbenchWarning):
        rows = _run(machines, _group(_planned(16), _planned(32), _planned(48)))
    assert _ns(rows) == [16, 32, 48]
    assert [row["status"] for row in rows] == ["ok", "crashed", "ok"]
    assert "lost 3 times" in rows[1]["reason"]
    assert "the node died" in rows[1]["reason"]
    assert problems(rows[1]) == []
    assert json.loads(rows[1]["environment"]) == {"cpu_model": "fake"}
    assert len(machines.submitted) == 4


def test_a_loss_after_the_last_row_hands_nothing_out_again() -> None:
    group = _group(_planned(16))
    machines = Machines({})
    machines.events.extend([Measured(group, _row(group, group.cases[0])), Lost(group, "too late")])
    machines.submit = lambda group: None  # type: ignore[method-assign]
    assert len(_run(machines, group)) == 1


def test_what_a_lost_machine_has_shown_is_not_tried_again() -> None:
    machines = Machines({32: 1}, {16: "oom"})
    with pytest.warns(AttnbenchWarning):
        rows = _run(machines, _group(_planned(16), _planned(32), _planned(64)))
    assert machines.submitted[1].exceeded == {_planned(16).case.series(): (16, "out of memory")}
    assert [row["status"] for row in rows] == ["oom", "skipped", "skipped"]


def test_cases_that_need_no_worker_are_one_group_at_the_end() -> None:
    items = [
        _planned(16, "sdpa_cudnn", unsupported="needs cuda"),
        _planned(16, "torch"),
        _planned(32, "torch"),
        _planned(16, "flash_attn", unsupported="needs cuda"),
    ]
    assert [[i.case.backend for i in group] for group in grouped(items)] == [
        ["torch", "torch"],
        ["sdpa_cudnn", "flash_attn"],
    ]


def test_a_group_never_spans_devices() -> None:
    items = [_planned(16, device="h100-sxm"), _planned(16, device="a100-80g-sxm")]
    assert [len(group) for group in grouped(items)] == [1, 1]


def test_rows_of_an_earlier_attempt_say_which_lengths_are_too_long() -> None:
    item = _planned(16)
    row = _row(_group(item), item, "timeout")
    assert exceeded_by([item, _planned(32)], [row]) == {(0, item.case.series()): (16, "over the time limit")}
    assert exceeded_by([item], [row | {"status": "ok"}]) == {}
