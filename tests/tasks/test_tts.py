"""Both speech-synthesis tasks: the wiring of the models, what is scored, the presets."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from attnbench import Pattern
from attnbench.impls.case import Workload
from attnbench.tasks import registry
from attnbench.tasks.cab import _speech, tts_fastspeech2, tts_transformer
from attnbench.tasks.cab._speech import Speech, generated
from attnbench.tasks.controls import build_attention
from attnbench.tasks.data.sources import DataMissing
from attnbench.tasks.run import run_task

SPEECH = partial(generated, 8, 4, 6, 48, 40)


def seeded(pattern, name="softmax"):
    torch.manual_seed(0)

    def attention(layer, shape=None):
        n, m = (48, 48) if shape is None else (shape.n, shape.m)
        return build_attention(name, 32, 2, pattern=pattern, n=n, m=m)

    return attention


# ---- FastSpeech 2 --------------------------------------------------------------------------------------


def workload(task, preset, heads=2, head_dim=16):
    return Workload(f"{task}_{preset}", batch=4, heads=heads, kv_heads=heads, head_dim=head_dim)


def fast_session(**changes):
    shape = replace(tts_fastspeech2.TINY.shape, workload=workload("tts_fastspeech2", "tiny"), n=48, m=48)
    return tts_fastspeech2.FastSpeechSession(
        replace(tts_fastspeech2.TINY, shape=shape, speech=SPEECH, **changes), "cpu"
    )


def test_tokens_are_repeated_for_their_durations():
    x = torch.arange(3.0)[None, :, None].expand(2, -1, 4)
    durations = torch.tensor([[2, 0, 1], [1, 1, 0]])
    found, padding = tts_fastspeech2.regulated(x, durations, 4)
    assert found[0, :3, 0].tolist() == [0, 0, 2]
    assert found[1, :2, 0].tolist() == [0, 1]
    assert padding.tolist() == [[False] * 3 + [True], [False] * 2 + [True] * 2]


def test_durations_beyond_the_frames_are_cut():
    found, padding = tts_fastspeech2.regulated(torch.randn(1, 2, 4), torch.tensor([[3, 9]]), 5)
    assert found.shape == (1, 5, 4)
    assert not padding.any()


def fast_mel(model, batch):
    with torch.no_grad():
        return model(batch, given=True, gold_durations=True).mel


def test_only_attention_carries_the_style_to_the_start_of_an_utterance():
    session = fast_session()
    speech = session.speech
    clip = speech.train[0]
    tokens = clip.tokens.clone()
    tokens[-1] = 24 + (tokens[-1] - 24 + 1) % 4
    one, other = (speech.batch([replace(clip, tokens=t)], "cpu") for t in (clip.tokens, tokens))
    for name, seen in (("softmax", True), ("no_mixing", False)):
        model = session.model(seeded("NS", name)).eval()
        one_mel, other_mel = (fast_mel(model, b)[:, :1] for b in (one, other))  # out of reach of 3 taps
        assert torch.allclose(one_mel, other_mel) is not seen


def test_padding_changes_no_frame():
    session = fast_session()
    model = session.model(seeded("NS")).eval()
    batch = session.speech.batch(session.speech.train[:1], "cpu")
    frames = int(batch.frames)
    longer = replace(
        batch,
        **{
            name: nn.functional.pad(getattr(batch, name), (0, 3))
            for name in ("tokens", "durations", "pitch", "energy")
        },
        token_padding=nn.functional.pad(batch.token_padding, (0, 3), value=True),
    )
    longer.tokens[:, -3:] = 5
    torch.testing.assert_close(
        fast_mel(model, batch)[:, :frames], fast_mel(model, longer)[:, :frames], atol=1e-5, rtol=1e-4
    )


def test_gold_pitch_is_given_in_training_only():
    session = fast_session()
    model = session.model(seeded("NS")).eval()
    batch = session.speech.batch(session.speech.train[:1], "cpu")
    other = replace(batch, pitch=batch.pitch + 1.0)
    with torch.no_grad():
        given = [model(b, given=True, gold_durations=True).mel for b in (batch, other)]
        predicted = [model(b, given=False, gold_durations=True).mel for b in (batch, other)]
    assert not torch.allclose(*given)
    assert torch.equal(*predicted)


def test_steps_of_a_value_cover_three_deviations():
    values = torch.tensor([-9.0, -3.0, 0.0, 2.999, 9.0])
    assert tts_fastspeech2._step(values).tolist() == [0, 0, 128, 255, 255]


class Perfect(nn.Module):
    """Predicts what it is asked for."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, batch, given, gold_durations):
        log_duration = (1.0 + batch.durations).log()
        return tts_fastspeech2.Prediction(
            batch.mel + self.noise, batch.frame_padding, log_duration, batch.pitch, batch.energy
        )


