"""Spoken sentences as tokens and log-mel spectra: generated ones, and LJ Speech with aligned phones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.tasks.base import Corpus
from attnbench.tasks.cab._audio import MelSpec, log_mel, magnitudes, scoring_spec
from attnbench.tasks.data import formants, sources
from attnbench.tasks.data.loaders.speech import SAMPLE_RATE, Alignments, Interval, LJSpeech

LJSPEECH_MEL = MelSpec(SAMPLE_RATE, 1024, 256, 80, 20.0, 8000.0, power=1, htk=False, clamp=1e-5)
"""The spectrogram that fairseq's models of LJ Speech predict."""

_PITCH_HZ = (70.0, 400.0)
_VOICED = 0.3
"""Height of the peak of the normalised autocorrelation above which a frame is voiced."""
_LAG_COST = 0.2
"""What the longest lag loses, so that of a period and its double, which fit alike, the period is found."""


@dataclass(frozen=True)
class Clip:
    """One utterance: per token its id, frames, log pitch and log energy; and log-mel (frames, bands)."""

    tokens: Tensor
    durations: Tensor
    pitch: Tensor
    energy: Tensor
    mel: Tensor


@dataclass(frozen=True)
class Batch:
    """Clips padded to common lengths, spectra normalised; a padded token has 0 frames.

    tokens, durations, pitch, energy (B, T), mel (B, F, bands), frames (B,): how many of F are not padding;
    token_padding (B, T) is True on padding.
    """

    tokens: Tensor
    durations: Tensor
    pitch: Tensor
    energy: Tensor
    mel: Tensor
    frames: Tensor
    token_padding: Tensor

    @property
    def frame_padding(self) -> Tensor:
        """(B, F), True on padding."""
        return torch.arange(self.mel.shape[1], device=self.mel.device) >= self.frames[:, None]


@dataclass(frozen=True)
class Speech:
    """A corpus of clips. ``mean`` and ``std`` (bands,) are those of the training frames.

    ``longest`` is how many tokens and how many frames batches are padded to.
    """

    train: Sequence[Clip]
    test: Sequence[Clip]
    vocabulary: int
    spec: MelSpec
    longest: tuple[int, int]
    mean: Tensor
    std: Tensor
    corpus: Corpus

    def batch(self, clips: Sequence[Clip], device: str) -> Batch:
        """``clips`` padded to ``longest``, on ``device``."""
        tokens, frames = self.longest

        def padded(rows: Iterable[Tensor], length: int) -> Tensor:
            return torch.stack([torch.cat([r, r.new_zeros(length - len(r), *r.shape[1:])]) for r in rows])

        lengths = torch.tensor([len(c.tokens) for c in clips])
        found = Batch(
            padded((c.tokens for c in clips), tokens),
            padded((c.durations for c in clips), tokens),
            padded((c.pitch for c in clips), tokens),
            padded((c.energy for c in clips), tokens),
            padded(((c.mel - self.mean) / self.std for c in clips), frames),
            torch.tensor([len(c.mel) for c in clips]),
            torch.arange(tokens) >= lengths[:, None],
        )
        return Batch(**{name: value.to(device) for name, value in vars(found).items()})

    def spectra(self, predicted: Tensor) -> Tensor:
        """Log-mel spectra on the CPU from normalised ones (…, bands)."""
        return predicted.float().cpu() * self.std + self.mean

    def draws(self, seed: int, count: int, device: str) -> Iterator[Batch]:
        """Batches of ``count`` training clips without end: all of them in random order, again and again."""
        rng = np.random.default_rng(seed)
        waiting: list[int] = []
        while True:
            while len(waiting) < count:
                waiting += rng.permutation(len(self.train)).tolist()
            chosen, waiting = waiting[:count], waiting[count:]
            yield self.batch([self.train[i] for i in chosen], device)


@cache
def generated(train: int, test: int, phones: int, frames: int, bands: int) -> Speech:
    """Utterances of the formant generator, built once a process; what is predicted is what is scored."""
    spec = scoring_spec(formants.SAMPLE_RATE, bands)
    parts = {
        part: [_generated_clip(u, spec) for u in formants.utterances(part, count, phones, frames)]
        for part, count in (("train", train), ("test", test))
    }
    text = f"{formants.GENERATOR}/{train}/{test}/{phones}/{frames}/{bands}"
    corpus = Corpus("formant speech", "synthetic", hashlib.sha256(text.encode()).hexdigest())
    return _speech(parts["train"], parts["test"], formants.TOKENS, spec, (phones + 1, frames), corpus)


def _generated_clip(utterance: formants.Utterance, spec: MelSpec) -> Clip:
    magnitude = magnitudes(torch.from_numpy(utterance.wave), spec)
    pitch = np.log(utterance.pitch_hz / utterance.pitch_hz.mean())
    return _clip(utterance.tokens, utterance.durations, pitch, magnitude, spec)


