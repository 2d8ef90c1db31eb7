"""Point-cloud completion (noncausal cross attention; CAB also tries noncausal self): the surface of a scan.

CAB's task with its wiring: a global feature and coarse centres bypass the attention, so a model without it
scores about as well. ``pcc_probe`` closes the bypass; both are run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attnbench.impls.base import Attention
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.tasks import controls
from attnbench.tasks.base import BuildAttention, Preset, Session, Shape, Task
from attnbench.tasks.cab import _clouds, _scans
from attnbench.tasks.cab._pointr import Dimensions, PoinTr, Probe
from attnbench.tasks.data.extras import require
from attnbench.tasks.data.shapes import Shapes
from attnbench.tasks.trainer import Recipe


@dataclass(frozen=True)
class PCCPreset(Preset):
    """Sizes of the model and the data; ``shape`` is cross attention: N queries, M proxies.

    ``wiring`` is the published model or the one whose queries are learned.
    """

    dims: Dimensions
    clouds: _scans.Clouds
    encoder_layers: int
    decoder_layers: int
    wiring: type[PoinTr] | type[Probe] = PoinTr


def self_shapes(preset: PCCPreset) -> tuple[Shape, Shape]:
    """What self attention sees in the encoder and in the decoder."""
    shape = preset.shape
    return replace(shape, n=shape.m), replace(shape, m=shape.n)


def network(preset: PCCPreset, pattern: Pattern, attention: BuildAttention) -> nn.Module:
    """The model of a preset, with the layers of ``pattern`` under test and all others softmax attention.

    Layers are numbered through: encoder, self attention of the decoder, cross attention of the decoder.
    """
    depth, layers = preset.encoder_layers, preset.decoder_layers
    in_encoder, in_decoder = self_shapes(preset)

    def stack(first: int, count: int, kind: Pattern, shape: Shape) -> list[Attention]:
        if kind is pattern:
            return [attention(first + layer, shape) for layer in range(count)]
        return [controls.softmax(shape, kind) for _ in range(count)]

    return preset.wiring(
        preset.dims,
        stack(0, depth, Pattern.NS, in_encoder),
        stack(depth, layers, Pattern.NS, in_decoder),
        stack(depth + layers, layers, Pattern.NC, preset.shape),
    )


class PCCSession(Session):
    """One preset with its clouds; the attention of ``pattern`` is under test."""

    def __init__(self, preset: PCCPreset, pattern: Pattern, device: str) -> None:
        require("scipy.spatial", "SciPy", "point-cloud completion")
        self.preset, self.pattern = preset, pattern
        self.scans = _scans.load(preset.clouds, device)
        self.corpus = self.scans.corpus
        self.tokens_per_step = preset.shape.workload.batch * preset.shape.n

    def model(self, attention: BuildAttention) -> nn.Module:
        """Scan (B, P, 3) to a coarse and a dense cloud, see :func:`network`."""
        return network(self.preset, self.pattern, attention)

    def batches(self, seed: int) -> Callable[[], _scans.Pair]:
        """Scans (B, P, 3) with their surfaces (B, Q, 3)."""
        return self.scans.batches(self.preset.shape.workload.batch, seed)

    def loss(self, model: nn.Module, batch: _scans.Pair) -> Tensor:
        """Chamfer distance (l1) of the coarse and of the dense cloud, added."""
        scan, whole = batch
        coarse, dense = model(scan)
        return _clouds.chamfer_loss(coarse, whole) + _clouds.chamfer_loss(dense, whole)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """CD-l1, CD-l2 (times 1000) and F-scores: means within each category, then over the categories."""
        scored = []
        for scan, whole, category in self.scans.test():
            dense = model(scan)[1][0].float().cpu().numpy()
            scored.append((category, _clouds.scores(dense, whole.numpy())))
        return _clouds.by_category(scored)


@dataclass(frozen=True)
class PointCloudCompletion(Task):
    """The task; see the module's docstring and ``data``."""

    def workload(self, preset: str, pattern: Pattern) -> Shape:
        """Queries against proxies under NC, the encoder's self attention under NS."""
        chosen = self.preset(preset)
        assert isinstance(chosen, PCCPreset)
        return chosen.shape if pattern is Pattern.NC else self_shapes(chosen)[0]

    def open(self, preset: str, pattern: Pattern, device: str) -> PCCSession:
        """Load the preset's clouds. Raises UsageError without SciPy, DataMissing where PCN is not here."""
        chosen = self.preset(preset)
        assert isinstance(chosen, PCCPreset)
        return PCCSession(chosen, pattern, device)


