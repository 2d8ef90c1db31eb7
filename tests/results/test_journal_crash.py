"""The journal under ``kill -9``, a full disk and a failing one: what was acknowledged stays."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from attnbench import AttnbenchError, AttnbenchWarning
from attnbench.results.journal import Journal, read_journal


def opened(path):
    return Journal.open(path, run_id="run-a", config={"impl": ["all"], "seed": 0})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "journal.jsonl"


APPENDER = textwrap.dedent(
    """
    import json, sys
    from attnbench.results.journal import Journal
    row = json.loads(sys.argv[2])
    with Journal.open(sys.argv[1], run_id="run-a", config={"impl": ["all"], "seed": 0}) as journal:
        block = len(journal.keys())
        while True:
            journal.append({**row, "block": block})
            print(block, flush=True)
            block += 1
    """
)


@pytest.mark.filterwarnings("default::attnbench.AttnbenchWarning")
def test_kill_9_loses_no_acknowledged_row(path, make_row):
    """Kill a real writer at several moments and go on: all it acknowledged is there, in order, once."""
    row = json.dumps(make_row(samples_us=[1.0] * 2000, time_us=1.0))
    acknowledged = -1
    for kills in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", APPENDER, str(path), row],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        for _ in range(3 + 7 * kills):
            acknowledged = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.communicate(timeout=60)[0].split()  # acknowledged between the last line and the kill
        acknowledged = int(rest[-1]) if rest else acknowledged
        assert writer.returncode == -signal.SIGKILL
        blocks = [r["block"] for r in read_journal(path).rows]
        assert blocks == list(range(len(blocks)))
        assert len(blocks) > acknowledged
    with opened(path) as journal:
        assert len(journal.keys()) > acknowledged


LIMITED = textwrap.dedent(
    """
    import json, resource, sys
    from pathlib import Path
    from attnbench import AttnbenchError
    from attnbench.results.journal import Journal
    path, row = Path(sys.argv[1]), json.loads(sys.argv[2])
    with Journal.open(path, run_id="run-a", config={"impl": ["all"], "seed": 0}) as journal:
        journal.append(row)
        good = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) + 100, hard))
        try:
            journal.append({**row, "block": 1})
        except AttnbenchError as error:
            print(error, error.exit_code)
        assert path.read_bytes() == good
        assert len(journal.keys()) == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.append({**row, "block": 1})
    """
)


def test_a_file_that_may_not_grow_is_cut_back_to_the_last_good_row(path, make_row):
    """A file size limit makes the kernel write part of a line, as a full disk does; then space is freed."""
    command = [sys.executable, "-c", LIMITED, str(path), json.dumps(make_row())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cannot be written: File too large; every row before this one is safe" in done.stdout
    assert done.stdout.endswith(" 3\n")
    assert [row["block"] for row in read_journal(path).rows] == [0, 1]


def failing_write(real, allowed):
    """``os.write`` on a disk with ``allowed`` bytes left."""

    def write(descriptor, data):
        if not allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: allowed.pop()]
        return real(descriptor, part)

    return write


def test_a_full_disk_is_reported_and_leaves_no_half_line(path, make_row, monkeypatch):
    with opened(path) as journal:
        journal.append(make_row())
        good = path.read_bytes()
        monkeypatch.setattr(os, "write", failing_write(os.write, [40]))
        with pytest.raises(
            AttnbenchError, match="No space left on device; every row before this one is safe"
        ):
            journal.append(make_row(block=1))
    assert path.read_bytes() == good


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_row_that_did_not_reach_the_disk_is_taken_back(path, make_row, monkeypatch, error):
    def fsync(descriptor):
        raise error

    with opened(path) as journal:
        good = path.read_bytes()
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(AttnbenchError if isinstance(error, OSError) else KeyboardInterrupt):
            journal.append(make_row())
        monkeypatch.undo()
        assert path.read_bytes() == good
        assert journal.keys() == set()


def test_after_a_failure_that_cannot_be_undone_nothing_more_is_written(path, make_row, monkeypatch):
    def ftruncate(descriptor, size):
        raise OSError(errno.EIO, "Input/output error")

    with opened(path) as journal:
        monkeypatch.setattr(os, "write", failing_write(os.write, [40]))
        monkeypatch.setattr(os, "ftruncate", ftruncate)
        with pytest.raises(AttnbenchError, match=r"neither written nor cut back \(Input/output error\)"):
            journal.append(make_row())
        monkeypatch.undo()
        half = path.read_bytes()
        with pytest.raises(ValueError, match="is closed"):
            journal.append(make_row())
        assert path.read_bytes() == half
    with pytest.warns(AttnbenchWarning, match="40 bytes"), opened(path) as journal:
        journal.append(make_row())


def test_a_tail_that_cannot_be_moved_aside_stays(path, make_row, monkeypatch):
    with opened(path) as journal:
        journal.append(make_row())
    data = path.read_bytes()[:-5]
    path.write_bytes(data)
    monkeypatch.setattr(Path, "open", _full_disk_for_new_files(Path.open))
    with pytest.raises(AttnbenchError, match="cannot be moved aside: No space left"):
        opened(path)
    monkeypatch.undo()
    assert path.read_bytes() == data


def _full_disk_for_new_files(real):
    def open_(self, mode="r", *args, **kwargs):
        if "x" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, mode, *args, **kwargs)

    return open_
