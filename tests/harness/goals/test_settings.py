"""The plan of the races: what the goals need, the telling ones first, each case once."""

import pytest

from attnbench.harness.goals.judge import GOALS
from attnbench.harness.goals.problems import build
from attnbench.harness.goals.settings import DENSITIES, DRY, FAMILY, FULL, GATES, settings

PLAN = settings(FULL)


def test_every_goal_has_races_with_its_peers():
    for goal in GOALS:
        mine = [setting for setting in PLAN if setting.op == goal.op]
        assert mine
        assert set(goal.peers) <= {peer for setting in mine for peer in setting.peers}
    assert {setting.op for setting in PLAN} == set(FAMILY)


def test_the_sweep_is_complete():
    flash = {(s.n, s.head_dim, s.causal, s.backward) for s in PLAN if s.op == "flash"}
    lengths = [1024 << i for i in range(7)]
    assert flash == {(n, d, c, b) for n in lengths for d in (64, 128) for c in (0, 1) for b in (0, 1)}
    assert {s.gate for s in PLAN if s.op == "linrec"} == set(GATES)
    assert max(s.n for s in PLAN if s.op == "linrec") == 262144
    assert {s.density for s in PLAN if s.op == "block_sparse"} == set(DENSITIES)
    assert {s.dtype for s in PLAN} == {"bfloat16"}


def test_keys_are_unique_and_a_short_run_has_seen_every_operation_with_a_goal():
    keys = [setting.case(backend, "h200").key() for setting in PLAN for backend in setting.backends]
    assert len(set(keys)) == len(keys)
    assert {setting.op for setting in PLAN[:45]} == {goal.op for goal in GOALS}


@pytest.mark.parametrize("setting", settings(DRY), ids=lambda s: s.label)
def test_inputs_are_the_same_for_every_backend_and_every_time(setting):
    first, second = build(setting, "cpu"), build(setting, "cpu")
    assert all(a.equal(b) for a, b in zip(first.inputs, second.inputs, strict=True))
    assert first.upstream.shape == first.call("reference")()[0].shape
    assert all(x.requires_grad == setting.backward for x in first.inputs)
    assert first.flops > 0
    assert first.moved_bytes > 0
