"""The shapes of real models, read and checked from ``workloads.toml``. Imports no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from attnbench.errors import UsageError, unknown_name
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern

PATH = Path(__file__).with_name("workloads.toml")
PRESETS = ("tiny", "small", "paper")

_REQUIRED: Mapping[str, type] = {
    "model": str,
    "source": str,
    "batch": int,
    "heads": int,
    "kv_heads": int,
    "head_dim": int,
    "patterns": list,
    "suites": list,
    "lengths": dict,
}
_OPTIONAL: Mapping[str, type] = {"grid_rank": int, "m_fixed": int, "n_fixed": int, "m_per_n": float}


@dataclass(frozen=True)
class WorkloadEntry:
    """A workload with the patterns it makes sense for, its lengths per preset and the suites it is in.

    A length counts the queries, or the keys where ``workload.n_fixed`` fixes the queries.
    """

    workload: Workload
    patterns: tuple[Pattern, ...]
    lengths: Mapping[str, tuple[int, ...]]
    suites: tuple[str, ...]


def entries() -> list[WorkloadEntry]:
    """All workloads, in the order of the file."""
    return list(_shipped().values())


def entry(name: str) -> WorkloadEntry:
    """One workload by name. Raises UsageError for an unknown name."""
    if name not in _shipped():
        raise unknown_name("workload", name, _shipped(), "`attnbench list --workloads` shows them all.")
    return _shipped()[name]


def suites() -> list[str]:
    """Names of the suites, in the order in which the file first uses them."""
    return list(dict.fromkeys(suite for found in entries() for suite in found.suites))


def suite(name: str) -> list[WorkloadEntry]:
    """The workloads of a suite. Raises UsageError for an unknown suite."""
    if name not in suites():
        raise unknown_name("suite", name, suites())
    return [found for found in entries() if name in found.suites]


def load(path: Path) -> dict[str, WorkloadEntry]:
    """Read and check a file of workloads; name → entry.

    Raises UsageError with the file, the workload, the field, and what was observed and expected.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as TOML: {error}") from None
    return {name: _Table(path, name, fields).entry() for name, fields in tables.items()}


@cache
def _shipped() -> dict[str, WorkloadEntry]:
    return load(PATH)


@dataclass(frozen=True)
class _Table:
    """One table of the file, with what its error messages need."""

    path: Path
    name: str
    fields: Any

    def entry(self) -> WorkloadEntry:
        self._check_fields()
        f = self.fields
        for field in ("batch", "heads", "kv_heads", "head_dim", "grid_rank", "m_fixed", "n_fixed", "m_per_n"):
            self._expect(f.get(field, 1) > 0, field, "a positive number")
        self._expect(f["heads"] % f["kv_heads"] == 0, "kv_heads", f"a divisor of heads = {f['heads']}")
        self._expect(f.get("grid_rank", 1) <= 3, "grid_rank", "1, 2 or 3")
        known = {p.value for p in Pattern}
        self._expect(f["patterns"] and set(f["patterns"]) <= known, "patterns", f"some of {sorted(known)}")
        self._expect(f["suites"] and all(isinstance(s, str) for s in f["suites"]), "suites", "names")
        self._check_cross()
        lengths = {preset: self._lengths(preset, found) for preset, found in f["lengths"].items()}
        shape = {
            field: f[field]
            for field in (*_REQUIRED, *_OPTIONAL)
            if field in f and field not in ("patterns", "suites", "lengths")
        }
        patterns = tuple(Pattern(p) for p in f["patterns"])
        return WorkloadEntry(Workload(name=self.name, **shape), patterns, lengths, tuple(f["suites"]))

    def _check_fields(self) -> None:
        if not isinstance(self.fields, dict):
            raise UsageError(f"{self.path}: observed {self.name} = {self.fields!r}, expected [{self.name}]")
        types = {**_REQUIRED, **_OPTIONAL}
        for field, value in self.fields.items():
            if field not in types:
                raise unknown_name(f"field of [{self.name}] in {self.path}", field, types)
            kind = types[field]
            right = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
            self._expect(right, field, {str: "text", int: "an integer"}.get(kind, f"a {kind.__name__}"))
        for field in _REQUIRED:
            self._expect(field in self.fields, field, "a value: it is required")

    def _check_cross(self) -> None:
        f, patterns = self.fields, set(self.fields["patterns"])
        cross = patterns & {"NC", "CC"}
        for field in ("m_fixed", "m_per_n"):
            self._expect(field not in f or bool(cross), field, "NC or CC among the patterns")
        fits = "n_fixed" not in f or ("NS" not in patterns and "m_fixed" not in f and "m_per_n" not in f)
        self._expect(fits, "n_fixed", "no NS among the patterns, and no rule for the keys")

    def _lengths(self, preset: str, lengths: Any) -> tuple[int, ...]:
        field = f"lengths.{preset}"
        if preset not in PRESETS:
            raise unknown_name(f"preset in lengths of [{self.name}] in {self.path}", preset, PRESETS)
        right = isinstance(lengths, list) and bool(lengths) and all(type(n) is int and n > 0 for n in lengths)
        self._expect(right and lengths == sorted(set(lengths)), field, "ascending positive integers")
        return tuple(lengths)

    def _expect(self, right: object, field: str, expected: str) -> None:
        if not right:
            observed = self.fields.get(field, "nothing")
            if field.startswith("lengths."):
                observed = self.fields["lengths"][field.removeprefix("lengths.")]
            raise UsageError(
                f"{self.path}: [{self.name}] {field}: observed {observed!r}, expected {expected}"
            )
