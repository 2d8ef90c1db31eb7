"""Mechanisms that misbehave, each in one way; test_run.py names the status that each must end as."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import torch

from attnbench import Attention, Paper, Pattern, Spec


def _spec(name: str) -> Spec:
    return Spec(
        id=name,
        name=name,
        family="user",
        kind="core",
        paper=Paper("none", 2026),
        patterns=(Pattern.NS,),
        summary="Misbehaves in one way.",
        formula="-",
        cost="-",
        hot_loop="a matrix product",
    )


class Honest(Attention):
    """Softmax attention: the control of the zoo."""

    spec = _spec("honest")

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        return torch.softmax(q @ k.transpose(-1, -2) / self.head_dim**0.5, -1) @ v

    def flops(self, n, m):
        return 4 * self.num_heads * n * m * self.head_dim


class Raises(Honest):
    spec = _spec("raises")

    def attend(self, q, k, v, **inputs):
        raise ValueError("this mechanism always raises")


class ReturnsNan(Honest):
    spec = _spec("returns_nan")

    def attend(self, q, k, v, **inputs):
        return super().attend(q, k, v) * float("nan")


class WrongShape(Honest):
    spec = _spec("wrong_shape")

    def attend(self, q, k, v, **inputs):
        return super().attend(q, k, v)[:, :, :-1]


class WrongDtype(Honest):
    spec = _spec("wrong_dtype")

    def attend(self, q, k, v, **inputs):
        return super().attend(q, k, v).double()


class WrongValues(Honest):
    """Right in its reference, wrong in its torch backend."""

    spec = _spec("wrong_values")

    def attend(self, q, k, v, **inputs):
        return super().attend(q, k, v) * (1.0 if self.backend == "reference" else 1.01)


class Mutates(Honest):
    spec = _spec("mutates")

    def attend(self, q, k, v, **inputs):
        o = super().attend(q, k, v)
        with torch.no_grad():
            v.mul_(1.5)
        return o


class Hangs(Honest):
    spec = _spec("hangs")

    def attend(self, q, k, v, **inputs):
        while True:
            time.sleep(1)


class EatsMemory(Honest):
    spec = _spec("eats_memory")

    def attend(self, q, k, v, **inputs):
        hoard = [torch.empty(1 << 30) for _ in range(1000)]
        return super().attend(q, k, v) + hoard[0][0]


class Segfaults(Honest):
    spec = _spec("segfaults")

    def attend(self, q, k, v, **inputs):
        ctypes.string_at(0)


class Exits(Honest):
    spec = _spec("exits")

    def attend(self, q, k, v, **inputs):
        os._exit(7)


class KillsItself(Honest):
    spec = _spec("kills_itself")

    def attend(self, q, k, v, **inputs):
        os.kill(os.getpid(), signal.SIGKILL)


class Prints(Honest):
    """Prints 64 MB, part of it shaped like an answer, and is otherwise honest."""

    spec = _spec("prints")
    printed = False

    def attend(self, q, k, v, **inputs):
        if not type(self).printed:
            type(self).printed = True
            for _ in range(1024):
                os.write(1, b'{"kind": "row", "row": {"status": "ok"}}\n' * 1600)
        return super().attend(q, k, v)


class Unsupportive(Honest):
    spec = _spec("unsupportive")

    def attend(self, q, k, v, **inputs):
        from attnbench.kernels import Unsupported

        raise Unsupported("unsupportive", f"N = {q.shape[2]}", "another N")
