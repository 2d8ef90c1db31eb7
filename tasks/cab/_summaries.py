"""Documents with summaries: leads of paragraphs of the Python documentation, and Multi-News.

Extracting the leads is the strong baseline of news summarisation, and copying them takes cross attention.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from attnbench.tasks.base import Corpus
from attnbench.tasks.cab._rouge import sentences
from attnbench.tasks.data import sources, text
from attnbench.tasks.data.loaders.texts import MultiNews

Ids = NDArray[np.int64]

PAD, BOS, EOS, SEP = range(4)
"""The first ids of every vocabulary."""

PARAGRAPHS, WORDS, LEAD = 3, 20, 5
"""Paragraphs of a source, words of each, and the first of them that the summary repeats."""
KNOWN_WORDS, BUCKETS = 1000, 200
"""The most frequent words have ids of their own, all others share these."""
HELD_OUT = 300


class Pairs(ABC):
    """Sources and targets of fixed lengths: ``source`` tokens, and ``target`` tokens behind a BOS.

    ``padded`` says whether sources may end with PAD.
    """

    vocabulary: int
    corpus: Corpus
    padded: bool

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int) -> tuple[Ids, Ids]:
        """``count`` training pairs: sources (count, source), targets (count, 1 + target)."""

    @abstractmethod
    def test(self, count: int) -> Iterator[tuple[Ids, str]]:
        """The first ``count`` test sources, each with the text of its summary, a sentence a line."""

    @abstractmethod
    def text(self, ids: Sequence[int]) -> str:
        """Text of generated ids, a sentence a line."""


class Leads(Pairs):
    """Three paragraphs in, the first words of each out: real text, a rule that only copying fulfils.

    Source: BOS, then each paragraph and a SEP. Target: BOS, the leads, EOS.
    """

    padded = False
    source, target = 1 + PARAGRAPHS * (WORDS + 1), PARAGRAPHS * LEAD + 1

    def __init__(self) -> None:
        content, origin = text.corpus("python help topics")
        found = list(dict.fromkeys(paragraphs(content.decode("ascii"))))
        order = np.random.default_rng(0).permutation(len(found))
        shuffled = [found[i] for i in order]
        self.train_words, self.test_words = shuffled[HELD_OUT:], shuffled[:HELD_OUT]
        counts = Counter(word for paragraph in self.train_words for word in paragraph)
        first = SEP + 1
        common = sorted(counts, key=lambda word: (-counts[word], word))[:KNOWN_WORDS]
        self.ids = {word: first + i for i, word in enumerate(common)}
        self.names = {i: word for word, i in self.ids.items()}
        self.vocabulary = first + KNOWN_WORDS + BUCKETS
        self.train_ids, self.test_ids = (
            np.array([[self._id(word) for word in p] for p in part])
            for part in (self.train_words, self.test_words)
        )
        print_of = hashlib.sha256(f"leads/1/{origin.fingerprint}".encode()).hexdigest()
        self.corpus = Corpus("leads of Python documentation paragraphs", "embedded", print_of)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Ids, Ids]:
        """Pairs of three training paragraphs each, different ones, in any order."""
        chosen = rng.random((count, len(self.train_ids))).argpartition(PARAGRAPHS)[:, :PARAGRAPHS]
        return self._pairs(self.train_ids[chosen])

    def test(self, count: int) -> Iterator[tuple[Ids, str]]:
        """Held-out paragraphs, three at a time; in another order from the start when they are used up."""
        rng = np.random.default_rng(1)
        per_pass = len(self.test_ids) // PARAGRAPHS
        for at in range(count):
            if at % per_pass == 0:
                order = rng.permutation(len(self.test_ids))
            chosen = order[PARAGRAPHS * (at % per_pass) :][:PARAGRAPHS]
            sources, targets = self._pairs(self.test_ids[chosen][None])
            yield sources[0], self.text(targets[0, 1:-1].tolist())

    def text(self, ids: Sequence[int]) -> str:
        """Words, a line a lead; a shared id is a word of its own."""
        words = [self.names.get(i, f"w{i}") for i in ids]
        return "\n".join(" ".join(words[at : at + LEAD]) for at in range(0, len(words), LEAD))

    def _id(self, word: str) -> int:
        shared = self.vocabulary - BUCKETS + zlib.crc32(word.encode()) % BUCKETS
        return self.ids.get(word, shared)

    def _pairs(self, chosen: Ids) -> tuple[Ids, Ids]:
        """Sources and targets of paragraphs (count, PARAGRAPHS, WORDS)."""
        count = len(chosen)
        separated = np.concatenate([chosen, np.full((count, PARAGRAPHS, 1), SEP)], 2).reshape(count, -1)
        bos, eos = np.full((count, 1), BOS), np.full((count, 1), EOS)
        leads = chosen[:, :, :LEAD].reshape(count, -1)
        return np.concatenate([bos, separated], 1), np.concatenate([bos, leads, eos], 1)


def paragraphs(content: str) -> Iterator[tuple[str, ...]]:
    """The first WORDS lower-cased words of every paragraph that has as many."""
    for paragraph in re.split(r"\n\s*\n", content.lower()):
        words = tuple(re.findall(r"[a-z0-9_]+", paragraph))
        if len(words) >= WORDS:
            yield words[:WORDS]


class News(Pairs):
    """Multi-News in tokens of GPT-2: articles joined by SEP, cut at ``source`` and ``target`` tokens."""

    padded = True
    vocabulary = SEP + 1 + text.GPT2_VOCABULARY

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        found = sources.find("multi_news")
        assert isinstance(found, MultiNews)
        found.require_complete(("train", "test"))
        self.corpus = found.corpus()
        self.news = found
        self.train = [self._pair(example.articles, example.summary) for example in found.examples("train")]

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Ids, Ids]:
        """Training examples, drawn with replacement."""
        chosen = [self.train[i] for i in rng.integers(len(self.train), size=count)]
        return _stack([s for s, _ in chosen], self.source), _stack([t for _, t in chosen], self.target + 1)

    def test(self, count: int) -> Iterator[tuple[Ids, str]]:
        """The test examples; a summary is scored whole."""
        for _, example in zip(range(count), self.news.examples("test"), strict=False):
            ids, _ = self._pair(example.articles, example.summary)
            yield _stack([ids], self.source)[0], "\n".join(sentences(example.summary))

    def text(self, ids: Sequence[int]) -> str:
        """Decoded text, a sentence a line."""
        known = [i - SEP - 1 for i in ids if i > SEP]
        return "\n".join(sentences(text.gpt2().decode(known)))

    def _pair(self, articles: Sequence[str], summary: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        documents = [[*_tokens(article), SEP] for article in articles]
        joined = [token for document in documents for token in document]
        target = [BOS, *_tokens(summary)[: self.target - 1], EOS]
        return np.array(joined[: self.source], np.int32), np.array(target, np.int32)


def _tokens(content: str) -> list[int]:
    return [i + SEP + 1 for i in text.gpt2().encode(content, add_special_tokens=False).ids]


def _stack(rows: Sequence[NDArray[np.int32]], length: int) -> Ids:
    """Rows of ids (count, length), filled up with PAD."""
    found = np.full((len(rows), length), PAD)
    for row, ids in zip(found, rows, strict=True):
        row[: len(ids)] = ids
    return found


@cache
def leads() -> Leads:
    """The embedded pairs, built once a process."""
    return Leads()
