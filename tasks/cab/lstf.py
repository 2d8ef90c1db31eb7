"""Long-sequence time-series forecasting: CAB's task with Informer, on sunspots or on the published tables.

The attention under test is that from the forecast to the encoder's memory (NC), or the encoder's own (NS).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from attnbench.impls.spec import Pattern
from attnbench.tasks.base import LearningCheck
from attnbench.tasks.cab._forecast import Forecasting, ForecastPreset, cross_shape
from attnbench.tasks.cab._series import sunspots, table
from attnbench.tasks.trainer import Recipe

EPOCHS, BATCH = 6, 32


@dataclass(frozen=True)
class Published:
    """One of CAB's ten settings: table, channels, rows seen, given and forecast, layers, training rows."""

    data_set: str
    table: str
    target_only: bool
    seq: int
    label: int
    pred: int
    layers: tuple[int, int]
    train_rows: int

    @property
    def name(self) -> str:
        """Name of the preset, ``paper_etth1_m``: s forecasts the target alone, m all channels."""
        return f"paper_{self.table.lower()}_{'s' if self.target_only else 'm'}"

    def preset(self, name: str = "") -> ForecastPreset:
        """The preset, called ``name`` or else by its own name."""
        windows = self.train_rows - self.seq - self.pred + 1
        return ForecastPreset(
            shape=cross_shape(
                "lstf", name or self.name, BATCH, 8, 64, self.seq, self.label + self.pred, self.layers[0]
            ),
            recipe=Recipe(
                steps=EPOCHS * math.ceil(windows / BATCH),
                lr=1e-4,
                warmup=0,
                schedule="linear",
                betas=(0.9, 0.999),
                weight_decay=0.0,
                clip=math.inf,
            ),
            checks={},
            series=partial(table, self.data_set, self.table, self.target_only),
            seq=self.seq,
            label=self.label,
            pred=self.pred,
            layers=self.layers,
            dropout=0.05,
            eval_batch=BATCH,
        )


PUBLISHED = (
    Published("ett", "ETTh1", False, 336, 336, 720, (2, 1), 8640),
    Published("ett", "ETTh1", True, 168, 168, 720, (2, 1), 8640),
    Published("ett", "ETTh2", False, 720, 336, 720, (2, 1), 8640),
    Published("ett", "ETTh2", True, 336, 336, 720, (2, 1), 8640),
    Published("ett", "ETTm1", False, 672, 384, 672, (2, 1), 34_560),
    Published("ett", "ETTm1", True, 384, 384, 672, (2, 1), 34_560),
    Published("ecl", "ECL", False, 336, 336, 960, (3, 2), 18_412),
    Published("ecl", "ECL", True, 336, 336, 960, (3, 2), 18_412),
    Published("wth", "WTH", False, 720, 336, 720, (3, 2), 24_544),
    Published("wth", "WTH", True, 720, 336, 720, (3, 2), 24_544),
)
"""CAB's settings. Deviations: every attention that is not under test is softmax, where Informer has
ProbSparse self attention (its encoder is the mechanism ``probsparse`` under NS); the learning rate falls
linearly to 0, there it is halved every epoch; the last epoch, not the best of six; no test window is dropped.
"""

TINY = ForecastPreset(
    shape=cross_shape("lstf", "tiny", 32, 4, 16, seq=96, asked=24, encoder_layers=2),
    recipe=Recipe(steps=200, lr=2e-3, warmup=20),
    checks={Pattern.NC: LearningCheck(softmax=0.9, no_mixing=2.0)},
    series=sunspots,
    seq=96,
    label=0,
    pred=24,
    layers=(2, 1),
    dropout=0.05,
    eval_batch=128,
)
"""For one core: 6,400 windows are seen, about 10 s.

Measured on one thread with seed 0, NC (mean squared error): softmax 0.56, uniform 0.64, no_mixing 2.39;
predicting the training mean gives 2.40, the last value 1.20. The forecast needs the past but hardly any
addressing in it: see the task lstf_probe."""

SMALL = ForecastPreset(
    shape=cross_shape("lstf", "small", 32, 8, 32, seq=336, asked=168, encoder_layers=2),
    recipe=Recipe(steps=2000, lr=5e-4, warmup=200, dtype="bfloat16", max_seconds=420.0),
    checks={},
    series=sunspots,
    seq=336,
    label=0,
    pred=168,
    layers=(2, 1),
    dropout=0.05,
    eval_batch=256,
)
"""For one GPU: a cycle and a half of sunspots forecast from two and a half cycles; no learning check."""

TASK = Forecasting(
    id="lstf",
    title="Long-sequence time-series forecasting",
    patterns=(Pattern.NC, Pattern.NS),
    metric="mse",
    better="lower",
    presets={
        "tiny": TINY,
        "small": SMALL,
        "paper": PUBLISHED[0].preset("paper"),
        **{setting.name: setting.preset() for setting in PUBLISHED[1:]},
    },
    data="Monthly sunspots from 1749 (tiny, small); ETTh1 with all channels (paper), and as presets of their "
    "own the other settings of CAB on ETT, ECL and Weather",
    source="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (arXiv 2210.07661); "
    "Informer (arXiv 2012.07436)",
)
