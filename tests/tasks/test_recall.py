"""The recall suite: generators against plain statements of the tasks, scores of known models, no leaks."""

import dataclasses
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attnbench.errors import UsageError
from attnbench.tasks import registry
from attnbench.tasks.controls import build_attention
from attnbench.tasks.recall import copy_tokens, induction, mqar, multi_needle, passkey, selective_copy
from attnbench.tasks.recall._generate import IGNORED, choose, drawn, places, weighted_order
from attnbench.tasks.recall._needles import ASK, MARK, Needles, StackedNeedles
from attnbench.tasks.recall._session import RecallSession
from attnbench.tasks.run import run_task

MODULES = (mqar, passkey, multi_needle, copy_tokens, selective_copy, induction)
TASKS = {module.TASK.id: module for module in MODULES}


# ---- what is asked, said a second time -------------------------------------------------------------------


def answer_mqar(problem, row):
    """The value after each key of the first part, wherever a key returns."""
    start = 2 * problem.pairs
    known = dict(zip(row[0:start:2], row[1:start:2], strict=True))
    return {at: known[row[at]] for at in range(start, problem.length) if row[at] in known}


def answer_needles(problem, row):
    """Follow MARK key values; after ASK key come the values of that key, the last of them left out."""
    known, answers, at = {}, {}, 0
    while at < len(row):
        if row[at] == MARK:
            known[row[at + 1]] = row[at + 2 : at + 2 + problem.per_key]
            at += 2 + problem.per_key
        elif row[at] == ASK:
            values = known[row[at + 1]]
            assert row[at + 2 : at + 1 + problem.per_key] == values[:-1]
            answers |= {at + 1 + index: value for index, value in enumerate(values)}
            at += 1 + problem.per_key
        else:
            at += 1
    return answers


def answer_stacked(problem, row):
    """The second symbol where the first one stood with one, at the positions of the end."""
    known = {first: second for first, second in row if second}
    end = len(row) - problem.queries
    return {at: known[row[at][0]] for at in range(end, len(row))}


def answer_copy(problem, row):
    """All symbols before COPY in their order, after it."""
    at = row.index(1)
    text = [symbol for symbol in row[:at] if symbol > 1]
    return {at + 1 + index: symbol for index, symbol in enumerate(text)}


def answer_induction(problem, row):
    """What follows the first special symbol, at the end."""
    return {len(row) - 1: row[row.index(0) + 1]}


def answer_repeats(problem, row):
    """What follows the earlier occurrence of a symbol, wherever there is one."""
    last = {}
    answers = {}
    for at, symbol in enumerate(row):
        if symbol in last:
            answers[at] = row[last[symbol] + 1]
        last[symbol] = at
    return answers


ANSWERS = {
    mqar.Mqar: answer_mqar,
    Needles: answer_needles,
    StackedNeedles: answer_stacked,
    copy_tokens.Copying: answer_copy,
    selective_copy.SelectiveCopying: answer_copy,
    induction.Induction: answer_induction,
    induction.Repeats: answer_repeats,
}

