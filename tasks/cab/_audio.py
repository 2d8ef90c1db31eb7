"""Spectra of speech and the distances that speech synthesis is scored by: MCD and MSD along a best path.

The definitions are those of fairseq S^2 (arXiv 2109.06912): root-mean-square distances of log-mel spectra and
of their first cepstral coefficients, summed along dynamic time warping, per synthesised frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CEPSTRA = 13


@dataclass(frozen=True)
class MelSpec:
    """A log-mel spectrogram: Hann windows of ``n_fft`` samples, hop, bands from ``low_hz`` to ``high_hz``.

    ``power`` 1 takes magnitudes, 2 their squares. ``htk`` bands are triangles of height 1 on HTK's mel scale,
    else they have area 1 on Slaney's. The logarithm is of max(mel, ``clamp``) + ``offset``.
    """

    sample_rate: int
    n_fft: int
    hop: int
    bands: int
    low_hz: float
    high_hz: float
    power: Literal[1, 2]
    htk: bool
    clamp: float = 0.0
    offset: float = 0.0


def scoring_spec(sample_rate: int, bands: int = 80) -> MelSpec:
    """The spectrogram that is compared: windows of 50 ms every 12.5 ms, from 20 Hz up."""
    return MelSpec(
        sample_rate,
        int(0.05 * sample_rate),
        int(0.0125 * sample_rate),
        bands,
        20.0,
        sample_rate / 2,
        power=2,
        htk=True,
        offset=1e-6,
    )


@cache
def mel_filters(spec: MelSpec) -> Tensor:
    """Triangles (bands, n_fft // 2 + 1) that overlap by half on the mel scale."""
    edges = _hz(
        np.linspace(_mel(spec.low_hz, spec.htk), _mel(spec.high_hz, spec.htk), spec.bands + 2), spec.htk
    )
    frequency = np.linspace(0.0, spec.sample_rate / 2, spec.n_fft // 2 + 1)
    rise = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.minimum(rise, fall).clip(min=0.0)
    if not spec.htk:
        filters *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(filters).float()


def _mel(hz: float, htk: bool) -> float:
    if htk:
        return 2595.0 * math.log10(1.0 + hz / 700.0)
    return hz * 3.0 / 200.0 if hz < 1000.0 else 15.0 + 27.0 * math.log(hz / 1000.0) / math.log(6.4)


def _hz(mel: NDArray[np.float64], htk: bool) -> NDArray[np.float64]:
    if htk:
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * 6.4 ** ((mel - 15.0) / 27.0))


def magnitudes(wave: Tensor, spec: MelSpec) -> Tensor:
    """Magnitude spectrogram (frames, n_fft // 2 + 1) of ``wave`` (samples,), one frame a hop, centred."""
    window = torch.hann_window(spec.n_fft, device=wave.device)
    spectrum = torch.stft(wave, spec.n_fft, spec.hop, window=window, pad_mode="reflect", return_complex=True)
    return spectrum.abs().T[: len(wave) // spec.hop]


def log_mel(magnitude: Tensor, spec: MelSpec) -> Tensor:
    """Natural logarithm of the mel spectrum (frames, bands) of a :func:`magnitudes` spectrogram."""
    mel = magnitude.pow(spec.power) @ mel_filters(spec).to(magnitude.device).T
    return (mel.clamp(min=spec.clamp) + spec.offset).log()


def cepstra(mel: Tensor) -> Tensor:
    """First 13 coefficients (frames, 13) of the orthonormal DCT-II of log-mel spectra (frames, bands)."""
    bands = mel.shape[-1]
    n = torch.arange(bands, dtype=torch.float64)
    k = torch.arange(CEPSTRA, dtype=torch.float64)[:, None]
    basis = torch.cos(math.pi / bands * (n + 0.5) * k) * math.sqrt(2.0 / bands)
    basis[0] /= math.sqrt(2.0)
    return mel @ basis.T.to(mel)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Root-mean-square distance (m, n) of every frame of ``a`` (m, d) from every frame of ``b`` (n, d)."""
    exact = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return exact / math.sqrt(a.shape[1])


def warped_cost(distance: NDArray[np.float64]) -> float:
    """Cost of the cheapest path through ``distance`` (m, n) from corner to corner: dynamic time warping.

    A step goes down, right or both, and every cell on the path counts once. Computed by antidiagonals.
    """
    m, n = distance.shape
    before, last = np.full(m + 1, np.inf), np.full(m + 1, np.inf)
    before[0] = 0.0  # index i + 1 of a diagonal is row i: this is the corner before the first cell
    for diagonal in range(m + n - 1):
        rows = np.arange(max(0, diagonal - n + 1), min(m, diagonal + 1))
        cost = np.full(m + 1, np.inf)
        nearest = np.minimum(np.minimum(last[rows], last[rows + 1]), before[rows])
        cost[rows + 1] = nearest + distance[rows, diagonal - rows]
        before, last = last, cost
    return float(last[m])


def spectral_scores(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """MCD and MSD of (reference, synthesis) pairs of log-mel spectra, (frames, bands) each, after warping.

    Total cost over total synthesised frames; ``frames_ratio`` are those over the reference's, because too
    many frames lower the scores.
    """
    cost, frames, expected = {"mcd": 0.0, "msd": 0.0}, 0, 0
    for reference, synthesis in pairs:
        for name, a, b in (
            ("mcd", cepstra(reference), cepstra(synthesis)),
            ("msd", reference, synthesis),
        ):
            cost[name] += warped_cost(distances(a, b).cpu().numpy())
        frames, expected = frames + len(synthesis), expected + len(reference)
    return {**{name: total / frames for name, total in cost.items()}, "frames_ratio": frames / expected}


def frame_scores(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """MCD and MSD of pairs of spectra with equally many frames, frame by frame, without warping."""
    cost, frames = {"mcd": 0.0, "msd": 0.0}, 0
    for reference, synthesis in pairs:
        difference = (reference - synthesis).double()
        cost["msd"] += difference.square().mean(1).sqrt().sum().item()
        cost["mcd"] += cepstra(difference).square().mean(1).sqrt().sum().item()
        frames += len(reference)
    return {name: total / frames for name, total in cost.items()}


def griffin_lim(magnitude: Tensor, spec: MelSpec, iterations: int = 32) -> Tensor:
    """Samples whose spectrogram is near ``magnitude`` (frames, bins): Griffin and Lim (1984), random phases.

    The phases come from a generator of their own, so that equal spectra give equal samples.
    """
    window = torch.hann_window(spec.n_fft, device=magnitude.device)
    generator = torch.Generator().manual_seed(0)
    target = torch.cat([magnitude, magnitude[-1:]]).T  # a centred transform has one frame more
    phase = torch.rand(target.shape, generator=generator).to(target) * 2.0 * math.pi
    spectrum = torch.polar(target, phase)
    length = len(magnitude) * spec.hop
    for _ in range(iterations):
        wave = torch.istft(spectrum, spec.n_fft, spec.hop, window=window, length=length)
        again = torch.stft(wave, spec.n_fft, spec.hop, window=window, pad_mode="reflect", return_complex=True)
        spectrum = torch.polar(target, again.angle())
    return torch.istft(spectrum, spec.n_fft, spec.hop, window=window, length=length)


def vocode(mel: Tensor, spec: MelSpec) -> Tensor:
    """Samples from log-mel spectra (frames, bands): pseudo-inverse of the bands, then :func:`griffin_lim`.

    Spectra shorter than a window are followed by silence, so that even a model that says nothing has a score.
    """
    missing = max(0, -(-spec.n_fft // spec.hop) - len(mel))
    silence = mel.new_full((missing, spec.bands), math.log(spec.clamp + spec.offset))
    mel = torch.cat((mel, silence))
    inverse = torch.linalg.pinv(mel_filters(spec).double()).to(mel)
    energy = ((mel.exp() - spec.offset) @ inverse.T).clamp(min=1e-10)
    return griffin_lim(energy.pow(1.0 / spec.power), spec)


def resynthesised(mel: Tensor, spec: MelSpec) -> Tensor:
    """The scored spectrum of what a vocoder makes of log-mel spectra (frames, bands)."""
    scored = scoring_spec(spec.sample_rate)
    return log_mel(magnitudes(vocode(mel, spec), scored), scored)
