"""The worker process: measures one case after another and answers on its own pipe.

Run as ``python -m attnbench.harness.worker FD`` with settings and then questions on its standard input. This
is the boundary at which anything that an impl does is turned into a row: the one place that catches
everything.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from attnbench.harness.containment import children, contain
from attnbench.harness.flags import Flag
from attnbench.harness.timing.host import pin
from attnbench.impls.case import Case
from attnbench.results.schema import Status

MEMORY_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "cudaerrormemoryallocation",
)
COMPILE_WORDS = (
    "CompilationError",
    "InductorError",
    "BackendCompilerFailed",
    "PTXASError",
    "OutOfResources",
)
REASON_CHARACTERS = 500


class Channel:
    """The pipe of answers.

    Each carries the token that only driver and worker know and the question's number, so that nothing an impl
    writes into the pipe passes for an answer. Whether it is a valid row, the driver decides.
    """

    def __init__(self, descriptor: int, token: str) -> None:
        self._descriptor, self._token = descriptor, token
        self._process = os.getpid()
        self.question = 0

    def send(self, message: dict[str, Any]) -> None:
        """Write one answer. A process that an impl forked has none to give: it ends here."""
        if os.getpid() != self._process:
            os._exit(1)
        whole = {**message, "token": self._token, "question": self.question}
        line = memoryview(json.dumps(whole, default=repr).encode() + b"\n")
        while line:
            line = line[os.write(self._descriptor, line) :]


def main() -> None:
    """Announce the environment, then answer one question a line until the driver closes the pipe."""
    questions = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - what an impl reads is no question
        os.dup2(nothing.fileno(), 0)
    settings = json.loads(questions.readline())
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    channel = Channel(descriptor, settings["token"])
    device = settings["device"]
    contain(device)
    pin(settings["threads"])  # before torch starts its threads, which inherit the binding
    from attnbench.harness.environment import capture
    from attnbench.harness.measure import Measurer

    measurer = Measurer(settings)
    gc.freeze()  # what is imported by now is not garbage: collections between cases need not walk it
    channel.send({"kind": "ready", "environment": capture(device)})
    for line in questions:
        question = json.loads(line)
        channel.question = question["number"]
        row = _guarded(Case.from_json(question["case"]), measurer, channel.send)
        channel.send({"kind": "row", "row": _with_leaks(row)})


def _guarded(case: Case, measurer: Any, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure, and name the status of whatever was raised, a request to leave the process included."""
    from attnbench.impls.base import UnsupportedPattern
    from attnbench.kernels import Unsupported

    try:
        return dict(measurer.measure(case, send))
    except (Unsupported, UnsupportedPattern) as error:
        return {"status": Status.UNSUPPORTED, "reason": text_of(error)}
    except BaseException as error:
        traceback.print_exc()
        return {"status": status_of(error), "reason": _first_line(error), "poisoned": measurer.poisoned()}


def _with_leaks(row: dict[str, Any]) -> dict[str, Any]:
    """The row, flagged when processes of the impl still run; the driver ends them with the worker."""
    left = children()
    if not left:
        return row
    flag = Flag("leaked_processes", f"{left} processes outlive the case", "0")
    return {**row, "flags": [*row.get("flags", ()), flag.text]}


def status_of(error: BaseException) -> Status:
    """The status that an exception means: memory, compilation, or an error of the impl."""
    import torch

    text = f"{type(error).__module__}.{type(error).__name__}: {text_of(error)}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM:
        return Status.OOM
    if any(word in text.lower() for word in MEMORY_WORDS):
        return Status.OOM
    if any(word in text for word in COMPILE_WORDS):
        return Status.COMPILE_ERROR
    return Status.ERROR


def text_of(error: BaseException) -> str:
    """What an exception says; that it says nothing where it cannot even be shown."""
    try:
        return str(error)
    except Exception:
        return "its message cannot be shown"


def _first_line(error: BaseException) -> str:
    lines = text_of(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:REASON_CHARACTERS]


if __name__ == "__main__":
    main()
