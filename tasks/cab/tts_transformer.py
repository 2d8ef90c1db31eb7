"""Text to speech with Transformer-TTS: CAB's autoregressive task, for all patterns but NC.

Under NS the attention of the phones is tested, under CS that of the frames so far, under CC that from frames
to phones, by which the decoder must find what to say next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.base import Attention
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.tasks import controls
from attnbench.tasks.base import BuildAttention, LearningCheck, Preset, Session, Shape, Task
from attnbench.tasks.blocks import Block, DecoderBlock, network, sinusoids
from attnbench.tasks.cab._audio import frame_scores, resynthesised, spectral_scores
from attnbench.tasks.cab._speech import Batch, Speech, generated, ljspeech
from attnbench.tasks.trainer import Recipe

STOP_WEIGHT = 5.0
"""Weight of the steps where the utterance ends in the loss of the stop signal: there is one an utterance."""


@dataclass(frozen=True)
class TransformerPreset(Preset):
    """Dimensions of the model; ``shape`` is that of the cross attention: N decoder steps, M phones.

    A step emits ``frames_per_step`` frames. Its position is ``step_rate`` after that of the step before, in
    phones, by which a short training finds what to say (Deep Voice 3, arXiv 1710.07654). With
    ``gold_length`` utterances are as long as the reference and spectra are scored as they are; without, the
    model says when to stop, and what a vocoder makes of the spectra is scored. ``free`` test clips are spoken
    freely, all are scored with the true frames given.
    """

    speech: Callable[[], Speech]
    layers: int
    frames_per_step: int
    convolution: int
    prenet: int
    dropout: float
    prenet_dropout: float
    convolution_dropout: float
    step_rate: float
    gold_length: bool
    free: int
    eval_batch: int


class ConvStack(nn.Module):
    """Convolutions over time with batch norm, an activation (not the last, if ``linear``) and dropout."""

    def __init__(
        self, channels: list[int], activation: Callable[[], nn.Module], dropout: float, linear: bool
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for i, (a, b) in enumerate(pairwise(channels)):
            last = linear and i == len(channels) - 2
            self.layers.extend(
                [
                    nn.Conv1d(a, b, 5, padding=2),
                    nn.BatchNorm1d(b),
                    nn.Identity() if last else activation(),
                    nn.Dropout(dropout),
                ]
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, channels[0]) → (B, N, channels[-1])."""
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


