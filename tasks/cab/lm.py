"""Language modelling (causal self attention): CAB's task, from bytes on a CPU to PG-19 at 8,192 tokens.

The attention of a small decoder is its only path between positions. Positions are sinusoidal, as in the
published setting, so that the trained model can be scored at shorter and longer contexts too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.tasks.base import BuildAttention, LearningCheck, Preset, Session, Shape, Task
from attnbench.tasks.blocks import TokenModel
from attnbench.tasks.data import text
from attnbench.tasks.trainer import Recipe

IGNORED = -100
"""Target of a position that is not scored."""

LATE = 0.25
"""Share of a block whose perplexity is reported too: late tokens have the context that short blocks lack."""


@dataclass(frozen=True)
class LMPreset(Preset):
    """Dimensions of the model and of a step; C = ``shape.workload.width``, context = ``shape.n``.

    ``lengths`` are further contexts that the trained model is scored at; ``eval_tokens`` go through it at
    once, at least one block.
    """

    layers: int
    corpus: str
    eval_tokens: int
    lengths: tuple[int, ...] = ()
    std: float = 0.1
    tied: bool = False


class LMSession(Session):
    """One preset with its text: random windows to train on, every block of the test part to score."""

    def __init__(self, preset: LMPreset, device: str) -> None:
        self.preset = preset
        self.text = text.load(preset.corpus)
        self.corpus = self.text.corpus
        self.train_part, self.test_part = (part.to(device) for part in (self.text.train, self.text.test))
        self.context = preset.shape.n
        self.tokens_per_step = preset.shape.workload.batch * self.context

    def model(self, attention: BuildAttention) -> nn.Module:
        """A decoder around ``layers`` attention modules: logits (B, N, vocabulary)."""
        return TokenModel(
            self.text.vocabulary,
            self.context,
            [attention(layer) for layer in range(self.preset.layers)],
            std=self.preset.std,
            positions="sinusoidal",
            tied=self.preset.tied,
        )

    def batches(self, seed: int) -> Callable[[], Tensor]:
        """Batches of windows (B, context + 1), drawn with replacement from the training part."""
        generator = torch.Generator().manual_seed(seed)
        count = self.preset.shape.workload.batch
        return lambda: text.draw_windows(self.train_part, count, self.context + 1, generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean negative log-likelihood of the next token, in nats."""
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity per byte and per token and bits per byte of the test part.

        The text is cut into blocks of the context without overlap; every token but the first is predicted
        once, from its block alone. ``byte_ppl@n=…`` are the same for blocks of other lengths, and
        ``byte_ppl_late@n=…`` is the perplexity of the last quarter of each block. A length beyond what a
        mechanism is defined for gives NaN.
        """
        model.eval()
        nats, late = self._nats(model, self.context)
        bits = self._per_byte(nats) / math.log(2.0)
        found = {"byte_ppl": _exp(self._per_byte(nats)), "bits_per_byte": bits, "token_ppl": _exp(nats)}
        for n in (self.context, *self.preset.lengths):
            if n != self.context:
                try:
                    nats, late = self._nats(model, n)
                except UsageError:
                    nats = late = math.nan
            found[f"byte_ppl@n={n}"] = _exp(self._per_byte(nats))
            found[f"byte_ppl_late@n={n}"] = _exp(self._per_byte(late))
        return found

    def _per_byte(self, nats: float) -> float:
        """From nats per token to nats per byte, by the mean length of the test part's tokens."""
        return nats * len(self.test_part) / self.text.test_bytes

    @torch.no_grad()
    def _nats(self, model: nn.Module, context: int) -> tuple[float, float]:
        """Mean negative log-likelihood of a token in blocks of ``context``: of all, and of the late ones."""
        inputs, targets = blocks_of(self.test_part, context)
        at_once = max(1, self.preset.eval_tokens // context)
        losses = torch.cat(
            [
                F.cross_entropy(
                    model(x).float().transpose(1, 2), y, ignore_index=IGNORED, reduction="none"
                ).double()
                for x, y in zip(inputs.split(at_once), targets.split(at_once), strict=True)
            ]
        )
        scored = targets != IGNORED
        late = scored & (torch.arange(context, device=targets.device) >= context - LATE * context)
        return losses[scored].mean().item(), losses[late].mean().item()


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700.0 else math.inf if nats == nats else nats


def blocks_of(part: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), both (blocks, context), that predict each token of ``part`` but the first once."""
    starts = torch.arange(0, len(part) - 1, context)
    moved = max(0, int(starts[-1]) + context + 1 - len(part))
    starts[-1] -= moved
    blocks = text.windows(part, starts, context + 1)
    targets = blocks[:, 1:].clone()
    targets[-1, :moved] = IGNORED
    return blocks[:, :-1], targets


@dataclass(frozen=True)
class LanguageModelling(Task):
    """The task; see the module's docstring and ``data``."""

    def open(self, preset: str, pattern: Pattern, device: str) -> LMSession:
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
        model="decoder of the task lm",
        source="attnbench/tasks/cab/lm.py",
    )
    return Shape(workload, context, context)


