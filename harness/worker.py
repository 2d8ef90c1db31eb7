"""The worker process: measures one case after another and answers on its own pipe.

Run as ``python -m attnbench.harness.worker FD SETTINGS``. This is the boundary at which anything that an
impl does is turned into a row: the one place that catches every exception.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from attnbench.harness.timing.host import pin
from attnbench.impls.case import Case
from attnbench.results.schema import Status

MEMORY_SHARE = 0.85
"""Share of the free memory that a CPU worker may take before its allocations fail: an impl that eats
memory then ends as ``oom`` instead of taking the machine down."""


def main() -> None:
    """Announce the environment, then answer one question a line until the driver closes the pipe."""
    out = os.fdopen(int(sys.argv[1]), "wb", buffering=0)
    settings = json.loads(sys.argv[2])
    device = settings["device"]
    _limit_memory(device)
    pin(settings["threads"])  # before torch starts its threads, which inherit the binding
    from attnbench.harness.environment import capture
    from attnbench.harness.measure import Measurer

    measurer = Measurer(settings)
    gc.freeze()  # what is imported by now is not garbage: collections between cases need not walk it
    _send(out, {"kind": "ready", "environment": capture(device)})
    for line in sys.stdin:
        case = Case.from_json(json.loads(line)["case"])
        row = _guarded(case, measurer, lambda message: _send(out, message))
        _send(out, {"kind": "row", "row": row})
        if row.get("poisoned"):  # a CUDA context is dead after a sticky error: the next case needs a new one
            return


def _guarded(case: Case, measurer: Any, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure, and name the status of whatever was raised."""
    from attnbench.impls.base import UnsupportedPattern
    from attnbench.kernels import Unsupported

    try:
        return dict(measurer.measure(case, send))
    except (Unsupported, UnsupportedPattern) as error:
        return {"status": Status.UNSUPPORTED, "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"status": status_of(error), "reason": _first_line(error), "poisoned": measurer.poisoned()}


def status_of(error: BaseException) -> Status:
    """The status that an exception means: memory, compilation, or an error of the impl."""
    import torch

    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    memory_words = (
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "cudaErrorMemoryAllocation",
    )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in text for word in memory_words):
        return Status.OOM
    compile_words = (
        "CompilationError",
        "InductorError",
        "BackendCompilerFailed",
        "PTXASError",
        "OutOfResources",
    )
    if any(word in text for word in compile_words):
        return Status.COMPILE_ERROR
    return Status.ERROR


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:500]


def _limit_memory(device: str) -> None:
    """Let allocations of a CPU worker fail before the machine runs out. A CUDA context needs no limit."""
    if device != "cpu" or sys.platform != "linux":
        return
    import psutil

    limit = int(psutil.virtual_memory().available * MEMORY_SHARE)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _send(out: BinaryIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message, allow_nan=False).encode() + b"\n")


if __name__ == "__main__":
    main()