@cache
def ljspeech(tokens: int, frames: int) -> Speech:
    """LJ Speech with the phones of the aligner as tokens. Raises DataMissing without clips or alignments.

    Raises UsageError for a clip of more than ``tokens`` phones or ``frames`` frames.
    """
    source, aligned = sources.find("ljspeech"), sources.find("ljspeech-mfa")
    assert isinstance(source, LJSpeech)
    assert isinstance(aligned, Alignments)
    source.require_complete()
    has = set(aligned.ids())
    parts = {part: [c for c in source.clips(part) if c.id in has] for part in ("train", "test")}
    phones = {c.id: aligned.phones(c.id) for clips in parts.values() for c in clips}
    names = sorted({phone.label for spoken in phones.values() for phone in spoken})
    ids = {name: 1 + i for i, name in enumerate(names)}
    clips = {
        part: [_recorded_clip(source.waveform(c), phones[c.id], ids) for c in of_part]
        for part, of_part in parts.items()
    }
    for clip in (*clips["train"], *clips["test"]):
        if len(clip.tokens) > tokens or len(clip.mel) > frames:
            raise UsageError(
                f"data set ljspeech: observed a clip of {len(clip.tokens)} phones and {len(clip.mel)} "
                f"frames, expected at most {tokens} and {frames}"
            )
    fingerprint = hashlib.sha256(f"{source.fingerprint()}{aligned.fingerprint()}".encode()).hexdigest()
    corpus = Corpus("ljspeech with aligned phones", "real", fingerprint)
    return _speech(clips["train"], clips["test"], 1 + len(ids), LJSPEECH_MEL, (tokens, frames), corpus)


def _recorded_clip(wave: NDArray[np.float32], phones: Sequence[Interval], ids: dict[str, int]) -> Clip:
    spec = LJSPEECH_MEL
    magnitude = magnitudes(torch.from_numpy(wave), spec)
    ends = [round(phone.end_s * spec.sample_rate / spec.hop) for phone in phones]
    edges = np.clip([0, *ends], 0, len(magnitude))
    tokens = np.array([ids[phone.label] for phone in phones])
    pitch = log_pitch(wave, spec.sample_rate, spec.hop)
    return _clip(tokens, np.diff(edges), pitch[: edges[-1]], magnitude[: edges[-1]], spec)


def _clip(
    tokens: NDArray[np.int64],
    durations: NDArray[np.int64],
    pitch: NDArray[np.float64],
    magnitude: Tensor,
    spec: MelSpec,
) -> Clip:
    """A clip from its frames: pitch and energy are averaged over the frames of each token, 0 for none."""
    energy = magnitude.norm(dim=1).clamp(min=1e-5).log().double().numpy()
    owner = np.arange(len(durations)).repeat(durations)
    pitch_of, energy_of = (
        torch.from_numpy(np.bincount(owner, track, len(durations)) / np.maximum(durations, 1)).float()
        for track in (pitch, energy)
    )
    mel = log_mel(magnitude, spec)
    return Clip(torch.from_numpy(tokens), torch.from_numpy(durations), pitch_of, energy_of, mel)


def _speech(
    train: list[Clip],
    test: list[Clip],
    vocabulary: int,
    spec: MelSpec,
    longest: tuple[int, int],
    corpus: Corpus,
) -> Speech:
    """The corpus, with pitch and energy normalised over the training tokens that have frames."""
    frames = torch.cat([clip.mel for clip in train])
    spoken = torch.cat([clip.durations for clip in train]) > 0
    scales = {}
    for name in ("pitch", "energy"):
        values = torch.cat([getattr(clip, name) for clip in train])[spoken]
        scales[name] = values.mean(), values.std()

    def normalised(clip: Clip) -> Clip:
        tracks = {
            name: torch.where(clip.durations > 0, (getattr(clip, name) - mean) / std, 0.0)
            for name, (mean, std) in scales.items()
        }
        return Clip(clip.tokens, clip.durations, tracks["pitch"], tracks["energy"], clip.mel)

    train, test = ([normalised(clip) for clip in part] for part in (train, test))
    return Speech(train, test, vocabulary, spec, longest, frames.mean(0), frames.std(0), corpus)


def log_pitch(wave: NDArray[np.float32], sample_rate: int, hop: int) -> NDArray[np.float64]:
    """Natural logarithm of the pitch in Hz of every hop, interpolated where no voice is heard.

    The lag of the highest peak of the normalised autocorrelation in windows of four hops, between 70 and
    400 Hz. Raises UsageError when nothing in ``wave`` has a pitch.
    """
    size = 4 * hop
    padded = np.pad(wave.astype(np.float64), size // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop][: len(wave) // hop]
    windows = (windows - windows.mean(1, keepdims=True)) * np.hanning(size)
    power = np.abs(np.fft.rfft(windows, 2 * size)) ** 2
    taper = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)
    correlation = np.fft.irfft(power)
    correlation = correlation / np.maximum(correlation[:, :1], 1e-9) / (taper / taper[0]).clip(min=1e-3)
    shortest, longest = (int(sample_rate / hz) for hz in reversed(_PITCH_HZ))
    lags = correlation[:, shortest : longest + 1]
    best = (lags * (1.0 - _LAG_COST * np.arange(shortest, longest + 1) / longest)).argmax(1)
    voiced = lags[np.arange(len(lags)), best] > _VOICED
    if not voiced.any():
        raise UsageError("pitch: observed no voiced frame, expected speech")
    track = np.log(sample_rate / (best + shortest))
    at = np.arange(len(track))
    return np.interp(at, at[voiced], track[voiced])
