"""Which accelerator is here, what it is called in rows, and the least time its vendor's figures allow."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Final

from attnbench.errors import UsageError, unknown_name

DTYPE_NAMES: Final = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}


@dataclass(frozen=True)
class Hardware:
    """One accelerator by its vendor's figures; what is not published is None or missing from ``tflops``."""

    name: str
    title: str
    family: str
    torch_names: tuple[str, ...]
    tflops: Mapping[str, float]
    source: str
    bandwidth_gbps: float | None = None
    memory_gb: float | None = None
    l2_mib: int | None = None
    last_level_mib: int | None = None
    sms: int | None = None

    @property
    def bandwidth_bytes_per_s(self) -> float | None:
        """Peak bandwidth of the memory."""
        return None if self.bandwidth_gbps is None else self.bandwidth_gbps * 1e9

    @property
    def last_level_bytes(self) -> int | None:
        """Size of the cache next to the memory."""
        size = self.last_level_mib or self.l2_mib
        return None if size is None else size << 20

    def peak_tflops(self, dtype: str) -> float | None:
        """Highest dense rate at which products of ``dtype`` (torch's name, or ``tf32``) can be had.

        float32 may be made of three TF32 products at the accuracy of one, so its peak is the larger of the
        ordinary units and a third of the TF32 rate.
        """
        peak = self.tflops.get(DTYPE_NAMES.get(dtype, dtype))
        tf32 = self.tflops.get("tf32")
        if dtype == "float32" and peak is not None and tf32 is not None:
            return max(peak, tf32 / 3)
        return peak


@cache
def table() -> Mapping[str, Hardware]:
    """All accelerators of ``devices.toml`` by name, in the order of the file."""
    text = (files("attnbench.harness") / "devices.toml").read_text(encoding="utf-8")
    rows = {
        name: Hardware(
            name=name,
            torch_names=tuple(row.pop("torch_names")),
            tflops=MappingProxyType(row.pop("tflops")),
            **row,
        )
        for name, row in tomllib.loads(text).items()
    }
    return MappingProxyType(rows)


def hardware(name: str) -> Hardware | None:
    """The figures of a device as rows name it; None for ``cpu`` and for a GPU that the file does not have."""
    return table().get(name)


def name_of(torch_name: str) -> str:
    """What rows call the GPU of this torch name: its name in the file, or the torch name in kebab case."""
    for device in table().values():
        if torch_name in device.torch_names:
            return device.name
    return re.sub(r"[^a-z0-9]+", "-", torch_name.lower()).strip("-")


def resolve(asked: str) -> str:
    """The device for ``--gpu``: ``auto``, ``cpu``, a name or family of the file, or the GPU that is here.

    Raises UsageError for a name that does not exist, and for hardware that is not here.
    """
    return match(asked, _torch_name())


def match(asked: str, torch_name: str | None) -> str:
    """The same for a machine whose GPU torch calls ``torch_name``; None is a machine without one."""
    here = None if torch_name is None else name_of(torch_name)
    wanted = asked.lower()
    if wanted == "cpu":
        return "cpu"
    if wanted == "auto":
        return here or "cpu"
    known = {device.family for device in table().values()} | set(table())
    if wanted not in known and wanted != here:
        raise unknown_name("device", asked, {"auto", "cpu", *known, *((here,) if here else ())})
    sheet = None if here is None else hardware(here)
    if here is not None and (wanted == here or (sheet is not None and wanted == sheet.family)):
        return here
    seen = "no GPU that torch can use" if here is None else f"{torch_name} ({here})"
    raise UsageError(
        f"--gpu {asked}: observed {seen} on this machine, expected {asked}; "
        f"run it where there is one, or use --gpu {'cpu' if here is None else here} or --gpu auto"
    )


def _torch_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def roofline_us(flops: int, moved_bytes: int, dtype: str, device: str) -> float | None:
    """Least time in µs for ``flops`` and ``moved_bytes``: the longer of computing and moving at peak rates.

    ``dtype`` is torch's name, or ``tf32`` where float32 products are allowed to be that. None on a CPU and
    wherever a figure is unknown.
    """
    sheet = hardware(device)
    peak = None if sheet is None else sheet.peak_tflops(dtype)
    if sheet is None or peak is None or sheet.bandwidth_bytes_per_s is None:
        return None
    return max(flops / (peak * 1e12), moved_bytes / sheet.bandwidth_bytes_per_s) * 1e6
