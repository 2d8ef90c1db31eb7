"""The learning checks of the tiny presets: softmax learns the task, a model without mixing cannot.

One task a pattern is checked always, the others with ATTNBENCH_LEARNING=all.
"""

import os

import pytest

from attnbench.tasks import registry
from attnbench.tasks.run import run_task

GATES = {
    ("icl_regression", "NS"),
    ("mqar", "CS"),
    ("gcog", "NC"),
    ("sum", "CC"),
}
EVERYTHING = os.environ.get("ATTNBENCH_LEARNING") == "all"
CHECKS = [
    (name, str(pattern)) for name in registry.ids() for pattern in registry.task(name).presets["tiny"].checks
]


def test_every_pattern_has_a_gate_and_every_gate_is_a_check():
    assert set(CHECKS) >= GATES
    assert {pattern for _, pattern in GATES} == {"NS", "CS", "NC", "CC"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pattern"), CHECKS)
def test_softmax_learns_and_no_mixing_cannot(name, pattern):
    if (name, pattern) not in GATES and not EVERYTHING:
        pytest.skip("checked with ATTNBENCH_LEARNING=all")
    task = registry.task(name)
    scores = {
        mechanism: run_task(name, mechanism, pattern=pattern, seed=0)["metric_value"]
        for mechanism in ("softmax", "no_mixing")
    }
    assert task.presets["tiny"].checks[pattern].problems(task.better, **scores) == []
