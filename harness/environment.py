"""Where a row was measured: hardware, drivers, libraries and settings that may change a time.

Nothing here names a machine, a user or a path: rows are published. What cannot be found out is None.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil
import torch

import attnbench
from attnbench.harness.timing import Host
from attnbench.harness.timing.nvml import open_nvml
from attnbench.kernels.backends import OWN, REQUIREMENTS, Requirement

ENVIRONMENT_VARIABLES: Final = (
    "ATTNBENCH_TUNING",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TRITON_DEBUG",
    "TRITON_INTERPRET",
)
"""Variables that are recorded: each can change a time, none holds a name of a person or machine."""

PEERS: Final[Mapping[str, str]] = {
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "xformers": "xformers",
    "fla": "flash-linear-attention",
    "natten": "natten",
    "sageattention": "sageattention",
    "flashinfer": "flashinfer-python",
    "mamba_ssm": "mamba-ssm",
    "triton": "triton",
}
"""Libraries that attnbench compares with or computes by, and the names they are installed under.

A library that a backend needs and that is not named here is looked for under its own name.
"""

NOT_IN_KEY: Final = (
    "load_1m",
    "commit",
    "attnbench",
    "libraries",
    "container",
    "memory_total_bytes",
    "gpu_uuid_hash",
)
"""What the software key leaves out: it changes no time, or belongs to the impl and is recorded with it."""


def physical_cores() -> int:
    """How many threads compute at once here, within affinity and CPU quota."""
    return Host().physical_cores()


def capture(device: str, host: Host | None = None) -> dict[str, Any]:
    """What a row measured on ``device`` (a name of devices.toml, or ``cpu``) records, as plain values."""
    facts = {"device": device, **_machine(host or Host()), **_software()}
    return facts if device == "cpu" else {**facts, **_gpu()}


def software_key(environment: Mapping[str, Any]) -> str:
    """Hash of everything in ``environment`` that may change a time and is not the impl: 16 hex digits.

    Rows of different keys are not compared without saying so; a series of measurements starts anew with one.
    """
    relevant = {name: value for name, value in environment.items() if name not in NOT_IN_KEY}
    text = json.dumps(relevant, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def peers() -> dict[str, str]:
    """For each backend that is not ours, the library and its version, or why it is absent. Imports none.

    A backend whose library is there and whose device is not says so behind the version.
    """
    return {name: _peer(need) for name, need in REQUIREMENTS.items() if name not in OWN}


def _peer(need: Requirement) -> str:
    if need.library is None:
        state = f"torch {torch.__version__}"
    else:
        distribution = PEERS.get(need.library, need.library)
        version = _version(distribution)
        if version is None and importlib.util.find_spec(need.library) is None:
            return f"absent: {distribution} is not installed"
        state = f"{distribution} {version or 'of unknown version'}"
    if need.devices and not torch.cuda.is_available():
        return f"{state}; needs {' or '.join(need.devices)}, which is not here"
    return state


def _machine(host: Host) -> dict[str, Any]:
    cores = host.cores()
    load = host.text("proc/loadavg")
    first = min(host.allowed())
    return {
        "cpu_model": _cpu_model(host),
        "cpu_cores": len(cores),
        "cpu_threads": sum(len(cpus) for _, cpus in cores),
        "cpu_governor": host.text(f"sys/devices/system/cpu/cpu{first}/cpufreq/scaling_governor"),
        "cpu_turbo": _turbo(host),
        "cpu_cache_bytes": host.last_level_cache_bytes(),
        "numa_nodes": len({node for node, _ in cores}),
        "memory_total_bytes": psutil.virtual_memory().total,
        "load_1m": float(load.split()[0]) if load else None,
        "kernel": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "container": _container(host),
    }


def _software() -> dict[str, Any]:
    versions = {module: _version(distribution) for module, distribution in PEERS.items()}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": versions.pop("triton"),
        "numpy": _version("numpy"),
        "libraries": {name: version for name, version in versions.items() if version is not None},
        "attnbench": attnbench.__version__,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "env": {name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ},
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    nvml = open_nvml(f"GPU-{properties.uuid}")
    return {
        "gpu_name": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "gpu_l2_bytes": properties.L2_cache_size,
        "gpu_sms": properties.multi_processor_count,
        "cuda_runtime": torch.version.cuda,
        "hip_runtime": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        **(nvml.describe() if nvml is not None else {}),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """Commit of attnbench's checkout, ``+dirty`` when tracked files differ; None when it is none."""
    return commit_of(Path(attnbench.__file__).parent)


def commit_of(folder: Path) -> str | None:
    """The same for the checkout whose top is ``folder``: a repository further up is somebody else's."""
    if not (folder / ".git").exists():
        return None
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+dirty" if changed else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model(host: Host) -> str | None:
    for line in (host.text("proc/cpuinfo") or "").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or None


def _turbo(host: Host) -> bool | None:
    boost = host.text("sys/devices/system/cpu/cpufreq/boost")
    if boost is not None:
        return boost == "1"
    off = host.text("sys/devices/system/cpu/intel_pstate/no_turbo")
    return None if off is None else off == "0"


def _container(host: Host) -> str | None:
    """Which container runtime left its marks; None when none did."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    marks = {"docker": ".dockerenv", "podman": "run/.containerenv"}
    groups = host.text("proc/1/cgroup") or ""
    for name, mark in marks.items():
        if (host.root / mark).exists() or name in groups:
            return name
    return "lxc" if "lxc" in groups else None
