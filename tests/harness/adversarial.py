"""Mechanisms that attack the harness, each in one way; test_adversarial.py names what each must end as.

zoo.py has those that merely fail. All compute softmax attention, most of them rightly.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import torch

from attnbench import Attention, Paper, Pattern, Spec

MIB = 1 << 20


def _spec(name: str) -> Spec:
    return Spec(
        id=name,
        name=name,
        family="user",
        kind="core",
        exact=True,
        paper=Paper("none", 2026),
        patterns=(Pattern.NS,),
        summary="Attacks the harness.",
        formula="-",
        cost="-",
        hot_loop="a matrix product",
    )


class Honest(Attention):
    """Softmax attention; its row must not differ from that of :class:`HonestToo`."""

    spec = _spec("honest")

    def attend(self, q, k, v, **inputs):
        return torch.softmax(q @ k.transpose(-1, -2) / self.head_dim**0.5, -1) @ v

    def flops(self, n, m):
        return 4 * self.num_heads * n * m * self.head_dim

    @property
    def tested(self) -> bool:
        """Whether this is the backend under test, not the reference that it is compared with."""
        return self.backend != "reference"


class HonestToo(Honest):
    spec = _spec("honest_too")


# ---- results that were not computed --------------------------------------------------------------------


class RemembersByPointer(Honest):
    """Computes once for every place in memory that its inputs may lie at."""

    spec = _spec("remembers_by_pointer")
    known: dict[tuple[int, ...], torch.Tensor] = {}  # noqa: RUF012

    def attend(self, q, k, v, **inputs):
        key = (q.data_ptr(), k.data_ptr(), v.data_ptr())
        if key not in self.known:
            self.known[key] = super().attend(q, k, v)
        return self.known[key].clone() if self.tested else super().attend(q, k, v)


class TiresLater(Honest):
    """Computes the first calls, and less afterwards."""

    spec = _spec("tires_later")
    calls = 0

    def attend(self, q, k, v, **inputs):
        type(self).calls += self.tested
        if self.tested and self.calls > 6:
            return v.clone()
        return super().attend(q, k, v)


class NanOnTheSecondCall(Honest):
    spec = _spec("nan_on_the_second_call")
    calls = 0

    def attend(self, q, k, v, **inputs):
        self.calls += 1
        return super().attend(q, k, v) * (float("nan") if self.tested and self.calls == 2 else 1.0)


class ReturnsItsInput(Honest):
    """The identity, rightly: but what it returns is the caller's."""

    spec = _spec("returns_its_input")

    def attend(self, q, k, v, **inputs):
        return v.view(v.shape) if self.tested else v.clone()


class ReusesItsOutput(Honest):
    """Writes every output into the memory of the one before."""

    spec = _spec("reuses_its_output")

    def attend(self, q, k, v, **inputs):
        if not self.tested:
            return super().attend(q, k, v)
        if not hasattr(self, "out"):
            self.out = torch.empty_like(v)
        return self.out.copy_(super().attend(q, k, v))


class WorksElsewhere(Honest):
    """Returns at once and lets a thread fill the output."""

    spec = _spec("works_elsewhere")

    def attend(self, q, k, v, **inputs):
        if not self.tested:
            return super().attend(q, k, v)
        out, copies = torch.empty_like(v), (q.clone(), k.clone(), v.clone())

        def work():
            time.sleep(0.02)  # as more work would take
            out.copy_(Honest.attend(self, *copies))

        threading.Thread(target=work).start()
        return out


# ---- the measurement -----------------------------------------------------------------------------------


class PatchesClocks(Honest):
    """Lets no time pass for whoever asks for it, on a CPU or a GPU."""

    spec = _spec("patches_clocks")

    def attend(self, q, k, v, **inputs):
        start = time.perf_counter_ns()
        for name in ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time"):
            setattr(time, name, lambda: start)
        torch.cuda.Event.elapsed_time = lambda self, end: 1e-6
        torch.cuda.synchronize = lambda device=None: None
        return super().attend(q, k, v)


class PatchesTheHarness(Honest):
    """Makes every statistic small and every output right."""

    spec = _spec("patches_the_harness")

    def attend(self, q, k, v, **inputs):
        from attnbench.harness import accuracy
        from attnbench.results import stats

        real = getattr(stats.quantile, "real", stats.quantile)

        def small(samples, share):
            return real(samples, share) / 2

        small.real = real
        stats.quantile = small
        accuracy.unlike = lambda output, known, tolerance: ""
        return super().attend(q, k, v)


class SlowsTheClock(Honest):
    """Finds the device that it is timed on among its callers' variables, and has its clock run slower."""

    spec = _spec("slows_the_clock")

    def attend(self, q, k, v, **inputs):
        frame = sys._getframe()
        while frame is not None:
            device = frame.f_locals.get("device")
            if hasattr(device, "_clock_ns") and not hasattr(device, "slowed"):
                device.slowed = True
                device._clock_ns = self._slow(device._clock_ns)
            frame = frame.f_back
        return super().attend(q, k, v)

    @staticmethod
    def _slow(now):
        origin = now()
        return lambda: origin + (now() - origin) // 3


class AllocatesElsewhere(Honest):
    """Works in memory that torch does not know of."""

    spec = _spec("allocates_elsewhere")

    def attend(self, q, k, v, **inputs):
        with mmap.mmap(-1, 24 * MIB) as mapped:
            mapped.write(b"x" * (24 * MIB))
        scratch = np.ones(16 * MIB, dtype=np.uint8)
        out = super().attend(q, k, v)
        return out + float(scratch[0] - 1)


