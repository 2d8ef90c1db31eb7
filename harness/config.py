"""What a user asks of a run, and the same with nothing left open.

In :class:`RunConfig` an empty field means "as the preset says"; :func:`resolve` folds preset and request
into a :class:`Resolved` whose fields are all decided. Only the latter is consumed further on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from attnbench.errors import UsageError, unknown_name
from attnbench.impls.spec import Pattern

DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}
DIRECTIONS = ("fwd", "fwd_bwd")
MOST = 10_000
"""Blocks or jobs of a run at most: more is a slip of the pen."""

ENGINES = ("local", "ray", "slurm")
TIME_LIMITS_S = {"op": 120.0, "layer": 120.0, "task": 1800.0}
"""Seconds after which a case is a timeout, compilation and checks included; a task case is a training."""


@dataclass(frozen=True)
class Preset:
    """Defaults of a preset: what is swept where the user says nothing, and how long is measured.

    ``threads`` 0 means one per physical core. ``tiny`` computes on one: its shapes are too small to share,
    and threads that wait for each other make a busy machine many times slower.
    """

    dtypes_cpu: tuple[str, ...]
    dtypes_gpu: tuple[str, ...]
    directions: tuple[str, ...]
    timing: str
    gate_max_n: int
    seeds: tuple[int, ...]
    threads: int = 0


PRESETS = {
    "tiny": Preset(("float32",), ("bfloat16",), DIRECTIONS, "tiny", 256, (0, 1, 2), threads=1),
    "small": Preset(("float32",), ("bfloat16",), DIRECTIONS, "default", 2048, (0, 1, 2)),
    "paper": Preset(("float32",), ("bfloat16", "float16"), DIRECTIONS, "default", 4096, (0, 1, 2, 3, 4)),
}


@dataclass(frozen=True)
class RunConfig:
    """A request, as the command line or ``attnbench.run`` gives it. Empty tuples mean the preset's choice.

    ``hyper`` holds (mechanism, hyper-parameter, value). ``shard`` is (i, n), 1-based. ``blocks`` is how often
    each case is measured, each time in a fresh process. ``threads`` 0 means the preset's, ``time_limit_s`` 0
    the limit of :data:`TIME_LIMITS_S` for the scope. With ``density`` above 0, sparse mechanisms that have a
    choice keep that share of the pairs, whatever the length; 0 leaves them their own hyper-parameters.
    ``ranks`` are numbers of processes that compute one call together (suite context_parallel). ``jobs`` is
    the size of a job array (engine slurm); ``gpu`` may name several devices, comma-separated, for
    an engine that reaches other machines.
    """

    impl: tuple[str, ...] = ("all",)
    gpu: str = "auto"
    suite: str = "ops"
    task: tuple[str, ...] = ()
    workload: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ()
    seqlen: tuple[int, ...] = ()
    dtype: tuple[str, ...] = ()
    direction: tuple[str, ...] = ()
    preset: str = "tiny"
    seed: int = 0
    blocks: int = 1
    shard: tuple[int, int] = (1, 1)
    time_limit_s: float = 0.0
    threads: int = 0
    infer: bool = True
    hyper: tuple[tuple[str, str, Any], ...] = ()
    density: float = 0.0
    ranks: tuple[int, ...] = ()
    engine: str = "local"
    jobs: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``run.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunConfig:
        """Inverse of :meth:`to_json`; UsageError for a field of another version."""
        try:
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            given["hyper"] = tuple((m, n, v) for m, n, v in values.get("hyper", ()))
            config = cls(**cast(Any, given))
            _check_types(config)
            return config
        except (TypeError, ValueError) as error:
            raise UsageError(f"the run's config was written by another version: {error}") from None


def _check_types(config: RunConfig) -> None:
    """Raise TypeError for a field of another type than its default: a file may hold anything."""
    for known in fields(config):
        value, expected = getattr(config, known.name), type(known.default)
        allowed = (int, float) if expected is float else expected
        if not isinstance(value, allowed) or (isinstance(value, bool) and expected is not bool):
            raise TypeError(f"{known.name}: observed {value!r}, expected {expected.__name__}")
        items = {"hyper": (), "seqlen": (int,), "ranks": (int,), "shard": (int,)}.get(known.name, (str,))
        if items and isinstance(value, tuple) and not all(type(item) in items for item in value):
            raise TypeError(f"{known.name}: observed {value!r}, expected {items[0].__name__} items")
    if len(config.shard) != 2 or not 1 <= config.shard[0] <= config.shard[1]:
        raise ValueError(f"shard: observed {config.shard}, expected i, n with 1 <= i <= n")


@dataclass(frozen=True)
class Resolved:
    """A request with nothing left open."""

    request: RunConfig
    preset: Preset
    device: str
    patterns: tuple[str, ...]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    hyper: dict[str, dict[str, Any]] = field(default_factory=dict)


def preset_of(request: RunConfig) -> Preset:
    """How the preset of a request is measured: a variant that a task has, ``paper_etth1_s``, like ``paper``.

    Raises UsageError for another name.
    """
    scale, _, variant = request.preset.partition("_")
    if scale not in PRESETS or (variant and not request.task):
        raise unknown_name("preset", request.preset, PRESETS)
    return PRESETS[scale]


def resolve(request: RunConfig, device: str) -> Resolved:
    """Fold preset and request. Raises UsageError for every value that means nothing."""
    preset = preset_of(request)
    check_engine(request.engine)
    if min(request.blocks, request.jobs) < 1 or request.time_limit_s < 0 or request.threads < 0:
        raise UsageError(
            f"observed {request.blocks} blocks, {request.jobs} jobs, a time limit of {request.time_limit_s} "
            f"s, {request.threads} threads; expected positive numbers (0 seconds, 0 threads: the default)"
        )
    if not math.isfinite(request.time_limit_s) or max(request.blocks, request.jobs) > MOST:
        raise UsageError(
            f"observed a time limit of {request.time_limit_s} s, {request.blocks} blocks, {request.jobs} "
            f"jobs; expected a finite limit and at most {MOST} of either"
        )
    if not -(1 << 63) <= request.seed < 1 << 63:
        raise UsageError(f"--seed {request.seed}: expected a number of 64 bits")
    if not 0 <= request.density <= 1:
        raise UsageError(f"--density {request.density}: expected a share of the pairs, above 0 and at most 1")
    hyper: dict[str, dict[str, Any]] = {}
    for mechanism, name, value in request.hyper:
        hyper.setdefault(mechanism, {})[name] = value
    return Resolved(
        request=request,
        preset=preset,
        device=device,
        patterns=tuple(_one_of("pattern", p.upper(), Pattern) for p in request.pattern) or tuple(Pattern),
        dtypes=tuple(DTYPES[_one_of("dtype", d.lower(), DTYPES)] for d in request.dtype)
        or (preset.dtypes_cpu if device == "cpu" else preset.dtypes_gpu),
        directions=tuple(_one_of("direction", d, DIRECTIONS) for d in request.direction) or preset.directions,
        hyper=hyper,
    )


def check_engine(name: str) -> str:
    """The name of an engine as it is. Raises UsageError for one that does not exist."""
    return _one_of("engine", name, ENGINES)


def _one_of(kind: str, value: str, known: Iterable[str]) -> str:
    names = [str(name) for name in known]
    if value not in names:
        raise unknown_name(kind, value, names)
    return value


def parse_lengths(text: str) -> tuple[int, ...]:
    """``"1024..65536"`` → the powers of two times 1024 up to 65536; ``"256,1000"`` → those two.

    Raises UsageError for anything else, for a length below 1, and for an end before the start.
    """
    expected = "expected lengths such as 1024, 256,512 or 1024..65536"
    lengths: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,12})(?:\.\.(\d{1,12}))?", part)
        if match is None:
            raise UsageError(f"--seqlen {text!r}: observed {part!r}, {expected}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first < 1 or last < first:
            raise UsageError(f"--seqlen {text!r}: {part!r} is empty or starts below 1, {expected}")
        while first <= last:
            lengths.append(first)
            first *= 2
    return tuple(sorted(set(lengths)))


def parse_ranks(text: str) -> tuple[int, ...]:
    """``"1,2,4"`` → (1, 2, 4). UsageError for anything but numbers from 1."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", part) for part in parts):
        raise UsageError(f"--ranks {text!r}: expected numbers of processes such as 1,2,4")
    return tuple(sorted({int(part) for part in parts}))


def parse_shard(text: str) -> tuple[int, int]:
    """``"2/8"`` → (2, 8). UsageError unless 1 ≤ i ≤ n."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text!r}: expected i/n with 1 <= i <= n, for instance 2/8")
    return int(match[1]), int(match[2])


def parse_parameter(text: str) -> tuple[str, str]:
    """``"partition=gpu"`` → ("partition", "gpu"). UsageError for anything without a name."""
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise UsageError(f"--slurm {text!r}: expected name=value, for instance partition=gpu")
    return name.strip(), value.strip()


def parse_hyper(text: str) -> tuple[str, str, Any]:
    """``"lara.alpha=2"`` → ("lara", "alpha", 2). Values are JSON, or text when they are not."""
    import json

    match = re.fullmatch(r"([^.=]+)\.([^.=]+)=(.*)", text)
    if match is None:
        raise UsageError(
            f"--set {text!r}: expected mechanism.name=value, for instance performer.num_features=64"
        )
    try:
        value: Any = json.loads(match[3])
    except (ValueError, RecursionError):
        value = match[3]
    return match[1], match[2], value
