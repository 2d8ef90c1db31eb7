"""Forecasting with Informer: the session, the presets' type and the task that both LSTF tasks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.tasks import controls
from attnbench.tasks.base import BuildAttention, Preset, Session, Shape, Task
from attnbench.tasks.cab._informer import Informer
from attnbench.tasks.cab._series import Part, Series

Window = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""(seen, their marks, start of the decoder, marks of start and forecast, forecast), each (B, rows, …)."""


@dataclass(frozen=True)
class ForecastPreset(Preset):
    """Rows seen, given to the decoder and forecast; encoder and decoder layers; where the series comes from.

    ``shape`` is that of the cross attention of the decoder. ``label`` rows are given to the decoder: with
    none, cross attention is its only way to the past.
    """

    series: Callable[[], Series]
    seq: int
    label: int
    pred: int
    layers: tuple[int, int]
    dropout: float
    eval_batch: int

    def lengths(self) -> list[int]:
        """Lengths that the encoder layers see: each half of the one before."""
        found = [self.seq]
        for _ in range(self.layers[0] - 1):
            found.append((found[-1] + 1) // 2)
        return found


class ForecastSession(Session):
    """One preset with its series on a device: random training windows, every test window at stride 1."""

    def __init__(self, preset: ForecastPreset, pattern: Pattern, device: str) -> None:
        self.preset, self.pattern = preset, pattern
        self.series = preset.series()
        self.corpus = self.series.corpus
        self.values = torch.from_numpy(self.series.values).to(device)
        self.marks = torch.from_numpy(self.series.marks).to(device)
        self.tokens_per_step = preset.shape.workload.batch * (preset.seq + preset.label + preset.pred)

    def model(self, attention: BuildAttention) -> nn.Module:
        """An :class:`Informer` with softmax attention wherever ``pattern`` does not stand."""
        p, cross_shape = self.preset, self.preset.shape
        encoder_shapes = [replace(cross_shape, n=n, m=n) for n in p.lengths()]
        own_shape = replace(cross_shape, m=cross_shape.n)
        if self.pattern is Pattern.NS:
            encoder = [attention(i, shape) for i, shape in enumerate(encoder_shapes)]
            cross = [controls.softmax(cross_shape, Pattern.NC) for _ in range(p.layers[1])]
        else:
            encoder = [controls.softmax(shape, Pattern.NS) for shape in encoder_shapes]
            cross = [attention(i) for i in range(p.layers[1])]
        own = [controls.softmax(own_shape, Pattern.CS) for _ in range(p.layers[1])]
        channels, marks = self.values.shape[1], self.marks.shape[1]
        return Informer(channels, marks, p.pred, encoder, own, cross, dropout=p.dropout)

    def batches(self, seed: int) -> Callable[[], Window]:
        """Batches of training windows: all of them in random order, again and again."""
        rng = np.random.default_rng(seed)
        starts = self._starts("train")
        waiting = np.empty(0, np.int64)

        def draw() -> Window:
            nonlocal waiting
            while len(waiting) < self.preset.shape.workload.batch:
                waiting = np.concatenate([waiting, rng.permutation(starts)])
            chosen, waiting = np.split(waiting, [self.preset.shape.workload.batch])
            return self._windows(torch.from_numpy(chosen))

        return draw

    def loss(self, model: nn.Module, batch: Window) -> Tensor:
        """Mean squared error of the forecast, in units of the training rows' variance."""
        *given, target = batch
        return F.mse_loss(model(*given), target)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean squared and mean absolute error over all test windows, rows and channels, normalised."""
        model.eval()
        squared, absolute, count = 0.0, 0.0, 0
        for starts in torch.from_numpy(self._starts("test")).split(self.preset.eval_batch):
            *given, target = self._windows(starts)
            error = (model(*given) - target).double()
            squared, absolute = squared + error.square().sum().item(), absolute + error.abs().sum().item()
            count += error.numel()
        return {"mse": squared / count, "mae": absolute / count}

    def _starts(self, part: Part) -> NDArray[np.int64]:
        return self.series.starts(part, self.preset.seq, self.preset.pred)

    def _windows(self, starts: Tensor) -> Window:
        p = self.preset
        rows = (starts[:, None] + torch.arange(p.seq + p.pred)).to(self.values.device)
        values, marks = self.values[rows], self.marks[rows]
        given = p.seq - p.label
        return (
            values[:, : p.seq],
            marks[:, : p.seq],
            values[:, given : p.seq],
            marks[:, given:],
            values[:, p.seq :],
        )


@dataclass(frozen=True)
class Forecasting(Task):
    """Long-sequence time-series forecasting; see ``data``."""

    def workload(self, preset: str, pattern: Pattern) -> Shape:
        """NC: forecast to memory; NS: the first layer of the encoder."""
        chosen = self._chosen(preset)
        if pattern is Pattern.NS:
            return replace(chosen.shape, n=chosen.seq, m=chosen.seq)
        return chosen.shape

    def open(self, preset: str, pattern: Pattern, device: str) -> ForecastSession:
        """Load the preset's series onto ``device``. Raises DataMissing without a real one."""
        return ForecastSession(self._chosen(preset), pattern, device)

    def _chosen(self, preset: str) -> ForecastPreset:
        chosen = self.preset(preset)
        assert isinstance(chosen, ForecastPreset)
        return chosen


def cross_shape(
    task: str, preset: str, batch: int, heads: int, head_dim: int, seq: int, asked: int, encoder_layers: int
) -> Shape:
    """Shape of the decoder's cross attention: ``asked`` queries, keys as many as the last encoder layer."""
    workload = Workload(
        name=f"{task}_{preset}",
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        model="Informer of the task lstf",
        source="attnbench/tasks/cab/_forecast.py",
    )
    m = seq
    for _ in range(encoder_layers - 1):
        m = (m + 1) // 2
    return Shape(workload, asked, m)