PROBLEMS = [
    *(module.TINY.problem for module in MODULES),
    mqar.Mqar(length=20, pairs=5, vocabulary=12),
    Needles(length=40, needles=3, queries=1, keys=3, values=5, fillers=4),
    Needles(length=64, needles=4, queries=2, keys=9, values=5, fillers=4, per_key=4),
    Needles(length=21, needles=5, queries=3, keys=5, values=2, fillers=1),
    StackedNeedles(length=12, needles=8, queries=4, keys=8, values=2, fillers=3),
    copy_tokens.Copying(tokens=3, gap=0, symbols=2),
    selective_copy.SelectiveCopying(length=9, tokens=4, symbols=3),
    induction.Induction(length=3, vocabulary=4),
    induction.Induction(length=30, vocabulary=8),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_labels_are_what_the_task_asks(problem):
    samples, _ = drawn(problem, "train", 50)
    assert samples.labels.shape == samples.tokens.shape[:2] == (50, problem.length)
    assert samples.tokens.min() >= 0
    assert max(samples.tokens.max(), samples.labels.max()) < problem.vocabulary
    for tokens, labels in zip(samples.tokens.tolist(), samples.labels.tolist(), strict=True):
        asked = {at: label for at, label in enumerate(labels) if label != IGNORED}
        assert asked == ANSWERS[type(problem)](problem, tokens)


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_samples_are_a_function_of_problem_and_part(problem):
    first, fingerprint = drawn(problem, "train", 20)
    drawn.cache_clear()
    again, same = drawn(problem, "train", 20)
    test, other = drawn(problem, "test", 20)
    assert np.array_equal(first.tokens, again.tokens)
    assert fingerprint == same != other
    assert not np.array_equal(first.tokens, test.tokens)


def test_random_fillers_leave_the_labels_alone():
    problem = mqar.Mqar(length=64, pairs=4, vocabulary=32, filler="random")
    samples, _ = drawn(problem, "train", 50)
    for tokens, labels in zip(samples.tokens.tolist(), samples.labels.tolist(), strict=True):
        answers = answer_mqar(problem, tokens)
        asked = {at: label for at, label in enumerate(labels) if label != IGNORED}
        assert len(asked) == problem.pairs
        assert asked.items() <= answers.items()
    assert len(np.unique(samples.tokens)) == 32


def test_most_queries_of_mqar_come_soon_after_the_pairs():
    samples, _ = drawn(mqar.Mqar(length=256, pairs=1, vocabulary=64), "train", 4000)
    gaps = (np.argmax(samples.labels != IGNORED, 1) - 2) // 2 + 1
    weights = np.arange(1, 128) ** -0.99
    expected = weights / weights.sum()
    for gap in (1, 2, 3, 10):
        assert (gaps == gap).mean() == pytest.approx(expected[gap - 1], abs=0.025)


def test_depth_is_the_place_of_what_is_asked():
    samples, _ = drawn(passkey.TINY.problem, "test", 100)
    marks = np.argmax(samples.tokens == MARK, 1)
    assert samples.depth is not None
    assert np.allclose(samples.depth[:, -1], marks / (128 - 2))
    assert samples.depth.max() < 1.0
    assert np.ptp(marks) > 100


def test_choices_are_distinct_and_even():
    rng = np.random.default_rng(0)
    picks = choose(rng, 4000, 6, 3)
    assert all(len(set(row)) == 3 for row in picks.tolist())
    assert np.bincount(picks[:, 0]) / 4000 == pytest.approx(1 / 6, abs=0.03)
    with pytest.raises(ValueError, match="7 picks"):
        choose(rng, 10, 6, 7)
    starts = places(rng, 4000, 7, 2, 3)
    assert {tuple(row) for row in starts.tolist()} == {(0, 3), (0, 4), (1, 4)}


def test_weighted_order_draws_one_after_the_other():
    weights = np.array([4.0, 2.0, 1.0])
    order = weighted_order(np.random.default_rng(0), 20_000, weights, 2)
    assert np.bincount(order[:, 0]) / 20_000 == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.015)
    second = order[order[:, 0] == 0, 1]
    assert (second == 1).mean() == pytest.approx(2 / 3, abs=0.015)


# ---- scores ----------------------------------------------------------------------------------------------


class Known(nn.Module):
    """The right answer before position ``until``, a wrong one from there on."""

    def __init__(self, problem, until):
        super().__init__()
        self.problem, self.until = problem, until

    def forward(self, tokens, where):
        logits = torch.zeros(*tokens.shape[:2], self.problem.vocabulary)
        for row, symbols in enumerate(tokens.tolist()):
            for at, label in ANSWERS[type(self.problem)](self.problem, symbols).items():
                said = label if at < self.until else (label + 1) % self.problem.vocabulary
                logits[row, at, said] = 1.0
        return logits[where]


def _small(preset, **changes):
    """The preset with a small pool and few tests, at the trained load only unless told otherwise."""
    only = {name: load for name, load in preset.loads.items() if load == preset.problem}
    return replace(preset, **{"pool": 64, "tests": 40, "loads": only, **changes})


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_knows_scores_one_and_one_that_does_not_scores_nothing(task):
    preset = _small(TASKS[task].TINY)
    session = RecallSession(preset, task, "cpu")
    found = session.evaluate(Known(preset.problem, until=10**6))
    assert {name.split("@")[0] for name in found} <= {"accuracy", "exact", "effective_n"}
    assert found["accuracy"] == found["exact"] == 1.0
    assert all(found[f"accuracy@{load}"] == 1.0 for load in preset.loads)
    none = session.evaluate(Known(preset.problem, until=0))
    assert none["accuracy"] == none["exact"] == 0.0


def test_half_of_the_answers_are_half_of_the_accuracy_and_no_exact_sequence():
    preset = _small(copy_tokens.TINY)
    found = RecallSession(preset, "copy_tokens", "cpu").evaluate(Known(preset.problem, until=56))
    assert found["accuracy"] == 0.5
    assert found["exact"] == 0.0


def test_depths_and_the_effective_length_of_a_model_with_a_short_memory():
    class Short(Known):
        def forward(self, tokens, where):
            logits = super().forward(tokens, where)
            marks = (tokens == MARK).float().argmax(1)
            return logits * (tokens.shape[1] - marks < 100)[:, None]

    problem = passkey.TINY.problem
    loads = {f"n={n}": replace(problem, length=n) for n in (64, 128, 256)}
    session = RecallSession(_small(passkey.TINY, loads=loads, tests=400), "passkey", "cpu")
    found = session.evaluate(Short(problem, until=10**6))
    assert found["effective_n"] == 64.0
    assert found["accuracy@n=64"] == found["accuracy@n=128,depth=90"] == 1.0
    assert found["accuracy@n=128,depth=0"] == found["accuracy@n=256,depth=50"] == 0.0
    assert found["accuracy"] == found["accuracy@n=128"] == pytest.approx(99 / 126, abs=0.08)


