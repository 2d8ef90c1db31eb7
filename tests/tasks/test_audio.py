"""Speech: the generator, the spectra and their distances against independent code, clips and batches."""

import importlib.util
import math
import wave
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch

from attnbench.errors import UsageError
from attnbench.tasks.cab import _speech
from attnbench.tasks.cab._audio import (
    MelSpec,
    cepstra,
    distances,
    frame_scores,
    griffin_lim,
    log_mel,
    magnitudes,
    mel_filters,
    resynthesised,
    scoring_spec,
    spectral_scores,
    vocode,
    warped_cost,
)
from attnbench.tasks.data import formants
from attnbench.tasks.data.loaders.speech import Alignments, LJSpeech

SPEC = scoring_spec(16_000, 40)

# ---- spectra -------------------------------------------------------------------------------------------


def test_the_scored_spectrogram_has_fairseqs_windows():
    assert scoring_spec(22_050) == MelSpec(
        22_050, 1102, 275, 80, 20.0, 11_025.0, power=2, htk=True, offset=1e-6
    )
    assert (SPEC.n_fft, SPEC.hop) == (800, 200)


def slow_log_mel(samples, spec):
    """The definition, frame by frame and band by band."""
    half = spec.n_fft // 2
    padded = np.concatenate([samples[half:0:-1], samples, samples[-2 : -half - 2 : -1]])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.n_fft) / spec.n_fft)

    def mel(hz):
        if spec.htk:
            return 2595 * math.log10(1 + hz / 700)
        return hz / (200 / 3) if hz < 1000 else 15 + math.log(hz / 1000) / (math.log(6.4) / 27)

    low, high = mel(spec.low_hz), mel(spec.high_hz)
    rows = []
    for at in range(len(samples) // spec.hop):
        spectrum = np.abs(np.fft.rfft(window * padded[at * spec.hop :][: spec.n_fft])) ** spec.power
        row = []
        for band in range(spec.bands):
            step = (high - low) / (spec.bands + 1)
            left, centre, right = (low + (band + i) * step for i in range(3))
            edges = [_inverse(mel, point) for point in (left, centre, right)]
            total = 0.0
            for k, value in enumerate(spectrum):
                hz = k * spec.sample_rate / spec.n_fft
                if edges[0] < hz < edges[2]:
                    side = (
                        (hz - edges[0]) / (edges[1] - edges[0])
                        if hz <= edges[1]
                        else ((edges[2] - hz) / (edges[2] - edges[1]))
                    )
                    total += value * side * (1 if spec.htk else 2 / (edges[2] - edges[0]))
            row.append(math.log(max(total, spec.clamp) + spec.offset))
        rows.append(row)
    return np.array(rows)


def _inverse(function, value):
    """x with function(x) = value, by bisection."""
    low, high = 0.0, 50_000.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if function(middle) < value else (low, middle)
    return low


@pytest.mark.parametrize(
    "spec",
    [
        MelSpec(8000, 400, 100, 12, 20.0, 4000.0, power=2, htk=True, offset=1e-6),
        MelSpec(8000, 256, 64, 10, 20.0, 3000.0, power=1, htk=False, clamp=1e-5),
    ],
)
def test_log_mel_is_its_definition(spec):
    samples = np.random.default_rng(0).standard_normal(1000)
    found = log_mel(magnitudes(torch.from_numpy(samples).float(), spec), spec)
    assert np.abs(found.numpy() - slow_log_mel(samples, spec)).max() < 1e-3


@pytest.mark.skipif(importlib.util.find_spec("librosa") is None, reason="librosa is not installed")
@pytest.mark.parametrize("spec", [SPEC, _speech.LJSPEECH_MEL])
def test_filters_are_librosas(spec):
    import librosa

    expected = librosa.filters.mel(
        sr=spec.sample_rate,
        n_fft=spec.n_fft,
        n_mels=spec.bands,
        fmin=spec.low_hz,
        fmax=spec.high_hz,
        htk=spec.htk,
        norm=None if spec.htk else "slaney",
    )
    assert np.abs(mel_filters(spec).numpy() - expected).max() < 1e-5


def test_cepstra_are_an_orthonormal_dct():
    mel = torch.randn(5, 40)
    expected = scipy.fft.dct(mel.numpy(), type=2, norm="ortho")[:, :13]
    assert np.abs(cepstra(mel).numpy() - expected).max() < 1e-5


# ---- distances -----------------------------------------------------------------------------------------


def slow_warped_cost(distance):
    m, n = distance.shape
    total = np.full((m, n), np.inf)
    for i in range(m):
        for j in range(n):
            before = [total[a, b] for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if a >= 0 and b >= 0]
            total[i, j] = distance[i, j] + min(before, default=0.0)
    return total[-1, -1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 5), (4, 9), (9, 4)])
def test_warping_is_dynamic_programming(shape):
    distance = np.random.default_rng(0).random(shape)
    assert warped_cost(distance) == pytest.approx(slow_warped_cost(distance))