def test_a_perfect_model_scores_zero_and_has_no_loss():
    session = fast_session()
    found = session.evaluate(Perfect(0.0))
    assert found["mcd"] < 1e-5
    assert found["msd"] < 1e-5
    assert session.loss(Perfect(0.0), session.batches(0)()).item() == pytest.approx(0.0, abs=1e-6)
    std = session.speech.std
    expected = std.square().mean().sqrt().item()  # one standard deviation in every band of every frame
    assert session.evaluate(Perfect(1.0))["msd"] == pytest.approx(expected, rel=1e-4)


def test_predicted_durations_and_the_vocoder_are_scored_along_the_best_path():
    session = fast_session(gold_durations=False)
    found = session.evaluate(session.model(seeded("NS")).eval())
    assert set(found) == {"mcd", "msd", "frames_ratio"}
    assert found["mcd"] > 0.0


# ---- Transformer-TTS -----------------------------------------------------------------------------------


def slow_session(pattern=Pattern.CC, **changes):
    shape = replace(tts_transformer.TINY.shape, workload=workload("tts_transformer", "tiny"), n=12, m=7)
    changes = {"frames_per_step": 4, "free": 2, "prenet_dropout": 0.0} | changes
    preset = replace(tts_transformer.TINY, shape=shape, speech=SPEECH, **changes)
    return tts_transformer.TransformerSession(preset, pattern, "cpu")


def test_the_decoder_reads_the_last_frame_of_the_step_before():
    mel = torch.arange(1.0, 13.0)[None, :, None]
    assert tts_transformer.shifted(mel, 4)[0, :, 0].tolist() == [0, 4, 8]


def test_frames_depend_on_the_frames_before_them_only():
    session = slow_session()
    model = session.model(seeded("CC")).eval()
    batch = session.speech.batch(session.speech.train[:1], "cpu")
    changed = batch.mel.clone()
    changed[:, 20:] += 1.0
    with torch.no_grad():
        memory = model.encode(batch.tokens, batch.token_padding)
        one, other = (
            model.decode(tts_transformer.shifted(mel, 4), memory, batch.token_padding)[0]
            for mel in (batch.mel, changed)
        )
    assert torch.equal(one[:, :24], other[:, :24])
    assert not torch.allclose(one[:, 24:], other[:, 24:])


def test_steps_are_a_rate_of_phones_apart():
    model = slow_session(step_rate=2.0).model(seeded("CC")).eval()
    silence = torch.zeros(1, 4, 64)
    phones, steps = (model._placed(silence, side)[0] for side in range(2))
    assert torch.equal(steps[1], phones[2])
    assert not torch.equal(steps[1], phones[1])


def test_only_cross_attention_brings_the_phones_to_the_frames():
    session = slow_session()
    a, b = (session.speech.batch([session.speech.train[i]], "cpu") for i in range(2))
    for name, seen in (("softmax", True), ("no_mixing", False)):
        model = session.model(seeded("CC", name)).eval()
        with torch.no_grad():
            one, other = (model(x.tokens, x.token_padding, a.mel)[1] for x in (a, b))
        assert torch.equal(one, other) is not seen


def test_free_speech_is_what_its_own_frames_give_when_they_are_given():
    session = slow_session()
    model = session.model(seeded("CC")).eval()
    batch = session.speech.batch(session.speech.train[:2], "cpu")
    with torch.no_grad():
        spoken, _ = model.speak(batch.tokens, batch.token_padding, 12)
        before = spoken - 0.0
        memory = model.encode(batch.tokens, batch.token_padding)
        raw = torch.zeros(2, 0, 40)
        given = torch.zeros(2, 1, 40)
        for _ in range(12):
            frames, _ = model.decode(given, memory, batch.token_padding)
            raw = frames
            given = torch.cat((torch.zeros(2, 1, 40), frames[:, 3::4]), 1)
        again = raw + model.postnet(raw)
    torch.testing.assert_close(before, again, atol=1e-4, rtol=1e-3)


class Parrot(tts_transformer.TransformerTTS):
    """Says the clips of a corpus by their tokens, and stops after their frames."""

    def __init__(self, speech: Speech, stop_at: int) -> None:
        nn.Module.__init__(self)
        self.speech, self.stop_at = speech, stop_at

    def _mel(self, tokens):
        by_tokens = {tuple(c.tokens.tolist()): c for c in self.speech.test}
        return self.speech.batch([by_tokens[tuple(row)] for row in tokens.tolist()], "cpu").mel

    def forward(self, tokens, padding, mel):
        return mel, mel, torch.zeros(len(mel), 12)

    def speak(self, tokens, padding, steps):
        stop = torch.full((len(tokens), steps), -1.0)
        stop[:, self.stop_at :] = 1.0
        return self._mel(tokens), stop


def test_a_perfect_speaker_scores_zero():
    session = slow_session()
    found = session.evaluate(Parrot(session.speech, 0))
    assert found["mcd"] < 1e-5
    assert found["mcd_tf"] < 1e-5
    assert found["frames_ratio"] == 1.0