def test_a_length_that_a_mechanism_refuses_is_not_a_number():
    class Table(Known):
        def forward(self, tokens, where):
            if tokens.shape[1] > 128:
                raise UsageError("too long")
            return super().forward(tokens, where)

    problem = passkey.TINY.problem
    loads = {"n=128": problem, "n=256": replace(problem, length=256)}
    session = RecallSession(_small(passkey.TINY, loads=loads), "passkey", "cpu")
    found = session.evaluate(Table(problem, until=10**6))
    assert found["accuracy"] == 1.0
    assert found["effective_n"] == 128.0
    assert all(math.isnan(value) for name, value in found.items() if "n=256" in name)
    with pytest.raises(UsageError, match="too long"):
        RecallSession(_small(passkey.TINY, problem=loads["n=256"], loads=loads), "passkey", "cpu").evaluate(
            Table(problem, until=10**6)
        )


# ---- the model -------------------------------------------------------------------------------------------


def _model(session, name):
    w = session.preset.shape.workload
    n = session.preset.shape.n

    def attention(layer, shape=None):
        return build_attention(name, w.width, w.heads, pattern="CS", n=n, m=n)

    torch.manual_seed(0)
    return session.model(attention).eval()


@pytest.mark.parametrize("task", TASKS)
def test_outputs_depend_on_the_past_with_attention_and_on_one_token_without(task):
    session = RecallSession(_small(TASKS[task].TINY), task, "cpu")
    tokens, labels = session.batches(0)()
    at = int((labels[0] != IGNORED).nonzero()[0])
    later, earlier = tokens.clone(), tokens.clone()
    later[:, at + 1 :] = (later[:, at + 1 :] + 1) % session.preset.problem.vocabulary
    earlier[:, :at] = (earlier[:, :at] + 1) % session.preset.problem.vocabulary
    for name, reads in (("softmax", True), ("no_mixing", False)):
        model = _model(session, name)
        with torch.no_grad():
            before, after, other = (model(x)[:, at] for x in (tokens, later, earlier))
        assert torch.allclose(before, after, atol=1e-5)
        assert torch.allclose(before, other, atol=1e-5) is not reads


@pytest.mark.parametrize("task", TASKS)
def test_loss_is_the_cross_entropy_of_what_is_asked(task):
    session = RecallSession(_small(TASKS[task].TINY), task, "cpu")
    batch = session.batches(0)()
    model = _model(session, "softmax")
    tokens, labels = batch
    whole = nn.functional.cross_entropy(
        model(tokens).flatten(0, 1), labels.flatten().long(), ignore_index=IGNORED
    )
    assert session.loss(model, batch).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mechanism", ["softmax", "linear_transformer", "no_mixing"])
def test_two_steps_and_a_row(task, mechanism, monkeypatch):
    module = TASKS[task]
    preset = _small(module.TINY, loads=module.TINY.loads, tests=4)
    preset = replace(preset, recipe=replace(preset.recipe, steps=2, warmup=1))
    monkeypatch.setattr(module, "TASK", replace(module.TASK, presets={"tiny": preset}))
    row = run_task(task, mechanism)
    metrics = json.loads(row["metrics"])
    assert row["metric_value"] == metrics["accuracy"]
    assert {f"accuracy@{load}" for load in preset.loads} <= metrics.keys()
    assert row["data"].startswith(f"synthetic: {task}")
    assert row["flags"] == []


# ---- presets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_presets_train_on_one_of_their_loads_and_fit_their_shape(task):
    for name, preset in registry.task(task).presets.items():
        assert preset.problem in preset.loads.values()
        assert preset.shape.n == preset.shape.m == preset.problem.length
        assert preset.shape.workload.name == f"{task}_{name}"
        assert preset.pool >= preset.shape.workload.batch
        for load, problem in preset.loads.items():
            for part in load.split(","):
                axis, value = part.split("=")
                dial = {"n": "length", "values": "per_key"}.get(axis, axis)
                assert getattr(problem, dial) == int(value), load
            assert problem.vocabulary == preset.problem.vocabulary


@pytest.mark.parametrize(
    ("task", "name"), [(t, p) for t, module in TASKS.items() for p in module.TASK.presets if p != "tiny"]
)
def test_large_presets_build_and_run_on_meta(task, name):
    preset = _small(TASKS[task].TASK.presets[name], pool=1, tests=1)
    samples, _ = drawn(preset.problem, "train", 1)
    session = RecallSession(preset, task, "cpu")
    with torch.device("meta"):
        model = _model(session, "softmax")
        logits = model(torch.from_numpy(samples.tokens).to("meta"))
    assert logits.shape == (1, preset.problem.length, preset.problem.vocabulary)


def test_problems_are_frozen_so_that_their_text_names_all_dials():
    for problem in PROBLEMS:
        assert dataclasses.is_dataclass(problem)
        assert all(f"{field.name}=" in repr(problem) for field in dataclasses.fields(problem))
