"""Chooses among the launch configurations of a kernel: by default, from a cache on disk, or by timing them.

Nothing is tuned unasked: a first call that takes seconds, inside somebody's measurement, would be worse than
a default that is a few per cent slow. Whoever measures turns tuning on and records what was picked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

import torch

from attnbench.kernels.backends import interpreting

Mode = Literal["off", "cache", "compile", "tune"]
"""``off``: the default. ``cache``: what an earlier tuning stored, else the default. ``tune``: on a miss, time
the candidates and store the winner. ``compile``: on a miss, launch each once: a later process only times.
"""

Source = Literal["default", "cache", "tuned"]
C = TypeVar("C")
Launch = Callable[[], object]

VARIABLE: Final = "ATTNBENCH_TUNING"
CACHE_VERSION: Final = 1
MARGIN: Final = 0.01
"""A candidate replaces the default only when it is faster by more than this share: noise moves nothing."""


@dataclass(frozen=True)
class Gpu:
    """What a timing holds for: another device, capability or compiler has winners of its own."""

    name: str
    capability: tuple[int, int]
    triton: str


@dataclass(frozen=True)
class Picked:
    """One choice. ``source``: ``default`` (first candidate), ``cache`` (an earlier tuning) or ``tuned``."""

    op: str
    kernel: str
    config: Any
    source: Source

    def plain(self) -> dict[str, Any]:
        """The choice as values that JSON has."""
        return {"op": self.op, "kernel": self.kernel, "config": _plain(self.config), "source": self.source}


@dataclass
class Tuner:
    """Winners of one GPU: in memory, in one JSON file, and how to find new ones.

    ``bench`` gives the time of a launch in µs; a candidate that raises one of ``failures`` is dropped. The
    file is shared by processes: it is replaced atomically, under a lock where the system has one, and a file
    that cannot be read counts as empty.
    """

    gpu: Gpu
    folder: Path
    bench: Callable[[Launch], float]
    failures: tuple[type[Exception], ...] = ()
    _entries: dict[str, Any] = field(default_factory=dict, init=False)
    _stamp: tuple[int, int] | None = field(default=None, init=False)

    @property
    def path(self) -> Path:
        """The file of this GPU."""
        name = re.sub(r"[^a-z0-9]+", "-", self.gpu.name.lower()).strip("-")
        major, minor = self.gpu.capability
        return self.folder / f"{name}-{major}.{minor}.json"

    def identity(self, op: str, kernel: str, key: Sequence[object], candidates: Sequence[object]) -> str:
        """Hash of all that a winner depends on within one GPU: 24 hex digits."""
        parts = [self.gpu.triton, op, kernel, list(key), [_plain(config) for config in candidates]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]

    def known(self, identity: str, candidates: Sequence[C]) -> C | None:
        """The winner that was stored, or None. Reads the file when it has changed."""
        self._load()
        entry = self._entries.get(identity)
        winner = entry.get("winner") if isinstance(entry, dict) else None
        return next((config for config in candidates if _plain(config) == winner), None)

    def tune(
        self,
        op: str,
        kernel: str,
        key: Sequence[object],
        candidates: Sequence[C],
        launch: Callable[[C], Launch],
    ) -> C:
        """Time every candidate, store the fastest and return it; the first one when all of them fail."""
        times_us: list[float | None] = []
        dropped: dict[str, str] = {}
        for index, config in enumerate(candidates):
            try:
                time_us = self.bench(launch(config))
            except self.failures as why:
                dropped[str(index)] = f"{type(why).__name__}: {why}"[:200]
                times_us.append(None)
            else:
                times_us.append(time_us if math.isfinite(time_us) else None)
        best = fastest(times_us)
        if best is None:
            return candidates[0]  # launching it says what is wrong
        entry = {
            "triton": self.gpu.triton,
            "op": op,
            "kernel": kernel,
            "key": json.loads(json.dumps(list(key), default=str)),
            "winner": _plain(candidates[best]),
            "candidates": [_plain(config) for config in candidates],
            "times_us": times_us,
            "dropped": dropped,
        }
        self._store(self.identity(op, kernel, key, candidates), entry)
        return candidates[best]

    def compile(self, candidates: Sequence[C], launch: Callable[[C], Launch]) -> None:
        """Launch every candidate once and time none: what is compiled is in Triton's cache on disk."""
        for config in candidates:
            with suppress(*self.failures):
                launch(config)()

    def _load(self) -> None:
        """Entries of the file over those in memory, when the file is another one than at the last look."""
        try:
            status = self.path.stat()
            stamp = (status.st_ino, status.st_mtime_ns)
            if stamp == self._stamp:
                return
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        self._stamp = stamp
        if isinstance(content, dict) and content.get("version") == CACHE_VERSION:
            entries = content.get("entries")
            self._entries |= entries if isinstance(entries, dict) else {}

    def _store(self, identity: str, entry: dict[str, Any]) -> None:
        """Add one entry to what others have stored meanwhile.

        A folder that cannot be written costs the next process's time and nothing else: the winner stays in
        memory.
        """
        self._entries[identity] = entry
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                self._load()
                self._entries[identity] = entry
                content = {
                    "version": CACHE_VERSION,
                    "device": self.gpu.name,
                    "capability": list(self.gpu.capability),
                    "entries": self._entries,
                }
                _replace(self.path, json.dumps(content, indent=1, sort_keys=True))


