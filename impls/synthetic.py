"""Synthetic values of the inputs that a mechanism declares beyond x and one context, by name.

The contract kit, the harness and the command line feed them where a user would feed real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.errors import unknown_name
from attnbench.impls.spec import Input, Spec

SECOND_CONTEXT = 16
"""Tokens P of a second context: an image prompt, a few words."""

CLASSES = 8
"""Different values of labels and groups."""

MASK_KEEPS = 0.7
"""Share of the pairs or tokens that a random mask keeps."""


@dataclass(frozen=True)
class Dims:
    """Sizes of one call, by the letters of :class:`Input`; the grids are () on a plain sequence."""

    b: int
    n: int
    m: int
    h: int
    hkv: int
    d: int
    p: int = SECOND_CONTEXT
    grid: tuple[int, ...] = ()
    grid_kv: tuple[int, ...] = ()

    @property
    def c(self) -> int:
        """Model width C = H·D."""
        return self.h * self.d

    def sizes(self, declared: Input) -> tuple[int, ...]:
        """The shape of an input as numbers."""
        letters = {"B": self.b, "N": self.n, "M": self.m, "P": self.p, "C": self.c}
        letters |= {"H": self.h, "Hkv": self.hkv, "D": self.d}
        return tuple(int(d) if d.isdecimal() else letters[d] for d in declared.dims)


Generate = Callable[[Dims, tuple[int, ...], torch.Generator, torch.device], Tensor]
"""Sizes, the shape to draw, a generator on the device, the device → fp32, int64 or bool of that shape."""


def _normal(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator, device=device)


def _uniform(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=device)


def _positive(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator, device=device).exp()


def _log_decay(
    dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device
) -> Tensor:
    return torch.nn.functional.logsigmoid(torch.randn(shape, generator=generator, device=device) + 3.0)


def _mask(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    kept = torch.rand(shape, generator=generator, device=device) < MASK_KEEPS
    kept[..., 0] = kept[..., -1] = True
    return kept


def _labels(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(CLASSES, shape, generator=generator, device=device)


def _segments(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    length = shape[-1]
    return (torch.arange(length, device=device) * CLASSES // max(length, CLASSES)).expand(shape).contiguous()


def _partners(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    order = torch.rand(shape, generator=generator, device=device).argsort(-1)
    return order


def _zeros(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.zeros(shape, device=device)


def _ones(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.ones(shape, device=device)


GENERATORS: Mapping[str, Generate] = {
    "normal": _normal,
    "uniform": _uniform,
    "positive": _positive,
    "log_decay": _log_decay,
    "mask": _mask,
    "labels": _labels,
    "segments": _segments,
    "permutation": _partners,
    "zeros": _zeros,
    "ones": _ones,
}
"""``normal`` (tokens, logits, scores, states) · ``uniform`` in [0, 1) · ``positive`` (log-normal weights) ·
``log_decay`` (≤ 0, mostly near 0) · ``mask`` (bool, True = kept, the first and the last of each row always)
· ``labels`` (integers 0..7) · ``segments`` (contiguous runs 0..7 along the last axis) · ``permutation`` (of
the last axis) · ``zeros`` · ``ones``."""


def make(
    declared: Input, dims: Dims, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """One input of the declared shape: floating-point values in ``dtype``, integers and bools as they are.

    Drawn in fp32 from ``generator``, which lives on ``device``, so that two dtypes see the same numbers.
    Raises UsageError for an unknown generator, ValueError when one returns another shape or a gradient is
    declared for integers.
    """
    shape = dims.sizes(declared)
    drawn = _generator(declared)(dims, shape, generator, torch.device(device))
    if tuple(drawn.shape) != shape:
        raise ValueError(f"input {declared.name}: observed shape {tuple(drawn.shape)}, expected {shape}")
    if declared.differentiable and not drawn.is_floating_point():
        raise ValueError(f"input {declared.name}: differentiable, but its generator returns {drawn.dtype}")
    return drawn.to(dtype) if drawn.is_floating_point() else drawn


def make_all(
    spec: Spec,
    scope: str,
    dims: Dims,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """All inputs that the call of ``scope`` (``op`` or ``layer``) takes, by name and in declared order."""
    return {x.name: make(x, dims, generator, dtype, device) for x in spec.served_inputs(scope)}


def _generator(declared: Input) -> Generate:
    if callable(declared.synthetic):
        return declared.synthetic
    if declared.synthetic not in GENERATORS:
        raise unknown_name("synthetic input", declared.synthetic, GENERATORS)
    return GENERATORS[declared.synthetic]