@pytest.mark.skipif(importlib.util.find_spec("librosa") is None, reason="librosa is not installed")
def test_warping_is_librosas():
    import librosa

    distance = np.random.default_rng(0).random((30, 20))
    assert warped_cost(distance) == pytest.approx(librosa.sequence.dtw(C=distance)[0][-1, -1])


def test_distances_are_root_mean_squares():
    a, b = torch.randn(3, 13), torch.randn(4, 13)
    expected = ((a[:, None] - b[None]) ** 2).mean(-1).sqrt()
    torch.testing.assert_close(distances(a, b).float(), expected)


def test_scores_of_equal_stretched_and_shifted_spectra():
    mel = torch.randn(20, 40)
    assert spectral_scores([(mel, mel)]) == {"mcd": 0.0, "msd": 0.0, "frames_ratio": 1.0}
    stretched = mel.repeat_interleave(2, 0)
    assert spectral_scores([(mel, stretched)]) == {"mcd": 0.0, "msd": 0.0, "frames_ratio": 2.0}
    louder = frame_scores([(mel, mel + 1.0)])
    assert louder["msd"] == pytest.approx(1.0)
    assert louder["mcd"] == pytest.approx(math.sqrt(40 / 13))  # only the first coefficient differs, by √40


def test_scores_are_totals_over_frames_and_not_means_of_clips():
    a, b = torch.zeros(1, 40), torch.zeros(3, 40)
    assert frame_scores([(a, a + 4.0), (b, b)])["msd"] == pytest.approx(1.0)
    assert spectral_scores([(a, a + 4.0), (b, b)])["msd"] == pytest.approx(1.0)


# ---- the vocoder ---------------------------------------------------------------------------------------


def test_griffin_lim_finds_samples_with_the_spectrogram():
    wave = torch.sin(torch.arange(8000) * 2 * math.pi * 440 / 16_000)
    target = magnitudes(wave, SPEC)
    found = griffin_lim(target, SPEC)
    assert len(found) == 8000
    error = (magnitudes(found, SPEC) - target).norm() / target.norm()
    assert error < 0.2
    assert torch.equal(found, griffin_lim(target, SPEC))


def test_vocoded_speech_is_near_its_spectrum():
    spoken = next(formants.utterances("test", 1, 8, 60))
    mel = log_mel(magnitudes(torch.from_numpy(spoken.wave), SPEC), SPEC)
    other = log_mel(magnitudes(vocode(mel, SPEC), SPEC), SPEC)
    assert frame_scores([(mel, other)])["mcd"] < 0.3 * frame_scores([(mel, mel.roll(10, 0))])["mcd"]


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_even_nearly_nothing_can_be_vocoded_and_scored(frames):
    for spec in (SPEC, _speech.LJSPEECH_MEL):
        found = resynthesised(torch.zeros(frames, spec.bands), spec)
        assert len(found) > 0
        assert found.isfinite().all()


# ---- the generator -------------------------------------------------------------------------------------


def test_utterances_are_a_function_of_their_arguments_and_parts_differ():
    a, b = (list(formants.utterances("train", 3, 6, 60)) for _ in range(2))
    test = list(formants.utterances("test", 3, 6, 60))
    assert all(np.array_equal(x.wave, y.wave) for x, y in zip(a, b, strict=True))
    assert not any(np.array_equal(x.tokens, y.tokens) for x, y in zip(a, test, strict=True))
    assert not np.array_equal(a[0].tokens, a[1].tokens)


def test_tokens_durations_and_samples_agree():
    for spoken in formants.utterances("train", 30, 24, 160):
        assert len(spoken.tokens) == len(spoken.durations) == 25
        assert spoken.tokens[:-1].max() < formants.PHONES <= spoken.tokens[-1] < formants.TOKENS
        assert spoken.durations[:-1].min() >= 1
        assert spoken.durations[-1] == 0
        frames = spoken.durations.sum()
        assert frames <= 160
        assert len(spoken.pitch_hz) == frames
        assert len(spoken.wave) == frames * formants.FRAME
        assert 0.05 < np.abs(spoken.wave).max() < 1.0


def test_a_long_utterance_is_shortened_to_the_limit():
    spoken = next(formants.utterances("train", 1, 24, 40))
    assert spoken.durations.sum() <= 40
    assert spoken.durations[:-1].min() >= 1


def test_voiced_phones_have_the_pitch_of_the_style():
    """The distance of the harmonics of a voiced phone is the pitch, whose contour the style gives."""
    for spoken in formants.utterances("train", 12, 24, 160):
        style = spoken.tokens[-1] - formants.PHONES
        assert np.allclose(spoken.pitch_hz, 120.0 * formants.contour(style, len(spoken.pitch_hz)))
    assert formants.contour(1, 5)[0] < 1.0 < formants.contour(1, 5)[-1]
    assert formants.contour(2, 5)[0] > 1.0 > formants.contour(2, 5)[-1]


