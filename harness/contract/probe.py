"""A mechanism made concrete for a check: built modules, inputs that fit them, and comparison with a limit.

Every check sees the same two kinds of tensors: those whose token axis is the queries' and those whose token
axis is the keys'. It is written once for ``attend(q, k, v)`` and for ``forward(x, context)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from attnbench.harness.contract.outcome import CheckFailed
from attnbench.impls.base import Attention
from attnbench.impls.case import fold
from attnbench.impls.spec import Pattern
from attnbench.kernels.backends import Unsupported, interpreting

Face = Literal["attend", "forward"]
Size = tuple[int, int]
Inputs = tuple[Tensor, ...]
T = TypeVar("T")

SELF_SIZES: tuple[Size, ...] = ((1, 1), (5, 5), (16, 16), (33, 33))
CROSS_SIZES: tuple[Size, ...] = ((1, 7), (5, 16), (16, 5), (33, 20), (20, 33))
"""(N, M): one token, multiples of 16 and not, more queries than keys and fewer."""

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


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; the width is heads · head_dim. ``kv_heads`` 0 means as many as heads."""

    n: int
    m: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 0
    head_dim: int = 8
    value_dim: int = 8

    @property
    def width(self) -> int:
        """Model width C."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Instance:
    """A module in eval mode, inputs that fit it, and the call that takes them."""

    module: Attention
    inputs: Inputs
    face: Face
    shape: Shape

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Output on copies of ``inputs`` (the instance's own by default), without a graph."""
        with torch.no_grad():
            return self.differentiable(*(x.clone() for x in inputs or self.inputs), **options)

    def differentiable(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Output on the very tensors given (by default the instance's own), with a graph where it is on."""
        given = inputs or self.inputs
        if self.module.spec.stochastic:  # its draws are part of the definition: the same ones in every call
            torch.manual_seed(0)
        grid = fold(given[0].shape[-2], 1, self.module.spec.grid_ranks) or None
        if self.face == "forward":
            return self.module(*given, grid=grid, **options)
        q, k, v = given
        return self.module.attend(q, *self.module.grouped(k, v), grid=grid, **options)

    @property
    def query_side(self) -> tuple[int, ...]:
        """Indices of the inputs whose tokens are the queries' (in self attention, all)."""
        return (0, 1, 2) if self.face == "attend" and not self.module.pattern.cross else (0,)

    @property
    def key_side(self) -> tuple[int, ...]:
        """Indices of the inputs whose tokens are the keys'."""
        if self.face == "attend":
            return (1, 2)
        return (1,) if self.module.pattern.cross else (0,)

    def changed(self, indices: Sequence[int], how: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with ``how`` applied to a copy of each of ``indices``."""
        return tuple(how(x.clone()) if i in indices else x for i, x in enumerate(self.inputs))

    def prefix(self, length: int) -> Inputs:
        """The inputs with the first ``length`` query-side tokens only."""
        return self.changed(self.query_side, lambda x: x[..., :length, :].contiguous())

    def with_future(self, position: int, future: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with the query-side tokens after ``position`` replaced by ``future(those tokens)``."""

        def replaced(x: Tensor) -> Tensor:
            x[..., position + 1 :, :] = future(x[..., position + 1 :, :])
            return x

        return self.changed(self.query_side, replaced)

    def gradients(self, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
        """The output and the gradients of <output, upstream> with respect to every input.

        Without ``upstream``, of the sum of the outputs. An input that the output ignores has gradient zero.
        """
        leaves = tuple(x.detach().clone().requires_grad_() for x in self.inputs)
        output = self.differentiable(*leaves)
        upstream = torch.ones_like(output) if upstream is None else upstream.to(output.dtype)
        return (
            output.detach(),
            *torch.autograd.grad(output, leaves, upstream, allow_unused=True, materialize_grads=True),
        )


class Probe:
    """What a check is given: the target, a way to build it, and a place for notes on what was reduced."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.spec = target.mechanism.spec
        self.notes: list[str] = []

    @property
    def face(self) -> Face:
        """The call that most checks make: ``attend`` where the kind has one."""
        return "attend" if self.spec.kind in ("core", "mask") else "forward"

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
        """(N, M) pairs of the pattern."""
        return CROSS_SIZES if self.target.pattern.cross else SELF_SIZES

    def cost_sizes(self) -> tuple[Size, ...]:
        """(N, M) pairs of the pattern at which costs are compared."""
        return CROSS_COST_SIZES if self.target.pattern.cross else SELF_COST_SIZES

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
        return Instance(module.to(device=self.target.device, dtype=dtype).eval(), inputs, face, shape)

    def as_reference(self, instance: Instance, dtype: torch.dtype) -> Instance:
        """The same weights and inputs on the reference backend, in ``dtype``."""
        module = self._module("reference", instance.shape, instance.face, seed=0)
        module.load_state_dict(instance.module.state_dict())
        module = module.to(device=self.target.device, dtype=dtype).eval()
        inputs = tuple(x.detach().to(dtype) for x in instance.inputs)
        return Instance(module, inputs, instance.face, instance.shape)

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
