"""The schema of a row: every column with its type, unit and meaning, and the rule which may be filled.

Journal, Parquet, report, site and docs/metrics.md read this list; a column exists nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import pyarrow as pa

SCHEMA_VERSION: Final = 3
"""Raised when a column comes, goes or changes its meaning; :mod:`attnbench.results.migrate` lifts older ones.

2: measured peaks and the bound that they give; geometry; what a sparse mechanism selects.
3: every metric of a task, and the limits of its learning check; processes that compute one call together.
"""

MEASUREMENT_VERSION: Final = 1
"""Raised when the same code would be measured differently; rows of two versions are never compared."""


class Status(StrEnum):
    """How a planned case ended. Every planned case ends as exactly one of these."""

    OK = "ok"
    INCORRECT = "incorrect"
    UNSUPPORTED = "unsupported"
    OOM = "oom"
    TIMEOUT = "timeout"
    COMPILE_ERROR = "compile_error"
    ERROR = "error"
    CRASHED = "crashed"
    SKIPPED = "skipped"


STATUS_MEANING: Final[dict[Status, str]] = {
    Status.OK: "measured, and the correctness gate passed",
    Status.INCORRECT: "ran, but gave wrong, non-finite or misshapen results, or changed its input",
    Status.UNSUPPORTED: "the impl declares that it cannot serve this case, with its reason",
    Status.OOM: "memory ran out",
    Status.TIMEOUT: "the time limit of the case passed",
    Status.COMPILE_ERROR: "a kernel did not compile",
    Status.ERROR: "the impl raised an exception",
    Status.CRASHED: "the worker process died",
    Status.SKIPPED: "not run: a shorter length of its series, or the run, was out of memory or time",
}


@dataclass(frozen=True)
class Column:
    """One column. ``performance`` columns are filled on ``ok`` rows only; ``required`` ones on every row."""

    name: str
    type: pa.DataType
    group: str
    doc: str
    unit: str = ""
    performance: bool = False
    required: bool = False


_STR, _INT, _F64, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_STRS = pa.list_(pa.string())


def _columns() -> tuple[Column, ...]:
    c = Column
    return (
        # ---- which case
        c("run_id", _STR, "case", "Identifier of the run that planned the case.", required=True),
        c("case_key", _STR, "case", "Key of the case: equal for equal cases on any machine.", required=True),
        c(
            "block",
            _INT,
            "case",
            "Replication of the case, from 0: each block is a fresh process.",
            required=True,
        ),
        c("suite", _STR, "case", "Named set of cases: `ops`, `cab`, `recall`, ...", required=True),
        c(
            "preset",
            _STR,
            "case",
            "Preset of the run: `tiny`, `small`, `paper`, or a variant that a task has, `paper_etth1_s`.",
            required=True,
        ),
        c("mechanism", _STR, "case", "Attention mechanism.", required=True),
        c("backend", _STR, "case", "How its operations are computed.", required=True),
        c("impl", _STR, "case", "`mechanism/backend`.", required=True),
        c(
            "family",
            _STR,
            "case",
            "Family: dense, linear, sparse, vision, cross, user; control for a control of a task.",
            required=True,
        ),
        c("exact", _BOOL, "case", "Whether the mechanism computes softmax attention exactly."),
        c("pattern", _STR, "case", "NS, CS, NC or CC: (non)causal, self or cross.", required=True),
        c("workload", _STR, "case", "Name of the shape, see `tasks/workloads.toml`.", required=True),
        c("batch", _INT, "case", "Batch size B."),
        c("heads", _INT, "case", "Query heads H."),
        c("kv_heads", _INT, "case", "Key and value heads Hkv."),
        c("head_dim", _INT, "case", "Head dimension D."),
        c("grid", pa.list_(pa.int64()), "case", "Grid the length was folded into; empty on a 1-D sequence."),
        c(
            "geometry",
            _STR,
            "case",
            "`native` on the workload's own grid, `folded` on a folded length.",
        ),
        c("n", _INT, "case", "Queries N.", "tokens", required=True),
        c("m", _INT, "case", "Keys M.", "tokens"),
        c("dtype", _STR, "case", "Element type of inputs and output.", required=True),
        c(
            "direction",
            _STR,
            "case",
            "`fwd`, or `fwd_bwd` for forward and backward together; `train` for a task.",
        ),
        c(
            "scope",
            _STR,
            "case",
            "`op` (q, k, v → o), `layer` (x → y with projections) or `task`.",
            required=True,
        ),
        c("hyper", _STR, "case", "Hyper-parameters that differ from the defaults, as JSON."),
        c("input_dist", _STR, "case", "Distribution of the timed inputs."),
        c("seed", _INT, "case", "Seed of inputs, initialisation and order."),
        c("device", _STR, "case", "Device as named in `harness/devices.toml`, or `cpu`.", required=True),
        c("world_size", _INT, "case", "Processes, each with a device, that compute one call together."),
        # ---- how it ended
        c("status", _STR, "outcome", "How the case ended, one of nine words.", required=True),
        c("reason", _STR, "outcome", "Why, in one sentence; filled on every row that is not `ok`."),
        c("log_tail", _STR, "outcome", "Last 4 KiB of what the worker printed, when it failed."),
        c(
            "flags",
            _STRS,
            "outcome",
            "What makes the numbers less certain, each with observed value and limit.",
        ),
        c("started_at", _STR, "outcome", "Start of the case, UTC, ISO 8601.", required=True),
        c("duration_s", _F64, "outcome", "Wall time of the case with compilation, checks and all.", "s"),
        # ---- time
        c("time_us", _F64, "time", "Headline latency: median of `samples_us`.", "µs", performance=True),
        c(
            "time_kind",
            _STR,
            "time",
            "What `time_us` is: `device_cold` on a GPU, `cpu_hot` on a CPU, `slowest_rank` of several.",
        ),
        c(
            "time_lo_us",
            _F64,
            "time",
            "Lower end of the 95 % order-statistic interval of the median.",
            "µs",
            True,
        ),
        c("time_hi_us", _F64, "time", "Upper end of the same interval.", "µs", True),
        c("cold_us", _F64, "time", "Median with the last-level cache evicted before each call.", "µs", True),
        c("hot_us", _F64, "time", "Median with inputs left in cache.", "µs", True),
        c(
            "e2e_us",
            _F64,
            "time",
            "Median wall time of call and synchronisation, as eager Python sees it.",
            "µs",
            True,
        ),
        c("launch_us", _F64, "time", "max(0, e2e − hot): time the device waits for Python.", "µs", True),
        c("p5_us", _F64, "time", "5th percentile of the headline samples.", "µs", True),
        c("p25_us", _F64, "time", "25th percentile of the headline samples.", "µs", True),
        c("p75_us", _F64, "time", "75th percentile of the headline samples.", "µs", True),
        c("p95_us", _F64, "time", "95th percentile of the headline samples.", "µs", True),
        c("min_us", _F64, "time", "Fastest headline sample.", "µs", True),
        c("mean_us", _F64, "time", "Mean of the headline samples.", "µs", True),
        c("mad_us", _F64, "time", "Median absolute deviation of the headline samples.", "µs", True),
        c("n_samples", _INT, "time", "Number of headline samples; none is dropped.", "samples", True),
        c(
            "n_outliers_mild",
            _INT,
            "time",
            "Samples beyond 1.5 interquartile ranges (kept).",
            "samples",
            True,
        ),
        c(
            "n_outliers_severe",
            _INT,
            "time",
            "Samples beyond 3 interquartile ranges (kept).",
            "samples",
            True,
        ),
        c(
            "loops",
            _INT,
            "time",
            "Calls per sample, so that a CPU sample lasts at least 5 ms.",
            "calls",
            True,
        ),
        c("samples_us", pa.list_(pa.float32()), "time", "Every headline sample, in order.", "µs", True),
        c("warmup_calls", _INT, "time", "Calls before sampling began.", "calls"),
        c("compile_s", _F64, "time", "First call minus the median later call: compilation and tuning.", "s"),
        c(
            "flush_ratio",
            _F64,
            "time",
            "Flushed over hot time of a reduction: proof that the cache was cold.",
            "×",
        ),
        c("graph", _BOOL, "time", "Whether `hot_us` replays a CUDA graph."),
        # ---- memory
        c(
            "mem_peak_bytes",
            _INT,
            "memory",
            "Peak of memory during the call, above what was held before.",
            "B",
            True,
        ),
        c(
            "mem_saved_bytes",
            _INT,
            "memory",
            "Memory kept for the backward, without inputs and output.",
            "B",
            True,
        ),
        c("mem_workspace_bytes", _INT, "memory", "Peak minus output and saved memory.", "B", True),
        c("mem_inputs_bytes", _INT, "memory", "Size of the inputs.", "B"),
        c("mem_output_bytes", _INT, "memory", "Size of the output.", "B"),
        c("mem_formula_bytes", _INT, "memory", "Extra memory by the mechanism's cost formula.", "B"),
        c(
            "mem_method",
            _STR,
            "memory",
            "`allocator` (CUDA) or `profiler` (replayed allocation events, CPU).",
        ),
        # ---- work and bounds
        c("flops", _INT, "work", "FLOPs of this mechanism by its formula; a multiply-add is 2.", "FLOP"),
        c("flops_dense", _INT, "work", "FLOPs of softmax attention on the same case.", "FLOP"),
        c(
            "flops_counted",
            _INT,
            "work",
            "FLOPs that torch's counter sees in the forward pass; a check of the formula.",
            "FLOP",
        ),
        c("tflops", _F64, "work", "`flops` over `time_us`.", "TFLOP/s", True),
        c(
            "tflops_effective",
            _F64,
            "work",
            "`flops_dense` over `time_us`: useful work per second.",
            "TFLOP/s",
            True,
        ),
        c("bytes_min", _INT, "work", "Inputs and output, each once: least traffic.", "B"),
        c(
            "gbps_min",
            _F64,
            "work",
            "`bytes_min` over `time_us`: a lower bound of the bandwidth used.",
            "GB/s",
            True,
        ),
        c(
            "roofline_us",
            _F64,
            "work",
            "Least possible time on this device: max of compute and traffic.",
            "µs",
        ),
        c("roofline_pct", _F64, "work", "`roofline_us` over `time_us`.", "%", True),
        c(
            "peak_tflops_measured",
            _F64,
            "work",
            "Rate of the fastest matrix product of this dtype in this process.",
            "TFLOP/s",
        ),
        c("peak_gbps_measured", _F64, "work", "Bytes read and written by a large copy, per second.", "GB/s"),
        c(
            "roofline_measured_us",
            _F64,
            "work",
            "`roofline_us` with the measured peaks instead of the vendor's.",
            "µs",
        ),
        c("roofline_measured_pct", _F64, "work", "`roofline_measured_us` over `time_us`.", "%", True),
        # ---- correctness and fidelity
        c(
            "err_rms",
            _F64,
            "error",
            "RMS error against the fp64 reference, relative to the RMS of the truth.",
        ),
        c("err_max", _F64, "error", "Largest absolute error, relative to the RMS of the truth."),
        c("err_ratio", _F64, "error", "`err_rms` over that of a plain reference in the same dtype.", "×"),
        c("cosine", _F64, "error", "Cosine of the output and the fp64 truth."),
        c("grad_err_rms", _F64, "error", "Largest relative RMS error over the input gradients."),
        c(
            "grad_err_ratio",
            _F64,
            "error",
            "`grad_err_rms` over that of the plain reference in the same dtype.",
            "×",
        ),
        c(
            "truth_dtype",
            _STR,
            "error",
            "Precision of the reference: `float64`, or `float32` where that does not fit.",
        ),
        c("gate_n", _INT, "error", "Length at which correctness was checked.", "tokens"),
        c("bitwise_equal", _BOOL, "error", "Whether two calls on equal inputs gave equal bits."),
        c(
            "approx_err_gaussian",
            _F64,
            "error",
            "RMS error against exact softmax attention, gaussian inputs.",
        ),
        c(
            "approx_err_structured",
            _F64,
            "error",
            "The same on structured inputs: sinks, locality, heavy hitters, topics.",
        ),
        c(
            "approx_err_recorded",
            _F64,
            "error",
            "The same on q, k, v recorded from a trained language model.",
        ),
        c("approx_cosine_gaussian", _F64, "error", "Cosine with exact softmax attention, gaussian inputs."),
        c("approx_cosine_structured", _F64, "error", "The same on structured inputs."),
        c("approx_cosine_recorded", _F64, "error", "The same on recorded inputs."),
        # ---- what a sparse mechanism selects, on recorded inputs
        c("density", _F64, "selection", "Pairs kept over pairs that the pattern allows."),
        c("block_density", _F64, "selection", "Blocks kept over blocks with an allowed pair."),
        c("executed_density", _F64, "selection", "Pairs in 64×64 tiles computed over pairs allowed."),
        c(
            "recall_mean",
            _F64,
            "selection",
            "Mass of softmax attention on the kept keys, mean over rows.",
        ),
        c("recall_p5", _F64, "selection", "What 95 % of the rows reach."),
        c("recall_p1", _F64, "selection", "What 99 % of the rows reach."),
        c("recall_min", _F64, "selection", "The least of any row."),
        c("selector_us", _F64, "selection", "Time of the selection alone, forward.", "µs", True),
        c("selector_share", _F64, "selection", "That over the time of the whole call.", "", True),
        # ---- what ran
        c("ops_used", _STRS, "provenance", "Operations and the backend that computed each, as `op/backend`."),
        c("kernels", _STRS, "provenance", "Names of the kernels launched by one call."),
        c("n_launches", _INT, "provenance", "Kernels launched by one call.", "kernels"),
        c(
            "tuned_config",
            _STR,
            "provenance",
            "Configurations picked for our kernels, each `default`, `cache` or `tuned`, as JSON.",
        ),
        # ---- tasks
        c("task", _STR, "task", "Task that was trained and evaluated."),
        c("metric", _STR, "task", "Name of the metric."),
        c("metric_value", _F64, "task", "The metric on held-out data, one seed.", performance=True),
        c("metric_better", _STR, "task", "`lower` or `higher`."),
        c("metrics", _STR, "task", "Every metric of the evaluation by name, as JSON; null where not finite."),
        c("check_softmax", _F64, "task", "Score that softmax must beat for the preset to test attention."),
        c("check_no_mixing", _F64, "task", "Score that a model without mixing must fail to reach."),
        c("steps", _INT, "task", "Optimiser steps taken.", "steps"),
        c("train_s", _F64, "task", "Training time, evaluation excluded.", "s", performance=True),
        c("tokens_per_s", _F64, "task", "Training throughput.", "tokens/s", performance=True),
        c("params", _INT, "task", "Parameters of the model.", "parameters"),
        c(
            "params_softmax",
            _INT,
            "task",
            "Parameters of the same model with softmax attention.",
            "parameters",
        ),
        c("data", _STR, "task", "`real`, `embedded` or `synthetic`, with the name of the data."),
        c("data_fingerprint", _STR, "task", "SHA-256 of the data; only equal data are compared."),
        c("control", _BOOL, "task", "Whether the row is a control (no mixing, uniform), not a mechanism."),
        # ---- provenance
        c("attnbench_version", _STR, "provenance", "Version of attnbench.", required=True),
        c("commit", _STR, "provenance", "Commit of attnbench; ends in `+dirty` with local changes."),
        c("measurement_version", _INT, "provenance", "Version of the measuring method.", required=True),
        c(
            "software_key",
            _STR,
            "provenance",
            "Hash of all that may change a time but is not the impl.",
            required=True,
        ),
        c(
            "environment",
            _STR,
            "provenance",
            "Hardware, drivers, libraries and settings, as JSON.",
            required=True,
        ),
    )


COLUMNS: Final[tuple[Column, ...]] = _columns()
BY_NAME: Final[dict[str, Column]] = {column.name: column for column in COLUMNS}
GROUPS: Final[dict[str, str]] = {
    "case": "Which case",
    "outcome": "How it ended",
    "time": "Time",
    "memory": "Memory",
    "work": "Work and bounds",
    "error": "Correctness and fidelity",
    "task": "Tasks",
    "selection": "What a sparse mechanism selects",
    "provenance": "What ran, where",
}
KEY: Final = ("case_key", "block", "software_key", "run_id")
"""Columns that identify a row: the same values twice are a duplicate."""


def arrow_schema() -> pa.Schema:
    """The pyarrow schema, with the version, units and meanings in its metadata."""
    fields = [
        pa.field(c.name, c.type, not c.required, {"unit": c.unit, "doc": c.doc, "group": c.group})
        for c in COLUMNS
    ]
    return pa.schema(fields, {"attnbench_schema_version": str(SCHEMA_VERSION)})


REQUIRED: Final = tuple(column.name for column in COLUMNS if column.required)
_PERFORMANCE: Final = tuple(column.name for column in COLUMNS if column.performance)
_STATUSES: Final = frozenset(str(status) for status in Status)


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with one row, in words; empty for a valid one.

    Checks unknown and missing columns, the status, and the invariant: only ``ok`` carries performance, an
    ``ok`` row carries its headline, and every other row carries its reason.
    """
    found = [f"unknown column {name!r}" for name in row if name not in BY_NAME]
    found += [f"{name} is missing" for name in REQUIRED if row.get(name) is None]
    status = row.get("status")
    if not isinstance(status, str) or status not in _STATUSES:
        return [*found, f"status {status!r} is not one of {', '.join(Status)}"]
    filled = [name for name in _PERFORMANCE if row.get(name) is not None]
    if status == Status.OK:
        headline = "metric_value" if row.get("scope") == "task" else "time_us"
        if row.get(headline) is None:
            found.append(f"status ok without {headline}")
    else:
        if filled:
            found.append(f"status {status} carries performance: {', '.join(filled)}")
        if not row.get("reason"):
            found.append(f"status {status} without a reason")
    return found


def without_performance(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its performance columns removed, as every status but ``ok`` requires."""
    return {name: value for name, value in row.items() if not BY_NAME[name].performance}
