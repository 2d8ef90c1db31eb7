"""Counts what was compiled in this process, so that compiling while measuring does not pass for work."""

from __future__ import annotations

import sys
from typing import Any


class CompileCounter:
    """Graphs that torch.compile made and, with ``triton``, kernels that Triton compiled or loaded.

    Triton has one process-wide listener, called for every kernel that its in-memory cache did not hold; the
    one that was set before is called as well. Its time is lost to the caller even when the kernel comes from
    the cache on disk, so both count.
    """

    def __init__(self, *, triton: bool) -> None:
        self._triton_kernels = 0
        if triton:
            self._listen()

    def count(self) -> int:
        """Compilations so far; only differences mean something."""
        dynamo = sys.modules.get("torch._dynamo.utils")
        graphs = int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0
        return graphs + self._triton_kernels

    def _listen(self) -> None:
        from triton import knobs

        earlier = knobs.compilation.listener

        def listener(**what: Any) -> None:
            self._triton_kernels += 1
            if earlier is not None:
                earlier(**what)

        knobs.compilation.listener = listener
