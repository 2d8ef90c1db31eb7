"""The CPU as a device: the clock, an eviction of the last-level cache, and the operators that ran."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnbench.harness.timing.compiles import CompileCounter
from attnbench.harness.timing.device import Call, Trace
from attnbench.harness.timing.host import CpuHealth, Host

DEFAULT_CACHE_BYTES: Final = 64 << 20
"""Assumed last-level cache where the machine does not tell."""

NO_WORK: Final = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift_fresh")
"""Operators that compute nothing; views compute nothing either."""


class _Operators(TorchDispatchMode):
    """Collects the operators that reach the kernels, below autograd, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition(".")[0]
        if not func.is_view and not name.startswith(NO_WORK):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class CpuDevice:
    """The CPUs of this machine. ``clock_ns`` and ``host`` are replaced in tests."""

    name = "cpu"
    kind = "cpu"
    bandwidth_bytes_per_s = None

    def __init__(self, host: Host | None = None, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._host = host or Host()
        self._clock_ns = clock_ns
        self._cache_bytes = self._host.last_level_cache_bytes() or DEFAULT_CACHE_BYTES
        self._evict: torch.Tensor | None = None
        self._compiles = CompileCounter(triton=False)

    def now_ns(self) -> int:
        """``time.perf_counter_ns``."""
        return self._clock_ns()

    def synchronize(self) -> None:
        """Nothing: a call has run when it returns."""

    def flush(self) -> None:
        """Read and write a buffer of twice the last-level cache."""
        if self._evict is None:
            self._evict = torch.zeros(2 * self._cache_bytes // 4)
        self._evict.add_(1.0)

    def probe(self) -> tuple[Call, int]:
        """A sum over half a last-level cache, and its size in bytes."""
        data = torch.ones(self._cache_bytes // 8)
        return data.sum, data.nbytes

    def compilations(self) -> int:
        """Graphs that torch.compile made."""
        return self._compiles.count()

    def trace(self, call: Call) -> Trace:
        """Run ``call`` and name its operators; a CPU has no kernels and nothing to wait for."""
        with _Operators() as operators:
            call()
        return Trace(tuple(operators.names), 0)

    def health(self) -> CpuHealth:
        """Steal, load, context switches and affinity."""
        return self._host.health(torch.get_num_threads(), self._clock_ns() * 1e-9)

    def healthy(self) -> bool:
        """Always: a CPU that fails ends the process."""
        return True