TINY = LMPreset(
    shape=_shape("tiny", batch=16, heads=4, head_dim=16, context=128),
    recipe=Recipe(steps=800, lr=6e-3, warmup=80),
    checks={Pattern.CS: LearningCheck(softmax=5.5, no_mixing=9.0)},
    layers=2,
    corpus="python help topics",
    eval_tokens=4096,
    lengths=(32, 64, 256, 512),
)
"""For one core: 1.6 million bytes are seen, softmax takes 20 s.

Measured on one thread with seed 0 (byte perplexity): softmax 4.18, no_mixing 10.12, about that of byte
bigrams. In blocks of 32, 64, 128, 256 and 512 bytes softmax scores 4.44, 4.26, 4.18, 10.4 and 16.8, in their
last quarters 4.18, 4.05, 4.13, 26.8 and 27.8: it does not extrapolate, and no_mixing (10.1 to 10.2) has
nothing to extrapolate. With learned positions, which end at 128, seeds 0, 1, 2 gave softmax 4.25, 4.33, 4.28;
linear_transformer 5.40, 5.52, 5.67; uniform 8.10, 8.10, 8.19; local_window 3.88, 3.92, 3.89; no_mixing 10.15,
10.14, 10.17."""

SMALL = LMPreset(
    shape=_shape("small", batch=16, heads=8, head_dim=64, context=2048),
    recipe=Recipe(steps=1500, lr=1e-3, warmup=150, dtype="bfloat16", max_seconds=420.0),
    checks={},
    layers=8,
    corpus="python library sources",
    eval_tokens=8192,
    lengths=(256, 512, 1024, 4096, 8192),
)
"""For one GPU: about 1e16 FLOPs. The steps are an estimate from FLOPs, hence the time limit and no
learning check."""

PAPER = LMPreset(
    shape=_shape("paper", batch=16, heads=12, head_dim=64, context=8192),
    recipe=Recipe(
        steps=125_000,
        lr=5e-4,
        warmup=10_000,
        schedule="inverse_sqrt",
        betas=(0.9, 0.999),
        clip=math.inf,
        dtype="bfloat16",
    ),
    checks={},
    layers=12,
    corpus="pg19",
    eval_tokens=16_384,
    lengths=(256, 512, 1024, 2048, 4096, 12_288, 16_384),
    std=0.02,
    tied=True,
)
"""CAB's setting: the size of GPT-2 on PG-19 in its tokens, 131,072 of them an update (8 GPUs × 2
accumulated batches of 8,192 there, one batch of 16 blocks here). Deviations: no dropout of attention weights
(0.1 there), which most mechanisms do not have; bf16 instead of fp16; the last checkpoint, not the best."""

TASK = LanguageModelling(
    id="lm",
    title="Language modelling",
    patterns=(Pattern.CS,),
    metric="byte_ppl",
    better="lower",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Bytes of the Python documentation (tiny) or of the standard library's sources (small), as the "
    "running Python carries them, the last tenth is the test part; PG-19 as tokens of GPT-2 (paper)",
    source="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (arXiv 2210.07661)",
)