class Prenet(nn.Module):
    """Two layers with ReLU and a dropout that never rests, so that the decoder cannot just copy frames."""

    def __init__(self, bands: int, hidden: int, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(bands, hidden), nn.Linear(hidden, hidden)])
        self.out = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, bands) → (B, N, C)."""
        for layer in self.layers:
            x = F.dropout(layer(x).relu(), self.dropout, training=True)
        return self.out(x)


class TransformerTTS(nn.Module):
    """Transformer-TTS (arXiv 1809.08895): phones to memory, frames so far to the next and a stop signal."""

    def __init__(
        self,
        vocabulary: int,
        bands: int,
        encoder: list[Attention],
        own: list[Attention],
        cross: list[Attention],
        preset: TransformerPreset,
    ) -> None:
        super().__init__()
        width, p = encoder[0].embed_dim, preset
        self.bands, self.per_step = bands, p.frames_per_step
        self.token = nn.Embedding(vocabulary, width)
        self.encoder_prenet = ConvStack([width] * 4, nn.ReLU, p.convolution_dropout, linear=False)
        self.encoder_in = nn.Linear(width, width)
        self.decoder_prenet = Prenet(bands, p.prenet, width, p.prenet_dropout)
        self.scales, self.rates = nn.Parameter(torch.ones(2)), (1.0, p.step_rate)
        self.dropout = nn.Dropout(p.dropout)
        self.encoder = nn.ModuleList(
            Block(width, a, mlp=network(width, 4, nn.ReLU), dropout=p.dropout) for a in encoder
        )
        self.decoder = nn.ModuleList(
            DecoderBlock(width, o, c, activation=nn.ReLU, dropout=p.dropout)
            for o, c in zip(own, cross, strict=True)
        )
        self.norm_memory, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, p.frames_per_step * bands)
        self.stop = nn.Linear(width, 1)
        self.postnet = ConvStack(
            [bands, *[p.convolution] * 4, bands], nn.Tanh, p.convolution_dropout, linear=True
        )

    def encode(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Memory (B, M, C) of ``tokens`` (B, M); ``padding`` (B, M) is True where there is none."""
        x = self.encoder_prenet(self.token(tokens).masked_fill(padding[..., None], 0.0))
        x = self._placed(self.encoder_in(x), 0)
        for block in self.encoder:
            x = block(x, key_padding_mask=padding)
        return self.norm_memory(x)

    def decode(self, before: Tensor, memory: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, N·frames_per_step, bands) and stop logits (B, N) after ``before`` (B, N, bands)."""
        x = self._placed(self.decoder_prenet(before), 1)
        for block in self.decoder:
            x = block(x, memory, key_padding_mask=padding)
        x = self.norm(x)
        return self.head(x).unflatten(-1, (self.per_step, self.bands)).flatten(1, 2), self.stop(x)[..., 0]

    def forward(self, tokens: Tensor, padding: Tensor, mel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames before and after the postnet, and stop logits, with the true ``mel`` (B, F, bands) given."""
        frames, stop = self.decode(shifted(mel, self.per_step), self.encode(tokens, padding), padding)
        return frames, frames + self.postnet(frames), stop

    def speak(self, tokens: Tensor, padding: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Frames after the postnet (B, steps·frames_per_step, bands) and stop logits (B, steps), one by one.

        The decoder always runs at its full length, which every mechanism is built for; what stands after the
        last frame can, by causality, change nothing.
        """
        memory = self.encode(tokens, padding)
        before = memory.new_zeros(len(tokens), steps, self.bands)
        for at in range(steps):
            frames, stop = self.decode(before, memory, padding)
            if at + 1 < steps:
                before[:, at + 1] = frames[:, (at + 1) * self.per_step - 1].to(before.dtype)
        return frames + self.postnet(frames), stop

    def _placed(self, x: Tensor, side: int) -> Tensor:
        table = sinusoids(x.shape[1], x.shape[2], x.device, rate=self.rates[side])
        return self.dropout(x + self.scales[side] * table)


def shifted(mel: Tensor, per_step: int) -> Tensor:
    """What the decoder reads (B, F / per_step, bands): silence, then the last frame of every step but one."""
    last = mel[:, per_step - 1 :: per_step]
    return torch.cat((torch.zeros_like(last[:, :1]), last[:, :-1]), 1)


class TransformerSession(Session):
    """One preset with its clips."""

    def __init__(self, preset: TransformerPreset, pattern: Pattern, device: str) -> None:
        self.preset, self.pattern, self.device = preset, pattern, device
        self.speech = preset.speech()
        self.corpus = self.speech.corpus
        self.tokens_per_step = preset.shape.workload.batch * (preset.shape.n + preset.shape.m)

    def model(self, attention: BuildAttention) -> nn.Module:
        """A :class:`TransformerTTS` with softmax attention wherever ``pattern`` does not stand."""
        built = {
            pattern: [
                attention(layer, shape) if pattern is self.pattern else controls.softmax(shape, pattern)
                for layer in range(self.preset.layers)
            ]
            for pattern, shape in shapes(self.preset.shape).items()
        }
        return TransformerTTS(
            self.speech.vocabulary,
            self.speech.spec.bands,
            built[Pattern.NS],
            built[Pattern.CS],
            built[Pattern.CC],
            self.preset,
        )

    def batches(self, seed: int) -> Callable[[], Batch]:
        """Batches of training clips."""
        drawn = self.speech.draws(seed, self.preset.shape.workload.batch, self.device)
        return lambda: next(drawn)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Absolute plus squared error before and after the postnet, plus cross entropy of the stop signal."""
        before, after, stop = model(batch.tokens, batch.token_padding, batch.mel)
        shown = ~batch.frame_padding
        target = batch.mel[shown]
        total = sum(
            F.l1_loss(found[shown], target) + F.mse_loss(found[shown], target) for found in (before, after)
        )
        step = torch.arange(stop.shape[1], device=stop.device)
        ends = (self._steps(batch.frames) - 1)[:, None]
        heard = step <= ends
        weight = torch.tensor(STOP_WEIGHT, device=stop.device)
        wanted = (step == ends).to(stop.dtype)
        return total + F.binary_cross_entropy_with_logits(stop[heard], wanted[heard], pos_weight=weight)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """MCD and MSD of freely spoken test clips along the best path; ``mcd_tf`` with the true frames given.

        The dropout of the prenet draws from a generator that is seeded here.
        """
        assert isinstance(model, TransformerTTS)
        model.eval()
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self.device == "cuda" else []):
            torch.manual_seed(0)
            forced = frame_scores(self._forced(model))
            spoken = spectral_scores(self._spoken(model))
        return {**spoken, "mcd_tf": forced["mcd"], "msd_tf": forced["msd"]}

    def _forced(self, model: TransformerTTS) -> list[tuple[Tensor, Tensor]]:
        found = []
        for at in range(0, len(self.speech.test), self.preset.eval_batch):
            clips = self.speech.test[at : at + self.preset.eval_batch]
            batch = self.speech.batch(clips, self.device)
            mel = self.speech.spectra(model(batch.tokens, batch.token_padding, batch.mel)[1])
            found += [(clip.mel, row[: len(clip.mel)]) for clip, row in zip(clips, mel, strict=True)]
        return found

    def _spoken(self, model: TransformerTTS) -> list[tuple[Tensor, Tensor]]:
        found, spec = [], self.speech.spec
        asked = self.speech.test[: self.preset.free]
        for at in range(0, len(asked), self.preset.eval_batch):
            clips = asked[at : at + self.preset.eval_batch]
            batch = self.speech.batch(clips, self.device)
            mel, stop = model.speak(batch.tokens, batch.token_padding, self.preset.shape.n)
            lengths = batch.frames if self.preset.gold_length else self._stopped(stop)
            for clip, row, frames in zip(clips, self.speech.spectra(mel), lengths.tolist(), strict=True):
                pair = (clip.mel, row[:frames])
                if not self.preset.gold_length:
                    pair = (resynthesised(pair[0], spec), resynthesised(pair[1], spec))
                found.append(pair)
        return found

    def _stopped(self, stop: Tensor) -> Tensor:
        """Frames (B,) up to the first step whose stop signal is more likely than not, else all."""
        ends = stop > 0
        ends[:, -1] = True
        return (ends.int().argmax(1) + 1) * self.preset.frames_per_step

    def _steps(self, frames: Tensor) -> Tensor:
        return -(-frames // self.preset.frames_per_step)


def shapes(cross: Shape) -> dict[Pattern, Shape]:
    """What each pattern sees: phones to themselves, steps to themselves, steps to phones."""
    return {
        Pattern.NS: replace(cross, n=cross.m),
        Pattern.CS: replace(cross, m=cross.n),
        Pattern.CC: cross,
    }


@dataclass(frozen=True)
class TransformerTask(Task):
    """The task; see the module's docstring and ``data``."""

    def workload(self, preset: str, pattern: Pattern) -> Shape:
        """The lengths that ``pattern`` sees."""
        return shapes(self.preset(preset).shape)[pattern]

    def open(self, preset: str, pattern: Pattern, device: str) -> TransformerSession:
        """Build or read the clips. Raises DataMissing without those of ``paper``."""
        chosen = self.preset(preset)
        assert isinstance(chosen, TransformerPreset)
        return TransformerSession(chosen, pattern, device)


def _shape(preset: str, batch: int, heads: int, head_dim: int, steps: int, phones: int) -> Shape:
    workload = Workload(
        name=f"tts_transformer_{preset}",
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        model="Transformer-TTS",
        source="arXiv 1809.08895",
    )
    return Shape(workload, steps, phones)


TINY = TransformerPreset(
    shape=_shape("tiny", batch=16, heads=4, head_dim=16, steps=10, phones=13),
    recipe=Recipe(steps=800, lr=3e-3, warmup=60),
    checks={Pattern.CC: LearningCheck(softmax=4.1, no_mixing=4.6)},
    speech=partial(generated, 512, 64, 12, 80, 40),
    layers=2,
    frames_per_step=8,
    convolution=64,
    prenet=64,
    dropout=0.0,
    prenet_dropout=0.5,
    convolution_dropout=0.0,
    step_rate=1.33,
    gold_length=True,
    free=16,
    eval_batch=64,
)
"""For one core. Under CC softmax gave an MCD of 3.53, 3.66 and 3.03 (seeds 0, 1, 2), uniform 4.11 and
no_mixing 5.09 (seed 0). Utterances are short and a step speaks 8 frames, for the phones must be found in 800
steps: with 16 phones softmax came to 4.33, with 4 frames a step to 4.04 (seed 0)."""

SMALL = TransformerPreset(
    shape=_shape("small", batch=48, heads=4, head_dim=64, steps=140, phones=96),
    recipe=Recipe(steps=4000, lr=1e-3, warmup=400, dtype="bfloat16", max_seconds=420.0),
    checks={},
    speech=partial(generated, 4000, 256, 95, 560, 80),
    layers=3,
    frames_per_step=4,
    convolution=256,
    prenet=256,
    dropout=0.1,
    prenet_dropout=0.1,
    convolution_dropout=0.1,
    step_rate=1.0,
    gold_length=True,
    free=64,
    eval_batch=64,
)
"""For one GPU: the lengths of LJ Speech, generated; no learning check."""

PAPER = TransformerPreset(
    shape=_shape("paper", batch=48, heads=4, head_dim=128, steps=224, phones=256),
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
    layers=6,
    frames_per_step=4,
    convolution=512,
    prenet=256,
    dropout=0.1,
    prenet_dropout=0.5,
    convolution_dropout=0.5,
    step_rate=1.0,
    gold_length=False,
    free=1 << 20,
    eval_batch=48,
)
"""CAB's setting on LJ Speech, 48 clips an update. Deviations: the phones of the aligner instead of IPA; at
most 896 frames instead of 1,200, which no clip reaches; the last checkpoint; no dropout of attention weights,
which most mechanisms do not have."""

TASK = TransformerTask(
    id="tts_transformer",
    title="Text to speech, frame after frame",
    patterns=(Pattern.CC, Pattern.NS, Pattern.CS),
    metric="mcd",
    better="lower",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Random phones spoken by formants and noise in one of four styles, generated (tiny, small); LJ "
    "Speech (paper)",
    source="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (arXiv 2210.07661); "
    "Transformer-TTS (arXiv 1809.08895)",
)
