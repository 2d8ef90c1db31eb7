"""The work of one call by formula: FLOPs, least traffic, memory. The same for a case measured or modelled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from attnbench.impls import registry
from attnbench.impls.base import Attention
from attnbench.impls.case import Case

ITEM_BYTES: Final = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """Of one call, whole batch: ``flops`` of the mechanism, ``flops_dense`` of softmax attention instead.

    ``moved_bytes`` counts inputs and output once each (with a backward: and their gradients). ``extra_bytes``
    is what the mechanism needs beyond inputs, output and parameters.
    """

    flops: int
    flops_dense: int
    moved_bytes: int
    extra_bytes: int
    inputs_bytes: int
    output_bytes: int


def work_of(case: Case, module: Attention, inputs_bytes: int | None = None) -> Work:
    """The work of ``case`` for ``module``, which was built for it. Reads no tensor: any device, meta too.

    ``inputs_bytes`` is the size of the inputs where they exist; else it follows from the shapes of the case.
    """
    batch, backward = case.workload.batch, case.direction == "fwd_bwd"
    grids: dict[str, Any] = {"grid": case.grid or None, "grid_kv": case.grid_kv or None}
    core = batch * module.cost("flops", case.n, case.m, **grids)
    whole = batch * module.cost("layer_flops", case.n, case.m, **grids) if case.scope == "layer" else core
    recomputes = "flash" in registry.spec(case.mechanism).ops_for(case.pattern)
    dense = 4 * batch * case.workload.heads * dense_pairs(case) * case.workload.head_dim
    inputs = inputs_bytes
    if inputs is None:
        inputs = sum(math.prod(shape) for shape in input_shapes(case)) * ITEM_BYTES[case.dtype]
    output = math.prod(input_shapes(case)[0]) * ITEM_BYTES[case.dtype]
    return Work(
        flops=with_backward(core, recomputes, backward) + with_backward(whole - core, False, backward),
        flops_dense=with_backward(dense, True, backward),
        moved_bytes=(1 + backward) * (inputs + output),
        extra_bytes=batch * module.cost("extra_bytes", case.n, case.m, ITEM_BYTES[case.dtype], **grids),
        inputs_bytes=inputs,
        output_bytes=output,
    )


def input_shapes(case: Case) -> tuple[tuple[int, ...], ...]:
    """q, k, v of an operation; x, and the context in a cross pattern, of a layer."""
    w = case.workload
    if case.scope == "op":
        key = (w.batch, w.kv_heads, case.m, w.head_dim)
        return (w.batch, w.heads, case.n, w.head_dim), key, key
    lengths = (case.n, case.m) if case.pattern in ("NC", "CC") else (case.n,)
    return tuple((w.batch, length, w.width) for length in lengths)


def with_backward(forward: int, recomputes: bool, backward: bool) -> int:
    """Forward FLOPs, and with a backward 2 more times them, or 2.5 where it recomputes the scores."""
    if not backward:
        return forward
    return forward * 7 // 2 if recomputes else forward * 3


def dense_pairs(case: Case) -> int:
    """(query, key) pairs that softmax attention visits per head; causal is aligned at the last token."""
    n, m = case.n, case.m
    if case.pattern != "CS":
        return n * m
    return n * m - n * (n - 1) // 2 if m >= n else m * (m + 1) // 2