def shape_of(name: str, batch: int, heads: int, head_dim: int, queries: int, proxies: int) -> Shape:
    """Cross attention of ``queries`` to ``proxies`` in the preset called ``name``."""
    workload = Workload(
        name=name,
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        model="PoinTr",
        source="attnbench/tasks/cab/pcc.py",
        m_fixed=proxies,
    )
    return Shape(workload, queries, proxies)


TINY = PCCPreset(
    shape=shape_of("pcc_tiny", batch=8, heads=4, head_dim=16, queries=32, proxies=32),
    recipe=Recipe(steps=300, lr=2e-3, warmup=30),
    checks={},
    dims=Dimensions(width=64, queries=32, stages=((32, 64),), fold=3, global_width=128),
    clouds=_scans.Clouds(256, Shapes(train=1500, test=128, points=512)),
    encoder_layers=2,
    decoder_layers=2,
)
"""For one core: 2,400 clouds are seen. No learning check: the global feature carries the shape, so nothing
that is learned without cross attention is missed."""

PAPER = PCCPreset(
    shape=shape_of("pcc_paper", batch=48, heads=6, head_dim=64, queries=3584, proxies=1536),
    recipe=Recipe(
        steps=28_974 // 48 * 300,
        lr=5e-4,
        warmup=0,
        final=0.9 ** (300 / 21),
        schedule="linear",
        betas=(0.9, 0.999),
        weight_decay=5e-4,
        clip=10.0,
    ),
    checks={},
    dims=Dimensions(
        width=384,
        queries=3584,
        stages=((2048, 32), (1536, 64), (1536, 64), (1536, 128)),
        fold=2,
        global_width=1024,
    ),
    clouds=_scans.Clouds(2048, None),
    encoder_layers=6,
    decoder_layers=8,
)
"""CAB's lengths, read as 1,536 proxies and 3,584 queries of 2 × 2 points: with the 2,048 points of the scan
they make the 16,384 of PCN. Known differences from PoinTr's code: layer norm instead of batch norm and its
momentum schedule; the learning rate falls on a line to where its steps of 0.9 every 21 epochs end."""

PAPER_STOCK = replace(
    PAPER,
    shape=shape_of("pcc_paper_stock", batch=48, heads=6, head_dim=64, queries=224, proxies=128),
    dims=replace(PAPER.dims, queries=224, stages=((2048, 32), (512, 64), (512, 64), (128, 128)), fold=8),
)
"""PoinTr's own sizes: 128 proxies, 224 queries of 8 × 8 points."""

SMALL = PCCPreset(
    shape=shape_of("pcc_small", batch=32, heads=4, head_dim=64, queries=512, proxies=512),
    recipe=Recipe(steps=4000, lr=5e-4, warmup=200, dtype="bfloat16", max_seconds=420.0),
    checks={},
    dims=Dimensions(
        width=256, queries=512, stages=((1024, 32), (512, 64), (512, 128)), fold=4, global_width=512
    ),
    clouds=_scans.Clouds(2048, Shapes(train=8_000, test=256, points=8192)),
    encoder_layers=4,
    decoder_layers=4,
)
"""For one GPU. The steps are an estimate from FLOPs, hence the time limit and no learning check."""

TASK = PointCloudCompletion(
    id="pcc",
    title="Point-cloud completion",
    patterns=(Pattern.NC, Pattern.NS),
    metric="cd_l1",
    better="lower",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER, "paper_stock": PAPER_STOCK},
    data="tiny, small: surfaces of eight families of analytic shapes, given the points that are farthest "
    "from a random viewpoint; paper: the PCN set",
    source="CAB (arXiv 2210.07661) with PoinTr (arXiv 2108.08839)",
)