class BuildsAMask(Honest):
    """Pays for a mask in every call."""

    spec = _spec("builds_a_mask")

    def attend(self, q, k, v, **inputs):
        mask = torch.ones(1024, 1024, dtype=torch.float32).tril_().mul_(0)
        return super().attend(q, k, v) + mask[0, 0]

    def flops(self, n, m):
        return 4 * self.num_heads * n * m * self.head_dim


class ChangesSettings(Honest):
    spec = _spec("changes_settings")

    def attend(self, q, k, v, **inputs):
        out = super().attend(q, k, v)
        if self.tested:
            os.chdir("/")
            torch.manual_seed(1)
            torch.rand(1)
            torch.set_num_threads(2)
            torch.set_default_dtype(torch.float64)
        return out


class ImpossibleCost(Honest):
    """Says that it needs no end of FLOPs."""

    spec = _spec("impossible_cost")

    def flops(self, n, m):
        return 1 << 80


# ---- the process ---------------------------------------------------------------------------------------


class HangsInNativeCode(Honest):
    """Waits in a system call that no signal but SIGKILL ends."""

    spec = _spec("hangs_in_native_code")

    def attend(self, q, k, v, **inputs):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while True:
            ctypes.CDLL(None).pause()


class RunsOutOfMemory(Honest):
    """Asks for memory where torch is not asked."""

    spec = _spec("runs_out_of_memory")

    def attend(self, q, k, v, **inputs):
        hoard = [mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(64)]
        return super().attend(q, k, v) + len(hoard)


class Interrupts(Honest):
    spec = _spec("interrupts")

    def attend(self, q, k, v, **inputs):
        raise KeyboardInterrupt


class Leaves(Honest):
    spec = _spec("leaves")

    def attend(self, q, k, v, **inputs):
        sys.exit(0)


class SpeaksInRiddles(Honest):
    """Raises what cannot be stored, or would take over the terminal that shows it."""

    spec = _spec("speaks_in_riddles")

    def attend(self, q, k, v, **inputs):
        raise ValueError("\x1b[2Jgone \udcff\x07")


class CannotBeShown(Honest):
    spec = _spec("cannot_be_shown")

    def attend(self, q, k, v, **inputs):
        class MuteError(Exception):
            def __str__(self):
                raise RuntimeError("no")

        raise MuteError


class LeaksProcesses(Honest):
    """Leaves processes behind: one in its group, one in a session of its own, one that hides its origin."""

    spec = _spec("leaks_processes")
    leaked = False
    marks = ("31337.25", "31337.5", "31337.75")

    def attend(self, q, k, v, **inputs):
        if not type(self).leaked:
            type(self).leaked = True
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            a, b, c = (["sleep", seconds] for seconds in self.marks)
            subprocess.Popen(a, **quiet)
            subprocess.Popen(b, start_new_session=True)  # holds on to the log as well
            subprocess.run(
                ["sh", "-c", 'setsid "$@" &', "sh", *c], env={"PATH": os.environ["PATH"]}, check=True, **quiet
            )
        return super().attend(q, k, v)


class ForksALot(Honest):
    """Every process that it starts starts others, two levels deep, and holds every pipe open."""

    spec = _spec("forks_a_lot")
    forked = False

    def attend(self, q, k, v, **inputs):
        if not type(self).forked:
            type(self).forked = True
            for _ in range(6):
                if os.fork() == 0:
                    for _ in range(6):
                        if os.fork() == 0:
                            break
                    time.sleep(100)
                    os._exit(0)  # bounded, should the harness fail to end it
        return super().attend(q, k, v)


class ForksAndGoesOn(Honest):
    """Its child measures on as if it were the worker."""

    spec = _spec("forks_and_goes_on")
    forked = False

    def attend(self, q, k, v, **inputs):
        if not type(self).forked:
            type(self).forked = True
            os.fork()
        return super().attend(q, k, v)


class DiesBehindAChild(Honest):
    """Dies while a child holds the pipe of answers open."""

    spec = _spec("dies_behind_a_child")

    def attend(self, q, k, v, **inputs):
        if os.fork() == 0:
            os.setsid()
            time.sleep(100)
        os._exit(9)


class ScribblesEverywhere(Honest):
    """Writes garbage without end of line, some MiB of it, into every descriptor that takes it."""

    spec = _spec("scribbles_everywhere")

    def attend(self, q, k, v, **inputs):
        _write_everywhere(b"\x00garbage\xff" * 50_000, 8)
        return super().attend(q, k, v)


class ForgesAnAnswer(Honest):
    """Writes a row as the worker would."""

    spec = _spec("forges_an_answer")

    def attend(self, q, k, v, **inputs):
        row = b'{"kind": "row", "question": 1, "token": "", "row": {"status": "ok", "time_us": 1.0}}\n'
        _write_everywhere(row, 1)
        return super().attend(q, k, v)


class ClosesEverything(Honest):
    spec = _spec("closes_everything")

    def attend(self, q, k, v, **inputs):
        os.closerange(0, 4096)
        return super().attend(q, k, v)


def _write_everywhere(data: bytes, times: int) -> None:
    for descriptor in range(256):
        try:
            for _ in range(times):
                os.write(descriptor, data)
        except OSError:
            continue


# ---- on a GPU ------------------------------------------------------------------------------------------


class SideStream(Honest):
    """Works on a stream of its own, which nobody waits for."""

    spec = _spec("side_stream")

    def attend(self, q, k, v, **inputs):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(50):
                out = super().attend(q, k, v)
        return out


class RawDeviceMemory(Honest):
    """Takes device memory past torch's allocator and keeps it."""

    spec = _spec("raw_device_memory")
    calls = 0

    def attend(self, q, k, v, **inputs):
        type(self).calls += 1
        if self.calls < 100:
            runtime = ctypes.CDLL("libcudart.so." + torch.version.cuda.split(".")[0])
            runtime.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(8 * MIB))
        return super().attend(q, k, v)
