"""The arena's tasks: expressions evaluated a second way, curves that keep apart, one token that is read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attnbench.errors import UsageError
from attnbench.impls.spec import Pattern
from attnbench.tasks import registry
from attnbench.tasks.base import Corpus
from attnbench.tasks.controls import build_attention
from attnbench.tasks.lra import listops, lra_image, lra_retrieval, lra_text, path_x, pathfinder
from attnbench.tasks.lra._curves import DOT, Curves
from attnbench.tasks.lra._packages import PACKAGES, package
from attnbench.tasks.lra._session import ArenaSession, Classifier, Data, Examples, TwoTowers
from attnbench.tasks.run import run_task

MODULES = {
    module.TASK.id: module for module in (listops, lra_text, lra_retrieval, lra_image, pathfinder, path_x)
}


# ---- ListOps ---------------------------------------------------------------------------------------------


def by_python(symbols):
    """The value of an expression that Python itself evaluates."""
    names = {"[MIN": "low", "[MAX": "high", "[MED": "middle", "[SM": "total"}
    text = "".join(f"{names[s]}((" if s in names else ")), " if s == "]" else f"{s}, " for s in symbols)
    functions = {
        "low": lambda v: min(v),
        "high": lambda v: max(v),
        "middle": lambda v: int(np.median(v)),
        "total": lambda v: int(np.sum(v)) % 10,
    }
    return eval(text.rstrip(", "), functions)


def nesting(symbols):
    depth = np.cumsum([s in listops.OPERATORS for s in symbols]) - np.cumsum([s == "]" for s in symbols])
    return depth.max()


def test_values_of_expressions():
    assert listops.value(["[SM", "9", "9", "[MIN", "3", "4", "]", "]"]) == 1
    assert listops.value(["[MED", "1", "2", "]"]) == 1
    rng = np.random.default_rng(0)
    deepest = 0
    for _ in range(300):
        symbols = list(listops.expression(rng, 4, 5))
        assert listops.value(symbols) == by_python(symbols)
        assert symbols[0] in listops.OPERATORS
        deepest = max(deepest, nesting(symbols))
    assert deepest == 4


def test_expressions_have_the_lengths_that_were_asked_for():
    problem = replace(listops.TINY.problem, train=200, test=50)
    data = problem.load()
    lengths = data.train.lengths
    assert problem.shortest < lengths.min() <= lengths.max() < problem.longest
    for tokens, label, length in zip(data.train.tokens, data.train.labels, lengths, strict=True):
        symbols = [listops.SYMBOLS[code] for code in tokens[:length]]
        assert by_python(symbols) == label
        assert not tokens[length:].any()
    assert data.corpus.label.startswith("synthetic: listops")
    assert not np.array_equal(data.train.tokens[:50], data.test.tokens)


def test_published_expressions_lose_their_parentheses():
    rows = [("( ( [MAX 2 ) ( ( [MIN 1 ) ] ) ] )", 2)]
    found = listops.PublishedListOps(length=8)._read(iter(rows))
    assert [listops.SYMBOLS[code] for code in found.tokens[0]] == ["[MAX", "2", "[MIN", "1", "]", "]", "", ""]
    assert found.lengths.tolist() == [6]
    with pytest.raises(UsageError, match="expected at most 3"):
        listops.PublishedListOps(length=3)._read(iter(rows))


# ---- text and images -------------------------------------------------------------------------------------


def test_windows_come_from_the_right_part_of_the_right_package():
    data = lra_text.PackageOf(length=40, train=32, test=16).load()
    for part, examples in (("train", data.train), ("test", data.test)):
        assert np.bincount(examples.labels).tolist() == [len(examples.labels) // 8] * 8
        for tokens, label in zip(examples.tokens, examples.labels, strict=True):
            text = package(PACKAGES[label]).tobytes()
            cut = round(0.8 * len(text))
            assert tokens.tobytes() in (text[:cut] if part == "train" else text[cut:])


def test_pairs_are_of_one_package_in_half_of_the_cases():
    data = lra_retrieval.SamePackage(length=60, train=64, test=8).load()
    texts = [package(name).tobytes() for name in PACKAGES]
    for (first, second), label in zip(data.train.tokens, data.train.labels, strict=True):
        homes = [{i for i, text in enumerate(texts) if x.tobytes() in text} for x in (first, second)]
        assert bool(homes[0] & homes[1]) == label
    assert data.train.labels.mean() == 0.5


def test_reviews_and_articles_are_cut_and_padded():
    found = lra_text.Reviews(length=6)._read(iter([("good", 1), ("terrible", 0)]))
    assert found.tokens.tolist() == [[*b"good", 0, 0], list(b"terrib")]
    assert (found.lengths.tolist(), found.labels.tolist()) == ([4, 6], [1, 0])
    pairs = lra_retrieval.Citations(length=3)._read(iter([("ab", "xyz0", 1), ("c", "", 0)]))
    assert pairs.tokens.tolist() == [[[97, 98, 0], [120, 121, 122]], [[99, 0, 0], [0, 0, 0]]]
    assert (pairs.lengths.tolist(), pairs.labels.tolist()) == ([[2, 3], [1, 0]], [1, 0])


def test_digits_are_split_and_placed_whole():
    images, _ = lra_image.digits()
    plain = lra_image.Digits().load()
    assert (len(plain.train.labels), len(plain.test.labels)) == (1400, 397)
    rows = {image.tobytes() for image in images}
    assert {row.tobytes() for row in plain.train.tokens} | {
        row.tobytes() for row in plain.test.tokens
    } == rows
    large = lra_image.Digits(side=20, scale=2, copies=3).load()
    assert large.train.tokens.shape == (4200, 400)
    assert (large.train.tokens.sum(1) == 4 * np.tile(plain.train.tokens, (3, 1)).sum(1)).all()
    assert np.array_equal(large.train.labels, np.tile(plain.train.labels, 3))


def test_gray_levels():
    image = np.array([[[[255, 255, 255], [255, 0, 0]], [[0, 255, 0], [0, 0, 255]]]], np.uint8)
    assert lra_image.gray(image, np.array([3])).tokens.tolist() == [[254, 76, 149, 29]]


@pytest.mark.parametrize(
    "task", ["listops", "lra_text", "lra_retrieval", "lra_image", "pathfinder", "path_x"]
)
def test_missing_data_are_a_usage_error_that_says_what_to_do(task, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="not on this machine"):
        registry.task(task).open("paper", Pattern.NS, "cpu")


# ---- curves ----------------------------------------------------------------------------------------------


def test_curves_are_connected_and_keep_apart():
    problem = Curves(side=16, steps=8, distractors=2, train=1, test=1)
    found = problem.curves(np.random.default_rng(0), 200)
    assert 50 < len(found) <= 200
    y, x = found // 16, found % 16
    steps = np.maximum(abs(np.diff(y, axis=2)), abs(np.diff(x, axis=2)))
    assert steps.max() == 1
    for first in range(4):
        for second in range(first):
            gap = np.maximum(
                abs(y[:, first, :, None] - y[:, second, None]), abs(x[:, first, :, None] - x[:, second, None])
            )
            assert gap.min() >= 2


def test_dots_are_the_ends_of_one_curve_or_of_two():
    problem = Curves(side=16, steps=8, distractors=1, train=1, test=1)
    labels = np.arange(100) % 2
    curves = problem.curves(np.random.default_rng(3), 100)
    pictures = problem._pictures(np.random.default_rng(3), labels)
    for curve, picture, label in zip(curves, pictures, labels, strict=False):
        dots = set(np.flatnonzero(picture == DOT).tolist())
        assert dots == {curve[0, 0], curve[0, -1] if label else curve[1, -1]}
        assert set(np.flatnonzero(picture).tolist()) <= set(curve.ravel().tolist())
    data = replace(problem, train=40, test=20).load()
    assert data.train.labels.mean() == data.test.labels.mean() == 0.5
    assert data.train.tokens.max() == DOT


# ---- the model -------------------------------------------------------------------------------------------


def _builder(preset, name, backend="auto"):
    w, n = preset.shape.workload, preset.shape.n

    def attention(layer, shape=None):
        return build_attention(name, w.width, w.heads, pattern="NS", n=n, m=n, backend=backend)

    return attention


def _tokens(preset, count=4):
    problem = preset.problem
    shape = (count, 2, problem.length) if problem.pairs else (count, problem.length)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(problem.vocabulary, shape, generator=generator)


@pytest.mark.parametrize("task", MODULES)
def test_without_mixing_the_output_is_the_same_for_every_input(task):
    preset = MODULES[task].TINY
    for name, constant in (("no_mixing", True), ("softmax", False)):
        torch.manual_seed(0)
        kind = TwoTowers if preset.problem.pairs else Classifier
        model = kind(preset, [_builder(preset, name)(layer) for layer in range(2)]).eval()
        with torch.no_grad():
            logits = model(_tokens(preset))
        assert logits.shape == (4, preset.problem.classes)
        assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-6) is constant


def test_padding_is_not_read():
    preset = listops.TINY
    model = Classifier(preset, [_builder(preset, "softmax")(layer) for layer in range(2)]).eval()
    tokens = _tokens(preset)
    where = torch.arange(preset.problem.length) < torch.tensor([5, 20, 40, 63])[:, None]
    changed = torch.where(where, tokens, (tokens + 1) % preset.problem.vocabulary)
    with torch.no_grad():
        assert torch.allclose(model(tokens, where), model(changed, where), atol=1e-5)
        assert not torch.allclose(model(tokens), model(changed), atol=1e-5)


def test_towers_are_separate_and_share_their_weights():
    preset = lra_retrieval.TINY
    model = TwoTowers(preset, [_builder(preset, "softmax")(layer) for layer in range(2)]).eval()
    tokens = _tokens(preset)
    seen = []
    model.compare.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
        model(tokens.flip(1))
    a, b, product, difference = seen[0].chunk(4, 1)
    assert torch.allclose(a * b, product)
    assert torch.allclose(a - b, difference)
    assert torch.allclose(torch.cat([b, a], 1), torch.cat(seen[1].chunk(4, 1)[:2], 1), atol=1e-5)


class FirstToken(nn.Module):
    """Says that the class is the first token, counted from the first real one."""

    def forward(self, tokens, where=None):
        return nn.functional.one_hot(tokens[:, 0], 4).float()


def test_accuracy_counts_right_answers():
    tokens = np.array([[0, 1], [1, 1], [2, 1], [3, 1]], np.uint8)
    examples = Examples(tokens, np.array([0, 1, 2, 0]))

    class Problem(Curves):
        def load(self):
            return Data(examples, examples, Corpus("four", "synthetic", ""))

    problem = Problem(side=8, steps=6, distractors=1, train=8, test=8)
    session = ArenaSession(replace(pathfinder.TINY, problem=problem, eval_batch=3), "cpu")
    assert session.evaluate(FirstToken()) == {"accuracy": 0.75}


# ---- rows and presets ------------------------------------------------------------------------------------


def _short(preset):
    problem = preset.problem
    if hasattr(problem, "train"):
        problem = replace(problem, train=40, test=20)
    return replace(preset, problem=problem, recipe=replace(preset.recipe, steps=2, warmup=1), eval_batch=40)


@pytest.mark.parametrize("task", MODULES)
@pytest.mark.parametrize("mechanism", ["softmax", "linear_transformer", "no_mixing"])
def test_two_steps_and_a_row(task, mechanism, monkeypatch):
    module = MODULES[task]
    monkeypatch.setattr(module, "TASK", replace(module.TASK, presets={"tiny": _short(module.TINY)}))
    row = run_task(task, mechanism)
    assert 0.0 <= row["metric_value"] <= 1.0
    assert json.loads(row["metrics"]) == {"accuracy": row["metric_value"]}
    assert row["n"] == module.TINY.problem.length + 1
    assert row["flags"] == []


@pytest.mark.parametrize("task", MODULES)
@pytest.mark.parametrize("name", ["small", "paper"])
def test_large_presets_build_and_run_on_meta(task, name):
    preset = registry.task(task).presets[name]
    kind = TwoTowers if preset.problem.pairs else Classifier
    with torch.device("meta"):
        build = _builder(preset, "softmax", "sdpa_math")
        model = kind(preset, [build(layer) for layer in range(preset.layers)])
        logits = model(torch.zeros(_meta_shape(preset), dtype=torch.long))
    assert logits.shape == (1, preset.problem.classes)


def _meta_shape(preset):
    return (1, 2, preset.problem.length) if preset.problem.pairs else (1, preset.problem.length)
