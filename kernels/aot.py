"""Ahead-of-time compilation of every Triton kernel for GPUs that are not here.

A kernel that does not compile for an architecture, that spills or that asks for more shared memory than a
block has must be seen in CI, which has no GPU. ``python -m attnbench.kernels.aot`` prints what each kernel
takes; it runs in a process of its own, because it replaces Triton's driver.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, fields
from io import StringIO
from typing import Any, NamedTuple

import torch

from attnbench.kernels.backends import Unsupported, interpreting

OPS = (
    "block_mass",
    "block_sparse",
    "buckets",
    "few_query",
    "flash",
    "flash_int8",
    "gather",
    "kv_reduce",
    "linrec",
    "neighborhood",
    "query_softmax",
    "selective_scan",
    "tensor3",
    "token_blocks",
    "window",
)
"""Operations with Triton kernels: ``attnbench.kernels.<op>.triton`` has ``aot_cases(capability)``."""

CAPABILITIES = (80, 90, 100)
"""Architectures compiled by default: Ampere, Hopper and Blackwell of the data centre."""

SHARED_LIMIT_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Shared memory that one block can have, by compute capability (CUDA C++ Programming Guide)."""


class AotCase(NamedTuple):
    """One kernel to compile by ``kernel.warmup(*args, **options)``; tensors in ``args`` lend their types."""

    name: str
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class AotRow:
    """What one compiled kernel takes: registers per thread, shared memory per block, spills per thread."""

    op: str
    case: str
    kernel: str
    capability: int
    dtype: str
    head_dim: int | None
    num_warps: int
    num_stages: int
    registers: int
    shared_bytes: int
    spill_bytes: int

    @property
    def fits(self) -> bool:
        """Whether a block of this architecture has the shared memory that the kernel asks for."""
        return self.shared_bytes <= SHARED_LIMIT_BYTES[self.capability]


class _OfflineDriver:
    """The part of a Triton driver that compiling needs, for a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def cases(op: str, capability: int) -> list[AotCase]:
    """The kernels of one operation; no other operation's kernels are imported."""
    if op not in OPS:
        raise Unsupported("operation to compile", repr(op), f"one of {', '.join(OPS)}")
    return importlib.import_module(f"attnbench.kernels.{op}.triton").aot_cases(capability)


def compile_ops(ops: Iterable[str] = OPS, capabilities: Iterable[int] = CAPABILITIES) -> Iterator[AotRow]:
    """Compile every case of every operation for every capability, one row each, in that order.

    Leaves Triton's driver set to the last capability: call it in a process that launches nothing. Raises
    Unsupported under Triton's interpreter or for a capability whose limits are not known.
    """
    if interpreting():
        raise Unsupported("ahead-of-time compilation", "TRITON_INTERPRET=1", "a process without it")
    from triton.runtime.driver import driver

    capabilities = tuple(capabilities)
    for op in ops:
        for capability in capabilities:
            if capability not in SHARED_LIMIT_BYTES:
                known = ", ".join(map(str, SHARED_LIMIT_BYTES))
                raise Unsupported("compute capability", capability, f"one of {known}")
            driver.set_active(_OfflineDriver(capability))
            for case in cases(op, capability):
                yield _compile(op, case, capability)


def _compile(op: str, case: AotCase, capability: int) -> AotRow:
    case.kernel.device_caches.clear()  # it holds the target of the driver that compiled last
    with _every_log() as log:
        compiled = case.kernel.warmup(*case.args, **case.options)
    registers, spill_bytes = _usage(log.getvalue())
    return AotRow(
        op=op,
        case=case.name,
        kernel=case.kernel.fn.__name__,
        capability=capability,
        dtype=str(_first_tensor(case.args).dtype).removeprefix("torch."),
        head_dim=case.options.get("D"),
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        spill_bytes=spill_bytes,
    )


def _first_tensor(args: Iterable[Any]) -> torch.Tensor:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg
        if isinstance(arg, tuple):
            return _first_tensor(arg)
    raise ValueError("an ahead-of-time case without a tensor among its arguments")


@contextmanager
def _every_log() -> Iterator[StringIO]:
    """What ptxas says of the kernels compiled meanwhile; Triton's cache, which keeps no logs, is not read."""
    from triton import knobs

    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        yield log


def _usage(log: str) -> tuple[int, int]:
    """Registers and spilled bytes (stores + loads) per thread, from the log of ptxas."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise ValueError(f"the log of ptxas has no register and spill counts:\n{log}")
    return max(map(int, registers)), sum(int(stores) + int(loads) for stores, loads in spills)


def _table(rows: Sequence[AotRow]) -> str:
    heads = [field.name for field in fields(AotRow)]
    lines = [heads] + [
        ["" if value is None else str(value) for value in asdict(row).values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or JSON; returns 1 when a kernel asks for more shared memory than a block has."""
    parser = argparse.ArgumentParser(prog="python -m attnbench.kernels.aot", description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--op", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--json", action="store_true", help="one JSON list of rows instead of a table")
    options = parser.parse_args(argv)
    try:
        rows = list(compile_ops(options.op, options.capability))
    except Unsupported as why:
        parser.error(str(why))
    text = json.dumps([asdict(row) | {"fits": row.fits} for row in rows]) if options.json else _table(rows)
    sys.stdout.write(text + "\n")
    too_big = [row for row in rows if not row.fits]
    for row in too_big:
        limit = SHARED_LIMIT_BYTES[row.capability]
        sys.stderr.write(f"{row.case} for sm_{row.capability}: {row.shared_bytes} > {limit} bytes shared\n")
    return 1 if too_big else 0


if __name__ == "__main__":
    sys.exit(main())
