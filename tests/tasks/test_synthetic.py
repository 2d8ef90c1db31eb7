"""The synthetic suite: exact references, answers re-derived from scenes, the capacity of known memories."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attnbench.impls.spec import Pattern
from attnbench.kernels import Unsupported
from attnbench.tasks import registry
from attnbench.tasks.controls import build_attention
from attnbench.tasks.data.pool import generator
from attnbench.tasks.run import run_task
from attnbench.tasks.synthetic import associative_capacity, gcog, icl_regression
from attnbench.tasks.synthetic.associative_capacity import Memory, Probe, capacity, slope
from attnbench.tasks.synthetic.gcog import EXIST, GET_COLOUR, GET_SHAPE, GO, YES_NO, Grid
from attnbench.tasks.synthetic.icl_regression import Regression, RegressionSession, references

MODULES = {module.TASK.id: module for module in (icl_regression, gcog, associative_capacity)}


def _builder(preset, name, pattern):
    def attention(layer, shape=None):
        seen = shape or preset.shape
        w = seen.workload
        return build_attention(name, w.width, w.heads, pattern=pattern, n=seen.n, m=seen.m)

    return attention


# ---- in-context regression -------------------------------------------------------------------------------


def _prompts(problem, count=200):
    tokens, targets = problem.sample(np.random.default_rng(0), count)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def test_without_noise_the_pairs_determine_the_answer():
    tokens, targets = _prompts(Regression(pairs=9, dim=4, noise=0.0))
    assert tokens.shape == (200, 10, 5)
    assert (tokens[:, -1, -1] == 0).all()
    for prompt, target in zip(tokens.double().numpy(), targets.numpy(), strict=True):
        beta = np.linalg.lstsq(prompt[:-1, :-1], prompt[:-1, -1], rcond=None)[0]
        assert prompt[-1, :-1] @ beta == pytest.approx(target, abs=1e-4)


def test_references_are_their_definitions():
    problem = Regression(pairs=6, dim=3, noise=0.5)
    tokens, _ = _prompts(problem, 20)
    found = references(problem, tokens)
    for row, prompt in enumerate(tokens.double().numpy()):
        x, y, query = prompt[:-1, :-1], prompt[:-1, -1], prompt[-1, :-1]
        eta = 6 / (6 + 3 + 1 + 0.25)
        step = eta / 6 * sum(y[i] * (x[i] @ query) for i in range(6))
        centred = eta / 6 * sum(y[i] * ((x[i] - x.mean(0)) @ query) for i in range(6))
        ridge = query @ np.linalg.inv(x.T @ x + 0.25 * np.eye(3)) @ x.T @ y
        expected = {"zero": 0.0, "one_step": step, "debiased": centred, "ridge": ridge}
        assert {name: value[row].item() for name, value in found.items()} == pytest.approx(expected)


def test_the_step_is_the_best_and_ridge_better_still():
    problem = Regression(pairs=10, dim=5, noise=0.3)
    tokens, targets = _prompts(problem, 40_000)
    found = references(problem, tokens)

    def error(predicted):
        return (predicted - targets).square().mean().item()

    best = error(found["one_step"])
    assert best < error(0.9 * found["one_step"])
    assert best < error(1.1 * found["one_step"])
    assert best == pytest.approx(5 + 0.09 - 5 * 10 / (10 + 5 + 1 + 0.09), rel=0.03)
    assert error(found["ridge"]) < 0.5 < best
    assert error(found["zero"]) == pytest.approx(5 + 0.09, rel=0.03)


def _regression(**changes):
    return replace(icl_regression.TINY, pool=64, tests=16, **changes)


def test_regression_reads_the_pairs_as_a_set_and_only_through_attention():
    preset = _regression()
    session = RegressionSession(preset, "cpu")
    tokens, _ = session.batches(0)()
    shuffled, other = tokens.clone(), tokens.clone()
    shuffled[:, :-1] = tokens[:, :-1].flip(1)
    other[:, :-1] += 1.0
    for name, reads in (("softmax", True), ("no_mixing", False)):
        torch.manual_seed(0)
        model = session.model(_builder(preset, name, "NS")).eval()
        with torch.no_grad():
            found, same, different = model(tokens), model(shuffled), model(other)
        assert torch.allclose(found, same, atol=1e-5)
        assert torch.allclose(found, different, atol=1e-5) is not reads


def test_scores_of_ridge_as_a_model_are_those_of_the_reference():
    preset = _regression()

    class Ridge(nn.Module):
        def forward(self, tokens):
            problem = replace(preset.problem, pairs=tokens.shape[1] - 1)
            return references(problem, tokens)["ridge"].float()

    found = RegressionSession(preset, "cpu").evaluate(Ridge())
    for n in preset.lengths:
        assert found[f"mse@n={n}"] == pytest.approx(found[f"mse_ridge@n={n}"], rel=1e-4)
    assert found["mse"] == found["mse@n=40"]


def test_bare_attention_is_all_of_the_papers_model():
    preset = replace(icl_regression.PAPER, pool=512, tests=4)
    model = RegressionSession(preset, "cpu").model(_builder(preset, "softmax", "NS"))
    width = preset.shape.workload.width
    attention = 4 * (width**2 + width)
    assert sum(p.numel() for p in model.parameters()) == attention + (6 * width + width) + (width + 1)
    assert model(torch.randn(2, 41, 6)).shape == (2,)


def test_a_length_that_a_mechanism_refuses_is_not_a_number():
    preset = _regression()
    session = RegressionSession(preset, "cpu")
    found = session.evaluate(session.model(_builder(preset, "linformer", "NS")).eval())
    assert math.isfinite(found["mse"])
    assert math.isfinite(found["mse@n=10"])
    assert math.isnan(found["mse@n=80"])


# ---- questions about a grid ------------------------------------------------------------------------------


def answer(problem, operator, colour, shape, scene):
    """The answer by looking at every object of the scene."""
    objects = [
        (cell, (code - 1) // problem.shapes, (code - 1) % problem.shapes)
        for cell, code in enumerate(scene)
        if code
    ]
    fitting = [o for o in objects if colour in (0, 1 + o[1]) and shape in (0, 1 + o[2])]
    if operator == EXIST:
        return int(bool(fitting))
    assert len(fitting) == 1
    cell, its_colour, its_shape = fitting[0]
    if operator == GET_COLOUR:
        return YES_NO + its_colour
    if operator == GET_SHAPE:
        return YES_NO + problem.colours + its_shape
    return YES_NO + problem.colours + problem.shapes + cell


@pytest.mark.parametrize(
    "problem",
    [
        gcog.TINY.problem,
        Grid(side=3, colours=2, shapes=2, distractors=(1, 3)),
        Grid(side=5, colours=4, shapes=6, distractors=(20, 20), operators=(EXIST, GO)),
    ],
    ids=repr,
)
def test_answers_are_what_the_scene_shows(problem):
    found = problem.sample(np.random.default_rng(0), 400)
    for row in range(400):
        question = [int(found[name][row]) for name in ("operator", "colour", "shape")]
        assert answer(problem, *question, found["scene"][row].tolist()) == found["answer"][row]
    assert found["answer"].max() < problem.answers
    assert set(found["operator"].tolist()) == set(problem.operators)


def test_scenes_hold_distinct_objects_and_as_many_as_asked():
    problem = gcog.TINY.problem
    found = problem.sample(np.random.default_rng(1), 4000)
    for scene in found["scene"][:200].tolist():
        objects = [code for code in scene if code]
        assert len(objects) == len(set(objects))
    others = (found["scene"] > 0).sum(1) - ((found["operator"] != EXIST) | (found["answer"] == 1))
    assert np.bincount(others, minlength=7)[1:7] / 4000 == pytest.approx(1 / 6, abs=0.03)
    exist = found["operator"] == EXIST
    assert exist.mean() == pytest.approx(0.25, abs=0.03)
    assert (found["answer"][exist] == 1).mean() == pytest.approx(0.5, abs=0.05)
    assert (found["colour"][found["operator"] == GET_COLOUR] == 0).all()
    assert (found["shape"][found["operator"] == GET_SHAPE] == 0).all()


def test_the_scene_reaches_the_answer_through_cross_attention_alone():
    preset = replace(gcog.TINY, pool=64, tests=8)
    session = gcog.GridSession(preset, "cpu")
    *question, scene, _ = session.batches(0)()
    for name, reads in (("softmax", True), ("no_mixing", False)):
        torch.manual_seed(0)
        model = session.model(_builder(preset, name, "NC")).eval()
        with torch.no_grad():
            found, other = model(*question, scene), model(*question, scene.flip(1))
        assert torch.allclose(found, other, atol=1e-5) is not reads


def test_a_model_that_looks_scores_one_everywhere():
    preset = replace(gcog.TINY, pool=64, tests=50)

    class Looks(nn.Module):
        def forward(self, *columns):
            logits = torch.zeros(len(columns[0]), preset.problem.answers)
            for row, (*question, scene) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
                logits[row, answer(preset.problem, *question, scene)] = 1.0
            return logits

    found = gcog.GridSession(preset, "cpu").evaluate(Looks())
    assert set(found.values()) == {1.0}
    assert {"accuracy", "accuracy@operator=go", "accuracy@distractors=20"} <= set(found)


# ---- capacity --------------------------------------------------------------------------------------------


class OuterProducts(nn.Module):
    """The memory Σ v kᵀ, read by q."""

    def forward(self, memory, q, k, v):
        return q @ (k.mT @ v)


class Nearest(nn.Module):
    """The value of the nearest key: no memory holds more."""

    def forward(self, memory, q, k, v):
        return torch.take_along_dim(v, (q @ k.mT).argmax(-1)[..., None], 2)


def test_bits_of_outer_products_follow_the_normal_law():
    session = associative_capacity.CapacitySession(associative_capacity.TINY, "cpu")
    found = session.evaluate(OuterProducts())
    for width in (16, 32, 64):
        for pairs in (8, 16, 32, 64, 128, 256):
            expected = 0.5 * (1 + math.erf(math.sqrt(width / (pairs - 1) / 2)))
            assert found[f"bits@d={width},pairs={pairs}"] == pytest.approx(expected, abs=0.03)
        assert found[f"p90@d={width}"] == width / 2
    assert found["p90"] == 32.0
    assert found["slope"] == pytest.approx(1.0)
    assert found["p99"] < found["p90"]
    assert found["p90@d=64,cosine=0.9"] <= 32.0


def test_the_nearest_key_stores_all():
    session = associative_capacity.CapacitySession(associative_capacity.TINY, "cpu")
    found = session.evaluate(Nearest())
    assert found["p90"] == found["p99"] == 1024.0
    assert found["slope"] == pytest.approx(0.0)
    assert found["items@d=64,pairs=1024"] == 1.0


@pytest.mark.parametrize("cosine", [1.0, 0.9, 0.0])
def test_queries_have_the_cosine_to_the_key_whose_value_is_wanted(cosine):
    q, k, v, wanted = Memory(8, 16, cosine).sample(np.random.default_rng(0), 5)
    assert torch.allclose(k.norm(dim=-1), torch.tensor(4.0), atol=1e-4)
    assert torch.allclose(q.norm(dim=-1), torch.tensor(4.0), atol=1e-4)
    _, _, order, _ = Memory(8, 16, 1.0).sample(np.random.default_rng(0), 5)
    assert torch.equal(v, order)
    exact = Memory(8, 16, 1.0).sample(np.random.default_rng(0), 5)[0]
    assert torch.allclose((q * exact).sum(-1) / 16, torch.tensor(cosine), atol=1e-4)
    found = torch.take_along_dim(v, (exact @ k.mT).argmax(-1)[..., None], 2)
    assert torch.equal(found, wanted)


def test_capacity_is_where_the_first_load_fails():
    assert capacity({2: 1.0, 4: 0.95, 8: 0.89, 16: 0.95}, 0.9) == 4
    assert capacity({2: 0.8, 4: 1.0}, 0.9) == 0
    assert slope((16, 32, 64), [8.0, 16.0, 32.0]) == pytest.approx(1.0)
    assert math.isnan(slope((16, 32), [0.0, 2.0]))


def test_a_causal_memory_is_written_first_and_read_then():
    preset = replace(
        associative_capacity.TINY, shape=associative_capacity.TASK.workload("tiny", Pattern.CS), most=1024
    )
    session = associative_capacity.CapacitySession(preset, "cpu")
    q, k, v, _ = Memory(32, 16).sample(np.random.default_rng(0), 4)
    outputs = {}
    for pattern, chosen in (("NS", associative_capacity.TINY), ("CS", preset)):
        small = replace(chosen, widths=(16,), most=chosen.most)
        model = associative_capacity.CapacitySession(small, "cpu").model(
            _builder(small, "linear_transformer", pattern)
        )
        assert isinstance(model, Probe)
        with torch.no_grad():
            outputs[pattern] = model(Memory(32, 16), q, k, v)
    assert torch.equal(outputs["NS"].sign(), outputs["CS"].sign())
    assert session.preset.seen(Memory(32, 16)).n == 64


@pytest.mark.parametrize(("mechanism", "words"), [("fnet", "mixer"), ("tensor_attention", "k2, v2")])
def test_what_is_no_function_of_q_k_v_is_unsupported(mechanism, words):
    with pytest.raises(Unsupported, match=words):
        run_task("associative_capacity", mechanism, pattern="NS")


# ---- rows and presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", MODULES)
@pytest.mark.parametrize("mechanism", ["softmax", "linear_transformer", "no_mixing"])
def test_two_steps_and_a_row(task, mechanism, monkeypatch):
    module = MODULES[task]
    preset = module.TINY
    if task == "associative_capacity":
        preset = replace(preset, most=32, shape=replace(preset.shape, n=32, m=32), sampled=64)
    else:
        preset = replace(preset, pool=64, tests=8, recipe=replace(preset.recipe, steps=2, warmup=1))
    monkeypatch.setattr(module, "TASK", replace(module.TASK, presets={"tiny": preset}))
    for pattern in module.TASK.patterns:
        row = run_task(task, mechanism, pattern=pattern)
        assert row["metric_value"] == json.loads(row["metrics"])[module.TASK.metric]
        assert row["flags"] == []
        assert row["params"] == row["params_softmax"]


@pytest.mark.parametrize("name", ["small", "paper"])
def test_large_presets_build_and_run_on_meta(name):
    preset = icl_regression.TASK.presets[name]
    session = RegressionSession(replace(preset, pool=1, tests=1), "cpu")
    with torch.device("meta"):
        model = session.model(_builder(preset, "softmax", "NS"))
        assert model(torch.zeros(2, preset.shape.n, preset.problem.dim + 1)).shape == (2,)


def test_the_small_grid_builds_and_runs_on_meta():
    preset = replace(gcog.SMALL, pool=1, tests=1)
    session = gcog.GridSession(preset, "cpu")
    with torch.device("meta"):
        model = session.model(_builder(preset, "softmax", "NC"))
        *question, _ = (x.to("meta") for x in session.train)
        assert model(*question).shape == (1, preset.problem.answers)


@pytest.mark.parametrize("task", MODULES)
def test_shapes_fit_their_problems(task):
    for name, preset in registry.task(task).presets.items():
        assert preset.shape.workload.name == f"{task}_{name}"
        if task == "gcog":
            assert (preset.shape.n, preset.shape.m) == (3, preset.problem.cells)
            assert preset.problem.distractors[1] < preset.problem.cells
        if task == "icl_regression":
            assert preset.shape.n == preset.shape.m == preset.problem.pairs + 1
            assert preset.problem.pairs in preset.lengths


def test_parts_have_generators_of_their_own():
    problem = icl_regression.TINY.problem
    draws = {
        (part, version): generator(problem, part, version).random()
        for part in ("train", "test")
        for version in (1, 2)
    }
    assert len(set(draws.values())) == 4
    assert generator(problem, "train", 1).random() == draws["train", 1]
