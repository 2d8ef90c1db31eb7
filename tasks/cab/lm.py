"""Language modelling (causal self attention) on bytes of text that every Python installation carries.

CAB's language-modelling task at the size of a CPU: perplexity per byte of a small decoder whose attention is
the only path between positions. Bits per byte are the base-2 logarithm of the headline metric.
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
from attnbench.tasks.data import text
from attnbench.tasks.trainer import Recipe

IGNORED = -100
"""Target of a position that is not scored."""

EMBEDDING_STD = 0.1
"""Softmax after 600 steps at 8e-3 with β2 0.95: byte perplexity 6.4 with 0.02, 5.0 with 0.1, 5.3 with 0.3."""


@dataclass(frozen=True)
class LMPreset(Preset):
    """Dimensions of the model and of a step; C = ``shape.workload.width``, context = ``shape.n``."""

    layers: int
    corpus: str
    eval_batch: int


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU network four times as wide."""

    def __init__(self, width: int, attention: Attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """A decoder over bytes with learned positions outside the attention; logits (B, N, 128)."""

    def __init__(self, width: int, context: int, attentions: list[Attention]) -> None:
        super().__init__()
        self.token = nn.Embedding(text.VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, attention) for attention in attentions)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, text.VOCABULARY, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte after each of ``tokens`` (B, N), N at most the context."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LMSession(Session):
    """One preset with its text: random windows to train on, every block of the test part to score."""

    def __init__(self, preset: LMPreset, device: str) -> None:
        self.preset = preset
        content, self.corpus = text.corpus(preset.corpus)
        self.train_part, self.test_part = (part.to(device) for part in text.split(content))
        self.context = preset.shape.n
        self.tokens_per_step = preset.shape.workload.batch * self.context

    def model(self, attention: BuildAttention) -> nn.Module:
        """A :class:`LanguageModel` around ``layers`` attention modules."""
        attentions = [attention(layer) for layer in range(self.preset.layers)]
        return LanguageModel(self.preset.shape.workload.width, self.context, attentions)

    def batches(self, seed: int) -> Callable[[], Tensor]:
        """Batches of windows (B, context + 1), drawn with replacement from the training part."""
        generator = torch.Generator().manual_seed(seed)
        count = self.preset.shape.workload.batch
        last = len(self.train_part) - self.context - 1

        def draw() -> Tensor:
            starts = torch.randint(last + 1, (count,), generator=generator)
            return _windows(self.train_part, starts, self.context + 1)

        return draw

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean negative log-likelihood of the next byte, in nats."""
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity per byte and bits per byte of the test part.

        The text is cut into blocks of the context without overlap; every byte but the first is predicted
        once. The last block is moved back to be full, and scored only where no other block was.
        """
        model.eval()
        inputs, targets = blocks_of(self.test_part, self.context)
        total = 0.0
        for x, y in zip(
            inputs.split(self.preset.eval_batch), targets.split(self.preset.eval_batch), strict=True
        ):
            logits = model(x).float()
            losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum")
            total += losses.item()
        nats = total / int((targets != IGNORED).sum())
        perplexity = math.exp(nats) if nats < 700.0 else math.inf
        return {"byte_ppl": perplexity, "bits_per_byte": nats / math.log(2.0)}


def blocks_of(part: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), both (blocks, context), that predict each byte of ``part`` but the first once."""
    starts = torch.arange(0, len(part) - 1, context)
    moved = max(0, int(starts[-1]) + context + 1 - len(part))
    starts[-1] -= moved
    blocks = _windows(part, starts, context + 1)
    targets = blocks[:, 1:].clone()
    targets[-1, :moved] = IGNORED
    return blocks[:, :-1], targets


def _windows(part: Tensor, starts: Tensor, length: int) -> Tensor:
    index = starts[:, None] + torch.arange(length)
    return part[index.to(part.device)].long()


@dataclass(frozen=True)
class LanguageModelling(Task):
    """The task; see the module's docstring and ``data``."""

    def open(self, preset: str, device: str) -> LMSession:
        """Load the preset's corpus onto ``device``. Raises UsageError for an unknown preset."""
        chosen = self.preset(preset)
        assert isinstance(chosen, LMPreset)
        return LMSession(chosen, device)


def _shape(preset: str, batch: int, heads: int, head_dim: int, context: int) -> Shape:
    workload = Workload(
        name=f"lm_{preset}",
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        model="byte-level decoder of the task lm",
        source="attnbench/tasks/cab/lm.py",
    )
    return Shape(workload, context, context)


TINY = LMPreset(
    shape=_shape("tiny", batch=16, heads=4, head_dim=16, context=128),
    recipe=Recipe(steps=800, lr=6e-3, warmup=80, max_seconds=240.0),
    check=LearningCheck(softmax=5.5, no_mixing=9.0),
    layers=2,
    corpus="python help topics",
    eval_batch=32,
)
"""For one core: 1.6 million bytes are seen, softmax takes 20 s.

Measured on one thread with seeds 0, 1, 2 (byte perplexity): softmax 4.25, 4.33, 4.28; linear_transformer
5.40, 5.52, 5.67; uniform 8.10, 8.10, 8.19; no_mixing 10.15, 10.14, 10.17, about that of byte bigrams. At this
size neighbours matter most: local_window scores 3.88, 3.92, 3.89. Fewer steps leave less margin: 600 at 8e-3
with β2 0.95 gave softmax 5.04, 5.24, 4.93."""

SMALL = LMPreset(
    shape=_shape("small", batch=16, heads=8, head_dim=64, context=2048),
    recipe=Recipe(steps=1500, lr=1e-3, warmup=150, max_seconds=420.0),
    check=None,
    layers=8,
    corpus="python library sources",
    eval_batch=4,
)
"""For one GPU: about 1e16 FLOPs, fp32. The steps are an estimate from FLOPs, hence the time limit and no
learning check."""

TASK = LanguageModelling(
    id="lm",
    title="Language modelling",
    patterns=(Pattern.CS,),
    metric="byte_ppl",
    better="lower",
    presets={"tiny": TINY, "small": SMALL},
    data="Bytes of the Python documentation (tiny) or of the standard library's sources (small), as the "
    "running Python carries them; the last tenth is the test part",
    source="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (arXiv 2210.07661)",
)
