"""Capacity of an attention as a memory, without training: how many pairs can be stored and read back.

After "Understanding Transformer from the Perspective of Associative Memory" (arXiv 2508.08289). The function
of the mechanism is called on q, k, v as it stands: neither projections nor steps of an optimiser take part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attnbench.impls.base import Attention
from attnbench.impls.case import Workload, fold
from attnbench.impls.spec import Pattern
from attnbench.kernels import Unsupported
from attnbench.tasks.base import BuildAttention, Corpus, LearningCheck, Preset, Session, Shape, Task
from attnbench.tasks.data.pool import fingerprint, generator
from attnbench.tasks.trainer import Recipe

VERSION = 1
"""Part of every seed: raised when the generator changes what it draws."""

Floats = NDArray[np.float64]

LEVELS = (0.9, 0.99)
"""Shares of bits that must be read back right: P90 and P99."""


@dataclass(frozen=True)
class Memory:
    """``pairs`` keys, uniform on a sphere in R^``width``, with values of ±1 in R^``width``.

    Keys have the norm √width, as normalised activations have. Queries are the keys in another order, so that
    a window does not help, turned away to the cosine ``cosine`` to their key.
    """

    pairs: int
    width: int
    cosine: float = 1.0

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and what each query should read, each (count, 1, pairs, width), fp32."""
        size = (count, 1, self.pairs, self.width)
        keys = _on_sphere(rng.standard_normal(size))
        values = np.where(rng.random(size) < 0.5, -1.0, 1.0)
        order = rng.permuted(np.tile(np.arange(self.pairs), (count, 1)), axis=1)[:, None, :, None]
        asked, wanted = (np.take_along_axis(x, order, 2) for x in (keys, values))
        aside = rng.standard_normal(size)
        unit = asked / math.sqrt(self.width)
        aside = _on_sphere(aside - (aside * unit).sum(-1, keepdims=True) * unit)
        queries = self.cosine * asked + math.sqrt(1.0 - self.cosine**2) * aside
        q, k, v, o = (torch.from_numpy(x.astype(np.float32)) for x in (queries, keys, values, wanted))
        return q, k, v, o


def _on_sphere(x: Floats) -> Floats:
    return x * math.sqrt(x.shape[-1]) / np.linalg.norm(x, axis=-1, keepdims=True)


@dataclass(frozen=True)
class CapacityPreset(Preset):
    """The widths of a head and the numbers of pairs to try, and how many pairs a point averages over."""

    widths: tuple[int, ...]
    most: int
    sampled: int
    cosines: tuple[float, ...]

    @property
    def loads(self) -> tuple[int, ...]:
        """Powers of two from 2 to ``most``."""
        return tuple(2**e for e in range(1, int(math.log2(self.most)) + 1))

    def seen(self, memory: Memory) -> Shape:
        """The shape of one probe: a head of its width; under CS the queries come after the pairs."""
        tokens = memory.pairs * self.shape.n // self.most
        workload = replace(self.shape.workload, head_dim=memory.width)
        return Shape(workload, tokens, tokens)


