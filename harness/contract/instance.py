"""A built module with inputs that fit it, and the changes to its inputs that checks make.

Every check sees the same tensors, whatever the mechanism takes: each is a :class:`Slot` that knows which of
its axes counts batch entries, which query tokens and which key tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnbench.impls.base import Attention, SparseAttention
from attnbench.impls.case import fold
from attnbench.impls.spec import Input

Face = Literal["attend", "forward"]
Side = Literal["query", "key"]
Inputs = tuple[Tensor, ...]
Index = slice | Tensor


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
class Slot:
    """One input of the call: its axes, and whether it is one of q, k, v, x, context (``main``)."""

    name: str
    batch: int | None
    query: int | None
    key: int | None
    differentiable: bool = True
    main: bool = True

    @classmethod
    def of(cls, declared: Input) -> Slot:
        """The slot of an input that a Spec declares."""
        axes = (declared.axis("B"), declared.axis("N"), declared.axis("M"))
        return cls(declared.name, *axes, differentiable=declared.differentiable, main=False)


def main_slots(face: Face, *, cross: bool) -> tuple[Slot, ...]:
    """q, k, v of ``attend``; x, and the context in a cross pattern, of ``forward``."""
    if face == "attend":
        return Slot("q", 0, 2, None), Slot("k", 0, None, 2), Slot("v", 0, None, 2)
    if cross:
        return Slot("x", 0, 1, None), Slot("context", 0, None, 1)
    return (Slot("x", 0, 1, 1),)


@dataclass(frozen=True)
class Instance:
    """A module in eval mode, inputs that fit it, and the call that takes them on grids of ``rank``."""

    module: Attention
    inputs: Inputs
    face: Face
    shape: Shape
    slots: tuple[Slot, ...]
    rank: int = 1

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Output on copies of ``inputs`` (the instance's own by default), without a graph.

        Inputs that the Spec declares may be left out: then they are the instance's own.
        """
        with torch.no_grad():
            return self.differentiable(*(x.clone() for x in self.completed(inputs)), **options)

    def differentiable(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Output on the very tensors given (by default the instance's own), with a graph where it is on."""
        given = self.completed(inputs)
        if self.module.spec.stochastic:  # its draws are part of the definition: the same ones in every call
            torch.manual_seed(0)
        main, keywords = self.split(given)
        if self.face == "forward":
            return self.module(*main, **(keywords | options))
        q, k, v = main
        keys, values = self.module.grouped(k, v)
        return self.module.attend(q, keys, values, **(keywords | options))

    def completed(self, inputs: Sequence[Tensor]) -> Inputs:
        """``inputs``, by default the instance's own, with its own extra inputs where they are missing."""
        if not inputs:
            return self.inputs
        return (*inputs, *self.inputs[len(inputs) :])

    def split(self, given: Inputs) -> tuple[Inputs, dict[str, Any]]:
        """The main tensors, and the keywords of the call: the grids and the declared inputs."""
        pairs = list(zip(self.slots, given, strict=True))
        main = tuple(x for slot, x in pairs if slot.main)
        keywords: dict[str, Any] = {slot.name: x for slot, x in pairs if not slot.main}
        return main, self.grids(main) | keywords

    def grids(self, main: Inputs | None = None) -> dict[str, Any]:
        """``grid`` and, where the Spec has one, ``grid_kv``, for as many tokens as the main tensors have."""
        given = self.inputs if main is None else main
        last = given[1 if self.face == "attend" else self.mains - 1]
        lengths = {"grid": given[0].shape[-2]}
        if self.module.spec.grid_kv and self.module.pattern.cross:
            lengths["grid_kv"] = last.shape[-2]
        return {
            name: fold(length, self.rank, (self.rank,)) if self.rank > 1 else None
            for name, length in lengths.items()
        }

    @property
    def mains(self) -> int:
        """How many of the inputs are main tensors; they come first."""
        return sum(slot.main for slot in self.slots)

    def selection(self) -> Any:
        """What the module selects on the instance's inputs."""
        main, keywords = self.split(self.inputs)
        tokens = main[:2] if self.face == "attend" else main
        select: Callable[..., Any] = self.module.select  # type: ignore[assignment]  # see spec_is_filled
        if not isinstance(self.module, SparseAttention):
            keywords = {name: x for name, x in keywords.items() if x is not None}
        with torch.no_grad():
            return select(*tokens, **keywords)

    def visible(self) -> Tensor | None:
        """The declared mask, broadcastable to (B, H, N, M), or None where the mechanism states none."""
        see: Callable[..., Tensor] | None = getattr(self.module, "visible", None)
        if see is None:
            return None
        keywords = {name: x for name, x in self.split(self.inputs)[1].items() if x is not None}
        return see(self.shape.n, self.shape.m, self.inputs[0].device, **keywords)

    # ---- changed inputs --------------------------------------------------------------------------------

    @property
    def key_side(self) -> tuple[int, ...]:
        """Indices of the main tensors whose tokens are the keys'."""
        return tuple(i for i, slot in enumerate(self.slots) if slot.main and slot.key is not None)

    def axes(self, side: Side) -> list[tuple[int, int]]:
        """(input, axis) of every token axis of a side; in self attention keys are queries as well."""
        found = []
        for i, slot in enumerate(self.slots):
            wanted = [slot.query, slot.key] if side == "query" else [slot.key]
            if side == "query" and self.module.pattern.cross:
                wanted = [slot.query]
            found += [(i, axis) for axis in dict.fromkeys(wanted) if axis is not None]
        return found

    def changed(self, indices: Sequence[int], how: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with ``how`` applied to a copy of each of ``indices``."""
        return tuple(how(x.clone()) if i in indices else x for i, x in enumerate(self.inputs))

    def taken(self, side: Side, index: Index) -> Inputs:
        """The inputs with only the tokens ``index`` of a side, in that order."""
        inputs = list(self.inputs)
        for i, axis in self.axes(side):
            inputs[i] = inputs[i][at(axis, index)].contiguous()
        return tuple(inputs)

    def replaced(self, side: Side, index: Index, how: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with ``how(tokens)`` in place of the tokens ``index`` of a side, in all entries.

        Integers are reversed instead and bools negated: there is no other value that is surely legal.
        """
        inputs = list(self.inputs)
        for i, axis in self.axes(side):
            changed = inputs[i].clone()
            where = at(axis, index)
            changed[where] = _other(changed[where], axis, how)
            inputs[i] = changed
        return tuple(inputs)

    def entries(self, how: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with ``how`` applied to those that have a batch axis, which is the first."""
        return tuple(how(x) if s.batch == 0 else x for s, x in zip(self.slots, self.inputs, strict=True))

    def prefix(self, length: int) -> Inputs:
        """The inputs with the first ``length`` query-side tokens only."""
        return self.taken("query", slice(0, length))

    def with_future(self, position: int, future: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with the query-side tokens after ``position`` replaced by ``future(those tokens)``."""
        return self.replaced("query", slice(position + 1, None), future)

    # ---- gradients -------------------------------------------------------------------------------------

    @property
    def differentiated(self) -> tuple[int, ...]:
        """Indices of the inputs that get a gradient."""
        return tuple(i for i, slot in enumerate(self.slots) if slot.differentiable)

    def leaves(self) -> Inputs:
        """Copies of the inputs, those that get one requiring a gradient."""
        wanted = self.differentiated
        return tuple(x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(self.inputs))

    def gradients(self, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
        """The output and the gradients of <output, upstream> with respect to every differentiable input.

        Without ``upstream``, of the sum of the outputs. An input that the output ignores has gradient zero.
        """
        leaves = self.leaves()
        output = self.differentiable(*leaves)
        upstream = torch.ones_like(output) if upstream is None else upstream.to(output.dtype)
        wanted = [leaves[i] for i in self.differentiated]
        return (
            output.detach(),
            *torch.autograd.grad(output, wanted, upstream, allow_unused=True, materialize_grads=True),
        )


def at(axis: int, index: Index) -> tuple[Index, ...]:
    """Index expression that takes ``index`` along ``axis``."""
    return (*(slice(None) for _ in range(axis)), index)


def _other(tokens: Tensor, axis: int, how: Callable[[Tensor], Tensor]) -> Tensor:
    if tokens.is_floating_point():
        return how(tokens)
    return ~tokens if tokens.dtype is torch.bool else tokens.flip(axis)
