"""Text to speech with FastSpeech 2 (noncausal self attention): CAB's non-autoregressive task.

All frames are predicted at once from phones and their durations; attention mixes phones in the encoder and
frames in the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.base import Attention
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.tasks.base import BuildAttention, LearningCheck, Preset, Session, Shape, Task
from attnbench.tasks.blocks import sinusoids
from attnbench.tasks.cab._audio import frame_scores, resynthesised, spectral_scores
from attnbench.tasks.cab._speech import Batch, Speech, generated, ljspeech
from attnbench.tasks.trainer import Recipe

BINS = 256
"""Steps of pitch and energy that have an embedding each, over ±3 standard deviations."""


@dataclass(frozen=True)
class FastSpeechPreset(Preset):
    """Dimensions of the model; ``shape`` is that of the decoder, N frames.

    ``ratio`` is that of the convolutions' inner width. With ``gold_durations`` the spectra are scored frame
    by frame at the true durations; without, predicted ones are used, and what a vocoder makes of the spectra
    is scored along the best path.
    """

    speech: Callable[[], Speech]
    layers: int
    kernel: int
    ratio: int
    dropout: float
    predictor_dropout: float
    gold_durations: bool
    eval_batch: int


class Convolutions(nn.Module):
    """Two convolutions over time with a ReLU between, to which padding looks like the end of the sequence."""

    def __init__(self, width: int, inner: int, kernel: int) -> None:
        super().__init__()
        self.up = nn.Conv1d(width, inner, kernel, padding=kernel // 2)
        self.down = nn.Conv1d(inner, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C); ``hidden`` (B, N, 1) is True on padding, where ``x`` must be 0."""
        inner = self.up(x.transpose(1, 2)).relu().masked_fill(hidden.transpose(1, 2), 0.0)
        return self.down(inner).transpose(1, 2)


class FFTBlock(nn.Module):
    """FastSpeech's post-norm block: self attention, then convolutions ``ratio`` times as wide."""

    def __init__(self, attention: Attention, ratio: int, kernel: int, dropout: float) -> None:
        super().__init__()
        width = attention.embed_dim
        self.attention = attention
        self.convolutions = Convolutions(width, ratio * width, kernel)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C), 0 on ``padding`` (B, N) as ``x`` must be."""
        hidden = padding[..., None]
        x = self.norm1(x + self.dropout(self.attention(x, key_padding_mask=padding)))
        x = x.masked_fill(hidden, 0.0)
        return self.norm2(x + self.dropout(self.convolutions(x, hidden))).masked_fill(hidden, 0.0)


class Predictor(nn.Module):
    """One number a token: two convolutions, each with ReLU, norm and dropout, and a linear layer."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(B, T, C) → (B, T); ``hidden`` (B, T, 1) is True on padding, where ``x`` must be 0."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x.transpose(1, 2)).relu().transpose(1, 2))
            x = self.dropout(x).masked_fill(hidden, 0.0)
        return self.head(x)[..., 0]


@dataclass(frozen=True)
class Prediction:
    """Normalised spectra (B, F, bands) with their padding (B, F), and per token (B, T) what was predicted."""

    mel: Tensor
    padding: Tensor
    log_duration: Tensor
    pitch: Tensor
    energy: Tensor


