"""The correctness gate and the fidelity of approximations: how far from the truth, by which yard-stick.

Truth is the mechanism's own reference in fp64 on the same inputs; the yard-stick is that reference in the
dtype under test. For an approximation, the distance to exact softmax attention is a result, not a gate.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], Sequence[Tensor]]
"""Computes the output and, in a direction with a backward, the input gradients after it."""

RATIO_LIMIT_FORWARD, RATIO_LIMIT_GRADIENT = 2.0, 3.0
COSINE_LOSS_LIMIT = {torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float32: 1e-6}
ROUNDING_FLOOR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-6}
"""An error below one rounding of the output is right whatever the yard-stick happens to be."""


@dataclass(frozen=True)
class Error:
    """Distance of one tensor from the truth; errors are relative to the RMS of the truth."""

    rms: float
    max: float
    cosine: float


REPEATED_ROUNDINGS, REPEATED_SPREADS = 16.0, 4.0
"""How far apart two calls on equal inputs may be: so many roundings, or so many times as far as two were."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of the gate: what is wrong in words (empty when right) and the columns it measured.

    ``tolerance`` is how far another output on equal inputs may be from this one, relative to its RMS.
    """

    wrong: str
    columns: dict[str, object]
    tolerance: float = math.inf


def distance(got: Tensor, truth: Tensor, beside_rms: float = 0.0, rounding: float = 0.0) -> Error:
    """Relative RMS and maximal error and cosine of ``got`` against ``truth``, in fp64.

    A truth that vanishes beside the other results (its RMS is at most ``rounding`` of ``beside_rms``) counts
    as zero: the error is then relative to ``beside_rms``, and the cosine, which would compare rounding
    noise, is 1. Two all-zero tensors are equal.
    """
    x, t = got.double().flatten(), truth.double().flatten()
    rms_truth = _rms(t)
    difference = x - t
    rms, largest = _rms(difference), difference.abs().max().item()
    if rms_truth <= rounding * beside_rms:
        scale = beside_rms or 1.0
        return Error(rms / scale, largest / scale, 1.0 if beside_rms or rms == 0.0 else 0.0)
    norm = x.norm().item() * t.norm().item()
    cosine = float(x @ t) / norm if norm > 0 else 0.0
    return Error(rms / rms_truth, largest / rms_truth, cosine)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def gate(
    got: Sequence[Tensor],
    again: Sequence[Tensor],
    truth: Sequence[Tensor],
    yard: Sequence[Tensor],
    like: Sequence[Tensor] | None = None,
) -> Verdict:
    """Judge an output and its gradients: shape, dtype, finiteness, then error by the yard-stick.

    ``again`` is a second call on equal inputs, for ``bitwise_equal``; ``got[0]`` is the output. ``like`` are
    tensors of the right shape, dtype and device, by default those of the yard-stick.
    """
    names = ["output"] + [f"gradient {i}" for i in range(1, len(got))]
    columns: dict[str, object] = {
        "bitwise_equal": all(torch.equal(a, b) for a, b in zip(got, again, strict=True)),
        "truth_dtype": str(truth[0].dtype).removeprefix("torch."),
    }
    for name, tensor, other, right in zip(names, got, again, like or yard, strict=True):
        wrong = _misshapen(name, tensor, right)
        if not wrong and not (tensor.isfinite().all() and other.isfinite().all()):
            wrong = f"{name} is not finite"
        if wrong:
            return Verdict(wrong, columns)
    dtype = got[0].dtype
    # a gradient that vanishes beside the others (a softmax over one key) is rounding, not a value
    beside, rounding = max(_rms(t.double()) for t in truth), ROUNDING_FLOOR.get(dtype, 1e-12)
    errors = [distance(a, t, beside, rounding) for a, t in zip(got, truth, strict=True)]
    yards = [distance(a, t, beside, rounding) for a, t in zip(yard, truth, strict=True)]
    ratios = [_ratio(e.rms, y.rms) for e, y in zip(errors, yards, strict=True)]
    columns |= {
        "err_rms": errors[0].rms,
        "err_max": errors[0].max,
        "err_ratio": ratios[0],
        "cosine": errors[0].cosine,
    }
    if len(errors) > 1:
        columns |= {"grad_err_rms": max(e.rms for e in errors[1:]), "grad_err_ratio": max(ratios[1:])}
    spread = distance(again[0], got[0]).rms
    tolerance = max(REPEATED_ROUNDINGS * ROUNDING_FLOOR.get(dtype, 1e-12), REPEATED_SPREADS * spread)
    return Verdict(_judge(names, errors, yards, ratios, dtype), columns, tolerance)


def unlike(output: Tensor, known: Tensor, tolerance: float) -> str:
    """What is wrong when the output of a later call is not that of an earlier one on equal inputs."""
    misshapen = _misshapen("the output of a later call", output, known)
    if misshapen:
        return misshapen
    apart = distance(output, known).rms
    if math.isfinite(apart) and apart <= tolerance:
        return ""
    return (
        f"the output of a later call is {apart:.3g} from that of an earlier one on equal inputs, "
        f"limit {tolerance:.3g}"
    )


def sharing(got: Tensor, again: Tensor, given: Sequence[Tensor]) -> str:
    """What is wrong when an output lies in the memory of an input, or two outputs in the same memory."""
    here = got.untyped_storage().data_ptr()
    for index, x in enumerate(given):
        if here and x.untyped_storage().data_ptr() == here:
            return f"the output is a view of input {index}"
    if here and again.untyped_storage().data_ptr() == here:
        return "two calls return the same memory: the second overwrites the output of the first"
    return ""


def _judge(
    names: list[str], errors: list[Error], yards: list[Error], ratios: list[float], dtype: torch.dtype
) -> str:
    floor = ROUNDING_FLOOR.get(dtype, 1e-12)
    for i, (name, error, yard, ratio) in enumerate(zip(names, errors, yards, ratios, strict=True)):
        limit = RATIO_LIMIT_FORWARD if i == 0 else RATIO_LIMIT_GRADIENT
        if error.rms > floor and ratio > limit:
            return (
                f"{name}: error {error.rms:.3g} is {ratio:.3g} times that of a plain {dtype} reference, "
                f"limit {limit}"
            )
        loss, allowed = 1.0 - error.cosine, COSINE_LOSS_LIMIT.get(dtype, 1e-10)
        if error.rms > floor and loss > max(allowed, 4.0 * (1.0 - yard.cosine)):
            return f"{name}: cosine with the truth is 1 - {loss:.3g}, limit 1 - {allowed:.0e}"
    return ""


def _misshapen(name: str, got: Tensor, right: Tensor) -> str:
    for what in ("shape", "dtype", "device"):
        observed, expected = getattr(got, what), getattr(right, what)
        if observed != expected:
            return f"{name} has {what} {_text(observed)}, expected {_text(expected)}"
    return ""


def _text(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def _ratio(error: float, yard: float) -> float:
    """Error over yard-stick; 1 when they are equal. Infinity cannot be stored: the quotient is capped."""
    return 1.0 if error == yard else min(error / max(yard, 1e-300), 1e300)


def fidelity(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """(relative RMS error, cosine) of an approximation against exact softmax attention."""
    error = distance(got, exact)
    if not (math.isfinite(error.rms) and math.isfinite(error.cosine)):
        raise FloatingPointError("the output is not finite on these inputs")
    return error.rms, error.cosine


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every uninitialised allocation with NaN inside the block, so that reading one shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # torch.use_deterministic_algorithms does this too, and imports the whole compiler: 2 s in every worker
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
