"""Summarisation: CAB's task with an encoder and a decoder, on Multi-News or on embedded text.

Under NS the encoder's attention is tested, under CS the decoder's own, under CC that from summary to source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.base import Attention
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.tasks import controls
from attnbench.tasks.base import BuildAttention, LearningCheck, Preset, Session, Shape, Task
from attnbench.tasks.blocks import Block, DecoderBlock
from attnbench.tasks.cab._rouge import rouge
from attnbench.tasks.cab._summaries import BOS, EOS, PAD, Leads, News, Pairs, leads
from attnbench.tasks.trainer import Recipe


@dataclass(frozen=True)
class SumPreset(Preset):
    """Dimensions of the model; ``shape`` is that of the cross attention: N summary and M source tokens.

    Greedy decoding gives ``shortest`` to N tokens. ``std`` is that of the initial embeddings.
    """

    pairs: Callable[[], Pairs]
    layers: int
    shortest: int
    test_pairs: int
    eval_batch: int
    dropout: float = 0.0
    smoothing: float = 0.0
    std: float = 0.02


class Summariser(nn.Module):
    """Transformer with learned positions, normalised embeddings shared by all sides, and pre-norm blocks."""

    def __init__(
        self,
        vocabulary: int,
        lengths: tuple[int, int],
        encoder: list[Attention],
        own: list[Attention],
        cross: list[Attention],
        *,
        dropout: float,
        std: float,
    ) -> None:
        super().__init__()
        width = encoder[0].embed_dim
        self.token = nn.Embedding(vocabulary, width)
        self.positions = nn.ModuleList(nn.Embedding(length, width) for length in lengths)
        self.norms_in = nn.ModuleList(nn.LayerNorm(width) for _ in lengths)
        for embedding in (self.token, *self.positions):
            nn.init.normal_(embedding.weight, std=std)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(Block(width, a, dropout=dropout) for a in encoder)
        self.decoder = nn.ModuleList(
            DecoderBlock(width, o, c, dropout=dropout) for o, c in zip(own, cross, strict=True)
        )
        self.norm_memory, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def encode(self, source: Tensor, padding: Tensor | None) -> Tensor:
        """Memory (B, M, C) of ``source`` (B, M); ``padding`` (B, M) is True where there is none."""
        x = self._embed(source, 1)
        for block in self.encoder:
            x = block(x, key_padding_mask=padding)
        return self.norm_memory(x)

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        """Features (B, N, C) after each token of ``target`` (B, N)."""
        x = self._embed(target, 0)
        for block in self.decoder:
            x = block(x, memory, key_padding_mask=padding)
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """Scores of the next token, by the embedding itself."""
        return F.linear(features, self.token.weight)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor | None) -> Tensor:
        """Logits (B, N, vocabulary) of the token after each of ``target``."""
        return self.logits(self.decode(target, self.encode(source, padding), padding))

    def _embed(self, tokens: Tensor, side: int) -> Tensor:
        positions = self.positions[side](torch.arange(tokens.shape[1], device=tokens.device))
        return self.dropout(self.norms_in[side](self.token(tokens) + positions))


class SumSession(Session):
    """One preset with its pairs: drawn ones to train on, greedy summaries of the test sources to score."""

    def __init__(self, preset: SumPreset, pattern: Pattern, device: str) -> None:
        self.preset, self.pattern, self.device = preset, pattern, device
        self.pairs = preset.pairs()
        self.corpus = self.pairs.corpus
        shape = preset.shape
        self.tokens_per_step = shape.workload.batch * (shape.n + shape.m)

    def model(self, attention: BuildAttention) -> nn.Module:
        """A :class:`Summariser` with softmax attention wherever ``pattern`` does not stand."""
        p = self.preset
        built = {
            pattern: [
                attention(layer, shape) if pattern is self.pattern else controls.softmax(shape, pattern)
                for layer in range(p.layers)
            ]
            for pattern, shape in shapes(p.shape).items()
        }
        return Summariser(
            self.pairs.vocabulary,
            (p.shape.n, p.shape.m),
            built[Pattern.NS],
            built[Pattern.CS],
            built[Pattern.CC],
            dropout=p.dropout,
            std=p.std,
        )

    def batches(self, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
        """Batches (source, target) of (B, M) and (B, 1 + N) ids."""
        rng = np.random.default_rng(seed)

        def draw() -> tuple[Tensor, Tensor]:
            source, target = self.pairs.draw(rng, self.preset.shape.workload.batch)
            return torch.from_numpy(source).to(self.device), torch.from_numpy(target).to(self.device)

        return draw

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean (smoothed) negative log-likelihood of the summary's tokens, in nats."""
        source, target = batch
        logits = model(source, target[:, :-1], self._padding(source))
        return F.cross_entropy(
            logits.flatten(0, 1),
            target[:, 1:].flatten(),
            ignore_index=PAD,
            label_smoothing=self.preset.smoothing,
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """ROUGE-1, -2 and -L in percent: F1 of greedy summaries of the test sources, mean over pairs."""
        model.eval()
        predictions, references = [], []
        pairs = self.pairs.test(self.preset.test_pairs)
        while part := list(islice(pairs, self.preset.eval_batch)):
            source = torch.from_numpy(np.stack([ids for ids, _ in part])).to(self.device)
            predictions += [self.pairs.text(ids) for ids in self.greedy(model, source)]
            references += [reference for _, reference in part]
        return rouge(predictions, references)

    @torch.no_grad()
    def greedy(self, model: nn.Module, source: Tensor) -> Iterator[list[int]]:
        """The most likely next token again and again, up to N tokens or an EOS after ``shortest`` of them.

        The decoder always runs at its full length, which every mechanism is built for; what stands after
        the last token can, by causality, change nothing.
        """
        assert isinstance(model, Summariser)
        longest, padding = self.preset.shape.n, self._padding(source)
        memory = model.encode(source, padding)
        target = source.new_full((len(source), longest + 1), PAD)
        target[:, 0] = BOS
        for at in range(longest):
            scores = model.logits(model.decode(target[:, :-1], memory, padding)[:, at])
            scores[:, [PAD, BOS]] = -math.inf
            if at < self.preset.shortest:
                scores[:, EOS] = -math.inf
            ended = (target[:, 1 : at + 1] == EOS).any(1)
            target[:, at + 1] = torch.where(ended, PAD, scores.argmax(-1))
        for row in target[:, 1:].tolist():
            yield row[: row.index(EOS)] if EOS in row else row

    def _padding(self, source: Tensor) -> Tensor | None:
        return source == PAD if self.pairs.padded else None


def shapes(cross: Shape) -> dict[Pattern, Shape]:
    """What each pattern sees: source to itself, summary to itself, summary to source."""
    return {
        Pattern.NS: replace(cross, n=cross.m),
        Pattern.CS: replace(cross, m=cross.n),
        Pattern.CC: cross,
    }


@dataclass(frozen=True)
class Summarisation(Task):
    """The task; see the module's docstring and ``data``."""

    def workload(self, preset: str, pattern: Pattern) -> Shape:
        """The lengths that ``pattern`` sees."""
        return shapes(self.preset(preset).shape)[pattern]

    def open(self, preset: str, pattern: Pattern, device: str) -> SumSession:
        """Load the preset's pairs. Raises DataMissing without the news of ``paper``."""
        chosen = self.preset(preset)
        assert isinstance(chosen, SumPreset)
        return SumSession(chosen, pattern, device)


def _shape(preset: str, batch: int, heads: int, head_dim: int, source: int, target: int) -> Shape:
    workload = Workload(
        name=f"sum_{preset}",
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        model="encoder and decoder of the task sum",
        source="attnbench/tasks/cab/sum.py",
    )
    return Shape(workload, target, source)


TINY = SumPreset(
    shape=_shape("tiny", batch=32, heads=4, head_dim=16, source=Leads.source, target=Leads.target),
    recipe=Recipe(steps=300, lr=4e-3, warmup=30),
    checks={Pattern.CC: LearningCheck(softmax=55.0, no_mixing=25.0)},
    pairs=leads,
    layers=2,
    shortest=Leads.target - 1,
    test_pairs=128,
    eval_batch=128,
    std=0.1,
)
"""For one core: 9,600 pairs are seen.

Measured on one thread with seeds 0, 1, 2, CC (ROUGE-1): softmax 96.4, 96.4, 95.0; uniform 28.4, 29.4, 28.9;
no_mixing 9.5."""

SMALL = SumPreset(
    shape=_shape("small", batch=128, heads=8, head_dim=32, source=Leads.source, target=Leads.target),
    recipe=Recipe(steps=6000, lr=1e-3, warmup=600, dtype="bfloat16", max_seconds=420.0),
    checks={},
    pairs=leads,
    layers=3,
    shortest=Leads.target - 1,
    test_pairs=500,
    eval_batch=500,
    std=0.1,
)
"""For one GPU: the pairs of ``tiny`` and a model of four times the width; no learning check."""

PAPER = SumPreset(
    shape=_shape("paper", batch=32, heads=8, head_dim=64, source=4096, target=400),
    recipe=Recipe(
        steps=50_000,
        lr=5e-4,
        warmup=1000,
        schedule="inverse_sqrt",
        betas=(0.9, 0.98),
        clip=math.inf,
        accumulate=2,
        dtype="bfloat16",
    ),
    checks={},
    pairs=lambda: News(4096, 400),
    layers=6,
    shortest=200,
    test_pairs=1 << 20,
    eval_batch=32,
    dropout=0.1,
    smoothing=0.1,
)
"""CAB's setting on Multi-News, 64 pairs an update. Deviations: tokens of GPT-2, whose byte pairs BART shares;
pre-norm blocks; all embeddings are shared; sentences are split by rule instead of by a trained splitter; no
dropout of attention weights, which most mechanisms do not have; bf16 instead of fp16."""

TASK = Summarisation(
    id="sum",
    title="Summarisation",
    patterns=(Pattern.CC, Pattern.NS, Pattern.CS),
    metric="rouge1",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Three paragraphs of the Python documentation, of which the summary repeats the first words (tiny, "
    "small); Multi-News (paper)",
    source="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (arXiv 2210.07661)",
)
