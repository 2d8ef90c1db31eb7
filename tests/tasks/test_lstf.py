"""Forecasting: the series and their windows, the wiring of Informer, the scores, CAB's settings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attnbench import Pattern
from attnbench.errors import UsageError
from attnbench.impls.case import Workload
from attnbench.tasks import registry
from attnbench.tasks.base import Corpus
from attnbench.tasks.cab import _series, lstf, lstf_probe
from attnbench.tasks.cab._forecast import ForecastSession
from attnbench.tasks.cab._informer import Distil, Informer, ValueEmbedding
from attnbench.tasks.controls import build_attention
from attnbench.tasks.data.loaders.tables import Split
from attnbench.tasks.data.sources import DataMissing
from attnbench.tasks.run import run_task

# ---- series --------------------------------------------------------------------------------------------


def test_sines_have_their_periods_and_their_noise():
    series = _series.sines(4000, 3)
    assert series.values.shape == (4000, 3)
    assert series.marks.shape == (4000, 0)
    train = series.values[:2800].astype(np.float64)
    assert np.abs(train.mean(0)).max() < 1e-5
    assert train.std(0) == pytest.approx(np.ones(3), abs=1e-5)
    power = np.abs(np.fft.rfft(series.values[:2688], axis=0)) ** 2  # 16 weeks: both periods are whole
    for channel in power.T:
        assert set(np.argsort(channel[1:])[-2:] + 1) == {2688 // 24, 2688 // 168}


def test_sines_are_a_function_of_their_arguments():
    a, b, c = _series.sines(500, 2), _series.sines(500, 2), _series.sines(500, 2, seed=1)
    assert np.array_equal(a.values, b.values)
    assert a.corpus == b.corpus
    assert not np.array_equal(a.values, c.values)
    assert a.corpus.fingerprint != c.corpus.fingerprint


def test_sunspots_are_the_known_months():
    series = _series.sunspots()
    assert series.values.shape == (3126, 1)  # January 1749 to June 2009
    assert series.split == Split((0, 2188), (2188, 2501), (2501, 3126))
    raw = series.values[:, 0]
    assert (raw[1] - raw[0]) / (raw[2] - raw[0]) == pytest.approx((62.6 - 58.0) / (70.0 - 58.0), rel=1e-4)
    assert series.corpus.label == "embedded: monthly sunspots"


def test_another_sunspot_file_is_refused(monkeypatch):
    monkeypatch.setattr(_series, "_SUNSPOTS_SHA256", "0")
    with pytest.raises(UsageError, match="other bytes"):
        _series.sunspots()


def ramp(rows=100):
    """A series whose value is its row."""
    values = np.arange(rows, dtype=np.float32)[:, None]
    marks = np.stack([values[:, 0], -values[:, 0]], 1)
    return _series.Series(
        values, marks, Split((0, 60), (60, 80), (80, rows)), Corpus("ramp", "synthetic", "0")
    )


def test_forecasts_lie_in_their_part_and_what_is_seen_may_reach_back():
    series = ramp()
    train, test = series.starts("train", 10, 5), series.starts("test", 10, 5)
    assert (train[0], train[-1] + 15) == (0, 60)
    assert (test[0] + 10, test[-1] + 15) == (80, 100)
    assert np.array_equal(np.diff(test), np.ones(len(test) - 1))


def test_a_series_without_a_window_is_a_usage_error():
    with pytest.raises(UsageError, match="observed 60 train rows, expected at least 70"):
        ramp().starts("train", 40, 30)


# ---- windows and scores --------------------------------------------------------------------------------


def session_of(label=4, pattern=Pattern.NC):
    shape = lstf_probe.TINY.shape
    preset = replace(
        lstf_probe.TINY, series=ramp, seq=10, label=label, pred=5, shape=replace(shape, n=label + 5, m=5)
    )
    return ForecastSession(preset, pattern, "cpu")


@pytest.mark.parametrize("label", [0, 4])
def test_windows_are_consecutive_rows_and_marks(label):
    seen, seen_marks, start, asked_marks, target = session_of(label).batches(0)()
    first = seen[:, :1]
    assert torch.equal(seen, first + torch.arange(10)[:, None])
    assert torch.equal(start, seen[:, 10 - label :])
    assert torch.equal(target, first + 10 + torch.arange(5)[:, None])
    assert torch.equal(seen_marks[..., :1], seen)
    assert torch.equal(asked_marks[..., :1], torch.cat((start, target), 1))


def test_every_training_window_comes_once_a_pass():
    draw = session_of().batches(0)
    drawn = torch.cat([draw()[0][:, 0, 0] for _ in range(23)])  # 16 passes over 46 windows
    assert torch.equal(drawn.long().bincount(), torch.full((46,), 16))
    assert torch.equal(session_of().batches(0)()[0], session_of().batches(0)()[0])
    assert not torch.equal(session_of().batches(0)()[0], session_of().batches(1)()[0])


def test_scores_of_a_perfect_and_of_a_constant_forecast():
    class Ramp(nn.Module):
        def forward(self, seen, seen_marks, start, asked_marks):
            return asked_marks[:, -5:, :1] + self.shift

    model, session = Ramp(), session_of()
    model.shift = 0.0
    assert session.evaluate(model) == {"mse": 0.0, "mae": 0.0}
    model.shift = -3.0
    assert session.evaluate(model) == {"mse": 9.0, "mae": 3.0}


# ---- the model -----------------------------------------------------------------------------------------


def informer(encoder="softmax", cross="softmax"):
    torch.manual_seed(0)
    return Informer(
        2,
        1,
        6,
        [build_attention(encoder, 16, 2, pattern="NS", n=n, m=n) for n in (12, 6)],
        [build_attention("softmax", 16, 2, pattern="CS", n=6, m=6)],
        [build_attention(cross, 16, 2, pattern="NC", n=6, m=6)],
        dropout=0.0,
    ).eval()


def forecast(model, seen):
    marks = torch.zeros(1, 12, 1)
    with torch.no_grad():
        return model(seen, marks, seen[:, :0], marks[:, :6])


def test_without_label_rows_cross_attention_is_the_only_way_to_the_past():
    one, other = torch.randn(1, 12, 2), torch.randn(1, 12, 2)
    assert not torch.allclose(forecast(informer(), one), forecast(informer(), other))
    blind = informer(cross="no_mixing")
    assert torch.equal(forecast(blind, one), forecast(blind, other))


def test_distilling_halves_the_length_upwards():
    assert [Distil(4)(torch.randn(2, n, 4)).shape[1] for n in (12, 13)] == [6, 7]


def test_the_value_embedding_is_a_circular_convolution_plus_positions():
    embed = ValueEmbedding(1, 0, 8, 0.0)
    values, none = torch.randn(1, 7, 1), torch.zeros(1, 7, 0)
    positions = embed(torch.zeros(1, 7, 1), none)
    weight = embed.value.weight[:, 0]
    around = torch.stack([values[0, [(i - 1) % 7, i, (i + 1) % 7], 0] for i in range(7)])
    torch.testing.assert_close((embed(values, none) - positions)[0], around @ weight.T)


def test_time_features_reach_the_forecast():
    model, seen = informer(), torch.randn(1, 12, 2)
    marks = torch.zeros(1, 12, 1)
    with torch.no_grad():
        assert not torch.allclose(
            model(seen, marks, seen[:, :0], marks[:, :6]), model(seen, marks, seen[:, :0], marks[:, :6] + 1)
        )


@pytest.mark.parametrize("mechanism", ["softmax", "linear_transformer", "no_mixing"])
@pytest.mark.parametrize(("module", "pattern"), [(lstf_probe, "NC"), (lstf, "NC"), (lstf, "NS")])
def test_the_tiny_presets_take_steps(monkeypatch, module, pattern, mechanism):
    preset = replace(module.TINY, recipe=replace(module.TINY.recipe, steps=2, warmup=1))
    monkeypatch.setattr(module, "TASK", replace(module.TASK, presets={"tiny": preset}))
    row = run_task(module.TASK.id, mechanism, pattern=pattern)
    assert (row["n"], row["m"]) == ((24, 48) if pattern == "NC" else (96, 96))
    assert 0.0 < row["metric_value"] < 20.0


# ---- CAB's settings ------------------------------------------------------------------------------------


def test_every_setting_of_cab_is_a_preset_of_the_published_size():
    presets = [lstf.TASK.presets[name] for name in lstf.TASK.presets if name.startswith("paper")]
    assert len(presets) == len({(p.seq, p.series.args) for p in presets}) == 10
    for preset in presets:
        rows = preset.seq + preset.pred + 64
        target_only = preset.series.args[2]
        channels = 1 if target_only else {"ett": 7, "ecl": 321, "wth": 12}[preset.series.args[0]]
        series = _series.Series(
            np.zeros((rows, channels), np.float32),
            np.zeros((rows, 4), np.float32),
            Split((0, rows), (0, rows), (0, rows)),
            Corpus("fake", "synthetic", "0"),
        )
        session = ForecastSession(replace(preset, series=lambda series=series: series), Pattern.NC, "cpu")
        shape = preset.shape
        with torch.device("meta"):
            model = session.model(
                lambda layer, shape=shape: build_attention(
                    "softmax", 512, 8, pattern="NC", n=shape.n, m=shape.m
                )
            )
        assert 10e6 < sum(p.numel() for p in model.parameters()) < 22e6
        seen, marks = torch.zeros(1, preset.seq, channels), torch.zeros(1, preset.seq, 4)
        asked = torch.zeros(1, preset.label + preset.pred, 4)
        out = model.to("meta")(*(t.to("meta") for t in (seen, marks, seen[:, : preset.label], asked)))
        assert out.shape == (1, preset.pred, channels)
        assert shape.m == -(-preset.seq // 2 ** (preset.layers[0] - 1))


def test_a_paper_preset_reads_its_table_and_takes_a_step(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    (tmp_path / "ett").mkdir()
    hours = np.arange(14_400)
    dates = np.datetime64("2016-07-01T00:00") + hours.astype("timedelta64[h]")
    columns = [np.sin(2 * np.pi * hours / 24 + i).round(4) for i in range(7)]
    lines = ["date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT"] + [
        ",".join([str(date).replace("T", " ") + ":00", *map(str, row)])
        for date, row in zip(dates, zip(*columns, strict=True), strict=True)
    ]
    (tmp_path / "ett" / "ETTh1.csv").write_text("\n".join(lines))
    preset = lstf.TASK.presets["paper_etth1_s"]
    workload = Workload("lstf_paper_etth1_s", batch=2, heads=2, kv_heads=2, head_dim=4)
    preset = replace(
        preset,
        shape=replace(preset.shape, workload=workload),
        recipe=replace(preset.recipe, steps=1),
        eval_batch=500,
    )
    session = ForecastSession(preset, Pattern.NC, "cpu")
    assert session.corpus.label == "real: ett ETTh1, target"
    assert session.values.shape == (14_400, 1)
    assert session.marks.shape == (14_400, 4)
    assert session.series.split == Split((0, 8640), (8640, 11_520), (11_520, 14_400))
    model = session.model(lambda layer: build_attention("softmax", 8, 2, pattern="NC", n=888, m=84))
    session.loss(model, session.batches(0)()).backward()


def test_a_missing_table_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataMissing, match="ETTh1"):
        registry.task("lstf").open("paper", Pattern.NC, "cpu")
