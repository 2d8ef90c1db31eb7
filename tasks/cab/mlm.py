"""Masked language modelling (noncausal self attention): CAB's task, from bytes on a CPU to PG-19.

A position that is masked knows nothing of its own token, so a model that cannot mix tokens does no better
than token frequencies: attention is the only way to a lower perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.base import Attention
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.tasks.base import BuildAttention, LearningCheck, Preset, Session, Shape, Task
from attnbench.tasks.blocks import Block, sinusoids
from attnbench.tasks.cab.lm import IGNORED
from attnbench.tasks.data import text
from attnbench.tasks.trainer import Recipe

REPLACED, RANDOM = 0.8, 0.1
"""Of the chosen tokens, the share that the mask symbol replaces and the share that a random token does."""


@dataclass(frozen=True)
class MLMPreset(Preset):
    """Dimensions of the model and of a step; C = ``shape.workload.width``, length of a window = ``shape.n``.

    ``masked`` is the share of tokens to predict; ``std`` that of the initial embeddings.
    """

    layers: int
    corpus: str
    eval_windows: int
    eval_batch: int
    masked: float = 0.15
    dropout: float = 0.0
    std: float = 0.02


class MaskedModel(nn.Module):
    """RoBERTa (arXiv 1907.11692): normalised embeddings, post-norm blocks, a head tied to the embedding.

    The vocabulary has one symbol more than it predicts, the mask. Positions are learned; they begin as
    sinusoids, from which relative addressing is learned in fewer steps.
    """

    def __init__(
        self, vocabulary: int, length: int, attentions: list[Attention], *, dropout: float, std: float
    ) -> None:
        super().__init__()
        width = attentions[0].embed_dim
        self.token = nn.Embedding(vocabulary + 1, width)
        nn.init.normal_(self.token.weight, std=std)
        self.position = nn.Parameter(std * math.sqrt(2.0) * sinusoids(length, width))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, a, dropout=dropout, post_norm=True) for a in attentions)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Logits (count, vocabulary) at the ``chosen`` (B, N) positions of ``tokens`` (B, N), in order."""
        x = self.dropout(self.norm(self.token(tokens) + self.position[: tokens.shape[1]]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.head(x[chosen]), self.token.weight[:-1], self.bias)


class MLMSession(Session):
    """One preset with its text: random windows with random masks to train on, fixed ones to score."""

    def __init__(self, preset: MLMPreset, device: str) -> None:
        self.preset, self.device = preset, device
        self.text = text.load(preset.corpus)
        self.corpus = self.text.corpus
        self.tokens_per_step = preset.shape.workload.batch * preset.shape.n

    def model(self, attention: BuildAttention) -> nn.Module:
        """A :class:`MaskedModel` around ``layers`` attention modules."""
        p = self.preset
        attentions = [attention(layer) for layer in range(p.layers)]
        return MaskedModel(self.text.vocabulary, p.shape.n, attentions, dropout=p.dropout, std=p.std)

    def batches(self, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
        """Batches (input, target), both (B, N), of windows drawn with replacement and masked anew."""
        generator = torch.Generator().manual_seed(seed)

        def draw() -> tuple[Tensor, Tensor]:
            count, length = self.preset.shape.workload.batch, self.preset.shape.n
            return self._masked(text.draw_windows(self.text.train, count, length, generator), generator)

        return draw

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean negative log-likelihood of the masked tokens, in nats."""
        inputs, targets = batch
        chosen = targets != IGNORED
        return F.cross_entropy(model(inputs, chosen), targets[chosen])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity of a masked token (a byte, or a token of GPT-2): windows and masks are always the same.

        The windows lie next to each other, spread over the test part.
        """
        model.eval()
        total, count = 0.0, 0
        for inputs, targets in self.test_batches():
            chosen = targets != IGNORED
            logits = model(inputs, chosen).float()
            total += F.cross_entropy(logits, targets[chosen], reduction="sum").item()
            count += int(chosen.sum())
        nats = total / count
        return {"masked_ppl": math.exp(nats) if nats < 700.0 else math.inf, "masked_nats": nats}

    def test_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The batches (input, target) that :meth:`evaluate` scores."""
        p, generator = self.preset, torch.Generator().manual_seed(0)
        last = len(self.text.test) - p.shape.n
        starts = torch.linspace(0, last, min(p.eval_windows, last // p.shape.n + 1)).long()
        return [
            self._masked(text.windows(self.text.test, part, p.shape.n), generator)
            for part in starts.split(p.eval_batch)
        ]

    def _masked(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, targets = mask_tokens(tokens, self.text.vocabulary, self.preset.masked, generator)
        return inputs.to(self.device), targets.to(self.device)


def mask_tokens(
    tokens: Tensor, vocabulary: int, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """BERT's corruption (arXiv 1810.04805) of ``tokens`` (B, N): (input, target), both (B, N).

    ``share`` of the tokens are targets, the others IGNORED. Of the targets 80 % become the mask symbol
    (= ``vocabulary``), 10 % a random token, 10 % stay.
    """
    chosen = torch.rand(tokens.shape, generator=generator) < share
    fate = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(vocabulary, tokens.shape, generator=generator)
    inputs = torch.where(chosen & (fate < REPLACED), vocabulary, tokens)
    inputs = torch.where(chosen & (fate >= REPLACED) & (fate < REPLACED + RANDOM), other, inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORED)


@dataclass(frozen=True)
class MaskedLanguageModelling(Task):
    """The task; see the module's docstring and ``data``."""

    def open(self, preset: str, pattern: Pattern, device: str) -> MLMSession:
        """Load the preset's corpus for ``device``. Raises UsageError for an unknown preset."""
        chosen = self.preset(preset)
        assert isinstance(chosen, MLMPreset)
        return MLMSession(chosen, device)


def _shape(preset: str, batch: int, heads: int, head_dim: int, length: int) -> Shape:
    workload = Workload(
        name=f"mlm_{preset}",
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        model="encoder of the task mlm",
        source="attnbench/tasks/cab/mlm.py",
    )
    return Shape(workload, length, length)


TINY = MLMPreset(
    shape=_shape("tiny", batch=16, heads=4, head_dim=16, length=128),
    recipe=Recipe(steps=600, lr=5e-3, warmup=60),
    checks={Pattern.NS: LearningCheck(softmax=15.0, no_mixing=18.0)},
    layers=2,
    corpus="python help topics",
    eval_windows=360,
    eval_batch=32,
    std=0.1,
)
"""For one core: 1.2 million bytes are seen, about 15 s.

Measured on one thread with seed 0 (perplexity of a masked byte): softmax 11.5; byte frequencies give 25.6,
and a model without mixing at best about 20, as a fifth of the masked bytes is not hidden. 800 steps at 3e-3
gave 11.2, and masking 30 % instead of 15 % 11.3."""

SMALL = MLMPreset(
    shape=_shape("small", batch=32, heads=6, head_dim=64, length=1024),
    recipe=Recipe(steps=4000, lr=1e-3, warmup=400, dtype="bfloat16", max_seconds=420.0),
    checks={},
    layers=6,
    corpus="python library sources",
    eval_windows=960,
    eval_batch=32,
    std=0.1,
)
"""For one GPU. The steps are an estimate from FLOPs, hence the time limit and no learning check."""

PAPER = MLMPreset(
    shape=_shape("paper", batch=256, heads=12, head_dim=64, length=2048),
    recipe=Recipe(
        steps=125_000,
        lr=3e-4,
        warmup=5000,
        schedule="linear",
        betas=(0.9, 0.98),
        eps=1e-6,
        clip=math.inf,
        dtype="bfloat16",
    ),
    checks={},
    layers=12,
    corpus="pg19",
    eval_windows=1 << 20,
    eval_batch=16,
    dropout=0.1,
)
"""CAB's setting: RoBERTa-base at 2,048 tokens of GPT-2 on PG-19, 256 windows an update. Deviations: windows
of the stream instead of whole sentences behind a start token; scored on the test part, there on the
validation part; learned positions begin as sinusoids; no dropout of attention weights, which most mechanisms
do not have; bf16 instead of fp16."""

TASK = MaskedLanguageModelling(
    id="mlm",
    title="Masked language modelling",
    patterns=(Pattern.NS,),
    metric="masked_ppl",
    better="lower",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Bytes of the Python documentation (tiny) or of the standard library's sources (small), as the "
    "running Python carries them, the last tenth is the test part; PG-19 as tokens of GPT-2 (paper)",
    source="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (arXiv 2210.07661)",
)
