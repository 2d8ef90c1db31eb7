"""Where rows come from: environments, and the flags that make numbers less certain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.results.rows import Row


@dataclass(frozen=True)
class Environment:
    """What rows of one software key and device were measured on. ``facts`` are those of the newest row."""

    key: str
    devices: tuple[str, ...]
    rows: int
    first: str
    last: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FlagCount:
    """A flag, the number of rows that carry it, and one of them in words."""

    name: str
    rows: int
    example: str


def environments(rows: Iterable[Row]) -> list[Environment]:
    """Every software key with the facts of its newest environment, the newest key first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["software_key"], []).append(row)
    found = [_environment(key, group) for key, group in groups.items()]
    return sorted(found, key=lambda e: (e.last, e.key), reverse=True)


def facts(environment: str) -> tuple[tuple[str, str], ...]:
    """Names and values of an environment, by name; what is not known is left out."""
    known = json.loads(environment)
    return tuple((n, _fact(v)) for n, v in sorted(known.items()) if v not in (None, "", [], {}))


def flag_counts(rows: Iterable[Row]) -> list[FlagCount]:
    """Every flag with the number of rows that carry it and one example."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        for text in row.get("flags") or ():
            seen.setdefault(text.split(":")[0], []).append(text)
    return [FlagCount(name, len(texts), min(texts)) for name, texts in sorted(seen.items())]


def _environment(key: str, group: Sequence[Row]) -> Environment:
    days = sorted(str(row["started_at"]) for row in group)
    newest = max(group, key=lambda row: str(row["started_at"]))
    devices = tuple(sorted({str(row["device"]) for row in group}))
    return Environment(key, devices, len(group), days[0][:10], days[-1][:10], facts(newest["environment"]))


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
