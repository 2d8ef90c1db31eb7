"""Which calls are raced: operation, option, shape, direction, peers; the most telling ones first. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from attnbench.impls.case import Case, Direction, Workload

FAMILY: Final = {
    "flash": "dense",
    "linrec": "linear",
    "block_sparse": "sparse",
    "neighborhood": "vision",
    "window": "vision",
    "selective_scan": "linear",
    "kv_reduce": "linear",
    "few_query": "cross",
    "gather": "sparse",
    "token_blocks": "sparse",
    "buckets": "sparse",
    "block_mass": "sparse",
    "query_softmax": "cross",
    "flash_int8": "sparse",
    "tensor3": "dense",
}
"""Operations that are raced, and the family that their rows are filed under."""


@dataclass(frozen=True)
class Scale:
    """How large everything is. ``tokens`` = B·N where N leaves room for a batch; ``width`` = H·D."""

    lengths: tuple[int, ...]
    linear_lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    tokens: int
    width: int
    dtype: str
    grids: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]
    windows: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    block: int
    sparse_length: int
    ours: str = "triton"


FULL: Final = Scale(
    lengths=(16384, 4096, 65536, 1024, 8192, 2048, 32768),
    linear_lengths=(16384, 4096, 65536, 1024, 262144),
    head_dims=(64, 128),
    tokens=16384,
    width=2048,
    dtype="bfloat16",
    # grid, window, stride
    grids=(
        ((128, 128), (32, 32), (1, 1)),
        ((128, 128), (32, 32), (16, 16)),
        ((16, 32, 32), (8, 16, 16), (1, 1, 1)),
        ((16384,), (1024,), (1,)),
    ),
    windows=(((128, 128), (8, 8)), ((128, 128), (16, 16)), ((112, 112), (7, 7))),
    block=128,
    sparse_length=16384,
)

DRY: Final = Scale(
    lengths=(64, 32),
    linear_lengths=(64,),
    head_dims=(16,),
    tokens=64,
    width=32,
    dtype="float32",
    grids=(((8, 8), (3, 3), (1, 1)),),
    windows=(((8, 8), (4, 4)),),
    block=16,
    sparse_length=160,
    ours="torch",
)
"""Tiny shapes on a CPU, where the backend ``torch`` stands for our kernels."""

GATES: Final = ("none", "head", "scalar", "vector", "delta", "gated_delta")
DENSITIES: Final = (1.0, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Setting:
    """One race: equal inputs, one call each of ``ours`` and the peers. ``name`` tells what N does not."""

    op: str
    name: str
    batch: int
    heads: int
    n: int
    head_dim: int
    dtype: str
    ours: str
    peers: tuple[str, ...]
    causal: bool = False
    backward: bool = False
    gate: str = "none"
    density: float = 1.0
    block: int = 128
    grid: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    keys: int = 0
    kept: int = 0

    @property
    def m(self) -> int:
        """M: ``keys`` where they are another number than the queries."""
        return self.keys or self.n

    @property
    def backends(self) -> tuple[str, ...]:
        """Ours, then the peers."""
        return (self.ours, *self.peers)

    @property
    def direction(self) -> Direction:
        """As rows have it."""
        return "fwd_bwd" if self.backward else "fwd"

    @property
    def label(self) -> str:
        """One line for logs and reports."""
        return f"{self.op} {self.name} D={self.head_dim} N={self.n} {self.direction}"

    def case(self, backend: str, device: str) -> Case:
        """The case of one backend, whose key its row carries."""
        shape = Workload(f"op_{self.op}", self.batch, self.heads, self.heads, self.head_dim)
        return Case(
            mechanism=f"op:{self.op}",
            backend=backend,
            pattern="CS" if self.causal else "NS",
            workload=shape,
            n=self.n,
            m=self.m,
            dtype=self.dtype,
            direction=self.direction,
            device=device,
            grid=self.grid,
            hyper=(("setting", self.name),),
        )


def settings(scale: Scale) -> list[Setting]:
    """All races in the order in which they are run: rank by rank, operations in turns within a rank.

    The first rank has one length of everything, so that a run that is cut short has said something of each.
    """
    series = [list(_flash(scale)), list(_linrec(scale)), list(_block_sparse(scale))]
    series += [list(_neighborhood(scale)), list(_window(scale)), list(_selective_scan(scale))]
    series += [list(_kv_reduce(scale)), list(_without_goal(scale))]
    ranked = [(rank, index, setting) for index, found in enumerate(series) for rank, setting in found]
    return [setting for _, _, setting in sorted(ranked, key=lambda item: item[:2])]


Ranked = Iterator[tuple[int, Setting]]


def _both(rank: int, setting: Setting) -> Ranked:
    yield rank, setting
    yield rank, replace(setting, backward=True)


def _base(scale: Scale, op: str, name: str, n: int, head_dim: int, peers: Sequence[str]) -> Setting:
    heads = max(1, scale.width // head_dim)
    batch = max(1, scale.tokens // n)
    return Setting(op, name, batch, heads, n, head_dim, scale.dtype, scale.ours, tuple(peers))


def _flash(scale: Scale) -> Ranked:
    for rank, n in enumerate(scale.lengths):
        for d in reversed(scale.head_dims):
            for causal in (True, False):
                name = "causal" if causal else "full"
                base = _base(scale, "flash", name, n, d, ("sdpa_flash", "sdpa_cudnn", "flex"))
                yield from _both(rank, replace(base, causal=causal))


def _linrec(scale: Scale) -> Ranked:
    for rank, n in enumerate(scale.linear_lengths):
        for gate in GATES:
            for d in reversed(scale.head_dims):
                setting = replace(_base(scale, "linrec", gate, n, d, ("fla",)), causal=True, gate=gate)
                yield from _both(rank + (d != scale.head_dims[-1]), setting)


def _block_sparse(scale: Scale) -> Ranked:
    for d in reversed(scale.head_dims):
        for density in DENSITIES:
            name = f"density {density:g}"
            base = _base(scale, "block_sparse", name, scale.sparse_length, d, ("flex",))
            setting = replace(base, density=density, block=scale.block)
            yield from _both(int(d != scale.head_dims[-1]), setting)


def _neighborhood(scale: Scale) -> Ranked:
    for rank, (grid, window, stride) in enumerate(scale.grids):
        for d in scale.head_dims:
            n = math.prod(grid)
            name = f"{_axes(grid)} window {_axes(window)} stride {_axes(stride)}"
            base = _base(scale, "neighborhood", name, n, d, ("natten", "flex"))
            setting = replace(base, grid=grid, window=window, stride=stride)
            yield from _both(rank // 2 + (d != scale.head_dims[0]), setting)


def _window(scale: Scale) -> Ranked:
    for rank, (grid, window) in enumerate(scale.windows):
        name = f"{_axes(grid)} window {_axes(window)}"
        base = _base(scale, "window", name, math.prod(grid), scale.head_dims[0], _eager(scale))
        yield from _both(rank // 2, replace(base, grid=grid, window=window))


def _selective_scan(scale: Scale) -> Ranked:
    for rank, n in enumerate(scale.lengths[:4]):
        setting = _base(scale, "selective_scan", "16 states", n, scale.head_dims[0], ("mamba_ssm",))
        yield from _both(rank, replace(setting, causal=True))


def _kv_reduce(scale: Scale) -> Ranked:
    for rank, n in enumerate(scale.linear_lengths):
        for d in scale.head_dims:
            yield rank, _base(scale, "kv_reduce", "elu1", n, d, _eager(scale))


def _without_goal(scale: Scale) -> Ranked:
    """One size of every other operation beside eager PyTorch, after the first ranks of those with a goal."""
    d, eager = scale.head_dims[0], _eager(scale)
    n, few, block = scale.lengths[1], min(64, scale.lengths[1] // 4), scale.block // 2
    short = max(8, n // 16)
    both = [
        replace(_base(scale, "few_query", f"{few} queries", few, d, eager), batch=4, keys=scale.lengths[0]),
        replace(_base(scale, "query_softmax", f"{few} slots", few, d, eager), batch=4, keys=n),
        replace(_base(scale, "gather", f"{block} keys", n, d, eager), kept=min(block, n)),
        replace(_base(scale, "token_blocks", f"2 blocks of {block}", n, d, eager), block=block, kept=2),
        replace(_base(scale, "buckets", f"chunks of {block}", n, d, eager), block=block),
        replace(_base(scale, "tensor3", "pairs", short, d, eager), batch=1),
    ]
    for setting in both:
        yield from _both(2, setting)
    mass = _base(scale, "block_mass", f"blocks of {block}", n, d, eager)
    yield 2, replace(mass, block=block, causal=True)
    yield 2, replace(_base(scale, "flash_int8", "causal", n, d, ("sage", *eager)), causal=True)


def _eager(scale: Scale) -> tuple[str, ...]:
    """What stands for unfused PyTorch beside ``ours``."""
    return ("reference",) if scale.ours == "torch" else ("torch",)


def _axes(values: Sequence[int]) -> str:
    return "×".join(map(str, values))