def fastest(times_us: Sequence[float | None]) -> int | None:
    """Index of the winner: the fastest, but the first where none beats it by :data:`MARGIN`."""
    timed = [(time_us, index) for index, time_us in enumerate(times_us) if time_us is not None]
    if not timed:
        return None
    best_us, best = min(timed)
    first_us = times_us[0]
    return 0 if first_us is not None and best_us >= first_us * (1 - MARGIN) else best


# ---- what kernels call -----------------------------------------------------------------------------------

# Backward kernels are launched by autograd's own threads, which inherit no context variables: the mode and
# the collectors belong to the process.
_modes: list[Mode] = []
_collectors: list[list[Picked]] = []
_memo: dict[tuple[object, ...], tuple[Sequence[Any], Any, Source]] = {}
_lock = threading.RLock()


def pick(
    op: str,
    kernel: str,
    key: tuple[object, ...],
    candidates: Sequence[C],
    launch: Callable[[C], Launch],
    device: torch.device,
    *,
    reorders: bool = True,
) -> C:
    """The configuration that ``kernel`` of ``op`` is launched with: one of ``candidates``.

    ``key`` names what the best choice depends on (capability, dtype, buckets of sizes); its items are
    hashable and have a stable ``str``. ``launch(config)`` gives a callable that launches the kernel and may
    be called any number of times. ``reorders`` tells that configurations sum in different orders, so that
    deterministic algorithms need the default.

    The default is ``candidates[0]``. It is also the answer on anything but a GPU (hence ahead of time), under
    Triton's interpreter, and where nothing is cached and nothing may be timed: tuning off, or a CUDA graph
    being captured. Raises ValueError without candidates.

    A repeated call costs one look-up in a dictionary.
    """
    if not candidates:
        raise ValueError(f"{op}/{kernel}: observed no candidates, expected at least the default")
    config, source = _choose(op, kernel, key, candidates, launch, device, reorders)
    for collector in _collectors:
        collector.append(Picked(op, kernel, config, source))
    return config


def _choose(
    op: str,
    kernel: str,
    key: tuple[object, ...],
    candidates: Sequence[C],
    launch: Callable[[C], Launch],
    device: torch.device,
    reorders: bool,
) -> tuple[C, Source]:
    wanted = mode()
    if len(candidates) == 1 or wanted == "off" or device.type != "cuda" or interpreting():
        return candidates[0], "default"
    if reorders and torch.are_deterministic_algorithms_enabled():
        return candidates[0], "default"
    memo_key = (device.index, op, kernel, key)
    known = _memo.get(memo_key)
    if known is not None and (known[0] is candidates or known[0] == candidates):
        _, config, source = known
        if source != "default" or wanted != "tune":
            return config, source
    with _lock:
        config, source = _search(op, kernel, key, candidates, launch, device, wanted)
        _memo[memo_key] = (candidates, config, source)
    return config, source


