"""Which backends exist here, on this device, for this dtype, and why not; and the dispatch of an op to one.

A backend never falls back: asked for by name, it computes or raises :class:`Unsupported`. Only ``"auto"``
chooses, and :func:`recording` tells what ran.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch


class Unsupported(RuntimeError):
    """A backend cannot serve a call: what was asked, what was observed, what would have been accepted."""

    def __init__(self, what: str, observed: object, expected: str) -> None:
        super().__init__(f"{what}: observed {observed}, expected {expected}")
        self.what, self.observed, self.expected = what, observed, expected


@dataclass(frozen=True)
class Support:
    """Whether something can run, and the reason when it cannot. True in a boolean context when it can."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Support(True)


@dataclass(frozen=True)
class Requirement:
    """What a backend needs: a device type, a library, or both."""

    devices: tuple[str, ...] = ()  # empty: any
    library: str | None = None


REQUIREMENTS: Mapping[str, Requirement] = {
    "reference": Requirement(),
    "torch": Requirement(),
    "triton": Requirement(devices=("cuda",), library="triton"),
    "sdpa_math": Requirement(),
    "sdpa_flash": Requirement(),
    "sdpa_efficient": Requirement(devices=("cuda",)),
    "sdpa_cudnn": Requirement(devices=("cuda",)),
    "flex": Requirement(),
    "flash_attn": Requirement(devices=("cuda",), library="flash_attn"),
    "flash_attn3": Requirement(devices=("cuda",), library="flash_attn_interface"),
    "flash_attn4": Requirement(devices=("cuda",), library="flash_attn"),
    "xformers": Requirement(devices=("cuda",), library="xformers"),
    "flashinfer": Requirement(devices=("cuda",), library="flashinfer"),
    "sage": Requirement(devices=("cuda",), library="sageattention"),
    "natten": Requirement(library="natten"),
    "fla": Requirement(devices=("cuda",), library="fla"),
    "mamba_ssm": Requirement(devices=("cuda",), library="mamba_ssm"),
}
"""Every backend by name. Order is the order of tables; ours first, then peers."""

OWN = ("reference", "torch", "triton")
"""Backends written in this project; the others are peers."""


def interpreting() -> bool:
    """Whether Triton runs in its interpreter in this process (correct and very slow; no GPU needed)."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def available(backend: str, device: str, dtype: torch.dtype | None = None) -> Support:
    """Whether ``backend`` can run on ``device`` ("cpu", "cuda") at all, before looking at shapes."""
    need = REQUIREMENTS.get(backend)
    if need is None:
        return Support(False, f"unknown backend {backend!r}; known: {', '.join(REQUIREMENTS)}")
    kind = torch.device(device).type
    if need.library and importlib.util.find_spec(need.library) is None:
        return Support(False, f"{backend} needs the library {need.library}, which is not installed")
    if backend == "triton" and interpreting():
        if dtype is torch.bfloat16:
            return Support(
                False, "triton under its interpreter: observed bfloat16, expected float16 or float32"
            )
        return YES
    if need.devices and kind not in need.devices:
        return Support(False, f"{backend} runs on {' or '.join(need.devices)}: observed device {kind}")
    return YES


_used: ContextVar[list[tuple[str, str]] | None] = ContextVar("attnbench_used_backends", default=None)


@contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Collect the (op, backend) pairs that run inside the block, in order, for the row's provenance."""
    used: list[tuple[str, str]] = []
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


class Op:
    """An operation: its name and its backends as lazily imported ``"module:function"`` targets.

    ``auto`` lists, per device type, the backends that ``backend="auto"`` tries in order; the first that
    does not raise :class:`Unsupported` computes the call.
    """

    def __init__(self, name: str, backends: Mapping[str, str], auto: Mapping[str, tuple[str, ...]]) -> None:
        unknown = set(backends) - set(REQUIREMENTS)
        if unknown:
            raise ValueError(f"op {name}: backends {sorted(unknown)} have no entry in REQUIREMENTS")
        self.name = name
        self._targets = dict(backends)
        self._auto = dict(auto)

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends that this op has, whether or not they can run here."""
        return tuple(name for name in REQUIREMENTS if name in self._targets)

    def function(self, backend: str) -> Callable[..., Any]:
        """Import and return the implementation of one backend; raises Unsupported for an unknown one."""
        target = self._targets.get(backend)
        if target is None:
            raise Unsupported(f"{self.name} backend", repr(backend), f"one of {', '.join(self.backends)}")
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def run(self, backend: str, first: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Compute with ``backend``, or with the first of the automatic order that supports the call."""
        if backend != "auto":
            return self._run_one(backend, first, *args, **options)
        reasons = []
        for name in self._auto.get(first.device.type, ("torch",)):
            try:
                return self._run_one(name, first, *args, **options)
            except Unsupported as why:
                reasons.append(f"{name}: {why}")
        raise Unsupported(
            f"{self.name} with backend 'auto'", "; ".join(reasons), "one backend that can serve it"
        )

    def _run_one(self, backend: str, first: torch.Tensor, *args: Any, **options: Any) -> Any:
        function = self.function(backend)
        support = available(backend, first.device.type, first.dtype)
        if not support:
            raise Unsupported(f"{self.name}/{backend}", support.reason, "a machine that has it")
        result = function(first, *args, **options)
        used = _used.get()
        if used is not None:
            used.append((self.name, backend))
        return result