def test_the_pitch_tracker_hears_the_pitch():
    speaker = formants.voice()
    frames = np.zeros(80, np.int64)
    pitch = np.linspace(100.0, 180.0, 80)
    wave = formants._voiced(frames, pitch, 0, speaker)
    found = np.exp(_speech.log_pitch(wave.astype(np.float32), formants.SAMPLE_RATE, formants.FRAME))
    assert np.median(np.abs(found / pitch - 1.0)) < 0.03
    with pytest.raises(UsageError, match="no voiced frame"):
        _speech.log_pitch(np.zeros(8000, np.float32), 16_000, 200)


def test_the_style_changes_the_spectrum_of_the_same_phones():
    speaker, phones = formants.voice(), np.arange(4).repeat(10)
    spectra = [
        log_mel(
            magnitudes(
                torch.from_numpy(formants._voiced(phones, np.full(40, 120.0), style, speaker)).float(), SPEC
            ),
            SPEC,
        )
        for style in range(formants.STYLES)
    ]
    for i in range(4):
        for j in range(i):
            assert frame_scores([(spectra[i], spectra[j])])["mcd"] > 0.3


# ---- clips and batches ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech():
    return _speech.generated(12, 4, 6, 48, 40)


def test_batches_are_padded_and_normalised(speech):
    batch = speech.batch(speech.train[:5], "cpu")
    assert batch.tokens.shape == (5, 7)
    assert batch.mel.shape == (5, 48, 40)
    assert torch.equal(batch.durations.sum(1), batch.frames)
    assert torch.equal((~batch.frame_padding).sum(1), batch.frames)
    for row, clip in enumerate(speech.train[:5]):
        back = speech.spectra(batch.mel[row, : len(clip.mel)])
        torch.testing.assert_close(back, clip.mel)
    everything = torch.cat([c.mel for c in speech.train])
    torch.testing.assert_close(everything.mean(0), speech.mean)


def test_pitch_and_energy_are_normalised_over_spoken_tokens(speech):
    for name in ("pitch", "energy"):
        values = torch.cat([getattr(c, name) for c in speech.train])
        spoken = torch.cat([c.durations for c in speech.train]) > 0
        assert values[spoken].mean().item() == pytest.approx(0.0, abs=1e-4)
        assert values[spoken].std().item() == pytest.approx(1.0, abs=1e-4)
        assert not values[~spoken].any()


def test_every_clip_is_drawn_once_a_pass(speech):
    draws = speech.draws(0, 4, "cpu")
    seen = torch.cat([next(draws).tokens for _ in range(3)])
    assert len({tuple(row) for row in seen.tolist()}) == 12
    assert torch.equal(next(speech.draws(1, 4, "cpu")).tokens, next(speech.draws(1, 4, "cpu")).tokens)


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    """A miniature of LJ Speech and its alignments."""
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    folder, grids = tmp_path / "ljspeech", tmp_path / "ljspeech-mfa"
    (folder / "wavs").mkdir(parents=True)
    grids.mkdir()
    names = ["LJ001-0001", "LJ003-0001", "LJ004-0001", "LJ004-0002"]
    (folder / "metadata.csv").write_text("".join(f"{name}|Some.|some.\n" for name in names))
    time = np.arange(22_050) / 22_050
    for name in names:
        samples = sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 6))
        with wave.open(str(folder / "wavs" / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 22_050, 0, "NONE", ""))
            file.writeframes((samples * 8000).astype("<i2").tobytes())
        intervals = [(0.0, 0.2, "sil"), (0.2, 0.55, "AA1"), (0.55, 0.98, "S")]
        entries = "\n".join(f'{start}\n{end}\n"{label}"' for start, end, label in intervals)
        grids.joinpath(f"{name}.TextGrid").write_text(
            f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n0.98\n<exists>\n1\n"IntervalTier"\n'
            f'"phones"\n0\n0.98\n3\n{entries}\n'
        )
    monkeypatch.setattr(LJSpeech, "published", {"train": 2, "dev": 1, "test": 1})
    monkeypatch.setattr(Alignments, "published", {"clips": None})
    _speech.ljspeech.cache_clear()
    yield
    _speech.ljspeech.cache_clear()


def test_recordings_become_clips_with_aligned_phones(recordings):
    found = _speech.ljspeech(8, 96)
    assert (len(found.train), len(found.test), found.vocabulary) == (2, 1, 4)
    clip = found.test[0]
    assert clip.durations.tolist() == [17, 30, 37]  # ends at 17.2, 47.4 and 84.4 hops of 256 samples
    assert clip.mel.shape == (84, 80)
    assert found.corpus.label == "real: ljspeech with aligned phones"
    batch = found.batch(found.train, "cpu")
    assert batch.mel.shape == (2, 96, 80)
    assert batch.token_padding.tolist() == [[False] * 3 + [True] * 5] * 2


def test_a_clip_beyond_the_limit_is_refused(recordings):
    with pytest.raises(
        UsageError, match="observed a clip of 3 phones and 84 frames, expected at most 8 and 80"
    ):
        _speech.ljspeech(8, 80)


def test_a_batch_can_be_made_from_parts(speech):
    batch = speech.batch(speech.test[:1], "cpu")
    assert replace(batch, frames=batch.frames - 1).frame_padding.sum() == batch.frame_padding.sum() + 1