def test_without_the_gold_length_the_stop_signal_ends_an_utterance():
    session = slow_session(gold_length=False)
    spoken = session._spoken(Parrot(session.speech, 3))
    scored = _speech.scoring_spec(16_000)
    assert [len(synthesis) for _, synthesis in spoken] == [16 * 200 // scored.hop] * 2
    assert session._stopped(torch.full((1, 12), -1.0)).tolist() == [48]


def test_the_stop_signal_is_asked_for_at_the_last_step_only():
    session = slow_session()
    batch = session.speech.batch(session.speech.train[:1], "cpu")
    last = -(-int(batch.frames) // 4) - 1

    class Stopper(nn.Module):
        def forward(self, tokens, padding, mel):
            stop = torch.full((1, 12), -30.0)
            stop[:, self.at :] = 30.0
            return mel, mel, stop

    model = Stopper()
    model.at = last
    assert session.loss(model, batch).item() == pytest.approx(0.0, abs=1e-6)
    model.at = last - 1
    assert session.loss(model, batch).item() > 1.0


# ---- rows and presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["softmax", "linear_transformer", "no_mixing"])
@pytest.mark.parametrize(
    ("module", "pattern", "n", "m"),
    [
        (tts_fastspeech2, "NS", 48, 48),
        (tts_transformer, "CC", 12, 7),
        (tts_transformer, "NS", 7, 7),
        (tts_transformer, "CS", 12, 12),
    ],
)
def test_every_pattern_takes_steps(monkeypatch, module, pattern, n, m, mechanism):
    session = fast_session() if module is tts_fastspeech2 else slow_session()
    preset = replace(session.preset, recipe=replace(session.preset.recipe, steps=2, warmup=1))
    monkeypatch.setattr(module, "TASK", replace(module.TASK, presets={"tiny": preset}))
    row = run_task(module.TASK.id, mechanism, pattern=pattern)
    assert (row["n"], row["m"]) == (n, m)
    assert row["metric_value"] > 0.0
    again = run_task(module.TASK.id, mechanism, pattern=pattern)
    assert again["metric_value"] == row["metric_value"]


def test_the_shapes_of_the_presets_are_those_of_their_speech():
    for task, module in (("tts_fastspeech2", tts_fastspeech2), ("tts_transformer", tts_transformer)):
        for preset in registry.task(task).presets.values():
            given = preset.speech.args
            tokens, frames = (given[2] + 1, given[3]) if preset.speech.func is generated else given
            if module is tts_fastspeech2:
                assert preset.shape.n == preset.shape.m == frames
            else:
                assert (preset.shape.n * preset.frames_per_step, preset.shape.m) == (frames, tokens)


def test_the_models_of_paper_have_the_published_size():
    p = tts_fastspeech2.PAPER
    with torch.device("meta"):
        own = [build_attention("softmax", 256, 2, pattern="NS", n=896, m=896) for _ in range(8)]
        fast = tts_fastspeech2.FastSpeech2(80, 80, 896, own[:4], own[4:], p)
        q = tts_transformer.PAPER
        slow = tts_transformer.TransformerTTS(
            80,
            80,
            *(
                [build_attention("softmax", 512, 4, pattern=pattern, n=s.n, m=s.m) for _ in range(6)]
                for pattern, s in sorted(
                    tts_transformer.shapes(q.shape).items(),
                    key=lambda item: ("NS", "CS", "CC").index(item[0]),
                )
            ),
            q,
        )
    assert 40e6 < sum(x.numel() for x in fast.parameters()) < 42e6
    assert 52e6 < sum(x.numel() for x in slow.parameters()) < 56e6


@pytest.mark.parametrize("task", ["tts_fastspeech2", "tts_transformer"])
def test_missing_recordings_are_said(tmp_path, monkeypatch, task):
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    _speech.ljspeech.cache_clear()
    with pytest.raises(DataMissing, match="ljspeech"):
        registry.task(task).open("paper", registry.task(task).patterns[0], "cpu")


@pytest.mark.parametrize("module", [tts_fastspeech2, tts_transformer])
def test_the_paper_options_take_a_step(monkeypatch, module):
    paper = module.PAPER
    shape = (fast_session() if module is tts_fastspeech2 else slow_session()).preset.shape
    preset = replace(
        paper,
        shape=replace(shape, workload=workload(module.TASK.id, "paper")),
        speech=SPEECH,
        layers=1,
        recipe=replace(paper.recipe, steps=2),
    )
    if module is tts_transformer:
        preset = replace(preset, free=2, convolution=8, prenet=8)
    monkeypatch.setattr(module, "TASK", replace(module.TASK, presets={"paper": preset}))
    assert run_task(module.TASK.id, "softmax", preset="paper")["metric_value"] > 0.0
