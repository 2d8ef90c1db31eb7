"""Generated speech: random phones, voiced by formants or made of noise, spoken in one of four styles.

The style stands in the last token and changes every frame of the utterance, as the type of a sentence does
in speech: only a model that carries it to all phones predicts the spectra. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GENERATOR = "formants/1"
"""Version of this generator, part of the fingerprint of its data."""

SAMPLE_RATE = 16_000
FRAME = 200
"""Samples of a frame: 12.5 ms."""

VOICED, UNVOICED, STYLES = 16, 8, 4
PHONES = VOICED + UNVOICED
TOKENS = PHONES + STYLES
"""Token ids: voiced phones, unvoiced phones, styles."""

_RANGES = ((250.0, 850.0), (900.0, 2400.0), (2400.0, 3200.0))
_WEIGHTS, _BANDWIDTHS = (1.0, 0.6, 0.35), (80.0, 120.0, 180.0)
_HARMONICS, _BASE_HZ = 30, 120.0
_ROOM = 3e-3
"""Standard deviation of the noise that is everywhere, as in any recording: no band is ever silent."""
_SCALE = (1.0, 1.18, 0.85, 1.05)
"""Factor on the formants, by style: the size of the speaker's mouth."""
_TILT = (0.3, 0.0, 0.6, 0.9)
"""Exponent of the fall of the harmonics, by style."""


@dataclass(frozen=True)
class Voice:
    """What a phone is: formants in Hz of the voiced ones, centre of the noise of the others, usual frames."""

    formants: Array
    noise_hz: Array
    frames: NDArray[np.int64]


@dataclass(frozen=True)
class Utterance:
    """Tokens with the frames of each (the style, last, has none), pitch in Hz per frame, and the samples."""

    tokens: NDArray[np.int64]
    durations: NDArray[np.int64]
    pitch_hz: Array
    wave: NDArray[np.float32]


def voice(seed: int = 0) -> Voice:
    """The phones of one speaker, a function of ``seed``."""
    rng = np.random.default_rng([seed, 0])
    formants = np.stack([rng.uniform(low, high, VOICED) for low, high in _RANGES], 1)
    return Voice(formants, np.linspace(2000.0, 6000.0, UNVOICED), rng.integers(4, 9, PHONES))


def utterances(part: str, count: int, phones: int, longest: int, seed: int = 0) -> Iterator[Utterance]:
    """``count`` utterances of ``phones`` phones and a style, at most ``longest`` frames each.

    Those of the parts ``train`` and ``test`` share the voice and nothing else. A function of its arguments.
    """
    speaker, stream = voice(seed), {"train": 1, "test": 2}[part]
    for number in range(count):
        yield _utterance(np.random.default_rng([seed, stream, number]), speaker, phones, longest)


def _utterance(rng: np.random.Generator, speaker: Voice, phones: int, longest: int) -> Utterance:
    style = int(rng.integers(STYLES))
    spoken = rng.integers(PHONES, size=phones)
    durations = speaker.frames[spoken] + rng.integers(-1, 2, phones)
    while durations.sum() > longest:
        durations[rng.integers(phones)] -= 1
        durations = durations.clip(min=1)
    of_frame = spoken.repeat(durations)
    pitch = _BASE_HZ * contour(style, len(of_frame))
    wave = _voiced(of_frame, pitch, style, speaker) + _noise(rng, spoken, durations, speaker)
    wave += _ROOM * rng.standard_normal(len(wave))
    tokens = np.append(spoken, PHONES + style)
    return Utterance(tokens, np.append(durations, 0), pitch, wave.astype(np.float32))


def contour(style: int, frames: int) -> Array:
    """Factor on the pitch over an utterance: flat, rising, falling, or a wave."""
    t = np.linspace(-1.0, 1.0, frames)
    return 1.0 + (np.zeros(frames), 0.25 * t, -0.25 * t, 0.3 * np.sin(2.0 * np.pi * t))[style]


def _voiced(of_frame: NDArray[np.int64], pitch: Array, style: int, speaker: Voice) -> Array:
    """Harmonics of the pitch, weighted by three resonances that glide from phone to phone."""
    loud = (of_frame < VOICED).astype(np.float64)
    formants = _smooth(speaker.formants[of_frame.clip(max=VOICED - 1)]) * _SCALE[style]
    order = np.arange(1, _HARMONICS + 1)
    frequency = pitch[:, None] * order
    size = sum(
        weight / (1.0 + ((frequency - formants[:, i : i + 1]) / bandwidth) ** 2)
        for i, (weight, bandwidth) in enumerate(zip(_WEIGHTS, _BANDWIDTHS, strict=True))
    )
    size = size * order ** -_TILT[style] * _smooth(loud[:, None])
    turn = np.exp(2j * np.pi * np.cumsum(pitch.repeat(FRAME)) / SAMPLE_RATE)
    power, total = np.ones_like(turn), np.zeros(len(turn))
    for k in range(_HARMONICS):
        power = power * turn
        total += size[:, k].repeat(FRAME) * power.imag
    return 0.2 * total


def _noise(
    rng: np.random.Generator, spoken: NDArray[np.int64], durations: NDArray[np.int64], speaker: Voice
) -> Array:
    """A band of noise for every unvoiced phone, silence elsewhere."""
    pieces = []
    for phone, frames in zip(spoken, durations, strict=True):
        samples = rng.standard_normal(frames * FRAME)
        if phone < VOICED:
            pieces.append(np.zeros(len(samples)))
            continue
        frequency = np.fft.rfftfreq(len(samples), 1.0 / SAMPLE_RATE)
        band = np.exp(-0.5 * ((frequency - speaker.noise_hz[phone - VOICED]) / 400.0) ** 2)
        pieces.append(0.2 * np.fft.irfft(np.fft.rfft(samples) * band, len(samples)))
    return np.concatenate(pieces)


def _smooth(track: Array) -> Array:
    """Each frame mixed with its neighbours, (frames, k): a Hann window over three frames."""
    padded = np.concatenate([track[:1], track, track[-1:]])
    return 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