class Probe(nn.Module):
    """The attention under test, one module for every width and number of pairs; parameters are as built."""

    def __init__(self, points: dict[Memory, Attention]) -> None:
        super().__init__()
        self.points = points
        self.attentions = nn.ModuleList(points.values())

    def forward(self, memory: Memory, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the queries (B, 1, P, D) read from pairs (B, 1, P, D): (B, 1, P, D).

        Under CS the pairs are the first half of one sequence and the queries the second, where keys and
        values are 0, which writes nothing to a memory that adds up.
        """
        attention = self.points[replace(memory, cosine=1.0)]
        if attention.pattern is Pattern.CS:
            nothing = torch.zeros_like(k)
            q, k, v = (torch.cat(halves, 2) for halves in ((k, q), (k, nothing), (v, nothing)))
        grid = fold(q.shape[2], 1, attention.spec.grid_ranks) or None
        o: Tensor = attention.attend(q, k, v, grid=grid)
        return o[:, :, -memory.pairs :]


class CapacitySession(Session):
    """Draws memories, has them read, and counts the bits that come back right."""

    def __init__(self, preset: CapacityPreset, device: str) -> None:
        self.preset, self.device = preset, device
        self.corpus = Corpus(
            f"associative_capacity, widths {preset.widths}, up to {preset.most} pairs",
            "synthetic",
            fingerprint(f"{VERSION}/{preset.widths}/{preset.most}/{preset.sampled}/{preset.cosines}"),
        )
        self.tokens_per_step = preset.sampled

    def model(self, attention: BuildAttention) -> nn.Module:
        """A :class:`Probe`. Raises Unsupported for a mechanism that is no function of q, k, v alone."""
        points: dict[Memory, Attention] = {}
        for width in self.preset.widths:
            for pairs in self.preset.loads:
                memory = Memory(pairs, width)
                points[memory] = attention(len(points), self.preset.seen(memory))
                _require_function(points[memory])
        return Probe(points)

    def batches(self, seed: int) -> Callable[[], tuple[Tensor, ...]]:
        """Memories of the largest load and width, for :meth:`loss`; the recipes of the task take no step."""
        rng = np.random.default_rng(seed)
        memory = Memory(self.preset.most, self.preset.widths[-1])
        return lambda: tuple(x.to(self.device) for x in memory.sample(rng, 1))

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean squared error of what is read, at the largest load and width."""
        q, k, v, wanted = batch
        memory = Memory(self.preset.most, self.preset.widths[-1])
        return (model(memory, q, k, v) - wanted).square().mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """P90 and P99, the largest power of two of pairs up to which that share of bits is read back right.

        By width as ``p90@d=32``, 0 when even two pairs are too many, at most the largest load that is tried;
        at another cosine of query and key as ``p90@d=32,cosine=0.9``. ``bits@d=32,pairs=64`` is the share of
        right signs, ``items@…`` of queries whose stored value is the nearest of all. ``p90`` is that of the
        largest width; ``slope`` the slope of log P90 over log d, nan unless all are above 0.
        """
        widths = self.preset.widths
        found: dict[str, float] = {}
        for cosine in self.preset.cosines:
            suffix = "" if cosine == 1.0 else f",cosine={cosine:g}"
            for width in widths:
                shares = {}
                for pairs in self.preset.loads:
                    shares[pairs], items = self._read(model, Memory(pairs, width, cosine))
                    if cosine == 1.0:
                        found[f"bits@d={width},pairs={pairs}"] = shares[pairs]
                        found[f"items@d={width},pairs={pairs}"] = items
                for level in LEVELS:
                    found[f"p{100 * level:g}@d={width}{suffix}"] = float(capacity(shares, level))
        capacities = [found[f"p90@d={width}"] for width in widths]
        headline = {"p90": capacities[-1], "p99": found[f"p99@d={widths[-1]}"]}
        return {**found, **headline, "slope": slope(widths, capacities)}

    def _read(self, model: nn.Module, memory: Memory) -> tuple[float, float]:
        """Shares of right bits and of right items."""
        count = max(1, self.preset.sampled // memory.pairs)
        rng = generator(memory, "test", VERSION)
        q, k, v, wanted = (x.to(self.device) for x in memory.sample(rng, count))
        o = model(memory, q, k, v).float()
        bits = (o.sign() == wanted).float().mean().item()
        likeness = o @ v.mT
        found = torch.take_along_dim(v, likeness.argmax(-1)[..., None], 2)
        return bits, (found == wanted).all(-1).float().mean().item()


def capacity(shares: dict[int, float], level: float) -> int:
    """The largest load up to which every share is at least ``level``; 0 when the first is not."""
    held = 0
    for load in sorted(shares):
        if shares[load] < level:
            break
        held = load
    return held


def slope(widths: tuple[int, ...], capacities: list[float]) -> float:
    """Least-squares slope of log capacity over log width; nan unless all capacities are above 0."""
    if min(capacities) <= 0.0:
        return math.nan
    return float(np.polyfit(np.log(widths), np.log(capacities), 1)[0])


def _require_function(attention: Attention) -> None:
    spec = attention.spec
    if not spec.on_tensors:
        raise Unsupported(
            f"associative_capacity calls attend(q, k, v) of {spec.id}",
            f"a {spec.kind}, a layer without such a function",
            "a core, mask or map mechanism",
        )
    needed = [declared.name for declared in spec.served_inputs("op")]
    if needed:
        raise Unsupported(
            f"associative_capacity calls attend(q, k, v) of {spec.id}",
            f"a function of {', '.join(needed)} besides",
            "a mechanism that needs q, k and v only",
        )


@dataclass(frozen=True)
class AssociativeCapacity(Task):
    """The task; see the module's docstring and ``data``."""

    def workload(self, preset: str, pattern: Pattern) -> Shape:
        """One head of the largest width at the largest load; under CS the queries come after the pairs."""
        shape = self.preset(preset).shape
        tokens = 2 * shape.n if pattern is Pattern.CS else shape.n
        return replace(shape, n=tokens, m=tokens)

    def open(self, preset: str, pattern: Pattern, device: str) -> CapacitySession:
        """A session on ``device``. Raises UsageError for an unknown preset."""
        chosen = self.preset(preset)
        assert isinstance(chosen, CapacityPreset)
        return CapacitySession(replace(chosen, shape=self.workload(preset, pattern)), device)


def _preset(name: str, widths: tuple[int, ...], most: int, sampled: int) -> CapacityPreset:
    workload = Workload(
        name=f"associative_capacity_{name}",
        batch=1,
        heads=1,
        kv_heads=1,
        head_dim=widths[-1],
        model="one head as a memory",
        source="attnbench/tasks/synthetic/associative_capacity.py",
    )
    return CapacityPreset(
        shape=Shape(workload, most, most),
        recipe=Recipe(steps=0, lr=0.0, warmup=0),
        checks={},
        widths=widths,
        most=most,
        sampled=sampled,
        cosines=(1.0, 0.9),
    )


TINY = replace(
    _preset("tiny", widths=(16, 32, 64), most=1024, sampled=4096),
    checks={
        Pattern.NS: LearningCheck(softmax=200.0, no_mixing=2.0),
        Pattern.CS: LearningCheck(softmax=200.0, no_mixing=2.0),
    },
)
"""Nothing is random but the draw, which is fixed: softmax scores 1024, the most that is tried, under NS and
CS; linear_transformer 2, whose positive features share a large mean; uniform and no_mixing 0."""
SMALL = _preset("small", widths=(16, 32, 64, 128), most=8192, sampled=16_384)

TASK = AssociativeCapacity(
    id="associative_capacity",
    title="Associative capacity",
    patterns=(Pattern.NS, Pattern.CS),
    metric="p90",
    better="higher",
    presets={"tiny": TINY, "small": SMALL},
    data="Random keys and values, read back by the untrained function of the mechanism",
    source="Understanding Transformer from the Perspective of Associative Memory (arXiv 2508.08289)",
)
