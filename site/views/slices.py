"""What the scripts of the pages read: the summaries of one device, dtype and direction, column by column.

Texts are stored once and referred to by index, fractions have six significant digits (the Parquet has all).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attnbench.results.aggregate import Summary
from attnbench.site.views.case import Case, Entry
from attnbench.site.views.columns import VALUES
from attnbench.site.views.links import impl_page, impl_slug, slug
from attnbench.site.views.words import context, flag_names, shape, value_of

DIGITS: Final = 6
TEXTS: Final = (
    *("workload", "pattern", "scope", "size", "stack"),
    *("status", "reason", "date", "flags", "shape", "context"),
)


@dataclass(frozen=True)
class Slice:
    """All cases of one device, dtype and direction.

    ``text`` is a script that hands them to the page: one opened from disk cannot fetch, but it can load a
    script. The name ``path`` follows from the content.
    """

    device: str
    dtype: str
    direction: str
    rows: int
    path: str
    text: str

    @property
    def entry(self) -> dict[str, Any]:
        """What the index says of it, under the keys of the address."""
        where = {"gpu": self.device, "dtype": self.dtype, "dir": self.direction}
        return {**where, "file": self.path, "rows": self.rows}


def slices(found: Mapping[Case, Sequence[Entry]], old_before: str = "") -> list[Slice]:
    """One slice for every device, dtype and direction that has a case.

    What was measured before the day ``old_before`` is marked as old.
    """
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for case in found:
        groups.setdefault((case.device, case.dtype, case.direction), []).append(case)
    made = []
    for key, inside in groups.items():
        content = {"old_before": old_before, **slice_content(key, {case: found[case] for case in inside})}
        text = compact(content)
        path = f"data/{hashlib.sha256(text.encode()).hexdigest()[:12]}.js"
        made.append(Slice(*key, content["rows"], path, f'attnbench.receive("{path}",{text});\n'))
    return made


def compact(value: Any) -> str:
    """JSON without spaces, keys in the order given."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def slice_content(key: tuple[str, str, str], found: Mapping[Case, Sequence[Entry]]) -> dict[str, Any]:
    """The columns of a slice, as its file holds them."""
    lines = [(case, entry) for case, group in found.items() for entry in group]
    summaries = [entry.summary for _, entry in lines]
    contexts = {case: context(entry.summary for entry in group) for case, group in found.items()}
    texts = {name: [_text(name, case, entry) for case, entry in lines] for name in TEXTS if name != "context"}
    texts["context"] = [contexts[case] for case, _ in lines]
    return {
        "device": key[0],
        "dtype": key[1],
        "direction": key[2],
        "slugs": {"device": slug(key[0]), "dtype": slug(key[1]), "direction": slug(key[2])},
        "rows": len(lines),
        "impls": _impls(summaries),
        "runs": {run: slug(run) for run in dict.fromkeys(s.run_ids[0] for s in summaries)},
        "texts": {
            **{name: _indexed(values) for name, values in texts.items()},
            "impl": _indexed([s.label for s in summaries]),
            "run": _indexed([s.run_ids[0] for s in summaries]),
        },
        "slugged": {value: slug(value) for value in sorted({case.workload for case in found})},
        "numbers": _numbers(lines),
    }


def _text(name: str, case: Case, entry: Entry) -> str:
    s = entry.summary
    if name in ("status", "reason"):
        return str(getattr(s, name))
    if name == "date":
        return s.started_at[:10]
    if name == "shape":
        return shape(s)
    if name == "flags":
        return flag_names(s.flags)
    return str(getattr(case, name))


def _impls(summaries: Iterable[Summary]) -> dict[str, dict[str, Any]]:
    found = {}
    for s in summaries:
        mechanism = str(s.get("mechanism"))
        found[s.label] = {
            "mechanism": mechanism,
            "backend": s.label.removeprefix(f"{mechanism}/"),
            "family": s.get("family"),
            "exact": bool(s.get("exact")),
            "slug": impl_slug(s.label, mechanism),
            "page": impl_page(mechanism),
            "file": f"{slug(mechanism)}.html",
        }
    return {label: found[label] for label in sorted(found)}


def _indexed(values: Sequence[str]) -> dict[str, list[Any]]:
    words = sorted(set(values))
    index = {word: at for at, word in enumerate(words)}
    return {"words": words, "at": [index[value] for value in values]}


def _numbers(lines: Sequence[tuple[Case, Entry]]) -> dict[str, list[float | int | None]]:
    """Columns of numbers; one without any value is left out."""
    columns: dict[str, list[Any]] = {
        "n": [case.n for case, _ in lines],
        "m": [case.m for case, _ in lines],
        "seed": [case.seed for case, _ in lines],
        "position": [entry.position for _, entry in lines],
        "best": [entry.best for _, entry in lines],
        "last": [entry.last for _, entry in lines],
        "baseline": [int(entry.baseline) for _, entry in lines],
        "blocks": [entry.summary.blocks for _, entry in lines],
        "time_us": [_short(entry.summary.time_us) for _, entry in lines],
        "half_us": [_short(entry.half_width_us) for _, entry in lines],
        "ratio": [_short(entry.ratio) for _, entry in lines],
    }
    for column in VALUES:
        columns[column.key] = [_short(value_of(column.key, entry.summary)) for _, entry in lines]
    return {name: values for name, values in columns.items() if any(v is not None for v in values)}


def _short(value: float | None) -> float | int | None:
    if value is None:
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.{DIGITS}g}")
