"""A worker process seen from the driver: start it, ask it, give up on it, learn how it died.

A worker answers on a pipe of its own, so nothing that an impl prints can be taken for an answer. It runs in
its own session: a time limit kills the whole process group, children of the impl included.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
LOG_TAIL_BYTES = 4096
TERM_GRACE_S = 5.0
START_LIMIT_S = 300.0


@dataclass(frozen=True)
class Answer:
    """What came of a question: the final message, or how the worker failed to give one.

    ``partial`` holds the columns that the worker sent before; ``how`` is ``done``, ``timeout`` or ``died``.
    """

    how: str
    message: dict[str, Any]
    partial: dict[str, Any]
    returncode: int | None = None
    out_of_memory: bool = False


def without_paths(text: str) -> str:
    """The last 4 KiB of a log, without the paths of this machine: rows are published."""
    return text.replace(str(PACKAGE), "attnbench").replace(str(Path.home()), "~")[-LOG_TAIL_BYTES:]


class WorkerProcess:
    """One fresh process running :mod:`attnbench.harness.worker`."""

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        read_fd, write_fd = os.pipe()
        self._answers = os.fdopen(read_fd, "rb", buffering=0)
        self._buffer = b""
        self._tail = b""
        self._oom_kills = _oom_kills()
        command = [
            sys.executable,
            "-m",
            "attnbench.harness.worker",
            str(write_fd),
            json.dumps(dict(settings)),
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write_fd,),
            start_new_session=True,
            env=dict(environment),
        )
        os.close(write_fd)
        self._reader = threading.Thread(target=self._keep_tail, daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def log_tail(self) -> str:
        """The last 4 KiB that the worker printed, without the paths of this machine."""
        return without_paths(self._tail.decode("utf-8", "replace"))

    def wait_ready(self) -> Answer:
        """Wait for the worker's first message: its environment. Its imports happen here, not in a case."""
        return self._await("ready", START_LIMIT_S)

    def ask(
        self,
        question: Mapping[str, Any],
        limit_s: float,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> Answer:
        """Send one question and wait at most ``limit_s`` for its answer; a worker that overruns is killed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(question)).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._dead({})
        return self._await("row", limit_s, on_progress)

    def close(self) -> None:
        """End the worker and everything it started, at once if it does not leave by itself."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(TERM_GRACE_S)
        self._kill_group(signal.SIGKILL)
        self._process.wait()
        self._reader.join(TERM_GRACE_S)
        self._answers.close()

    # ---- inside ----------------------------------------------------------------------------------------

    def _await(
        self, kind: str, limit_s: float, on_progress: Callable[[dict[str, Any]], None] | None = None
    ) -> Answer:
        deadline = time.monotonic() + limit_s
        partial: dict[str, Any] = {}
        while True:
            line = self._read_line(deadline)
            if line is None:
                return self._overrun(partial)
            if line == b"":
                return self._dead(partial)
            message = json.loads(line)
            if message["kind"] == kind:
                return Answer("done", message, partial)
            if message["kind"] == "partial":
                partial.update(message["columns"])
            elif on_progress is not None:
                on_progress(message)

    def _read_line(self, deadline: float) -> bytes | None:
        """The next answer; empty when the worker closed its pipe, None when the deadline passed."""
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                return None
            received = self._answers.read(1 << 16)
            if not received:
                return b""
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _overrun(self, partial: dict[str, Any]) -> Answer:
        self._kill_group(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(TERM_GRACE_S)
        self._kill_group(signal.SIGKILL)
        return Answer("timeout", {}, partial, self._process.wait())

    def _dead(self, partial: dict[str, Any]) -> Answer:
        try:
            code = self._process.wait(TERM_GRACE_S)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives on: it cannot be asked any more
            self._kill_group(signal.SIGKILL)
            code = self._process.wait()
        self._reader.join(TERM_GRACE_S)
        killed_for_memory = code == -signal.SIGKILL and _oom_kills() > self._oom_kills
        return Answer("died", {}, partial, code, killed_for_memory)

    def _kill_group(self, sign: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, sign)

    def _keep_tail(self) -> None:
        """Drain what the worker prints, however much, keeping the end of it."""
        assert self._process.stdout is not None
        while received := self._process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            self._tail = (self._tail + received)[-LOG_TAIL_BYTES:]


def death_reason(answer: Answer) -> str:
    """How a worker died, in words: the signal by name, or the exit code."""
    code = answer.returncode
    if code is not None and code < 0:
        return f"the worker process was killed by {signal.Signals(-code).name}"
    return f"the worker process exited with code {code} in the middle of the case"


def _oom_kills() -> int:
    """How many processes of this control group the kernel has killed for memory; 0 where it does not say."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
