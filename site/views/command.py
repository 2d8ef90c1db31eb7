"""The command that repeats a measurement, from what its rows say."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnbench.results.rows import Row
from attnbench.site.views.words import DTYPE_WORDS


def repeat(rows: Sequence[Row], workloads: Mapping[str, Mapping[str, Any]], everything: Iterable[str]) -> str:
    """``attnbench run …`` for the cases of ``rows``, which are of one run and device.

    ``workloads`` says which workload counts keys as its length, ``everything`` names all mechanisms there
    are: where the rows have all of them, the command says ``all``.
    """
    tasks = [row for row in rows if row["scope"] == "task"]
    chosen = tasks or list(rows)
    impls = _values(chosen, "impl")
    mechanisms = {row["mechanism"] for row in chosen if row["family"] != "control"}
    if len(mechanisms) > 1:
        impls = ["all"] if mechanisms == set(everything) else sorted(mechanisms)
    options: list[tuple[str, Sequence[str]]] = [
        ("--impl", impls),
        ("--gpu", _values(chosen, "device")),
        ("--preset", _values(chosen, "preset")),
        ("--pattern", _values(chosen, "pattern")),
        ("--seed", _one(_values(chosen, "seed"))),
    ]
    if tasks:
        options.append(("--task", _values(chosen, "task")))
    else:
        options += [
            ("--workload", _values(chosen, "workload")),
            ("--seqlen", sorted({_length(row, workloads) for row in chosen}, key=int)),
            ("--dtype", [DTYPE_WORDS.get(name, name) for name in _values(chosen, "dtype")]),
            ("--direction", _values(chosen, "direction")),
        ]
    blocks = 1 + max(row["block"] for row in chosen)
    options.append(("--blocks", [str(blocks)] if blocks > 1 else []))
    words = ["attnbench", "run"]
    for name, values in options:
        words += [name, ",".join(values)] if values else []
    return shlex.join([*words, *_settings(chosen)])


def install(rows: Iterable[Row]) -> tuple[str, ...]:
    """The versions and commits of attnbench that measured ``rows``, in words."""
    found = {(row["attnbench_version"], row.get("commit") or "") for row in rows}
    return tuple(f"attnbench {v}" + (f" at commit {c}" if c else "") for v, c in sorted(found))


def _settings(rows: Iterable[Row]) -> list[str]:
    found: dict[str, None] = {}
    for row in rows:
        for name, value in sorted(json.loads(row.get("hyper") or "{}").items()):
            found[f"{row['mechanism']}.{name}={value}"] = None
    return [word for text in found for word in ("--set", text)]


def _length(row: Row, workloads: Mapping[str, Mapping[str, Any]]) -> str:
    counts_keys = workloads.get(row["workload"], {}).get("n_fixed") is not None
    return str(row["m"] if counts_keys and row["m"] is not None else row["n"])


def _one(values: list[str]) -> list[str]:
    """The value that all rows share; with several, the preset's own are meant."""
    return values if len(values) == 1 else []


def _values(rows: Iterable[Row], name: str) -> list[str]:
    return sorted({str(row[name]) for row in rows if row[name] is not None})
