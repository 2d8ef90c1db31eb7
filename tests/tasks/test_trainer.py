"""The loop itself on a model small enough to be exact about: schedule, clipping, seeds, ends."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from attnbench.tasks.base import LearningCheck, TrainingDiverged
from attnbench.tasks.trainer import CHECK_EVERY, Checkpoints, Recipe, learning_rate, seed_of, train

RECIPE = Recipe(steps=30, lr=0.1, warmup=10)


class Line(nn.Module):
    """y = w x + b, to be fitted to y = 3 x - 1."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x)


def loss_of(model, x):
    return (model(x) - (3.0 * x - 1.0)).square().mean()


def source(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(16, 1, generator=generator)


class Clock:
    """A clock that gains one second each time it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_learning_rate_rises_linearly_then_falls_along_half_a_cosine():
    recipe = Recipe(steps=110, lr=1.0, warmup=10, final=0.1)
    assert [learning_rate(recipe, s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(recipe, 10) == pytest.approx(1.0)
    assert learning_rate(recipe, 60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(recipe, 110) == pytest.approx(0.1)


def test_training_fits_a_line():
    model = Line()
    trained = train(model, source(), loss_of, replace(RECIPE, steps=300, weight_decay=0.0), 16)
    assert (trained.steps, trained.complete) == (300, True)
    assert model.layer.weight.item() == pytest.approx(3.0, abs=0.05)
    assert model.layer.bias.item() == pytest.approx(-1.0, abs=0.05)
    assert trained.loss < 1e-2


def test_equal_seeds_give_equal_bits_and_another_order_does_not():
    def weight(seed):
        torch.manual_seed(1)
        model = Line()
        train(model, source(seed), loss_of, RECIPE, 16)
        return model.layer.weight.item()

    assert weight(0) == weight(0)
    assert weight(0) != weight(1)


def test_progress_is_told_steps_plan_and_loss():
    told = []
    train(Line(), source(), loss_of, replace(RECIPE, steps=25), 16, lambda *what: told.append(what))
    assert [(done, total) for done, total, _ in told] == [(10, 25), (20, 25), (25, 25)]
    assert all(math.isfinite(loss) for _, _, loss in told)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training_with_step_and_value(bad):
    calls = iter(range(100))

    def exploding(model, x):
        return loss_of(model, x) * (bad if next(calls) >= 5 else 1.0)

    with pytest.raises(TrainingDiverged, match="step 9") as raised:
        train(Line(), source(), exploding, RECIPE, 16)
    assert raised.value.step == CHECK_EVERY - 1
    assert not math.isfinite(raised.value.loss)


def test_the_time_limit_ends_training_and_says_so():
    # one reading at the start, one per look: the second look is 2 s after the start
    trained = train(Line(), source(), loss_of, replace(RECIPE, max_seconds=1.5), 16, clock=Clock())
    assert (trained.steps, trained.complete) == (2 * CHECK_EVERY, False)


def test_throughput_counts_tokens_over_seconds():
    trained = train(Line(), source(), loss_of, replace(RECIPE, steps=20), 16, clock=Clock())
    assert trained.train_s == 3.0  # start, two looks, end
    assert trained.tokens_per_s == pytest.approx(20 * 16 / 3.0)


def test_clipping_bounds_the_gradient(monkeypatch):
    seen = []
    original = nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        original(parameters, limit)
        seen.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    train(Line(), source(), lambda m, x: 1e4 * loss_of(m, x), replace(RECIPE, clip=0.5), 16)
    assert len(seen) == RECIPE.steps
    assert max(seen) <= 0.5 * (1 + 1e-5)


def test_weight_decay_acts_on_matrices_only():
    model = Line()
    before = [p.detach().clone() for p in model.parameters()]
    recipe = Recipe(steps=10, lr=0.1, warmup=1, weight_decay=0.5)
    train(model, source(), lambda m, x: 0.0 * loss_of(m, x), recipe, 16)
    weight, bias = model.parameters()
    assert weight.abs().item() < before[0].abs().item()
    assert torch.equal(bias, before[1])


def test_seeds_of_two_purposes_or_two_runs_differ():
    seeds = {seed_of(seed, purpose) for seed in range(3) for purpose in ("data", "init", "order")}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("better", "softmax", "no_mixing", "words"),
    [
        ("lower", 4.0, 10.0, []),
        ("lower", 6.0, 10.0, ["softmax scored 6"]),
        ("lower", 4.0, 8.0, ["leak"]),
        ("higher", 0.99, 0.05, []),
        ("higher", 0.5, 0.5, ["softmax scored 0.5", "leak"]),
    ],
)
def test_learning_check_names_the_side_that_fails(better, softmax, no_mixing, words):
    check = LearningCheck(5.5, 9.0) if better == "lower" else LearningCheck(0.95, 0.1)
    problems = check.problems(better, softmax, no_mixing)
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True))


def test_other_schedules_fall_as_they_say():
    linear = Recipe(steps=110, lr=1.0, warmup=10, final=0.2, schedule="linear")
    assert learning_rate(linear, 60) == pytest.approx(0.2 + 0.8 * 0.5)
    root = Recipe(steps=1000, lr=1.0, warmup=100, schedule="inverse_sqrt")
    assert learning_rate(root, 99) == pytest.approx(1.0)
    assert learning_rate(root, 399) == pytest.approx(0.5)


def test_accumulated_batches_are_one_step_on_their_union():
    whole, parts = Line(), Line()
    parts.load_state_dict(whole.state_dict())
    rows = torch.randn(60, 1, generator=torch.Generator().manual_seed(1))
    large, small = iter(rows.split(20)), iter(rows.split(10))
    recipe = replace(RECIPE, steps=3)
    train(whole, lambda: next(large), loss_of, recipe, 20)
    trained = train(parts, lambda: next(small), loss_of, replace(recipe, accumulate=2), 10)
    assert parts.layer.weight.item() == pytest.approx(whole.layer.weight.item(), rel=1e-6)
    assert trained.steps == 3


class Killed(Exception):
    """Ends a training from outside."""


def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path):
    straight, cut, again = Line(), Line(), Line()
    for model in (cut, again):
        model.load_state_dict(straight.state_dict())
    train(straight, source(), loss_of, RECIPE, 16)
    checkpoints = Checkpoints(tmp_path / "deep/state.pt", every_s=0.5)

    def kill(done, planned, loss):
        if done == 20:
            raise Killed

    with pytest.raises(Killed):
        train(cut, source(), loss_of, RECIPE, 16, kill, Clock(), checkpoints)
    done = []
    trained = train(again, source(), loss_of, RECIPE, 16, lambda d, *_: done.append(d), Clock(), checkpoints)
    assert done == [20, 30]
    assert trained.steps == 30
    assert torch.equal(again.layer.weight, straight.layer.weight)
    checkpoints.clear()
    assert not checkpoints.path.exists()


def test_a_checkpoint_never_runs_code(tmp_path):
    import pickle

    path = tmp_path / "state.pt"
    path.write_bytes(pickle.dumps({"done": print}))
    with pytest.raises(pickle.UnpicklingError):
        train(Line(), source(), loss_of, RECIPE, 16, checkpoints=Checkpoints(path))