def _search(
    op: str,
    kernel: str,
    key: tuple[object, ...],
    candidates: Sequence[C],
    launch: Callable[[C], Launch],
    device: torch.device,
    wanted: Mode,
) -> tuple[C, Source]:
    tuner = tuner_of(device.index or 0, cache_folder())
    cached = tuner.known(tuner.identity(op, kernel, key, candidates), candidates)
    if cached is not None:
        return cached, "cache"
    if wanted == "cache" or torch.cuda.is_current_stream_capturing():
        return candidates[0], "default"
    if wanted == "compile":
        tuner.compile(candidates, launch)
        return candidates[0], "default"
    return tuner.tune(op, kernel, key, candidates, launch), "tuned"


def mode() -> Mode:
    """What is in force: the innermost :func:`set_mode`, else ``ATTNBENCH_TUNING``, else ``cache``."""
    if _modes:
        return _modes[-1]
    asked = os.environ.get(VARIABLE, "cache")
    for known in get_args(Mode):
        if asked == known:
            return known
    raise ValueError(f"{VARIABLE}: observed {asked!r}, expected one of {', '.join(get_args(Mode))}")


@contextmanager
def set_mode(mode: Mode) -> Iterator[None]:
    """Set the mode inside the block, in every thread of the process."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode of tuning: observed {mode!r}, expected one of {', '.join(get_args(Mode))}")
    _modes.append(mode)
    try:
        yield
    finally:
        _modes.pop()


@contextmanager
def picked() -> Iterator[list[Picked]]:
    """Collect what :func:`pick` chooses inside the block, in every thread, in order, for a row's record."""
    choices: list[Picked] = []
    _collectors.append(choices)
    try:
        yield choices
    finally:
        _collectors[:] = [collector for collector in _collectors if collector is not choices]


def forget() -> None:
    """Empty what this process remembers of choices; files stay. For tests and after a change of folder."""
    with _lock:
        _memo.clear()
        tuner_of.cache_clear()


def cache_folder() -> Path:
    """Where the files are: ``attnbench/tuning`` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "attnbench" / "tuning"


@lru_cache(maxsize=32)
def tuner_of(index: int, folder: Path) -> Tuner:
    """The tuner of one GPU of this process."""
    import triton
    from triton.runtime.errors import OutOfResources, PTXASError

    properties = torch.cuda.get_device_properties(index)
    gpu = Gpu(properties.name, (properties.major, properties.minor), triton.__version__)
    return Tuner(gpu, folder, partial(_bench, index), (OutOfResources, PTXASError))


def _bench(index: int, launch: Launch) -> float:
    """Median time in µs on one GPU, with the L2 cache evicted before each launch."""
    from triton.testing import do_bench

    with torch.cuda.device(index):
        launch()  # compiles: a candidate without the resources fails here, before anything is timed
        return 1e3 * float(do_bench(launch, warmup=5, rep=25, return_mode="median"))


def _plain(config: object) -> Any:
    """A configuration as values that JSON has."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return json.loads(json.dumps(dataclasses.asdict(config), default=str))
    if isinstance(config, Mapping):
        return json.loads(json.dumps(dict(config), default=str))
    return str(config)


def _replace(path: Path, text: str) -> None:
    """Write ``path`` so that a reader sees the old file or the new one, never a part."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False
    ) as file:
        file.write(text)
    try:
        Path(file.name).replace(path)
    except OSError:
        Path(file.name).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; without one (not a POSIX system) the last writer wins, and no file is torn."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
