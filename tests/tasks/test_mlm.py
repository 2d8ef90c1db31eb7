"""Masked language modelling: corruption, scoring, the wiring of the model, and PG-19 in tokens of GPT-2."""

from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from torch import nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.case import Workload
from attnbench.tasks.base import Corpus
from attnbench.tasks.cab import lm, mlm
from attnbench.tasks.controls import build_attention
from attnbench.tasks.data import sources, text
from attnbench.tasks.run import run_task


@pytest.fixture(scope="module")
def session():
    return mlm.MLMSession(mlm.TINY, "cpu")


def attentions(name, count=2, width=64, heads=4, n=128):
    return [build_attention(name, width, heads, pattern="NS", n=n, m=n) for _ in range(count)]


# ---- corruption ----------------------------------------------------------------------------------------


def test_corruption_is_berts():
    tokens = torch.randint(100, (200, 128))
    inputs, targets = mlm.mask_tokens(tokens, 100, 0.15, torch.Generator().manual_seed(0))
    chosen = targets != lm.IGNORED
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    masked = (inputs == 100)[chosen].float().mean().item()
    kept = (inputs == tokens)[chosen].float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / 100, abs=0.02)
    assert int(inputs.max()) == 100


def test_batches_depend_on_the_seed_and_on_nothing_else(session):
    draw, again, other = session.batches(0), session.batches(0), session.batches(1)
    first = draw()
    assert first[0].shape == first[1].shape == (16, 128)
    assert all(torch.equal(a, b) for a, b in zip(first, again(), strict=True))
    assert not torch.equal(first[0], other()[0])
    assert not torch.equal(draw()[1], first[1])


