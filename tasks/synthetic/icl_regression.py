"""In-context linear regression (noncausal self attention): learn a linear map from the pairs of a prompt.

After "In-Context Linear Regression Demystified" (arXiv 2503.12734). Scores stand beside those of exact
references: the zero predictor, one optimal gradient step, its debiased form, which two softmax heads of
opposite sign compute, and ridge regression, which no predictor beats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.kernels import Unsupported
from attnbench.tasks.base import BuildAttention, Corpus, LearningCheck, Preset, Session, Shape, Task
from attnbench.tasks.blocks import Block
from attnbench.tasks.data.pool import Part, epochs, fingerprint, generator
from attnbench.tasks.trainer import Recipe

VERSION = 1
"""Part of every seed: raised when the generator changes what it draws."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Regression:
    """Prompts of ``pairs`` (x, y) with y = β·x + noise, x and β ~ N(0, I), and a last x without its y."""

    pairs: int
    dim: int
    noise: float

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Floats, Floats]:
        """(tokens, targets): (count, pairs + 1, dim + 1) with the last y 0, and that y (count,)."""
        x = rng.standard_normal((count, self.pairs + 1, self.dim), np.float32)
        beta = rng.standard_normal((count, self.dim), np.float32)
        y = np.einsum("snd,sd->sn", x, beta)
        y += self.noise * rng.standard_normal(y.shape, np.float32)
        tokens = np.concatenate([x, y[..., None]], 2)
        tokens[:, -1, -1] = 0.0
        return tokens, y[:, -1]


@lru_cache(maxsize=8)
def _drawn(problem: Regression, part: Part, count: int) -> tuple[Tensor, Tensor]:
    tokens, targets = problem.sample(generator(problem, part, VERSION), count)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def references(problem: Regression, tokens: Tensor) -> dict[str, Tensor]:
    """Predictions of the last y (S,) by what needs no training, from tokens (S, N + 1, d + 1).

    ``zero``; ``one_step``: (η/N) Σ y_i x_i·x_q, a gradient step from 0 with the best step size
    η = N/(N + d + 1 + σ²); ``debiased``: the same with x_i less their mean; ``ridge`` with λ = σ², the mean
    of the posterior of β under its true prior, in fp64.
    """
    x, y, query = tokens[:, :-1, :-1].double(), tokens[:, :-1, -1].double(), tokens[:, -1, :-1].double()
    n, d, variance = problem.pairs, problem.dim, problem.noise**2
    step = 1.0 / (n + d + 1 + variance)

    def towards(x: Tensor) -> Tensor:
        return step * torch.einsum("sn,snd,sd->s", y, x, query)

    gram = x.mT @ x + variance * torch.eye(d, dtype=x.dtype, device=x.device)
    beta = torch.linalg.solve(gram, (x.mT @ y[..., None]))[..., 0]
    return {
        "zero": torch.zeros_like(query[:, 0]),
        "one_step": towards(x),
        "debiased": towards(x - x.mean(1, keepdim=True)),
        "ridge": (beta * query).sum(-1),
    }


@dataclass(frozen=True)
class RegressionPreset(Preset):
    """A problem, the prompt lengths to score at, and the model: ``layers`` blocks, or ``bare`` attention.

    Bare is the model of the paper: attention alone, without networks, norms or residuals between.
    """

    problem: Regression
    lengths: tuple[int, ...]
    pool: int
    tests: int
    layers: int
    ratio: int
    eval_batch: int
    bare: bool = False


class RegressionModel(nn.Module):
    """From the tokens of a prompt to the y of its last one; the order of the tokens is not told."""

    def __init__(self, dim: int, attentions: list[Attention], ratio: int, bare: bool) -> None:
        super().__init__()
        width = attentions[0].embed_dim
        self.embed = nn.Linear(dim + 1, width)
        self.blocks = nn.ModuleList(attentions if bare else [Block(width, a, ratio) for a in attentions])
        self.norm = nn.Identity() if bare else nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predictions (B,) from tokens (B, N + 1, d + 1)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -1]))[:, 0]


