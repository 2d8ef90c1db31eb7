"""Checks of what a mechanism declares, before anything is computed with it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from attnbench.harness.contract.instance import Shape
from attnbench.harness.contract.outcome import CheckFailed
from attnbench.harness.contract.probe import Probe
from attnbench.impls.base import (
    Attention,
    MapAttention,
    MaskAttention,
    SparseAttention,
    UnsupportedPattern,
)
from attnbench.impls.spec import Pattern, Spec
from attnbench.impls.synthetic import GENERATORS
from attnbench.kernels import OPS

_OVERRIDDEN: tuple[tuple[type[Attention], str], ...] = (
    (MaskAttention, "mask_options"),
    (MaskAttention, "visible"),
    (SparseAttention, "select"),
    (SparseAttention, "consume"),
    (MapAttention, "transform"),
)

ARXIV = re.compile(r"\d{4}\.\d{4,5}|[a-z-]+/\d{7}")


def spec_is_filled(probe: Probe) -> None:
    """The Spec says what tests, tables and pages need: names, source, cost, operations, hyper-parameters."""
    spec = probe.spec
    _report([*_texts(spec), *_hyper(spec), *_inputs(spec), *_hot_path(probe), *_consistent(probe)])


def has_its_methods(probe: Probe) -> None:
    """The class overrides what its kind computes with, and its call takes a grid and a padding mask."""
    _report(list(_methods(probe.target.mechanism)))


def refuses_other_patterns(probe: Probe) -> None:
    """Building a pattern that the Spec does not declare raises UnsupportedPattern."""
    kind = probe.target.mechanism
    hyper = {**probe.target.hyper, **kind.for_length(4, 4)}
    for pattern in Pattern:
        if pattern in probe.spec.patterns:
            continue
        try:
            kind(16, 2, pattern=pattern, **hyper)
        except UnsupportedPattern:
            continue
        raise CheckFailed(f"a module under {pattern}", "UnsupportedPattern")


def cost_is_stated(probe: Probe) -> None:
    """Stated FLOPs and extra bytes are whole numbers, not negative, and the FLOPs grow with the lengths."""
    small, large = probe.cost_sizes()
    values = {}
    for size in (small, large):
        instance = probe.build(Shape(*size))
        module, grids = instance.module, instance.grids()
        counts = {
            "flops": module.cost("flops", *size, **grids),
            "extra_bytes": module.cost("extra_bytes", *size, 2, **grids),
        }
        for what, value in counts.items():
            if not isinstance(value, int) or value < 0:
                raise CheckFailed(f"{what}{size} = {value!r}", "an int, at least 0")
        values[size] = counts["flops"]
    if not 0 < values[small] < values[large]:
        raise CheckFailed(
            f"flops{small} = {values[small]}, flops{large} = {values[large]}", "0 < the first < the second"
        )


def _report(problems: list[str]) -> None:
    if problems:
        raise CheckFailed("; ".join(problems), "a complete and consistent declaration")


def _texts(spec: Spec) -> Iterator[str]:
    for name in ("id", "name", "summary", "formula", "cost"):
        if not getattr(spec, name).strip():
            yield f"Spec.{name} is empty"
    if not spec.id.isidentifier() or spec.id != spec.id.lower():
        yield f"Spec.id {spec.id!r} is not a lower-case identifier"
    if not spec.paper.title or not 1900 < spec.paper.year < 2100:
        yield f"Spec.paper lacks a title or a year: {spec.paper}"
    if not (spec.paper.arxiv or spec.paper.venue):
        yield "Spec.paper has neither an arXiv identifier nor a venue"
    if spec.paper.arxiv and not ARXIV.fullmatch(spec.paper.arxiv):
        yield f"Spec.paper.arxiv {spec.paper.arxiv!r} is not a bare arXiv identifier"
    if not spec.grid_ranks or min(spec.grid_ranks) < 1:
        yield f"Spec.grid_ranks {spec.grid_ranks} holds no rank"


def _hyper(spec: Spec) -> Iterator[str]:
    for hyper in spec.hyper:
        if not hyper.meaning.strip():
            yield f"hyper-parameter {hyper.name} has no meaning"
        for value in (hyper.default, hyper.cab):
            if hyper.choices and value is not None and value not in hyper.choices:
                yield f"hyper-parameter {hyper.name}: {value!r} is not among its choices"
    try:
        spec.resolve(spec.test_hyper)
    except ValueError as error:
        yield f"Spec.test_hyper: {error}"


def _inputs(spec: Spec) -> Iterator[str]:
    for declared in spec.inputs:
        if not declared.meaning.strip():
            yield f"input {declared.name} has no meaning"
        if isinstance(declared.synthetic, str) and declared.synthetic not in GENERATORS:
            yield f"input {declared.name}: no synthetic input is called {declared.synthetic!r}"
        if "B" in declared.dims[1:]:
            yield f"input {declared.name}: the batch is not the first dimension of {declared.shape}"
        if declared.scope == "op" and not spec.on_tensors:
            yield f"input {declared.name}: scope op, but a {spec.kind} has no operation"
    if spec.grid_kv and not spec.on_grid:
        yield "Spec.grid_kv without a rank above 1 in Spec.grid_ranks"


def _hot_path(probe: Probe) -> Iterator[str]:
    spec = probe.spec
    for pattern in spec.patterns:
        ops = spec.ops_for(pattern)
        unknown = [op for op in ops if op not in OPS]
        if unknown:
            yield f"Spec.ops under {pattern} names no operation of kernels: {', '.join(unknown)}"
            continue
        if not ops and not spec.hot_loop.strip():
            yield f"no operation under {pattern} and no Spec.hot_loop"
        backends = probe.target.mechanism.backends(pattern)
        if spec.flops_backend and spec.flops_backend not in backends:
            yield f"Spec.flops_backend {spec.flops_backend!r} is no backend under {pattern}"


def _consistent(probe: Probe) -> Iterator[str]:
    spec = probe.spec
    if spec.exact and spec.row_sum != "one":
        yield f"Spec.exact with row_sum {spec.row_sum}"
    if spec.causality == "selection_leaky" and not callable(getattr(probe.target.mechanism, "select", None)):
        yield "Spec.causality is selection_leaky but there is no select(q, k)"
    lacks_cc = Pattern.NC in spec.patterns and Pattern.CC not in spec.patterns
    if spec.selection and not callable(getattr(probe.target.mechanism, "select", None)):
        yield f"Spec.selection is {spec.selection} but there is no select(q, k)"
    if spec.query_separable and lacks_cc and 1 in spec.grid_ranks and spec.lengths == "free":
        yield "query_separable and NC but not CC: what is separable in NC is causal as it is"


def _methods(kind: type[Attention]) -> Iterator[str]:
    spec = kind.spec
    if spec.kind == "mask" and not issubclass(kind, MaskAttention):
        yield "Spec.kind is mask but the class is no MaskAttention"
    if spec.kind == "map" and not issubclass(kind, MapAttention):
        yield "Spec.kind is map but the class is no MapAttention"
    name = "attend" if spec.on_tensors else "forward"
    method = getattr(kind, name)
    if method is getattr(Attention, name):
        yield f"Spec.kind is {spec.kind} but {name} is not overridden"
    for base, own in _OVERRIDDEN:
        if issubclass(kind, base) and getattr(kind, own) is getattr(base, own):
            yield f"a {base.__name__} but {own} is not overridden"
    parameters = inspect.signature(method).parameters
    for keyword in ("grid", "key_padding_mask"):
        if keyword not in parameters:
            yield f"{name} takes no {keyword}"
    if kind.flops is Attention.flops:
        yield "flops(n, m) is not overridden"
    known = {hyper.name for hyper in spec.hyper}
    unknown = set(kind.for_length(8, 8)) - known
    if unknown:
        yield f"for_length returns {sorted(unknown)}, which are no hyper-parameters"


CHECKS = (spec_is_filled, has_its_methods, refuses_other_patterns, cost_is_stated)