class FastSpeech2(nn.Module):
    """FastSpeech 2 (arXiv 2006.04558): FFT blocks over phones, a variance adaptor, FFT blocks over frames."""

    def __init__(
        self,
        vocabulary: int,
        bands: int,
        frames: int,
        encoder: list[Attention],
        decoder: list[Attention],
        preset: FastSpeechPreset,
    ) -> None:
        super().__init__()
        width, self.frames = encoder[0].embed_dim, frames
        self.token = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.token.weight, std=width**-0.5)
        self.scales = nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(preset.dropout)

        self.encoder, self.decoder = (
            nn.ModuleList(FFTBlock(a, preset.ratio, preset.kernel, preset.dropout) for a in attentions)
            for attentions in (encoder, decoder)
        )
        self.duration, self.pitch, self.energy = (
            Predictor(width, preset.predictor_dropout) for _ in range(3)
        )
        self.pitch_steps, self.energy_steps = nn.Embedding(BINS, width), nn.Embedding(BINS, width)
        self.head = nn.Linear(width, bands)

    def forward(self, batch: Batch, given: bool, gold_durations: bool) -> Prediction:
        """Spectra of the tokens of ``batch``, from its pitch and energy where ``given``, else from predicted.

        Durations are the batch's with ``gold_durations``, else predicted, cut at the frames of the model.
        """
        x = self.token(batch.tokens)
        x = self._run(self.encoder, x, self.scales[0], batch.token_padding)
        hidden = batch.token_padding[..., None]
        log_duration, pitch, energy = (p(x, hidden) for p in (self.duration, self.pitch, self.energy))
        x = x + self.pitch_steps(_step(batch.pitch if given else pitch))
        x = x + self.energy_steps(_step(batch.energy if given else energy))
        durations = batch.durations
        if not gold_durations:
            durations = (log_duration.exp() - 1.0).round().long().clamp(min=0)
            durations = durations.masked_fill(batch.token_padding, 0)
        x, padding = regulated(x, durations, self.frames)
        x = self._run(self.decoder, x, self.scales[1], padding)
        return Prediction(self.head(x), padding, log_duration, pitch, energy)

    def _run(self, blocks: nn.ModuleList, x: Tensor, scale: Tensor, padding: Tensor) -> Tensor:
        x = self.dropout(x + scale * sinusoids(x.shape[1], x.shape[2], x.device))
        x = x.masked_fill(padding[..., None], 0.0)
        for block in blocks:
            x = block(x, padding)
        return x


def regulated(x: Tensor, durations: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, T, C) repeated ``durations`` (B, T), in ``frames`` rows, and (B, frames) padding."""
    ends = durations.cumsum(1)
    at = torch.arange(frames, device=x.device).expand(len(x), -1).contiguous()
    owner = torch.searchsorted(ends, at, right=True)
    padding = owner >= x.shape[1]
    owner = owner.clamp(max=x.shape[1] - 1)
    return x.gather(1, owner[..., None].expand(-1, -1, x.shape[2])), padding


def _step(value: Tensor) -> Tensor:
    """Index of the embedding of a normalised value."""
    return ((value + 3.0) / 6.0 * BINS).long().clamp(0, BINS - 1)


class FastSpeechSession(Session):
    """One preset with its clips."""

    def __init__(self, preset: FastSpeechPreset, device: str) -> None:
        self.preset, self.device = preset, device
        self.speech = preset.speech()
        self.corpus = self.speech.corpus
        self.tokens_per_step = preset.shape.workload.batch * sum(self.speech.longest)

    def model(self, attention: BuildAttention) -> nn.Module:
        """A :class:`FastSpeech2` whose attention is all under test."""
        p, (tokens, frames) = self.preset, self.speech.longest
        phones = replace(p.shape, n=tokens, m=tokens)
        encoder = [attention(layer, phones) for layer in range(p.layers)]
        decoder = [attention(p.layers + layer) for layer in range(p.layers)]
        return FastSpeech2(self.speech.vocabulary, self.speech.spec.bands, frames, encoder, decoder, p)

    def batches(self, seed: int) -> Callable[[], Batch]:
        """Batches of training clips."""
        drawn = self.speech.draws(seed, self.preset.shape.workload.batch, self.device)
        return lambda: next(drawn)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Absolute error of the spectra plus squared errors of log(1 + duration), pitch and energy."""
        found: Prediction = model(batch, given=True, gold_durations=True)
        shown = ~found.padding
        spoken = batch.durations > 0
        total = (found.mel - batch.mel)[shown].abs().mean()
        wanted = ((1.0 + batch.durations).log(), batch.pitch, batch.energy)
        for predicted, target, counted in zip(
            (found.log_duration, found.pitch, found.energy),
            wanted,
            (~batch.token_padding, spoken, spoken),
            strict=True,
        ):
            total = total + F.mse_loss(predicted[counted], target[counted])
        return total

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """MCD and MSD of the test clips; see :class:`FastSpeechPreset` for what is compared."""
        model.eval()
        gold = self.preset.gold_durations
        pairs = []
        for at in range(0, len(self.speech.test), self.preset.eval_batch):
            clips = self.speech.test[at : at + self.preset.eval_batch]
            found: Prediction = model(self.speech.batch(clips, self.device), given=False, gold_durations=gold)
            shown = (~found.padding).cpu()
            predicted = self.speech.spectra(found.mel)
            pairs += [(c.mel, mel[rows]) for c, mel, rows in zip(clips, predicted, shown, strict=True)]
        if gold:
            return frame_scores(pairs)
        spec = self.speech.spec
        return spectral_scores((resynthesised(a, spec), resynthesised(b, spec)) for a, b in pairs)


