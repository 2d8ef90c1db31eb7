"""Curves over the length, error against time, where curves cross: one setting drawn, others on choice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.site.charts import CONFIG, METRIC, Spec
from attnbench.site.figure import Figure, figure, inline
from attnbench.site.page import Asset, Page, SiteData
from attnbench.site.views.explore import ERRORS, Sweep, View, default_sweep, sweeps, view
from attnbench.site.views.slices import compact
from attnbench.site.views.words import DIRECTION_WORDS, DTYPE_WORDS

KEYS = {
    "gpu": "Device",
    "workload": "Workload",
    "dtype": "Number format",
    "dir": "Direction",
    "scope": "Scope",
    "sw": "Software",
}
"""Key in the address → what its selector is called."""

WORDS: Mapping[str, Mapping[str, str]] = {"dtype": DTYPE_WORDS, "dir": DIRECTION_WORDS}


@dataclass(frozen=True)
class Choice:
    """One selector: its key in the address, its options as (value, text), and the one chosen at first."""

    key: str
    label: str
    options: tuple[tuple[str, str], ...]
    chosen: str


def pages(data: SiteData) -> Iterator[Page | Asset]:
    """``explore.html``, and a file with the charts of every sweep."""
    found = sweeps(data.current)
    files: dict[Sweep, str] = {}
    shown: View | None = None
    first = default_sweep(found)
    for sweep, group in found.items():
        made = view(sweep, group, data.tasks)
        text = compact(_content(made))
        files[sweep] = f"data/explore/{hashlib.sha256(text.encode()).hexdigest()[:12]}.js"
        yield Asset(files[sweep], f'attnbench.receive("{files[sweep]}",{text});\n'.encode())
        if sweep == first:
            shown = made
    context: dict[str, Any] = {"view": shown}
    if shown is not None:
        context |= _shown(shown, files)
    yield Page("explore.html", "Explore", "explore.html", context, "explore.html")


# ---- inside --------------------------------------------------------------------------------------------


def _shown(made: View, files: Mapping[Sweep, str]) -> dict[str, Any]:
    """What is drawn at first, and what the script needs to draw anything else."""
    error = _preferred(made.errors, ("recorded", "gaussian"))
    lengths = list(made.errors.get(error, {}))
    state = {**made.sweep.state(), "y": "time", "err": error, "n": lengths[-1] if lengths else ""}
    config = {
        "usual": state,
        "sweeps": [{**sweep.state(), "file": file} for sweep, file in files.items()],
        "chart": CONFIG,
        "errors": {name: words for name, (_, words) in ERRORS.items()},
    }
    curves = made.curves.get("time") or next(iter(made.curves.values()), [])
    points = made.errors[error][lengths[-1]] if lengths else []
    return {
        "config": inline(config),
        "file": files[made.sweep],
        "choices": _choices(files, made.sweep),
        "metrics": [(name, METRIC[name].title) for name in METRIC],
        "curves": _figures(curves, "curve"),
        "points": _figures(points, "point"),
        "crossings": _figures(made.crossings, "crossing"),
        "error": error,
        "length": lengths[-1] if lengths else "",
        "lengths": lengths,
        "errors": [(name, ERRORS[name][1]) for name in made.errors],
        "tasks": [(f"task:{name}", f"score of {name}") for name in made.tasks],
    }


def _preferred(found: Mapping[str, Any], order: Sequence[str]) -> str:
    return next((name for name in order if name in found), next(iter(found), ""))


def _figures(specs: Sequence[Spec], kind: str) -> list[Figure]:
    return [figure(spec, f"{kind}-{at}", interactive=False) for at, spec in enumerate(specs)]


def _choices(files: Mapping[Sweep, str], chosen: Sweep) -> list[Choice]:
    states = [sweep.state() for sweep in files]
    found = []
    for key, label in KEYS.items():
        values = sorted({state[key] for state in states})
        options = tuple((value, _word(key, value)) for value in values)
        found.append(Choice(key, label, options, chosen.state()[key]))
    return found


def _word(key: str, value: str) -> str:
    return value[:8] if key == "sw" else WORDS.get(key, {}).get(value, value)


def _content(made: View) -> dict[str, Any]:
    """A view as its file holds it; what all specs share is in the page."""
    return {
        "title": made.sweep.title,
        "baseline": made.baseline,
        "labels": made.labels,
        "curves": {name: _stripped(specs) for name, specs in made.curves.items()},
        "errors": {
            **{name: _by_length(found) for name, found in made.errors.items()},
            **{f"task:{name}": _by_length(found) for name, found in made.tasks.items()},
        },
        "crossings": _stripped(made.crossings),
    }


def _by_length(found: Mapping[str, Sequence[Spec]]) -> dict[str, list[Spec]]:
    return {length: _stripped(specs) for length, specs in found.items()}


def _stripped(specs: Sequence[Spec]) -> list[Spec]:
    return [{key: value for key, value in spec.items() if key not in ("config", "$schema")} for spec in specs]