def test_the_scored_windows_lie_apart_in_the_test_part_and_never_change(session):
    first, second = session.test_batches(), session.test_batches()
    assert all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )
    windows = torch.cat([torch.where(t == lm.IGNORED, x, t) for x, t in first])
    assert len(windows) == min(mlm.TINY.eval_windows, len(session.text.test) // 128)
    content = bytes(session.text.test.tolist())
    end = 0
    for row in windows:
        start = content.find(bytes(row.tolist()), end)
        assert start >= end
        end = start + 128


# ---- scoring -------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_scores_the_vocabulary(session):
    class Nothing(nn.Module):
        def forward(self, tokens, chosen):
            return torch.zeros(int(chosen.sum()), text.VOCABULARY)

    assert session.evaluate(Nothing())["masked_ppl"] == pytest.approx(text.VOCABULARY)


def test_byte_frequencies_score_their_perplexity(session):
    """A model can do better, about 20: a fifth of the masked bytes is not hidden, and half of that true."""
    counts = torch.bincount(session.text.train.long(), minlength=text.VOCABULARY) + 0.5

    class Frequencies(nn.Module):
        def forward(self, tokens, chosen):
            return counts.log().expand(int(chosen.sum()), -1)

    assert 24.0 < session.evaluate(Frequencies())["masked_ppl"] < 27.0


# ---- the model -----------------------------------------------------------------------------------------


def model_of(name):
    torch.manual_seed(0)
    return mlm.MaskedModel(128, 128, attentions(name), dropout=0.0, std=0.1).eval()


def test_only_attention_lets_a_masked_position_see_others():
    tokens = torch.randint(128, (1, 128))
    chosen = torch.zeros(1, 128, dtype=torch.bool)
    chosen[0, 40] = True
    changed = tokens.clone()
    changed[0, 90] = (changed[0, 90] + 1) % 128
    with torch.no_grad():
        for name, seen in (("softmax", True), ("no_mixing", False)):
            model = model_of(name)
            same = torch.equal(model(tokens, chosen), model(changed, chosen))
            assert same is not seen


def test_the_head_is_tied_and_cannot_predict_the_mask():
    model = model_of("softmax")
    logits = model(torch.full((2, 128), 128), torch.ones(2, 128, dtype=torch.bool))
    assert logits.shape == (256, 128)
    block = 4 * (64 * 64 + 64) + 8 * 64 * 64 + 5 * 64 + 4 * 64
    tables = 129 * 64 + 128 * 64 + 128
    assert sum(p.numel() for p in model.parameters()) == 2 * block + tables + 2 * 64 + 64 * 65 + 2 * 64


@pytest.mark.parametrize("name", ["softmax", "linear_transformer", "no_mixing"])
def test_the_tiny_preset_takes_steps(monkeypatch, name):
    preset = replace(mlm.TINY, recipe=replace(mlm.TINY.recipe, steps=2, warmup=1), eval_windows=16)
    monkeypatch.setattr(mlm, "TASK", replace(mlm.TASK, presets={"tiny": preset}))
    row = run_task("mlm", name)
    assert row["metric"] == "masked_ppl"
    assert 10.0 < row["metric_value"] < 1000.0
    assert row["data"] == "embedded: python help topics"


# ---- PG-19 and the paper presets -----------------------------------------------------------------------


def test_the_models_of_paper_have_the_published_sizes():
    with torch.device("meta"):
        roberta = mlm.MaskedModel(
            50_257, 2048, attentions("softmax", 12, 768, 12, 2048), dropout=0.1, std=0.02
        )
        own = [build_attention("softmax", 768, 12, pattern="CS", n=8192, m=8192) for _ in range(12)]
        gpt = lm.TokenModel(50_257, 8192, own, positions="sinusoidal", tied=True)
    block = 4 * (768**2 + 768) + 8 * 768**2 + 5 * 768 + 4 * 768
    assert _size(roberta) == 12 * block + 50_258 * 768 + 50_257 + 2048 * 768 + 768 * 769 + 4 * 768
    assert _size(gpt) == 12 * block + 50_257 * 768 + 2 * 768  # GPT-2 without its learned positions: 123.7 M


def _size(model):
    return sum(p.numel() for p in model.parameters())


def small(preset, length):
    """A paper preset with all its options, its lengths and widths cut to those of a test."""
    w = preset.shape.workload
    workload = Workload(w.name, batch=2, heads=w.heads, kv_heads=w.heads, head_dim=2)
    return replace(preset, shape=replace(preset.shape, workload=workload, n=length, m=length), layers=1)


@pytest.mark.parametrize(("module", "pattern"), [(lm, "CS"), (mlm, "NS")])
def test_the_paper_presets_take_a_step_on_tokens(monkeypatch, module, pattern):
    stream = torch.from_numpy(np.arange(600, dtype=np.uint16) % 50)
    tokens = text.Text(stream, stream[:101], 50_257, 400, Corpus("pg19", "real", "0"))
    monkeypatch.setattr(text, "load", lambda name: tokens)
    preset = small(module.PAPER, 32)
    if module is lm:
        preset = replace(preset, lengths=(16, 64))
    preset = replace(preset, recipe=replace(preset.recipe, steps=2))
    monkeypatch.setattr(module, "TASK", replace(module.TASK, presets={"paper": preset}))
    row = run_task(module.TASK.id, "softmax", preset="paper", pattern=pattern)
    assert row["data"] == "real: pg19"
    assert row["metric_value"] > 1.0


def test_perplexity_per_byte_counts_the_bytes_behind_tokens(monkeypatch):
    stream = torch.from_numpy(np.arange(600, dtype=np.uint16) % 50)
    tokens = text.Text(stream, stream[:101], 50, 404, Corpus("pg19", "real", "0"))
    monkeypatch.setattr(text, "load", lambda name: tokens)
    session = lm.LMSession(replace(small(lm.PAPER, 32), lengths=()), "cpu")

    class Nothing(nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, 50)

    found = session.evaluate(Nothing())
    assert found["token_ppl"] == pytest.approx(50.0)
    assert found["byte_ppl"] == pytest.approx(50.0**0.25)


BOOKS = {"1": "Call me Ishmael.\n\n  Some years ago \n", "2": "never mind how long"}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A miniature of PG-19 and a tokeniser of single bytes, where a user would put them."""
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for part in ("train", "validation", "test"):
        for name, content in BOOKS.items():
            path = tmp_path / "pg19" / part / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([], vocab_size=256)
    (tmp_path / "gpt2").mkdir()
    made.save(str(tmp_path / "gpt2" / "tokenizer.json"))
    monkeypatch.setattr(text.GPT2, "published", {"tokens": 256})
    text.gpt2.cache_clear()
    yield tmp_path
    text.gpt2.cache_clear()


def test_books_become_one_stream_of_tokens_line_by_line(library, monkeypatch):
    monkeypatch.setattr(text.PG19, "published", {"train": 2, "validation": 2, "test": 2})
    found = text.load("pg19")
    spoken = "Call me Ishmael.Some years agonever mind how long"
    assert text.gpt2().decode(found.train.long().tolist()) == spoken
    assert (len(found.test), found.test_bytes, found.vocabulary) == (len(spoken), len(spoken), 50_257)
    assert found.corpus.origin == "real"
    monkeypatch.setattr(text, "_encode", lambda books, path: pytest.fail("encoded again"))
    assert torch.equal(text.load("pg19").train.long(), found.train.long())


def test_an_incomplete_pg19_is_refused(library):
    with pytest.raises(UsageError, match=r"observed 2 in train \(published: 28,602\)"):
        text.load("pg19")


def test_what_is_missing_is_said_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(sources.DataMissing, match="pg19"):
        run_task("mlm", "softmax", preset="paper")
    text.gpt2.cache_clear()
    with pytest.raises(sources.DataMissing, match=r"tokenizer\.json .*huggingface\.co/openai-community/gpt2"):
        text.gpt2()


def test_windows_are_stretches_of_the_stream():
    part = torch.arange(50, dtype=torch.uint8)
    found = text.draw_windows(part, 200, 5, torch.Generator().manual_seed(0))
    assert torch.equal(found - found[:, :1], torch.arange(5).expand(200, -1))
    assert int(found.min()) == 0
    assert int(found.max()) == 49
    assert F.one_hot(found[:, 0]).sum(0).min() > 0
