"""Made-up results that the validator accepts, for tests of the site and for its size and build time.

Times follow a cost model (launch floor, quadratic or linear work, a rate per GPU) with noise between blocks,
so that curves cross, intervals overlap and runs differ as measured ones do. Everything follows from the
arguments.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from attnbench.results import schema, stats
from attnbench.results.rows import Row

HOSTILE: Final = "<img src=x onerror=alert(1)>"
"""A name that is markup: pages must show it as text."""

PATTERNS: Final = ("NS", "CS", "NC", "CC")
BATCH, HEADS, HEAD_DIM, WIDTH_OF_LINEAR = 4, 8, 64, 256
MEMORY_BYTES: Final = 80 * 10**9
FIRST_RUN: Final = datetime(2026, 8, 3, 10, 15, tzinfo=UTC)

GPUS: Final = ("h100-sxm", "a100-sxm", "h200", "b200", "rtx-4090")
RATE_TFLOPS: Final = {"h100-sxm": 989.4, "a100-sxm": 312.0, "h200": 989.4, "b200": 2250.0, "rtx-4090": 165.2}
CPU_TFLOPS: Final = 0.5
DTYPE_COST: Final = {"bfloat16": 1.0, "float16": 1.0, "float32": 8.0}


@dataclass(frozen=True)
class Impl:
    """How a made-up impl behaves. ``efficiency`` is its share of the peak, ``growth`` the power of N."""

    mechanism: str
    backend: str
    family: str
    growth: int
    efficiency: float
    floor_us: float
    error: float = 0.0
    patterns: tuple[str, ...] = PATTERNS
    stores_map: bool = False
    hyper: str = "{}"

    @property
    def exact(self) -> bool:
        """Whether it is softmax attention itself."""
        return self.error == 0.0


IMPLS: Final = (
    Impl("softmax", "sdpa_flash", "dense", 2, 0.62, 9.0),
    Impl("softmax", "triton", "dense", 2, 0.619, 9.0),  # ties with the one above
    Impl("softmax", "torch", "dense", 2, 0.11, 31.0, stores_map=True),
    Impl("nystromformer", "triton", "linear", 1, 0.20, 62.0, 0.21, ("NS", "NC")),
    Impl("performer", "torch", "linear", 1, 0.16, 80.0, 0.42),
    Impl("cosformer", "triton", "linear", 1, 0.34, 24.0, 0.58),
    Impl("abc", "torch", "linear", 1, 0.07, 120.0, 0.35),
    Impl("local_window", "triton", "sparse", 1, 0.45, 12.0, 0.30, ("NS", "CS")),
    Impl("local_window", "triton", "sparse", 1, 0.25, 12.0, 0.17, ("NS", "CS"), hyper='{"window": 512}'),
    Impl("reformer_lsh", "torch", "sparse", 1, 0.012, 410.0, 0.26, ("NS", "CS")),
    Impl("axial_attention", "torch", "vision", 1, 0.10, 66.0, 0.74, ("NS",)),
    Impl("criss_cross_attention", "triton", "vision", 1, 0.18, 40.0, 0.66, ("NS",)),
    Impl("routing_transformer", "torch", "sparse", 1, 0.02, 300.0, 0.31, ("NS", "CS")),
    Impl("block_topk_oracle", "triton", "sparse", 2, 0.9, 35.0, 0.04, ("NS", "CS")),
)


@dataclass(frozen=True)
class _Run:
    """One run on one device: its date, its software, and by how much it is slower than the first."""

    index: int
    device: str
    started: datetime
    torch: str
    commit: str

    @property
    def run_id(self) -> str:
        return f"{self.started:%Y%m%dT%H%M%S}-{_digest(self.device, self.index)[:6]}"

    @property
    def environment(self) -> str:
        facts: dict[str, Any] = {
            "device": self.device,
            "architecture": "x86_64",
            "cpu_model": "AMD EPYC 9354",
            "cpu_cores": 32,
            "kernel": "Linux 6.8.0",
            "python": "3.11.9",
            "torch": self.torch,
            "triton": "3.7.1",
            "numpy": "2.4.6",
            "attnbench": "0.1.0",
            "commit": self.commit,
            "float32_matmul_precision": "highest",
            "libraries": {"flash_attn": "2.8.3"},
            "env": {},
        }
        if self.device != "cpu":
            facts |= {
                "gpu_name": f"NVIDIA {self.device}",
                "gpu_memory_bytes": MEMORY_BYTES,
                "driver": "580.65.06",
                "cuda_runtime": "13.0",
                "power_limit_w": 700,
            }
        return json.dumps(facts, sort_keys=True)

    @property
    def software_key(self) -> str:
        return _digest(self.device, self.torch)


def synthetic_rows(
    impls: Sequence[Impl] = IMPLS,
    lengths: Sequence[int] = (256, 1024, 4096, 16384, 65536),
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    patterns: Sequence[str] = ("NS", "CS"),
    directions: Sequence[str] = ("fwd", "fwd_bwd"),
    gpus: Sequence[str] = ("h100-sxm", "a100-sxm"),
    *,
    blocks: int = 3,
    runs: int = 2,
    tasks: bool = True,
    hostile: bool = False,
    workload: str = "cab_efficiency",
    samples: int = 11,
    seed: int = 0,
) -> list[Row]:
    """Rows of every impl × length × dtype × pattern × direction × GPU × block × run, and of two tasks.

    Runs are a week apart; the software changes with the second half of them. In that half nystromformer is 12
    % slower, in the last quarter performer 8 % faster. Statuses other than ``ok`` appear by fixed rules, see
    :func:`_failure`. ``hostile`` adds an impl and a reason that are markup.
    """
    chosen = [*impls, Impl(HOSTILE, "torch", "user", 1, 0.1, 50.0, 0.5)] if hostile else list(impls)
    rows: list[Row] = []
    for run in (_run(i, runs, gpu) for gpu in gpus for i in range(runs)):
        drift = _drift(run.index, runs)
        for impl in chosen:
            for pattern in (p for p in patterns if p in impl.patterns):
                for dtype in dtypes:
                    for direction in directions:
                        for n in lengths:
                            case = _Case(impl, pattern, dtype, direction, n, workload, seed)
                            factor = drift.get(impl.mechanism, 1.0)
                            rows += (_op_row(run, case, b, factor, samples) for b in range(blocks))
        if tasks:
            rows += _task_rows(run, chosen, seed)
    return rows


def large(seed: int = 0) -> list[Row]:
    """39,600 rows or a few more: 30 impls × 11 lengths × 3 dtypes × 4 patterns × 2 directions × 5 GPUs."""
    impls = [
        replace(IMPLS[i % len(IMPLS)], mechanism=f"{IMPLS[i % len(IMPLS)].mechanism}_{i}", patterns=PATTERNS)
        if i >= 3
        else IMPLS[i]
        for i in range(30)
    ]
    lengths = [2**k for k in range(7, 18)]
    return synthetic_rows(
        impls, lengths, ("bfloat16", "float16", "float32"), PATTERNS, ("fwd", "fwd_bwd"), GPUS,
        blocks=1, runs=1, samples=9, seed=seed,
    )  # fmt: skip


# ---- operations ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    impl: Impl
    pattern: str
    dtype: str
    direction: str
    n: int
    workload: str
    seed: int

    @property
    def pairs(self) -> float:
        return self.n * self.n / (2 if self.pattern in ("CS", "CC") else 1)

    @property
    def passes(self) -> float:
        return 3.5 if self.direction == "fwd_bwd" else 1.0

    @property
    def flops_dense(self) -> int:
        return round(4 * BATCH * HEADS * HEAD_DIM * self.pairs * self.passes)

    @property
    def flops(self) -> int:
        if self.impl.growth == 2:
            return self.flops_dense
        return round(4 * BATCH * HEADS * HEAD_DIM * self.n * WIDTH_OF_LINEAR * self.passes)

    @property
    def tensor_bytes(self) -> int:
        return BATCH * HEADS * self.n * HEAD_DIM * self.itemsize

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def memory_bytes(self) -> int:
        maps = BATCH * HEADS * self.n * self.n * self.itemsize if self.impl.stores_map else 0
        return round(self.tensor_bytes * self.passes * 2 + maps)


def _op_row(run: _Run, case: _Case, block: int, drift: float, samples: int) -> Row:
    impl = case.impl
    row: Row = {
        **_provenance(run, "ops", block, case.n),
        "mechanism": impl.mechanism,
        "backend": impl.backend,
        "impl": f"{impl.mechanism}/{impl.backend}",
        "family": impl.family,
        "exact": impl.exact,
        "pattern": case.pattern,
        "workload": case.workload,
        "batch": BATCH,
        "heads": HEADS,
        "kv_heads": HEADS,
        "head_dim": HEAD_DIM,
        "grid": [],
        "n": case.n,
        "m": case.n,
        "dtype": case.dtype,
        "direction": case.direction,
        "scope": "op",
        "hyper": impl.hyper,
        "input_dist": "gaussian",
        "seed": case.seed,
        "flags": [],
        "flops": case.flops,
        "flops_dense": case.flops_dense,
        "bytes_min": 4 * case.tensor_bytes,
        "duration_s": 2.0 + block / 4,
    }
    row["case_key"] = _case_key(row)
    failed = _failure(case, run, block)
    if failed is not None:
        status, reason = failed
        tail = f"Traceback (most recent call last):\n  {reason}" if status in ("error", "crashed") else None
        return {**row, "status": status, "reason": reason, "log_tail": tail}
    return {**row, **_measured(run, case, block, drift, samples)}


def _measured(run: _Run, case: _Case, block: int, drift: float, samples: int) -> Row:
    impl = case.impl
    draw = random.Random(f"{case} {run.run_id} {block}")
    peak = RATE_TFLOPS.get(run.device, CPU_TFLOPS) / DTYPE_COST[case.dtype]
    bound_us = case.flops / peak * 1e-6
    floor_us = impl.floor_us * (1.0 if case.direction == "fwd" else 2.2)
    centre = (bound_us / min(impl.efficiency, 0.95) + floor_us) * drift * draw.lognormvariate(0.0, 0.004)
    values = [_float32(centre * draw.lognormvariate(0.0, 0.005)) for _ in range(samples)]
    found = stats.describe(values)
    time_us = found.median
    gpu = run.device != "cpu"
    peak_bytes = case.memory_bytes
    row: Row = {
        "status": "ok",
        "time_us": time_us,
        "time_kind": "device_cold" if gpu else "cpu_hot",
        "time_lo_us": found.lo,
        "time_hi_us": found.hi,
        "cold_us": time_us,
        "hot_us": time_us * 0.94,
        "e2e_us": time_us + 11.0,
        "launch_us": 11.0 + time_us * 0.06,
        "p5_us": found.p5,
        "p25_us": found.p25,
        "p75_us": found.p75,
        "p95_us": found.p95,
        "min_us": found.min,
        "mean_us": found.mean,
        "mad_us": found.mad,
        "n_samples": found.n,
        "n_outliers_mild": found.n_outliers_mild,
        "n_outliers_severe": found.n_outliers_severe,
        "loops": 1,
        "samples_us": values,
        "warmup_calls": 12,
        "compile_s": 3.2 if impl.backend == "triton" else 0.02,
        "flush_ratio": 2.4,
        "mem_peak_bytes": peak_bytes,
        "mem_saved_bytes": peak_bytes // 3 if case.direction == "fwd_bwd" else 0,
        "mem_workspace_bytes": peak_bytes // 2,
        "mem_inputs_bytes": 3 * case.tensor_bytes,
        "mem_output_bytes": case.tensor_bytes,
        "mem_method": "allocator" if gpu else "profiler",
        "tflops": case.flops / time_us * 1e-6,
        "tflops_effective": case.flops_dense / time_us * 1e-6,
        "gbps_min": 4 * case.tensor_bytes / time_us * 1e-3,
        "roofline_us": bound_us,
        "roofline_pct": 100 * bound_us / time_us,
        "peak_tflops_measured": 0.8 * peak,
        "err_rms": {"float32": 3e-7, "float16": 4e-4}.get(case.dtype, 3e-3),
        "err_max": {"float32": 3e-6, "float16": 4e-3}.get(case.dtype, 3e-2),
        "err_ratio": 0.9 + 0.3 * draw.random(),
        "cosine": 0.99999,
        "truth_dtype": "float64",
        "gate_n": min(case.n, 4096),
        "bitwise_equal": True,
        "ops_used": [f"flash/{impl.backend}"],
        "kernels": [f"{impl.mechanism}_kernel"],
        "n_launches": 1 if impl.backend == "triton" else 7,
    }
    if not impl.exact:
        for inputs, size in (("gaussian", 1.6), ("structured", 1.2), ("recorded", 1.0)):
            row[f"approx_err_{inputs}"] = impl.error * size
            row[f"approx_cosine_{inputs}"] = 1.0 - 0.4 * impl.error * size
    if draw.random() < 0.04:
        row["flags"] = ["not_converged: observed median known to ±0.83%, limit ±0.5%"]
    elif draw.random() < 0.02:
        row["flags"] = ["power_capped: observed 689 W, limit 679 W"]
    return row


def _failure(case: _Case, run: _Run, block: int) -> tuple[str, str] | None:
    """What goes wrong by rule: each of the eight statuses that are not ``ok`` has its place."""
    impl, n = case.impl, case.n
    limit = MEMORY_BYTES if run.device != "rtx-4090" else MEMORY_BYTES // 4
    if case.memory_bytes > limit:
        half = replace(case, n=n // 2)
        if half.memory_bytes > limit:
            return "skipped", f"N={n // 2} of this series ran out of memory"
        gib = case.memory_bytes / 2**30
        return "oom", f"out of memory: tried to allocate {gib:.1f} GiB of {limit / 2**30:.1f} GiB"
    rules = {
        ("nystromformer", "float32"): ("compile_error", "out of resource: shared memory, required 262144"),
        ("cosformer", "float32"): ("unsupported", "observed float32, expected float16 or bfloat16"),
        ("criss_cross_attention", "float32"): ("error", "RuntimeError: shape '[4, 8, 16, 16]' is invalid"),
        (HOSTILE, "float32"): ("error", f"ValueError: {HOSTILE}"),
    }
    if (impl.mechanism, case.dtype) in rules:
        return rules[impl.mechanism, case.dtype]
    if impl.mechanism == "reformer_lsh" and n >= 65536:
        return "timeout", "observed more than 120 s, expected at most 120 s"
    if impl.mechanism == "axial_attention" and n >= 16384:
        return "incorrect", "output is 4.1 times as far from the fp64 truth as the reference, allowed 2"
    if impl.mechanism == "routing_transformer" and n >= 16384 and block == 1:
        return "crashed", "the worker died by signal 11"
    return None


# ---- tasks ---------------------------------------------------------------------------------------------


def _task_rows(run: _Run, impls: Sequence[Impl], seed: int) -> Iterator[Row]:
    controls = (
        Impl("no_mixing", "torch", "control", 1, 0.5, 5.0, 2.0),
        Impl("uniform", "torch", "control", 1, 0.5, 5.0, 1.0),
    )
    for task, metric, better, pattern in (
        ("lm", "byte_ppl", "lower", "CS"),
        ("recall", "accuracy", "higher", "NS"),
    ):
        for impl in (i for i in (*impls, *controls) if pattern in i.patterns and i.hyper == "{}"):
            for replica in range(3):
                yield _task_row(run, impl, (task, metric, better, pattern), seed + replica)


def _task_row(run: _Run, impl: Impl, task: tuple[str, str, str, str], seed: int) -> Row:
    name, metric, better, pattern = task
    draw = random.Random(f"{run.run_id} {impl.mechanism} {impl.backend} {name} {seed}")
    score = 3.4 + impl.error + draw.gauss(0, 0.02) if better == "lower" else 0.0
    if better == "higher":
        score = min(1.0, max(0.0, 0.97 - 0.45 * impl.error + draw.gauss(0, 0.008)))
    row: Row = {
        **_provenance(run, name, 0, 512),
        "mechanism": impl.mechanism,
        "backend": impl.backend,
        "impl": f"{impl.mechanism}/{impl.backend}",
        "family": impl.family,
        "exact": impl.exact and impl.family != "control",
        "pattern": pattern,
        "workload": name,
        "n": 512,
        "m": 512,
        "dtype": "float32",
        "direction": "train",
        "scope": "task",
        "hyper": "{}",
        "seed": seed,
        "flags": [],
        "task": name,
        "metric": metric,
        "metric_better": better,
        "params": 1_204_224,
        "params_softmax": 1_200_128,
        "data": "embedded: a small text",
        "data_fingerprint": _digest(name),
        "control": impl.family == "control",
    }
    row["case_key"] = _case_key(row)
    if impl.mechanism == "routing_transformer" and seed % 3 == 2:
        return {**row, "status": "incorrect", "reason": "the loss is not finite after 120 steps"}
    return {
        **row,
        "status": "ok",
        "metric_value": score,
        "steps": 2000,
        "train_s": 90.0 + 40 * draw.random(),
        "tokens_per_s": 180_000.0,
    }


# ---- parts ---------------------------------------------------------------------------------------------


def _run(index: int, runs: int, device: str) -> _Run:
    half = max(1, runs // 2)
    return _Run(
        index,
        device,
        FIRST_RUN + timedelta(days=7 * index),
        "2.12.0+cu130" if index < half else "2.13.0+cu130",
        _digest("commit", index) + _digest("tail", index)[:8],
    )


def _drift(index: int, runs: int) -> dict[str, float]:
    if runs == 1:
        return {}
    slower = {"nystromformer": 1.12} if index >= runs // 2 else {}
    return {**slower, "performer": 0.92} if index >= max(1, 3 * runs // 4) else slower


def _provenance(run: _Run, suite: str, block: int, n: int) -> Row:
    started = run.started + timedelta(minutes=20 * block, seconds=n % 997)
    return {
        "run_id": run.run_id,
        "block": block,
        "suite": suite,
        "preset": "paper" if suite == "ops" else "small",
        "device": run.device,
        "started_at": started.isoformat(),
        "attnbench_version": "0.1.0",
        "commit": run.commit,
        "measurement_version": schema.MEASUREMENT_VERSION,
        "software_key": run.software_key,
        "environment": run.environment,
    }


def _case_key(row: Row) -> str:
    names = ("mechanism", "backend", "pattern", "workload", "n", "m", "dtype", "direction", "scope")
    more = ("hyper", "seed", "device", "task")
    return _digest(*(row.get(name) for name in (*names, *more)))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _float32(value: float) -> float:
    """The nearest number that the column of samples can hold."""
    import numpy as np

    return float(np.float32(value))
