"""Measures how long a call takes, on a CPU or a GPU, with what makes the number doubtful as flags.

``measure(call, device, settings)`` gives a :class:`Timing`; ``audit(call, device)`` tells what it launches.
All that touches torch or the clock is behind :class:`Device`, so the protocols run on a simulated one.
"""

from attnbench.harness.timing.audit import Audit, audit
from attnbench.harness.timing.device import Call, Device, StreamDevice, Trace, Witness, unwitnessed
from attnbench.harness.timing.host import Host, pin
from attnbench.harness.timing.host_protocol import measure_host
from attnbench.harness.timing.result import Timing
from attnbench.harness.timing.sampling import time_once
from attnbench.harness.timing.settings import PRESETS, Settings
from attnbench.harness.timing.stream_protocol import measure_stream


def open_device(name: str) -> Device:
    """The device that rows call ``name``: ``cpu``, or the current GPU under its name in devices.toml."""
    if name == "cpu":
        from attnbench.harness.timing.cpu import CpuDevice

        return CpuDevice()
    from attnbench.harness.timing.cuda import CudaDevice

    return CudaDevice(name)


def measure(
    call: Call,
    device: Device,
    settings: Settings = PRESETS["default"],
    first_s: float | None = None,
    witness: Witness = unwitnessed,
) -> Timing:
    """Time ``call`` by the protocol of the device.

    ``first_s`` is the time of the very first call, from :func:`time_once`, where the caller made it before;
    without it the first call is made and timed here. ``witness`` looks at the results of headline samples.
    """
    if isinstance(device, StreamDevice):
        return measure_stream(call, device, settings, first_s, witness)
    return measure_host(call, device, settings, first_s, witness)


__all__ = [
    "PRESETS",
    "Audit",
    "Call",
    "Device",
    "Host",
    "Settings",
    "StreamDevice",
    "Timing",
    "Trace",
    "Witness",
    "audit",
    "measure",
    "measure_host",
    "measure_stream",
    "open_device",
    "pin",
    "time_once",
]
