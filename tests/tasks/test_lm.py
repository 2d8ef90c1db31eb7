"""The language-modelling task: data, model, scoring, the row."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from attnbench import Attention, Paper, Pattern, Spec
from attnbench.errors import UsageError
from attnbench.results.schema import BY_NAME
from attnbench.tasks import registry
from attnbench.tasks.base import TrainingDiverged
from attnbench.tasks.blocks import TokenModel
from attnbench.tasks.cab import lm
from attnbench.tasks.data import text
from attnbench.tasks.run import run_task

STEPS = 20


@pytest.fixture
def short(monkeypatch):
    """The tiny preset with a training run of seconds and a shorter test part."""
    preset = replace(lm.TINY, recipe=replace(lm.TINY.recipe, steps=STEPS, warmup=5), lengths=(64,))
    monkeypatch.setattr(lm, "TASK", replace(lm.TASK, presets={"tiny": preset}))
    monkeypatch.setattr(lm.text, "TEST_SHARE", 0.01)


# ---- data and scoring ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", text.CORPORA)
def test_corpora_are_ascii_and_have_a_fingerprint(name):
    content, corpus = text.corpus(name)
    assert max(content) < text.VOCABULARY
    assert len(content) > 400_000
    assert len(corpus.fingerprint) == 64
    assert corpus.label == f"embedded: {name}"


def test_the_test_part_is_the_last_tenth():
    train, test = text.split(bytes(range(100)))
    assert train.tolist() == list(range(90))
    assert test.tolist() == list(range(90, 100))


def test_a_stripped_python_is_a_usage_error(monkeypatch):
    monkeypatch.setitem(text.CORPORA, "python help topics", lambda: b"too short")
    text.corpus.cache_clear()
    with pytest.raises(UsageError, match="observed 9 bytes"):
        text.corpus("python help topics")
    text.corpus.cache_clear()


@pytest.mark.parametrize("length", [9, 12, 13, 16, 17, 30])
def test_blocks_predict_every_byte_but_the_first_exactly_once(length):
    part = torch.arange(length, dtype=torch.uint8)
    inputs, targets = lm.blocks_of(part, 4)
    assert inputs.shape == targets.shape
    scored = targets != lm.IGNORED
    assert sorted(targets[scored].tolist()) == list(range(1, length))
    assert torch.equal(targets[scored], inputs[scored] + 1)


def test_metrics_of_a_model_that_knows_nothing_and_of_a_bigram_count():
    session = lm.LMSession(lm.TINY, "cpu")

    class Uniform(nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, text.VOCABULARY)

    found = session.evaluate(Uniform())
    assert found["byte_ppl"] == pytest.approx(text.VOCABULARY)
    assert found["bits_per_byte"] == pytest.approx(7.0)
    pairs = torch.zeros(text.VOCABULARY, text.VOCABULARY).index_put_(
        (session.train_part[:-1].long(), session.train_part[1:].long()), torch.ones(()), accumulate=True
    )

    class Bigram(nn.Module):
        def forward(self, tokens):
            return (pairs[tokens] + 0.1).log()

    assert 9.0 < session.evaluate(Bigram())["byte_ppl"] < 12.0


def test_other_lengths_and_late_quarters_are_scored_on_the_same_bytes():
    session = lm.LMSession(replace(lm.TINY, lengths=(32, 512)), "cpu")

    class Counting(nn.Module):
        """Knows the next byte of all of a block but its first two and its last."""

        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, text.VOCABULARY)
            after = torch.cat((tokens[:, 1:], tokens[:, :1]), 1)
            known = torch.nn.functional.one_hot(after, text.VOCABULARY) * 1e4
            logits[:, 2:-1] = known[:, 2:-1]
            return logits

    found = session.evaluate(Counting())
    assert found["byte_ppl@n=128"] == found["byte_ppl"]
    for n in (32, 128, 512):  # the last byte of a block cannot be seen by its model, it stands outside
        assert math.log(found[f"byte_ppl@n={n}"]) == pytest.approx(3 / n * math.log(128), rel=0.02)
        assert math.log(found[f"byte_ppl_late@n={n}"]) == pytest.approx(4 / n * math.log(128), rel=0.02)


def test_a_length_that_a_mechanism_refuses_has_no_number():
    session = lm.LMSession(replace(lm.TINY, lengths=(256,)), "cpu")

    class Short(nn.Module):
        def forward(self, tokens):
            if tokens.shape[1] > 128:
                raise UsageError("too long")
            return torch.zeros(*tokens.shape, text.VOCABULARY)

    found = session.evaluate(Short())
    assert found["byte_ppl"] == pytest.approx(128.0)
    assert math.isnan(found["byte_ppl@n=256"])
    assert math.isnan(found["byte_ppl_late@n=256"])


def test_batches_are_windows_of_the_training_part_and_depend_on_the_seed():
    session = lm.LMSession(lm.TINY, "cpu")
    draw, again, other = session.batches(0), session.batches(0), session.batches(1)
    batch = draw()
    assert batch.shape == (16, 129)
    assert torch.equal(batch, again())
    assert not torch.equal(batch, other())
    assert bytes(batch[0].tolist()) in bytes(session.train_part.tolist())


# ---- the model and the row -----------------------------------------------------------------------------


def test_the_model_is_causal():
    session = lm.LMSession(lm.TINY, "cpu")
    model = session.model(lambda layer: _attention("softmax")).eval()
    tokens = torch.randint(text.VOCABULARY, (2, 128))
    changed = tokens.clone()
    changed[:, 70:] = (changed[:, 70:] + 1) % text.VOCABULARY
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.allclose(before[:, 70:], after[:, 70:])


def _attention(name):
    from attnbench.tasks.controls import build_attention

    return build_attention(name, 64, 4, pattern="CS", n=128, m=128)


def test_a_row_has_the_task_columns_and_training_learns(short):
    told = []
    row = run_task("lm", "softmax", seed=0, progress=lambda *what: told.append(what))
    assert set(row) <= set(BY_NAME)
    assert (row["metric"], row["metric_better"], row["steps"], row["n"]) == ("byte_ppl", "lower", STEPS, 128)
    assert 5.0 < row["metric_value"] < 60.0  # 128 before training
    assert row["params"] == row["params_softmax"] == 116_480
    assert row["tokens_per_s"] == pytest.approx(STEPS * 16 * 128 / row["train_s"])
    assert row["data"] == "embedded: python help topics"
    assert row["ops_used"] == ["flash/torch"]
    assert (row["control"], row["flags"]) == (False, [])
    assert told[-1][:2] == (STEPS, STEPS)


def test_equal_seeds_give_equal_scores_and_the_global_generator_is_left_alone(short):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = run_task("lm", "uniform", seed=1)["metric_value"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert run_task("lm", "uniform", seed=1)["metric_value"] == first
    assert run_task("lm", "uniform", seed=2)["metric_value"] != first


def test_mechanisms_share_the_weights_of_all_but_their_own_parameters(short, monkeypatch):
    models = {}
    original = lm.LMSession.model

    def keep(self, attention):
        model = original(self, attention)
        if model.head.weight.device.type == "cpu":
            models[model.blocks[0].attention.spec.id] = {k: v.clone() for k, v in model.state_dict().items()}
        return model

    monkeypatch.setattr(lm.LMSession, "model", keep)
    for name in ("softmax", "no_mixing"):
        run_task("lm", name, seed=3)
    softmax, control = models["softmax"], models["no_mixing"]
    assert set(softmax) == set(control)
    assert all(torch.equal(softmax[name], control[name]) for name in softmax)


@pytest.mark.parametrize(("name", "control"), [("no_mixing", True), ("linear_transformer", False)])
def test_controls_and_mechanisms_go_through_the_same_door(short, name, control):
    row = run_task("lm", name)
    assert row["control"] is control
    assert math.isfinite(row["metric_value"])


class Diverging(Attention):
    """A mechanism whose output is not a number."""

    spec = Spec(
        id="diverging",
        name="diverging",
        family="user",
        kind="core",
        paper=Paper("none", 2026),
        patterns=(Pattern.CS,),
        summary="Gives no numbers.",
        formula="-",
        cost="-",
        hot_loop="-",
    )

    def attend(self, q, k, v, **inputs):
        return v * float("nan")


class Heavy(Diverging):
    """A mechanism with more parameters than the rule allows."""

    spec = replace(Diverging.spec, id="heavy", name="heavy")

    def setup(self):
        self.extra = nn.Linear(128, 128)

    def attend(self, q, k, v, **inputs):
        return v


def test_divergence_is_an_error_with_step_and_loss(short):
    with pytest.raises(TrainingDiverged, match="loss nan at step 9") as raised:
        run_task("lm", f"{__file__}:Diverging")
    assert raised.value.step == 9


def test_more_than_a_tenth_more_parameters_is_flagged(short):
    row = run_task("lm", f"{__file__}:Heavy")
    assert row["params"] == row["params_softmax"] + 2 * (128 * 128 + 128)
    assert row["flags"] == ["parameters: observed +28.4 % of the softmax model, limit +10 %"]


def test_the_time_limit_is_flagged(short, monkeypatch):
    preset = lm.TASK.presets["tiny"]
    recipe = replace(preset.recipe, steps=1000, max_seconds=1e-3)
    monkeypatch.setattr(lm, "TASK", replace(lm.TASK, presets={"tiny": replace(preset, recipe=recipe)}))
    row = run_task("lm", "no_mixing")
    assert row["steps"] == 10
    assert row["flags"][0].startswith("stopped_early: observed 10 steps")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "huge"}, "unknown preset of task lm 'huge'"),
        ({"pattern": "NS"}, "task lm: observed pattern NS, expected CS"),
        ({"mechanism": "softmaxx"}, "did you mean softmax"),
        ({"task": "ln"}, "unknown task 'ln'"),
        ({"hyper": {"window": 3}}, "unknown hyper-parameter 'window'"),
        ({"backend": "no_such"}, "has no backend 'no_such'"),
    ],
)
def test_wrong_requests_are_usage_errors(options, words):
    request = {"task": "lm", "mechanism": "softmax", **options}
    with pytest.raises(UsageError, match=words):
        run_task(request.pop("task"), request.pop("mechanism"), **request)


def test_every_task_says_what_it_is():
    for name in registry.ids():
        task = registry.task(name)
        assert task.id == name
        assert task.title
        assert task.data
        assert task.source
        assert "tiny" in task.presets
        for preset in task.presets:
            for pattern in task.patterns:
                assert task.workload(preset, pattern).workload.name == f"{name}_{preset}"
        assert registry.suite_of(name) in registry.SUITES


def test_the_small_preset_builds_and_takes_a_step_on_meta_shapes():
    with torch.device("meta"):
        attentions = [_small_attention() for _ in range(lm.SMALL.layers)]
        model = TokenModel(text.VOCABULARY, 2048, attentions, positions="sinusoidal")
        logits = model(torch.zeros(1, 64, dtype=torch.long))
    assert logits.shape == (1, 64, text.VOCABULARY)
    width = 512
    block = 4 * (width**2 + width) + 2 * 4 * width**2 + 5 * width + 4 * width
    tables = 2 * text.VOCABULARY * width
    assert sum(p.numel() for p in model.parameters()) == 8 * block + tables + 2 * width


def _small_attention():
    from attnbench.impls.registry import build

    return build("softmax", 512, 8, pattern="CS", backend="reference")
