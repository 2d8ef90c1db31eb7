"""A worker process seen from the driver: start it, ask it, give up on it, learn how it died.

A worker answers on a pipe of its own, with a token in every answer, so nothing that an impl prints or writes
can be taken for one. It runs in its own session; with it ends whatever the impl started.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic  # bound here: the driver imports the files of users
from typing import Any

from psutil import Process

from attnbench.errors import AttnbenchError
from attnbench.harness.containment import MARK, descendants, end_family

PACKAGE = Path(__file__).resolve().parent.parent
LOG_TAIL_BYTES = 4096
ANSWER_LIMIT_BYTES = 16 << 20
"""A longer answer is none: the driver keeps no more of one."""

TERM_GRACE_S = 5.0
START_LIMIT_S = 300.0
POLL_S = 0.2
"""How often a silent worker is looked at: a child may hold its pipe open after it died."""

CLOCK_SHARE, CLOCK_SLACK_S = 0.2, 0.1
"""How far the worker's clock may be from the driver's, relative and absolute: a message may be late."""


@dataclass(frozen=True)
class Answer:
    """What came of a question: the final message, or how the worker failed to give one.

    ``partial`` holds the columns that the worker sent before; ``how`` is ``done``, ``timeout``, ``died`` or
    ``garbled``: something that is no answer came out of the pipe. ``clock`` says how the worker's clock ran
    when it did not run like the driver's.
    """

    how: str
    message: dict[str, Any]
    partial: dict[str, Any]
    returncode: int | None = None
    out_of_memory: bool = False
    clock: str = ""


def without_paths(text: str) -> str:
    """The last 4 KiB of a log, without the paths of this machine: rows are published."""
    return text.replace(str(PACKAGE), "attnbench").replace(str(Path.home()), "~")[-LOG_TAIL_BYTES:]


def printable(text: str) -> str:
    """The text without what would control a terminal or is no Unicode: an impl wrote it, others read it."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@dataclass
class _Clocks:
    """The worker's clock against the driver's, from pairs of their readings."""

    first: tuple[float, float] | None = None
    last: tuple[float, float] = (0.0, 0.0)

    def add(self, worker_s: float) -> None:
        self.last = (worker_s, monotonic())
        self.first = self.first or self.last

    def disagree(self) -> str:
        if self.first is None:
            return ""
        worker, driver = (now - then for now, then in zip(self.last, self.first, strict=True))
        if abs(worker - driver) <= CLOCK_SHARE * driver + CLOCK_SLACK_S:
            return ""
        return f"{worker:.3f} s passed on the worker's clock while {driver:.3f} s passed on the driver's"


@dataclass
class _Asked:
    """One question: its number, the kind of message that answers it, and what came of it so far."""

    number: int
    kind: str
    deadline: float
    partial: dict[str, Any] = field(default_factory=dict)
    clocks: _Clocks = field(default_factory=_Clocks)


