"""Forecasting that needs cross attention: the decoder of Informer is given nothing but positions.

In the wiring of the published task the decoder also reads the last rows, and its own self attention can
carry the forecast; here the memory of the encoder is the only way to the past.
"""

from __future__ import annotations

from functools import partial

from attnbench.impls.spec import Pattern
from attnbench.tasks.base import LearningCheck
from attnbench.tasks.cab._forecast import Forecasting, ForecastPreset, cross_shape
from attnbench.tasks.cab._series import sines
from attnbench.tasks.trainer import Recipe

TINY = ForecastPreset(
    shape=cross_shape("lstf_probe", "tiny", 32, 4, 16, seq=96, asked=24, encoder_layers=2),
    recipe=Recipe(steps=200, lr=2e-3, warmup=20),
    checks={Pattern.NC: LearningCheck(softmax=0.3, no_mixing=0.9)},
    series=partial(sines, 4000, 7),
    seq=96,
    label=0,
    pred=24,
    layers=(2, 1),
    dropout=0.05,
    eval_batch=128,
)
"""For one core: 6,400 windows are seen, about 10 s.

Measured on one thread with seed 0 (mean squared error; the noise alone is 0.074): softmax 0.088, uniform
0.53, no_mixing 0.986; predicting the training mean gives 0.985."""

SMALL = ForecastPreset(
    shape=cross_shape("lstf_probe", "small", 32, 8, 32, seq=336, asked=336, encoder_layers=2),
    recipe=Recipe(steps=3000, lr=5e-4, warmup=300, dtype="bfloat16", max_seconds=420.0),
    checks={},
    series=partial(sines, 20_000, 7),
    seq=336,
    label=0,
    pred=336,
    layers=(2, 1),
    dropout=0.05,
    eval_batch=256,
)
"""For one GPU: five passes over the training windows, no learning check."""

TASK = Forecasting(
    id="lstf_probe",
    title="Forecasting, cross attention as the only path",
    patterns=(Pattern.NC,),
    metric="mse",
    better="lower",
    presets={"tiny": TINY, "small": SMALL},
    data="Seven channels of daily and weekly sines with noise, generated",
    source="Wiring of CAB's LSTF (arXiv 2210.07661) with the decoder's own view of the past removed",
)
