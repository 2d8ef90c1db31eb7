"""NVIDIA's management library behind two questions: what is this GPU, and what disturbs it now.

A field that driver, permission or product does not tell is None. Without nvidia-ml-py nothing is known.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any, Final

from attnbench.harness.flags import Flag

CLOCK_SPREAD_LIMIT: Final = 0.03
POWER_REASONS: Final = ("SwPowerCap", "HwPowerBrakeSlowdown")
THERMAL_REASONS: Final = ("SwThermalSlowdown", "HwThermalSlowdown")
REASON_BITS: Final = {
    "SwPowerCap": 0x4,
    "HwSlowdown": 0x8,
    "SyncBoost": 0x10,
    "SwThermalSlowdown": 0x20,
    "HwThermalSlowdown": 0x40,
    "HwPowerBrakeSlowdown": 0x80,
}
"""Bits of nvmlClocksEventReasons; idle, application clocks and display clocks are no disturbance."""


@dataclass(frozen=True)
class GpuHealth:
    """A snapshot of a GPU. Violation times only grow, so that their deltas miss no short event."""

    sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    reasons: tuple[str, ...] = ()
    power_violation_ns: int | None = None
    thermal_violation_ns: int | None = None
    foreign_processes: int | None = None

    def flags_since(self, before: GpuHealth) -> tuple[Flag, ...]:
        """``power_capped``, ``thermal``, ``clock_spread`` and ``shared_device``."""
        flags = []
        for name, reasons, then, now in (
            ("power_capped", POWER_REASONS, before.power_violation_ns, self.power_violation_ns),
            ("thermal", THERMAL_REASONS, before.thermal_violation_ns, self.thermal_violation_ns),
        ):
            slowed_ms = 0.0 if then is None or now is None else (now - then) * 1e-6
            seen = [r for r in reasons if r in (*self.reasons, *before.reasons)]
            if seen or slowed_ms > 0.0:
                told = ", ".join(
                    [*seen, f"slowed for {slowed_ms:.1f} ms, {self.power_w} W, {self.temperature_c} °C"]
                )
                flags.append(Flag(name, told, "0 ms"))
        if self.sm_clock_mhz and before.sm_clock_mhz:
            spread = abs(self.sm_clock_mhz - before.sm_clock_mhz) / max(
                self.sm_clock_mhz, before.sm_clock_mhz
            )
            if spread > CLOCK_SPREAD_LIMIT:
                seen_clock = f"{before.sm_clock_mhz} then {self.sm_clock_mhz} MHz"
                flags.append(Flag("clock_spread", seen_clock, f"{CLOCK_SPREAD_LIMIT:.0%}"))
        if self.foreign_processes:
            flags.append(
                Flag("shared_device", f"{self.foreign_processes} other processes compute on it", "0")
            )
        return tuple(flags)


class Nvml:
    """One GPU seen through ``library``, the module ``pynvml`` or a recording of it."""

    def __init__(self, library: Any, uuid: str) -> None:
        self._library = library
        library.nvmlInit()
        self._handle = library.nvmlDeviceGetHandleByUUID(uuid)

    def describe(self) -> dict[str, Any]:
        """What a row records of the GPU and its settings; unknown fields are None."""
        ask, lib = self._ask, self._library
        ecc, mig = ask("DeviceGetEccMode"), ask("DeviceGetMigMode")
        limits = ask("DeviceGetPowerManagementLimitConstraints")
        generation, width = ask("DeviceGetCurrPcieLinkGeneration"), ask("DeviceGetCurrPcieLinkWidth")
        uuid = ask("DeviceGetUUID")
        return {
            "gpu_driver": self._ask_system("SystemGetDriverVersion"),
            "gpu_uuid_hash": None if uuid is None else hashlib.sha256(str(uuid).encode()).hexdigest()[:16],
            "gpu_pci_link": None if None in (generation, width) else f"gen {generation} x{width}",
            "gpu_ecc": None if ecc is None else bool(ecc[0]),
            "gpu_mig": None if mig is None else bool(mig[0]),
            "gpu_persistence": _boolean(ask("DeviceGetPersistenceMode")),
            "gpu_power_limit_w": _watts(ask("DeviceGetEnforcedPowerLimit")),
            "gpu_power_limit_default_w": _watts(ask("DeviceGetPowerManagementDefaultLimit")),
            "gpu_power_limit_max_w": None if limits is None else _watts(limits[1]),
            "gpu_sm_clock_max_mhz": ask("DeviceGetMaxClockInfo", lib.NVML_CLOCK_SM),
            "gpu_sm_clock_application_mhz": ask("DeviceGetApplicationsClock", lib.NVML_CLOCK_SM),
            "gpu_memory_clock_max_mhz": ask("DeviceGetMaxClockInfo", lib.NVML_CLOCK_MEM),
        }

    def health(self) -> GpuHealth:
        """A snapshot of clocks, temperature, power, reasons of slow-down and other processes."""
        ask, lib = self._ask, self._library
        bits = ask("DeviceGetCurrentClocksEventReasons")
        processes = ask("DeviceGetComputeRunningProcesses")
        ours = {os.getpid(), os.getppid()}
        return GpuHealth(
            sm_clock_mhz=ask("DeviceGetClockInfo", lib.NVML_CLOCK_SM),
            temperature_c=ask("DeviceGetTemperature", lib.NVML_TEMPERATURE_GPU),
            power_w=_watts(ask("DeviceGetPowerUsage")),
            reasons=tuple(name for name, bit in REASON_BITS.items() if bits is not None and bits & bit),
            power_violation_ns=_violation(ask("DeviceGetViolationStatus", lib.NVML_PERF_POLICY_POWER)),
            thermal_violation_ns=_violation(ask("DeviceGetViolationStatus", lib.NVML_PERF_POLICY_THERMAL)),
            foreign_processes=None if processes is None else sum(p.pid not in ours for p in processes),
        )

    def _ask(self, name: str, *args: Any) -> Any:
        return self._ask_system(name, self._handle, *args)

    def _ask_system(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self._library, f"nvml{name}")(*args)
        except self._library.NVMLError:
            return None


def open_nvml(uuid: str) -> Nvml | None:
    """The GPU with this UUID (``GPU-…``); None without the library, the driver or such a GPU."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        return Nvml(pynvml, uuid)
    except pynvml.NVMLError:
        return None


def _watts(milliwatts: Any) -> float | None:
    return None if milliwatts is None else milliwatts / 1000.0


def _boolean(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _violation(status: Any) -> int | None:
    return None if status is None else int(status.violationTime)
