"""Summarisation: pairs, ROUGE, greedy decoding, the wiring of the model, and Multi-News in tokens."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch

from attnbench import Pattern
from attnbench.errors import UsageError
from attnbench.impls.case import Workload
from attnbench.tasks import registry
from attnbench.tasks.cab import _rouge, _summaries
from attnbench.tasks.cab import sum as task
from attnbench.tasks.cab._rouge import rouge, sentences
from attnbench.tasks.cab._summaries import BOS, EOS, LEAD, PAD, PARAGRAPHS, SEP, WORDS, Leads, News
from attnbench.tasks.controls import build_attention
from attnbench.tasks.data import text
from attnbench.tasks.data.loaders.texts import MultiNews
from attnbench.tasks.data.sources import DataMissing
from attnbench.tasks.run import run_task

# ---- leads ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leads():
    return _summaries.leads()


def test_paragraphs_are_lower_cased_and_cut_and_short_ones_left_out():
    long = " ".join(f"Word{i}," for i in range(WORDS + 3))
    content = f"too short\n\n{long}\n \n{long} more"
    assert list(_summaries.paragraphs(content)) == [tuple(f"word{i}" for i in range(WORDS))] * 2


def test_a_summary_is_the_leads_of_its_source(leads):
    sources, targets = leads.draw(np.random.default_rng(0), 50)
    assert sources.shape == (50, Leads.source)
    assert targets.shape == (50, Leads.target + 1)
    assert (sources[:, 0] == BOS).all()
    assert (targets[:, 0] == BOS).all()
    assert (targets[:, -1] == EOS).all()
    assert (sources[:, WORDS + 1 :: WORDS + 1] == SEP).all()
    for source, target in zip(sources, targets, strict=True):
        parts = [source[1 + i * (WORDS + 1) :][:LEAD] for i in range(PARAGRAPHS)]
        assert np.array_equal(np.concatenate(parts), target[1:-1])
        assert len({tuple(part) for part in parts}) == PARAGRAPHS


def test_held_out_paragraphs_are_not_trained_on(leads):
    train, test = set(leads.train_words), set(leads.test_words)
    assert len(test) == _summaries.HELD_OUT
    assert not train & test
    counted = {word for paragraph in train for word in paragraph}
    assert set(leads.ids) <= counted


def test_unknown_words_share_ids_that_do_not_depend_on_the_process(leads):
    assert leads._id("the") < leads.vocabulary - _summaries.BUCKETS
    assert leads._id("no such word") == leads.vocabulary - _summaries.BUCKETS + 1_725_179_637 % 200
    ids = np.concatenate([leads.train_ids, leads.test_ids])
    assert ids.min() > SEP
    assert ids.max() < leads.vocabulary


def test_test_pairs_are_always_the_same_and_use_every_paragraph_once_a_pass(leads):
    per_pass = _summaries.HELD_OUT // PARAGRAPHS
    first, second = list(leads.test(per_pass + 1)), list(leads.test(per_pass + 1))
    assert all(np.array_equal(a, b) and x == y for (a, x), (b, y) in zip(first, second, strict=True))
    used = np.concatenate([ids[1:].reshape(PARAGRAPHS, -1)[:, :-1] for ids, _ in first[:-1]])
    assert len({tuple(row) for row in used}) == len({tuple(row) for row in leads.test_ids})
    source, reference = first[0]
    assert reference.splitlines()[1] == leads.text(source[WORDS + 2 :][:LEAD].tolist())


# ---- ROUGE ---------------------------------------------------------------------------------------------


def test_rouge_is_the_summary_level_variant_with_stemming():
    reference = "the cat sat on the mat.\nit was happy"
    swapped = "it was happy.\nthe cat was on the mat"
    found = rouge([swapped], [reference])
    assert found["rougeL"] == pytest.approx(88.9, abs=0.1)
    assert rouge(["cats jumping"], ["the cat jumps"])["rouge1"] == pytest.approx(80.0)
    assert rouge(["a b", "c d"], ["a b", "x y"]) == {"rouge1": 50.0, "rouge2": 50.0, "rougeL": 50.0}


def test_rouge_1_and_2_are_f1_of_shared_words_and_pairs():
    found = rouge(["one two three four"], ["one two five"])
    assert found["rouge1"] == pytest.approx(100 * 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert found["rouge2"] == pytest.approx(100 * 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_without_the_library_rouge_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UsageError, match=r"attnbench\[tasks\]"):
        _rouge.rouge(["a"], ["a"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("One is here. Two is there! Three?", ["One is here.", "Two is there!", "Three?"]),
        ("Mr. Smith paid 3.5 dollars. He left.", ["Mr. Smith paid 3.5 dollars.", "He left."]),
        ('"Stop." She did. J. Doe ran.', ['"Stop.', "She did.", "J. Doe ran."]),
        ("it goes on. and on", ["it goes on. and on"]),
        ("", []),
    ],
)
def test_sentences_end_before_capitals_but_not_after_abbreviations(content, expected):
    assert sentences(content) == expected


# ---- the model -----------------------------------------------------------------------------------------


def session_of(pattern=Pattern.CC, **changes):
    return task.SumSession(replace(task.TINY, **changes), pattern, "cpu")


def built(pattern, name="softmax"):
    torch.manual_seed(0)

    def attention(layer, shape):
        return build_attention(name, 64, 4, pattern=pattern, n=shape.n, m=shape.m)

    return session_of(pattern).model(attention).eval()


def logits(model, source, target):
    with torch.no_grad():
        return model(source, target, None)


def test_only_cross_attention_brings_the_source_to_the_summary(leads):
    sources, targets = map(torch.from_numpy, leads.draw(np.random.default_rng(0), 2))
    target = targets[:1, :-1]
    for name, seen in (("softmax", True), ("no_mixing", False)):
        model = built(Pattern.CC, name)
        same = torch.equal(logits(model, sources[:1], target), logits(model, sources[1:], target))
        assert same is not seen


@pytest.mark.parametrize("pattern", [Pattern.CC, Pattern.CS])
def test_the_decoder_is_causal(leads, pattern):
    sources, targets = map(torch.from_numpy, leads.draw(np.random.default_rng(0), 1))
    changed = targets.clone()
    changed[:, 9:] = 7
    model = built(pattern)
    before, after = logits(model, sources, targets[:, :-1]), logits(model, sources, changed[:, :-1])
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_what_is_padding_in_the_source_changes_nothing():
    model = built(Pattern.CC)
    source = torch.randint(4, 100, (1, 64))
    padding = torch.zeros(1, 64, dtype=torch.bool)
    padding[:, 40:] = True
    other = torch.where(padding, 9, source)
    target = torch.randint(4, 100, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(source, target, padding), model(other, target, padding))


class Scripted(task.Summariser):
    """A summariser that follows a script: after token t comes ``follows[t]``."""

    def __init__(self, follows):
        torch.nn.Module.__init__(self)
        self.follows = follows

    def encode(self, source, padding):
        return source

    def decode(self, target, memory, padding):
        return target

    def logits(self, features):
        best = torch.tensor([self.follows.get(int(t), EOS) for t in features])
        scores = torch.zeros(len(features), 20)
        scores[torch.arange(len(features)), best] = 2.0
        scores[:, EOS] += 1.0
        scores[:, PAD] += 3.0
        return scores


def test_greedy_decoding_ends_at_the_first_end_that_is_allowed():
    source = torch.zeros(1, 4, dtype=torch.long)
    follows = {BOS: 5, 5: 6, 6: EOS}
    assert list(session_of(shortest=0).greedy(Scripted(follows), source)) == [[5, 6]]
    found = next(iter(session_of(shortest=4).greedy(Scripted(follows), source)))
    assert (found[:2], len(found)) == ([5, 6], 4)
    follows = {BOS: 5, 5: 5}
    assert list(session_of(shortest=0).greedy(Scripted(follows), source)) == [[5] * 16]


def test_greedy_decoding_agrees_with_decoding_of_growing_prefixes(leads):
    session, model = session_of(), built(Pattern.CC)
    source = torch.from_numpy(leads.draw(np.random.default_rng(1), 2)[0])
    target = torch.full((2, 1), BOS)
    for at in range(16):
        scores = logits(model, source, target)[:, -1]
        scores[:, [PAD, BOS, *([EOS] if at < 15 else [])]] = -torch.inf
        target = torch.cat((target, scores.argmax(-1, keepdim=True)), 1)
    expected = [row[: row.index(EOS)] if EOS in row else row for row in target[:, 1:].tolist()]
    assert list(session.greedy(model, source)) == expected


@pytest.mark.parametrize("mechanism", ["softmax", "linear_transformer", "no_mixing"])
@pytest.mark.parametrize(("pattern", "n", "m"), [("CC", 16, 64), ("NS", 64, 64), ("CS", 16, 16)])
def test_every_pattern_takes_steps(monkeypatch, mechanism, pattern, n, m):
    preset = replace(task.TINY, recipe=replace(task.TINY.recipe, steps=2, warmup=1), test_pairs=8)
    monkeypatch.setattr(task, "TASK", replace(task.TASK, presets={"tiny": preset}))
    row = run_task("sum", mechanism, pattern=pattern)
    assert (row["n"], row["m"]) == (n, m)
    assert 0.0 <= row["metric_value"] < 60.0


# ---- Multi-News and the paper preset -------------------------------------------------------------------


def test_the_model_of_paper_has_the_published_size():
    with torch.device("meta"):
        attentions = {
            pattern: [
                build_attention("softmax", 512, 8, pattern=pattern, n=shape.n, m=shape.m) for _ in range(6)
            ]
            for pattern, shape in task.shapes(task.PAPER.shape).items()
        }
        model = task.Summariser(
            News.vocabulary, (400, 4096), *(attentions[p] for p in ("NS", "CS", "CC")), dropout=0.1, std=0.02
        )
    attention, mlp, norm = 4 * (512**2 + 512), 8 * 512**2 + 5 * 512, 2 * 512
    layers = 6 * (attention + mlp + 2 * norm) + 6 * (2 * attention + mlp + 3 * norm)
    tables = News.vocabulary * 512 + (400 + 4096) * 512
    assert sum(p.numel() for p in model.parameters()) == layers + tables + 4 * norm  # 72.2 M


@pytest.fixture
def news(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    (tmp_path / "multi_news").mkdir()
    for part in ("train", "val", "test"):
        sources = ["First one. ||||| Second.", "Only a long article" + " word" * 100]
        (tmp_path / "multi_news" / f"{part}.src").write_text("\n".join(sources) + "\n")
        (tmp_path / "multi_news" / f"{part}.tgt").write_text("It rained. Mr. Fox left.\nNothing\n")
    monkeypatch.setattr(MultiNews, "published", {"train": 2, "validation": 2, "test": 2})
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([], vocab_size=256)
    (tmp_path / "gpt2").mkdir()
    made.save(str(tmp_path / "gpt2" / "tokenizer.json"))
    monkeypatch.setattr(text.GPT2, "published", {"tokens": 256})
    text.gpt2.cache_clear()
    yield
    text.gpt2.cache_clear()


def test_articles_are_joined_cut_and_padded(news):
    pairs = News(40, 30)
    (source, reference), (long, _) = pairs.test(9)
    assert pairs.text(source[source > SEP].tolist()) == "First one.Second."
    assert (source == SEP).sum() == 2
    assert (source[len("First one.Second.") + 2 :] == PAD).all()
    assert (long != PAD).all()
    assert reference == "It rained.\nMr. Fox left."
    sources, targets = pairs.draw(np.random.default_rng(0), 8)
    assert (sources.shape, targets.shape) == ((8, 40), (8, 31))
    assert (targets[:, 0] == BOS).all()
    assert ((targets == EOS).sum(1) == 1).all()


def test_the_paper_preset_takes_a_step(news, monkeypatch):
    shape = replace(task.PAPER.shape, workload=Workload("sum_paper", 2, 8, 8, 2), n=12, m=40)
    preset = replace(
        task.PAPER,
        shape=shape,
        layers=1,
        shortest=3,
        pairs=lambda: News(40, 12),
        recipe=replace(task.PAPER.recipe, steps=2),
    )
    monkeypatch.setattr(task, "TASK", replace(task.TASK, presets={"paper": preset}))
    for pattern in ("CC", "NS", "CS"):
        row = run_task("sum", "linear_transformer", preset="paper", pattern=pattern)
        assert row["data"] == "real: multi_news"


def test_missing_news_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataMissing, match="multi_news"):
        registry.task("sum").open("paper", Pattern.CC, "cpu")