class WorkerProcess:
    """One fresh process running :mod:`attnbench.harness.worker`."""

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        read_fd, write_fd = os.pipe()
        self._answers = os.fdopen(read_fd, "rb", buffering=0)
        self._buffer = b""
        self._tail = b""
        self._oom_kills = _oom_kills()
        self._token, self._mark = secrets.token_hex(16), secrets.token_hex(16)
        self._questions = 0
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "attnbench.harness.worker", str(write_fd)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(write_fd,),
                start_new_session=True,
                env={**environment, MARK: self._mark},
            )
        except OSError as error:
            self._answers.close()
            raise AttnbenchError(f"a worker process could not start: {error.strerror}") from error
        finally:
            os.close(write_fd)
        self._reader = threading.Thread(target=self._keep_tail, daemon=True)
        self._reader.start()
        self._write({**settings, "token": self._token})

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def log_tail(self) -> str:
        """The last 4 KiB that the worker printed, without the paths of this machine."""
        return printable(without_paths(self._tail.decode("utf-8", "replace")))

    def wait_ready(self) -> Answer:
        """Wait for the worker's first message: its environment. Its imports happen here, not in a case."""
        return self._await(_Asked(0, "ready", monotonic() + START_LIMIT_S))

    def ask(
        self,
        question: Mapping[str, Any],
        limit_s: float,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> Answer:
        """Send one question and wait at most ``limit_s`` for its answer; a worker that overruns is killed."""
        self._questions += 1
        asked = _Asked(self._questions, "row", monotonic() + limit_s)
        if not self._write({**question, "number": asked.number}):
            return self._dead(asked)
        return self._await(asked, on_progress)

    def close(self) -> None:
        """End the worker and everything it started, at once if it does not leave by itself."""
        started = descendants(self._process.pid) if self.alive else ()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(TERM_GRACE_S)
        self._end(started)
        self._reader.join(TERM_GRACE_S)
        self._answers.close()

    # ---- inside ----------------------------------------------------------------------------------------

    def _write(self, message: Mapping[str, Any]) -> bool:
        """Send one line; whether there was somebody to read it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(message)).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def _await(self, asked: _Asked, on_progress: Callable[[dict[str, Any]], None] | None = None) -> Answer:
        while True:
            line = self._read_line(asked.deadline)
            if line is None:
                return self._overrun(asked)
            if line == b"":
                return self._dead(asked)
            message = self._message(line, asked.number)
            if message is None:
                self._end()
                return Answer("garbled", {}, asked.partial, self._process.wait())
            if message["kind"] == asked.kind:
                return Answer("done", message, asked.partial, clock=asked.clocks.disagree())
            if message["kind"] == "partial":
                asked.partial.update(message["columns"])
            elif message["kind"] == "clock":
                asked.clocks.add(message["seconds"])
            elif on_progress is not None:
                on_progress(message)

    def _message(self, line: bytes, number: int) -> dict[str, Any] | None:
        """The message of a line, None when the worker cannot have meant it for this question."""
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict):
            return None
        return found if (found.get("token"), found.get("question")) == (self._token, number) else None

    def _read_line(self, deadline: float) -> bytes | None:
        """The next line; empty when no more will come, None when the deadline passed."""
        while b"\n" not in self._buffer and len(self._buffer) <= ANSWER_LIMIT_BYTES:
            ended = not self.alive  # before looking: what it wrote before it ended is still to be read
            left = deadline - monotonic()
            if left <= 0:
                return None
            if not select.select([self._answers], [], [], 0 if ended else min(left, POLL_S))[0]:
                if ended:
                    return b""
                continue
            received = self._answers.read(1 << 16)
            if not received:
                return b""
            self._buffer += received
        if monotonic() >= deadline:
            return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line or b"\n"

    def _overrun(self, asked: _Asked) -> Answer:
        started = descendants(self._process.pid) if self.alive else ()
        self._kill_group(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(TERM_GRACE_S)
        self._end(started)
        return Answer("timeout", {}, asked.partial, self._process.wait())

    def _dead(self, asked: _Asked) -> Answer:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed its pipe and live on
            self._process.wait(TERM_GRACE_S)
        self._end()
        code = self._process.wait()
        self._reader.join(TERM_GRACE_S)
        killed_for_memory = code == -signal.SIGKILL and _oom_kills() > self._oom_kills
        return Answer("died", {}, asked.partial, code, killed_for_memory)

    def _end(self, started: Iterable[Process] = ()) -> None:
        """Kill what is left of the worker and of what it ``started``."""
        known = [*started, *(descendants(self._process.pid) if self.alive else ())]
        end_family(self._process.pid, self._mark, known)
        self._process.wait()

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
    if answer.how == "garbled":
        return "something that is no answer was written into the pipe of answers; the worker was ended"
    code = answer.returncode
    if code is not None and code < 0:
        return f"the worker process was killed by {signal.Signals(-code).name}"
    return f"the worker process exited with code {code} in the middle of the case"


def _oom_kills() -> int:
    """How many processes of this control group, or else of this machine, the kernel has killed for memory."""
    files = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat")
    for path in files:
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
