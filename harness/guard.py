"""What an impl must leave alone: the functions that measure it, and the settings it is measured under.

It shares a process with the harness, which cannot stop it; but what it replaced or changed is seen
afterwards, and the row says so.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

from attnbench.harness.flags import Flag

CLOCKS: Final = (
    "perf_counter",
    "perf_counter_ns",
    "monotonic",
    "monotonic_ns",
    "process_time",
    "thread_time",
)
WATCHED: Final[tuple[tuple[Any, tuple[str, ...]], ...]] = (
    (sys.modules["time"], CLOCKS),
    (torch, ("equal", "get_rng_state")),
    (torch.Tensor, ("isfinite", "double", "norm", "clone", "copy_", "neg_")),
    (torch.cuda, ("synchronize", "Event", "Stream", "_sleep", "max_memory_allocated", "memory_allocated")),
    (torch.cuda.Event, ("elapsed_time", "record", "query")),
)
"""Functions of other modules on which a measurement rests; of our own every one is watched."""

OURS: Final = ("attnbench.harness.", "attnbench.results.")


class Guard:
    """Remembers how things are before an impl is loaded."""

    def __init__(self) -> None:
        self._functions = dict(_functions())
        self._settings = {name: get() for name, (get, _) in _SETTINGS.items()}

    def replaced(self) -> str:
        """What is wrong when a function was replaced since; empty when none was."""
        now = dict(_functions())
        names = [name for name, function in self._functions.items() if now.get(name) is not function]
        if not names:
            return ""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"it replaced functions that measure it: {', '.join(names[:3])}{more}"

    def changed(self) -> tuple[Flag, ...]:
        """``changed_settings`` with those that are not as before; they are put back."""
        seen = []
        for name, before in self._settings.items():
            get, put = _SETTINGS[name]
            now = get()
            if now != before:
                seen.append(f"{name} {now}")
                put(before)
        return (Flag("changed_settings", ", ".join(seen), "as before"),) if seen else ()


def random_state() -> tuple[bytes, ...]:
    """The state of torch's global generators. Those of a device that is not in use are left out."""
    states = [_get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return tuple(state.numpy().tobytes() for state in states)


_get_rng_state = torch.get_rng_state


def _functions() -> Iterator[tuple[str, Any]]:
    for owner, names in WATCHED:
        for name in names:
            yield (
                f"{getattr(owner, '__qualname__', owner.__name__)}.{name}",
                inspect.getattr_static(owner, name),
            )
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(OURS):
            yield from _defined(module_name, vars(module))


def _defined(prefix: str, names: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Functions and classes, with the functions of classes, that a module of ours defines or imports."""
    for name, value in list(names.items()):
        if inspect.isclass(value) and value.__module__.startswith(OURS):
            yield f"{prefix}.{name}", value
            methods = {key: method for key, method in vars(value).items() if inspect.isfunction(method)}
            yield from ((f"{prefix}.{name}.{key}", method) for key, method in methods.items())
        elif inspect.isroutine(value):
            yield f"{prefix}.{name}", value


def _folder() -> str:
    with contextlib.suppress(FileNotFoundError):
        return str(Path.cwd())
    return "nowhere"


def _switch(on: bool, enable: Callable[[], None], disable: Callable[[], None]) -> None:
    if on:
        enable()
    else:
        disable()


def _affinity() -> tuple[int, ...]:
    return tuple(sorted(_get_affinity(0)))


_get_affinity: Callable[[int], set[int]] = getattr(os, "sched_getaffinity", lambda pid: set())
_set_affinity: Callable[[int, tuple[int, ...]], None] = getattr(
    os, "sched_setaffinity", lambda pid, cpus: None
)

_SETTINGS: Final[dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]] = {
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "CPUs": (_affinity, lambda cpus: _set_affinity(0, cpus)),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradients": (torch.is_grad_enabled, torch._C._set_grad_enabled),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        lambda on: torch._C._set_deterministic_algorithms(on, warn_only=False),
    ),
    "matrix product precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "garbage collection": (gc.isenabled, lambda on: _switch(on, gc.enable, gc.disable)),
    "folder": (_folder, os.chdir),
}
"""Settings of the process: how to read each, and how to put it back."""