class RegressionSession(Session):
    """Prompts of a preset on a device, and more of them at every tested length."""

    def __init__(self, preset: RegressionPreset, device: str) -> None:
        self.preset = preset
        train = _drawn(preset.problem, "train", preset.pool)
        problems = [replace(preset.problem, pairs=pairs) for pairs in preset.lengths]
        tests = [_drawn(problem, "test", preset.tests) for problem in problems]
        self.train = tuple(x.to(device) for x in train)
        self.tests = [
            (problem, tokens.to(device), targets.to(device))
            for problem, (tokens, targets) in zip(problems, tests, strict=True)
        ]
        self.corpus = Corpus(
            f"icl_regression, {preset.problem!r}",
            "synthetic",
            fingerprint(f"{VERSION}/{preset.problem!r}", *train, *(x for test in tests for x in test)),
        )
        self.tokens_per_step = preset.shape.workload.batch * preset.shape.n

    def model(self, attention: BuildAttention) -> nn.Module:
        """A :class:`RegressionModel` around ``layers`` attention modules."""
        p = self.preset
        attentions = [attention(layer) for layer in range(p.layers)]
        return RegressionModel(p.problem.dim, attentions, p.ratio, p.bare)

    def batches(self, seed: int) -> Callable[[], tuple[Tensor, ...]]:
        """Batches (tokens, targets) out of the pool, each epoch in another order."""
        return epochs(self.train, self.preset.shape.workload.batch, seed)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean squared error of the last y."""
        tokens, targets = batch
        return (model(tokens) - targets).square().mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean squared error at every length, of the model and of the references.

        ``mse`` at the trained length; ``mse@n=80`` and ``mse_ridge@n=80`` with N pairs in the prompt. A
        length that the mechanism refuses (a table of a fixed length) is nan.
        """
        model.eval()
        found: dict[str, float] = {}
        for problem, tokens, targets in self.tests:
            trained = problem == self.preset.problem
            error = self._error(model, tokens, targets, strict=trained)
            found[f"mse@n={problem.pairs}"] = error
            if trained:
                found["mse"] = error
            for name, predicted in references(problem, tokens).items():
                found[f"mse_{name}@n={problem.pairs}"] = (predicted - targets).square().mean().item()
        return found

    def _error(self, model: nn.Module, tokens: Tensor, targets: Tensor, strict: bool) -> float:
        try:
            predicted = torch.cat([model(part).float() for part in tokens.split(self.preset.eval_batch)])
        except (UsageError, Unsupported):
            if strict:
                raise
            return float("nan")
        return (predicted - targets).square().mean().item()


@dataclass(frozen=True)
class InContextRegression(Task):
    """The task; see the module's docstring and ``data``."""

    def open(self, preset: str, pattern: Pattern, device: str) -> RegressionSession:
        """Draw the prompts of ``preset``. Raises UsageError for an unknown preset."""
        chosen = self.preset(preset)
        assert isinstance(chosen, RegressionPreset)
        return RegressionSession(chosen, device)


def _shape(preset: str, batch: int, heads: int, head_dim: int, pairs: int) -> Shape:
    workload = Workload(
        name=f"icl_regression_{preset}",
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        model="regression model of the task icl_regression",
        source="attnbench/tasks/synthetic/icl_regression.py",
    )
    return Shape(workload, pairs + 1, pairs + 1)


TINY = RegressionPreset(
    shape=_shape("tiny", batch=64, heads=4, head_dim=16, pairs=40),
    recipe=Recipe(steps=600, lr=4e-3, warmup=60),
    checks={Pattern.NS: LearningCheck(softmax=0.66, no_mixing=4.0)},
    problem=Regression(pairs=40, dim=5, noise=0.1),
    lengths=(10, 20, 40, 80, 160),
    pool=25_600,
    tests=512,
    layers=1,
    ratio=2,
    eval_batch=128,
)
"""Measured on one thread with seed 0 (mean squared error): softmax 0.49, where one gradient step has 0.67,
ridge 0.01 and the zero predictor, all that is left without mixing, about 5."""

SMALL = RegressionPreset(
    shape=_shape("small", batch=256, heads=4, head_dim=32, pairs=40),
    recipe=Recipe(steps=20_000, lr=1e-3, warmup=1_000, dtype="bfloat16", max_seconds=420.0),
    checks={},
    problem=Regression(pairs=40, dim=20, noise=0.1),
    lengths=(10, 20, 40, 80, 160),
    pool=1_000_000,
    tests=4096,
    layers=2,
    ratio=4,
    eval_batch=1024,
)
"""Two blocks on 20 dimensions, where 40 pairs leave much to be had from good estimation."""

PAPER = RegressionPreset(
    shape=_shape("paper", batch=256, heads=2, head_dim=6, pairs=40),
    recipe=Recipe(steps=100_000, lr=1e-3, warmup=1_000, weight_decay=0.0),
    checks={},
    problem=Regression(pairs=40, dim=5, noise=0.1),
    lengths=(10, 20, 40, 80, 160),
    pool=2_000_000,
    tests=8192,
    layers=1,
    ratio=0,
    eval_batch=1024,
    bare=True,
)
"""One layer of attention with two heads and nothing else, as wide as a token. The paper's number of steps and
noise are not known to us; a pool of two million prompts stands for fresh ones."""

TASK = InContextRegression(
    id="icl_regression",
    title="In-context linear regression",
    patterns=(Pattern.NS,),
    metric="mse",
    better="lower",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Generated pairs of a random linear map with noise, five dimensions (tiny, paper) or twenty (small)",
    source="In-Context Linear Regression Demystified (arXiv 2503.12734)",
)
