"""Bounds of cases on a GPU by its vendor's figures: the plan of a run, with formulas in place of workers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch

from attnbench.errors import UsageError, unknown_name
from attnbench.harness import devices
from attnbench.harness.config import RunConfig, resolve
from attnbench.harness.devices import Hardware
from attnbench.harness.estimate import tiles
from attnbench.harness.estimate.neighborhoods import TILES
from attnbench.harness.plan import plan
from attnbench.harness.work import ITEM_BYTES, Work, work_of
from attnbench.impls import registry
from attnbench.impls.base import Attention, MaskAttention
from attnbench.impls.case import Case

TILE: Final = (128, 128)
"""Queries and keys of the tile that masks are simulated with."""

MASK_MAX_N: Final = 4096
"""A mask that is only known as a matrix is looked at up to this length."""


@dataclass(frozen=True)
class Estimate:
    """The bound of one case on one GPU. A figure that cannot be had is None.

    ``bound_us`` is the longer of computing at the peak rate and moving inputs and output once: no kernel is
    faster. ``ridge`` is the arithmetic intensity, in FLOP/B, from which computing is the longer part.
    ``tile_speedup`` and ``tile_efficiency`` are those of :class:`.tiles.TileCount`.
    """

    mechanism: str
    pattern: str
    workload: str
    n: int
    m: int
    grid: tuple[int, ...]
    dtype: str
    direction: str
    scope: str
    gpu: str
    flops: int
    flops_dense: int
    moved_bytes: int
    intensity: float
    ridge: float | None
    limit: str | None
    bound_us: float | None
    dense_us: float | None
    memory_bytes: int
    fits: bool | None
    tile_speedup: float | None
    tile_efficiency: float | None

    def plain(self) -> dict[str, Any]:
        """Values for JSON."""
        return asdict(self)


def sheets(asked: str) -> list[Hardware]:
    """The GPUs that ``--gpu`` names: one, or every member of a family. UsageError for anything else."""
    wanted = asked.lower()
    found = [d for d in devices.table().values() if wanted in (d.name, d.family)]
    if not found:
        known = {d.name for d in devices.table().values()} | {d.family for d in devices.table().values()}
        raise unknown_name("device to model", asked, known)
    return found


def estimates(request: RunConfig, gpu: str) -> list[Estimate]:
    """Every case of ``request`` on every GPU that ``gpu`` names, backends aside: they share one bound.

    Raises UsageError for what a run of the same request would refuse, and for tasks.
    """
    if request.task:
        raise UsageError("estimate: observed --task, expected operations: a training has no formula")
    found: list[Estimate] = []
    for sheet in sheets(gpu):
        planned = plan(resolve(replace(request, blocks=1), sheet.name))
        cases = dict.fromkeys(replace(item.case, backend="reference") for item in planned)
        ordered = sorted(cases, key=lambda c: (c.mechanism, c.pattern, c.workload.name, c.dtype, c.direction))
        found += [estimate(case, sheet) for case in ordered]
    return found


def estimate(case: Case, sheet: Hardware) -> Estimate:
    """The bound of one case."""
    module = _module(case)
    work = work_of(case, module)
    peak, bandwidth = sheet.peak_tflops(case.dtype), sheet.bandwidth_bytes_per_s
    ridge = None if peak is None or bandwidth is None else peak * 1e12 / bandwidth
    intensity = work.flops / work.moved_bytes
    memory = _memory_bytes(case, module, work)
    counted = tile_count(case, module)
    return Estimate(
        mechanism=case.mechanism,
        pattern=case.pattern,
        workload=case.workload.name,
        n=case.n,
        m=case.m,
        grid=case.grid,
        dtype=case.dtype,
        direction=case.direction,
        scope=case.scope,
        gpu=sheet.name,
        flops=work.flops,
        flops_dense=work.flops_dense,
        moved_bytes=work.moved_bytes,
        intensity=intensity,
        ridge=ridge,
        limit=None if ridge is None else "compute" if intensity >= ridge else "memory",
        bound_us=devices.roofline_us(work.flops, work.moved_bytes, case.dtype, sheet.name),
        dense_us=devices.roofline_us(work.flops_dense, work.moved_bytes, case.dtype, sheet.name),
        memory_bytes=memory,
        fits=None if sheet.memory_gb is None else memory <= sheet.memory_gb * 1e9,
        tile_speedup=None if counted is None else counted.speedup,
        tile_efficiency=None if counted is None else counted.efficiency,
    )


def tile_count(case: Case, module: Attention) -> tiles.TileCount | None:
    """Tiles that a kernel visits for this case; None for a mechanism that skips none, or too long a mask."""
    ops = module.spec.ops_for(module.pattern)
    if "neighborhood" in ops and hasattr(module.hp, "window") and case.n == case.m:
        return _neighborhood(case, module)
    if isinstance(module, MaskAttention) and max(case.n, case.m) <= MASK_MAX_N:
        return mask_tiles(module.visible(case.n, case.m, torch.device("cpu")), *TILE)
    return None


def mask_tiles(visible: torch.Tensor, block_m: int, block_n: int) -> tiles.TileCount | None:
    """Tiles with at least one visible pair in a mask, bool (N, M); None for a mask without any pair."""
    n, m = visible.shape
    rows, columns = -(-n // block_m), -(-m // block_n)
    padded = torch.zeros(rows * block_m, columns * block_n, dtype=torch.bool)
    padded[:n, :m] = visible
    occupied = padded.view(rows, block_m, columns, block_n).any(3).any(1)
    visited = int(occupied.sum())
    if not visited:
        return None
    return tiles.TileCount(visited, rows * columns, int(visible.sum()), n * m, block_m, block_n)


def _neighborhood(case: Case, module: Attention) -> tiles.TileCount | None:
    """The windows of a mechanism on its grid; None where a window does not fit an axis."""
    lengths = case.grid or (case.n,)
    rank = len(lengths)
    if rank not in TILES:
        return None
    hyper = vars(module.hp)
    window, stride, dilation = (
        tiles.broadcast(hyper.get(name, 1), rank, int) for name in ("window", "stride", "dilation")
    )
    causal = module.pattern.causal
    try:
        axes = [
            tiles.Axis(*values, causal=causal)
            for values in zip(lengths, window, stride, dilation, strict=True)
        ]
    except UsageError:
        return None
    return tiles.neighborhood(axes, TILES[rank], TILES[rank])


def _module(case: Case) -> Attention:
    """The module without memory for its parameters: only its formulas are read."""
    kind = registry.mechanism(case.mechanism)
    with torch.device("meta"):
        return kind(
            case.workload.width,
            case.workload.heads,
            pattern=case.pattern,
            num_kv_heads=case.workload.kv_heads,
            projections=case.scope == "layer",
            **{**kind.for_length(case.n, case.m), **dict(case.hyper)},
        )


def _memory_bytes(case: Case, module: Attention, work: Work) -> int:
    """What must be there at once: inputs, output, parameters, the formula's extra, and all gradients."""
    held = work.inputs_bytes + work.output_bytes
    held += sum(p.numel() for p in module.parameters()) * ITEM_BYTES[case.dtype]
    return held * (2 if case.direction == "fwd_bwd" else 1) + work.extra_bytes
