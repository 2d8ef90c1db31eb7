"""A case made concrete: the module, its inputs, and the call that is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls import registry
from attnbench.impls.base import Attention, SparseAttention
from attnbench.impls.case import Case
from attnbench.impls.synthetic import Dims, make_all
from attnbench.tasks.data.inputs import make_qkv


@dataclass(frozen=True)
class Subject:
    """What one case calls. ``inputs`` are q, k, v (scope op) or x and the context (scope layer).

    ``extras`` are the inputs that the mechanism declares beyond those, by name. With ``selection`` a sparse
    mechanism attends to that and selects nothing itself.
    """

    case: Case
    module: Attention
    inputs: tuple[Tensor, ...]
    upstream: Tensor | None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    selection: Any = None

    def forward(self) -> Tensor:
        """The output, with autograd as the surrounding context has it."""
        if self.case.scope == "op":
            q, k, v = self.inputs
            return self.module.attend(q, *self.module.grouped(k, v), **self.keywords())
        return self.module(*self.inputs, **self.keywords())

    def select(self) -> Any:
        """What a sparse mechanism selects: the first step of :meth:`forward`, without autograd."""
        module = self.module
        if not isinstance(module, SparseAttention):
            raise UsageError(f"{module.spec.id}: observed no select(q, k), expected a SparseAttention")
        q, k, v = self.inputs
        with torch.no_grad():
            return module.select(q, module.grouped(k, v)[0], **replace(self, selection=None).keywords())

    @property
    def selects(self) -> bool:
        """Whether :meth:`select` can be called: a sparse mechanism, measured as an operation."""
        return self.case.scope == "op" and isinstance(self.module, SparseAttention)

    @property
    def given(self) -> tuple[Tensor, ...]:
        """All tensors that the caller owns: the inputs and the declared ones."""
        return (*self.inputs, *self.extras.values())

    def keywords(self) -> dict[str, Any]:
        """Keywords of the call: the grids and the declared inputs."""
        grids: dict[str, Any] = {"grid": self.case.grid or None}
        if self.module.spec.grid_kv and self.module.pattern.cross:
            grids["grid_kv"] = self.case.grid_kv or None
        frozen = {} if self.selection is None else {"selection": self.selection}
        return grids | dict(self.extras) | frozen

    def leaves(self) -> list[Tensor]:
        """Tensors that a backward differentiates: the inputs, those declared so, then the parameters."""
        declared = [x for x in self.extras.values() if x.requires_grad]
        return [*self.inputs, *declared, *(p for p in self.module.parameters() if p.requires_grad)]

    def like(self) -> list[Tensor]:
        """Tensors of the shape, dtype and device that the results of :meth:`step` must have."""
        first, last = self.inputs[0], self.inputs[-1]
        shape = (*first.shape[:3], last.shape[-1]) if self.case.scope == "op" else first.shape
        return [first.new_empty(shape), *(self.leaves() if self.upstream is not None else ())]

    def step(self) -> Sequence[Tensor]:
        """One measured call: the output alone, or the output and its gradients."""
        if self.upstream is None:
            with torch.no_grad():
                return (self.forward(),)
        output = self.forward()
        leaves = self.leaves()
        # a definition may leave an input unread (shared queries and keys): its gradient is zero
        grads = torch.autograd.grad(output, leaves, self.upstream, materialize_grads=True)
        return (output.detach(), *grads)


def build(case: Case, dist: str = "gaussian") -> Subject:
    """Build the module and draw the inputs of ``case``, both from its seed."""
    device = "cpu" if case.device == "cpu" else "cuda"
    dtype: torch.dtype = getattr(torch, case.dtype)
    module = _module(case, case.backend).to(device=device, dtype=dtype).eval()
    generator = torch.Generator(device).manual_seed(case.seed)
    inputs = _inputs(case, dist, dtype, device, generator)
    extras = _extras(case, dtype, device, generator)
    upstream = None
    if case.direction == "fwd_bwd":
        inputs = tuple(x.requires_grad_() for x in inputs)
        for declared in module.spec.served_inputs(case.scope):
            extras[declared.name].requires_grad_(declared.differentiable)
        shape = inputs[0].shape if case.scope == "layer" else (*inputs[0].shape[:3], inputs[2].shape[-1])
        upstream = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    else:
        module.requires_grad_(False)
    return Subject(case, module, inputs, upstream, extras)


def as_reference(subject: Subject, dtype: torch.dtype) -> Subject:
    """The same module, weights and inputs on the reference backend, in ``dtype``."""
    case = replace(subject.case, backend="reference")
    module = _module(case, "reference")
    module.load_state_dict(subject.module.state_dict())
    device = subject.inputs[0].device
    module = module.to(device=device, dtype=dtype).eval()
    for mine, theirs in zip(module.parameters(), subject.module.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)  # a mechanism may hold frozen weights
    inputs = tuple(x.detach().to(dtype).requires_grad_(subject.upstream is not None) for x in subject.inputs)
    extras = {
        name: x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in subject.extras.items()
    }
    upstream = None if subject.upstream is None else subject.upstream.to(dtype)
    return Subject(case, module, inputs, upstream, extras, subject.selection)


def _module(case: Case, backend: str) -> Attention:
    kind = registry.mechanism(case.mechanism)
    torch.manual_seed(case.seed)
    return kind(
        case.workload.width,
        case.workload.heads,
        pattern=case.pattern,
        backend=backend,
        num_kv_heads=case.workload.kv_heads,
        projections=case.scope == "layer",
        **{**kind.for_length(case.n, case.m), **dict(case.hyper)},
    )


def _inputs(
    case: Case, dist: str, dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[Tensor, ...]:
    w = case.workload
    if case.scope == "op":
        d = w.head_dim
        return make_qkv(dist, w.batch, w.heads, w.kv_heads, case.n, case.m, d, d, dtype, device, generator)
    lengths = (case.n, case.m) if case.pattern in ("NC", "CC") else (case.n,)
    return tuple(
        torch.randn(w.batch, length, w.width, generator=generator, device=device, dtype=dtype)
        for length in lengths
    )


def _extras(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    w = case.workload
    sizes = Dims(
        w.batch, case.n, case.m, w.heads, w.kv_heads, w.head_dim, grid=case.grid, grid_kv=case.grid_kv
    )
    spec = registry.spec(case.mechanism)
    return make_all(spec, case.scope, sizes, generator, dtype, device)
