"""What a check is given: a target, a way to build it at any size, and comparison with a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnbench.harness.contract.instance import Face, Inputs, Instance, Shape, Slot, main_slots
from attnbench.harness.contract.outcome import CheckFailed
from attnbench.impls.base import Attention
from attnbench.impls.case import fold
from attnbench.impls.spec import Pattern
from attnbench.impls.synthetic import Dims, make_all
from attnbench.kernels.backends import Unsupported, interpreting

SECOND_CONTEXT = 6
"""Tokens of a second context: none of the other lengths."""

Size = tuple[int, int]
T = TypeVar("T")

SELF_SIZES: tuple[Size, ...] = ((1, 1), (5, 5), (16, 16), (33, 33))
CROSS_SIZES: tuple[Size, ...] = ((1, 7), (5, 16), (16, 5), (33, 20), (20, 33))
"""(N, M): one token, multiples of 16 and not, more queries than keys and fewer."""

GRID_SIZES: Mapping[int, tuple[Size, ...]] = {
    2: ((1, 1), (5, 5), (16, 16), (35, 35)),
    3: ((1, 1), (5, 5), (16, 16), (45, 45)),
}
"""Token counts that fold into (1, 5), (4, 4) and (5, 7); into (1, 1, 5), (2, 2, 4) and (3, 3, 5)."""

CROSS_GRID_SIZES: tuple[Size, ...] = ((1, 6), (5, 16), (16, 5), (35, 20), (20, 45))

LENGTHS = (37, 130)
"""Neither is a multiple of a tile; the second spans two chunks of 64 and a tile of 128."""

GRID_LENGTHS: Mapping[int, tuple[int, ...]] = {2: (35, 130), 3: (45, 150)}
"""Grids (5, 7), (10, 13), (3, 3, 5), (5, 5, 6)."""

SELF_COST_SIZES: tuple[Size, ...] = ((64, 64), (192, 192))
CROSS_COST_SIZES: tuple[Size, ...] = ((64, 128), (192, 256))
"""Large enough for lower-order terms of a cost to be small, and multiples of the chunk of 64: an eager
backend pads to it, a formula need not. Two, so that the growth is checked too."""

LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}
"""Largest difference of equal computations, relative to the largest output."""


@dataclass(frozen=True)
class Target:
    """What the kit runs on: a mechanism under one pattern and backend, with its test hyper-parameters."""

    mechanism: type[Attention]
    pattern: Pattern
    backend: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def label(self) -> str:
        """``mechanism/backend pattern``."""
        return f"{self.mechanism.spec.id}/{self.backend} {self.pattern}"


def targets(mechanism: type[Attention], device: str = "cpu") -> list[Target]:
    """Every declared pattern × backend of a mechanism, whether or not the backend can run on ``device``."""
    return [
        Target(mechanism, Pattern(pattern), backend, mechanism.spec.test_hyper, device)
        for pattern in mechanism.spec.patterns
        for backend in mechanism.backends(pattern)
    ]


class Probe:
    """A target on grids of one rank, a way to build it, and a place for notes on what was reduced."""

    def __init__(self, target: Target, rank: int | None = None) -> None:
        self.target = target
        self.rank = min(target.mechanism.spec.grid_ranks) if rank is None else rank
        self.spec = target.mechanism.spec
        self.notes: list[str] = []

    @property
    def face(self) -> Face:
        """The call that most checks make: ``attend`` where the kind has one."""
        return "attend" if self.spec.on_tensors else "forward"

    @property
    def slow(self) -> bool:
        """Whether every kernel launch costs tens of milliseconds: Triton in its interpreter."""
        return self.target.backend == "triton" and interpreting()

    @property
    def dtype(self) -> torch.dtype:
        """fp64 on our eager backends, which compute in it; fp32 on all others."""
        return torch.float64 if self.target.backend in ("reference", "torch") else torch.float32

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Precisions of a check that must hold in every one: fp64 where it is computed, and fp32."""
        return (torch.float64, torch.float32) if self.dtype is torch.float64 else (torch.float32,)

    def sizes(self) -> tuple[Size, ...]:
        """(N, M) pairs of the pattern and the rank."""
        if self.crossed:
            return CROSS_SIZES if self.rank == 1 else CROSS_GRID_SIZES
        return GRID_SIZES.get(self.rank, SELF_SIZES)

    def lengths(self) -> tuple[int, ...]:
        """Numbers of tokens at which causality of self attention is checked."""
        return GRID_LENGTHS.get(self.rank, LENGTHS)

    def cost_sizes(self) -> tuple[Size, ...]:
        """(N, M) pairs of the pattern at which costs are compared."""
        return CROSS_COST_SIZES if self.crossed else SELF_COST_SIZES

    @property
    def crossed(self) -> bool:
        """Whether N and M are unrelated."""
        return self.target.pattern.cross and self.spec.lengths == "free"

    @property
    def cuttable(self) -> bool:
        """Whether a call with some of the queries left out is still a call of the mechanism."""
        return self.rank == 1 and (self.crossed or not self.target.pattern.cross)

    @property
    def uncuttable(self) -> str:
        """Why queries cannot be left out."""
        if self.rank > 1:
            return f"grids of rank {self.rank}: without some of its tokens a grid is none"
        return "Spec.lengths is aligned: without some queries N and M differ"

    def note(self, text: str) -> None:
        """Record what a reader of a passed check should know."""
        if text not in self.notes:
            self.notes.append(text)

    def fewer(self, full: Sequence[T], reduced: Sequence[T], what: str) -> Sequence[T]:
        """``full``, or ``reduced`` with a note under interpreted Triton."""
        if not self.slow:
            return full
        self.note(f"interpreted Triton: only {what} {', '.join(map(str, reduced))}")
        return reduced

    def served(self, items: Sequence[T], body: Callable[[T], None], what: str) -> None:
        """Run ``body`` on each item; note the ones that the backend declares unsupported.

        Raises Unsupported when it serves none of them, so that the check is not taken for a pass, and at once
        on the reference backend, which is the definition: nothing may be beyond it.
        """
        refused: list[str] = []
        for item in items:
            try:
                body(item)
            except Unsupported as why:
                refused.append(f"{what} {item}: {why}")
                if len(refused) == len(items) or self.target.backend == "reference":
                    raise
        if refused:
            self.note("not served: " + "; ".join(refused))

    def build(
        self,
        shape: Shape,
        *,
        dtype: torch.dtype | None = None,
        face: Face | None = None,
        seed: int = 0,
    ) -> Instance:
        """A module of the target for ``shape``, with weights and inputs drawn from ``seed``."""
        face = self.face if face is None else face
        dtype = self.dtype if dtype is None else dtype
        module = self._module(self.target.backend, shape, face, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        inputs = self._inputs(shape, face, dtype, generator)
        scope = "op" if face == "attend" else "layer"
        declared = self.spec.served_inputs(scope)
        slots = (*main_slots(face, cross=self.target.pattern.cross), *map(Slot.of, declared))
        extra = make_all(self.spec, scope, self._dims(shape), generator, dtype, "cpu")
        inputs = (*inputs, *(x.to(self.target.device) for x in extra.values()))
        module = module.to(device=self.target.device, dtype=dtype).eval()
        return Instance(module, inputs, face, shape, slots, self.rank)

    def as_reference(self, instance: Instance, dtype: torch.dtype) -> Instance:
        """The same weights and inputs on the reference backend, in ``dtype``."""
        module = self._module("reference", instance.shape, instance.face, seed=0)
        module.load_state_dict(instance.module.state_dict())
        module = module.to(device=self.target.device, dtype=dtype).eval()
        inputs = tuple(x.detach().to(dtype) if x.is_floating_point() else x for x in instance.inputs)
        return replace(instance, module=module, inputs=inputs)

    def _dims(self, shape: Shape) -> Dims:
        grids = (fold(x, self.rank, (self.rank,)) if self.rank > 1 else () for x in (shape.n, shape.m))
        heads = (shape.heads, shape.kv_heads or shape.heads, shape.head_dim)
        return Dims(shape.batch, shape.n, shape.m, *heads, SECOND_CONTEXT, *grids)

    def _module(self, backend: str, shape: Shape, face: Face, seed: int) -> Attention:
        kind = self.target.mechanism
        torch.manual_seed(seed)
        module = kind(
            shape.width,
            shape.heads,
            pattern=self.target.pattern,
            backend=backend,
            num_kv_heads=shape.kv_heads or shape.heads,
            projections=face == "forward",
            **{**self.target.hyper, **kind.for_length(shape.n, shape.m)},
        )
        for parameter in module.parameters():
            if not parameter.any():  # a zero (a gate, a layer scale) hides what it multiplies
                torch.nn.init.normal_(parameter, std=0.1)
        return module

    def _inputs(self, shape: Shape, face: Face, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        b, n, m, kv = shape.batch, shape.n, shape.m, shape.kv_heads or shape.heads
        sizes: list[tuple[int, ...]]
        if face == "attend":
            q, k, v = (shape.heads, n, shape.head_dim), (kv, m, shape.head_dim), (kv, m, shape.value_dim)
            sizes = [(b, *q), (b, *k), (b, *v)]
        elif self.target.pattern.cross:
            sizes = [(b, n, shape.width), (b, m, shape.width)]
        else:
            sizes = [(b, n, shape.width)]
        drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
        return tuple(x.to(device=self.target.device, dtype=dtype) for x in drawn)


def same(got: Tensor, want: Tensor, what: str) -> None:
    """CheckFailed unless ``got`` is finite and equals ``want`` within the limit of its dtype."""
    if got.shape != want.shape:
        raise CheckFailed(f"{what}: shape {tuple(got.shape)}", f"shape {tuple(want.shape)}")
    if got.numel() == 0:
        return
    if not got.isfinite().all():
        raise CheckFailed(f"{what}: {int((~got.isfinite()).sum())} values not finite", "finite values")
    limit = LIMITS[got.dtype] * want.abs().max().item()
    off = (got - want).abs().max().item()
    if not off <= limit:
        raise CheckFailed(f"{what}: difference {off:.3g} ({_name(got.dtype)})", f"at most {limit:.3g}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