@dataclass(frozen=True)
class FastSpeechTask(Task):
    """The task; see the module's docstring and ``data``."""

    def open(self, preset: str, pattern: Pattern, device: str) -> FastSpeechSession:
        """Build or read the clips. Raises DataMissing without those of ``paper``."""
        chosen = self.preset(preset)
        assert isinstance(chosen, FastSpeechPreset)
        return FastSpeechSession(chosen, device)


def _shape(preset: str, batch: int, heads: int, head_dim: int, frames: int) -> Shape:
    workload = Workload(
        name=f"tts_fastspeech2_{preset}",
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        model="FastSpeech 2",
        source="arXiv 2006.04558",
    )
    return Shape(workload, frames, frames)


TINY = FastSpeechPreset(
    shape=_shape("tiny", batch=16, heads=2, head_dim=32, frames=160),
    recipe=Recipe(steps=400, lr=2e-3, warmup=40),
    checks={Pattern.NS: LearningCheck(softmax=1.9, no_mixing=2.1)},
    speech=partial(generated, 256, 64, 24, 160, 40),
    layers=2,
    kernel=3,
    ratio=2,
    dropout=0.0,
    predictor_dropout=0.0,
    gold_durations=True,
    eval_batch=32,
)
"""For one core. Measured with seed 0 (MCD): softmax 1.55, no mixing 2.35; 200 steps at a rate
of 3e-3 gave 2.99 and 2.83."""

SMALL = FastSpeechPreset(
    shape=_shape("small", batch=48, heads=2, head_dim=128, frames=560),
    recipe=Recipe(steps=3000, lr=1e-3, warmup=300, dtype="bfloat16", max_seconds=420.0),
    checks={},
    speech=partial(generated, 4000, 256, 95, 560, 80),
    layers=4,
    kernel=3,
    ratio=4,
    dropout=0.1,
    predictor_dropout=0.1,
    gold_durations=True,
    eval_batch=64,
)
"""For one GPU: the lengths of LJ Speech, generated; no learning check."""

PAPER = FastSpeechPreset(
    shape=_shape("paper", batch=48, heads=2, head_dim=128, frames=896),
    recipe=Recipe(
        steps=200_000,
        lr=5e-4,
        warmup=4000,
        schedule="inverse_sqrt",
        betas=(0.9, 0.999),
        weight_decay=0.0,
        clip=5.0,
    ),
    checks={},
    speech=partial(ljspeech, 256, 896),
    layers=4,
    kernel=9,
    ratio=4,
    dropout=0.1,
    predictor_dropout=0.5,
    gold_durations=False,
    eval_batch=48,
)
"""CAB's setting on LJ Speech, 48 clips an update. Deviations: pitch by autocorrelation instead of WORLD; the
last checkpoint; no dropout of attention weights, which most mechanisms do not have; batches padded to 896
frames."""

TASK = FastSpeechTask(
    id="tts_fastspeech2",
    title="Text to speech, all frames at once",
    patterns=(Pattern.NS,),
    metric="mcd",
    better="lower",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Random phones spoken by formants and noise in one of four styles, generated (tiny, small); LJ "
    "Speech (paper)",
    source="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (arXiv 2210.07661); "
    "FastSpeech 2 (arXiv 2006.04558)",
)
