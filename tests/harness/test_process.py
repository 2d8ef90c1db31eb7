"""The driver's side of a worker, against scripts that speak its protocol badly, without torch."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from attnbench.errors import AttnbenchError
from attnbench.harness import process
from attnbench.harness.process import Answer, WorkerProcess, death_reason

SPEAKER = """\
#!{python}
import json, os, signal, sys, time
fd = int(sys.argv[3])
settings = json.loads(sys.stdin.readline())
number = 0

def say(message, **changes):
    whole = {{**message, "token": settings["token"], "question": number, **changes}}
    os.write(fd, json.dumps(whole).encode() + b"\\n")

say({{"kind": "ready", "environment": {{}}}})
for line in sys.stdin:
    number = json.loads(line)["number"]
{body}
"""

Start = Callable[[str], WorkerProcess]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Start a worker that does what ``body`` says with every question."""
    started: list[WorkerProcess] = []
    monkeypatch.setattr(process, "TERM_GRACE_S", 1.0)

    def begin(body: str) -> WorkerProcess:
        script = tmp_path / f"speaker{len(started)}"
        script.write_text(
            SPEAKER.format(python=sys.executable, body=textwrap.indent(textwrap.dedent(body), "    "))
        )
        script.chmod(0o755)
        monkeypatch.setattr(process.sys, "executable", str(script))
        started.append(WorkerProcess({"device": "cpu"}, dict(os.environ)))
        assert started[-1].wait_ready().how == "done"
        return started[-1]

    yield begin
    for worker in started:
        worker.close()


def ask(worker: WorkerProcess, limit_s: float = 20.0) -> Answer:
    return worker.ask({"case": {}}, limit_s)


def test_an_answer_comes_with_what_was_sent_before(start: Start) -> None:
    worker = start(
        """
        say({"kind": "partial", "columns": {"flops": number}})
        say({"kind": "row", "row": {"status": "ok"}})
        """
    )
    for number in (1, 2):
        answer = ask(worker)
        assert (answer.how, answer.partial) == ("done", {"flops": number})
        assert answer.message["row"] == {"status": "ok"}


@pytest.mark.parametrize(
    "said",
    [
        'os.write(fd, b"\\x00\\xff no answer\\n")',
        'os.write(fd, b"\\n")',
        'os.write(fd, b"[]\\n")',
        'os.write(fd, b"[" * 60_000 + b"\\n")',
        'os.write(fd, b\'{"kind": "row", "row": {"status": "ok"}}\\n\')',
        'say({"kind": "row", "row": {}}, token="guessed")',
        'say({"kind": "row", "row": {}}, question=number - 1)',
        'say({"kind": "row", "row": {}}, token=None)',
    ],
)
def test_what_is_no_answer_ends_the_worker(start: Start, said: str) -> None:
    worker = start(said)
    answer = ask(worker)
    assert answer.how == "garbled"
    assert "no answer" in death_reason(answer)
    assert not worker.alive


def test_an_endless_line_is_cut_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "ANSWER_LIMIT_BYTES", 1 << 20)
    worker = start('while True: os.write(fd, b"x" * 65536)')
    assert ask(worker).how == "garbled"
    assert len(worker._buffer) <= 2 << 20


def test_endless_progress_does_not_put_off_the_time_limit(start: Start) -> None:
    worker = start('while True: say({"kind": "progress", "done": 1, "total": 2})')
    began = time.monotonic()
    assert ask(worker, 1.0).how == "timeout"
    assert time.monotonic() - began < 10.0


def test_a_worker_that_ignores_the_polite_signal_is_killed(start: Start) -> None:
    worker = start("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)")
    assert ask(worker, 0.5).how == "timeout"
    assert not worker.alive


def test_a_stopped_worker_is_a_timeout(start: Start) -> None:
    assert ask(start("os.kill(os.getpid(), signal.SIGSTOP)"), 0.5).how == "timeout"


def test_a_child_that_holds_the_pipe_does_not_hide_the_death(start: Start) -> None:
    worker = start(
        """
        if os.fork() == 0:
            os.setsid()
            time.sleep(100)
        os._exit(9)
        """
    )
    answer = ask(worker)
    assert (answer.how, answer.returncode) == ("died", 9)
    assert _alive_with(worker._mark) == []


def test_what_left_its_group_dies_with_the_worker(start: Start) -> None:
    worker = start(
        """
        import subprocess
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        say({"kind": "row", "row": {}})
        """
    )
    assert ask(worker).how == "done"
    assert len(_alive_with(worker._mark)) == 2
    worker.close()
    assert _alive_with(worker._mark) == []


def _alive_with(mark: str) -> list[int]:
    found = []
    for one in psutil.process_iter(["environ", "status"]):
        if (one.info["environ"] or {}).get(process.MARK) == mark and one.info["status"] != "zombie":
            found.append(one.pid)
    return found


@pytest.mark.parametrize(("share", "seen"), [(1.0, False), (0.3, True), (2.0, True)])
def test_the_clock_of_a_worker_is_compared_with_the_drivers(start: Start, share: float, seen: bool) -> None:
    worker = start(
        f"""
        begin = time.monotonic()
        say({{"kind": "clock", "seconds": 5.0}})
        time.sleep(0.6)
        say({{"kind": "clock", "seconds": 5.0 + {share} * (time.monotonic() - begin)}})
        say({{"kind": "row", "row": {{}}}})
        """
    )
    assert bool(ask(worker).clock) is seen


def test_a_worker_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process.sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(AttnbenchError, match="could not start: No such file"):
        WorkerProcess({}, {})
