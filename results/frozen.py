"""Frozen scales of the compositional index: cut once from a pool of mechanisms, kept in a file.

An index that is cut from whatever was run moves whenever a mechanism joins. With a file of scales the numbers
of old mechanisms stay, and every index names the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from attnbench.errors import UsageError
from attnbench.results.files import atomically
from attnbench.results.scores import Constants, Metric, MetricScale

FORMAT: Final = 1

Fingerprints = Mapping[str, Sequence[str]]
"""Task → fingerprints of its data, sorted."""


@dataclass(frozen=True)
class Frozen:
    """The scales of one suite at one preset, and the data that they were cut on."""

    preset: str
    suite: str
    constants: Constants
    data: Fingerprints

    def on(self, data: Fingerprints) -> Constants:
        """The scales of the tasks whose data in ``data`` are those of the file; others are left out."""
        kept, left_out = [], dict(self.constants.left_out)
        for scale in self.constants.scales:
            task = scale.metric.backbone
            if task not in data or set(data[task]) <= set(self.data.get(task, ())):
                kept.append(scale)
            else:
                left_out[scale.metric] = "run on other data than the scale was cut on"
        return Constants(self.constants.name, tuple(kept), left_out)


FrozenScales = Mapping[tuple[str, str], Frozen]
"""(preset, suite) → its scales."""


def save(found: Iterable[Frozen], path: Path) -> int:
    """Write scales to ``path``, named after the file; returns how many metrics have one.

    Raises UsageError where two devices or two versions of the software have scales for the same suite and
    preset, and AttnbenchError for a file that cannot be written.
    """
    sets = list(found)
    seen: set[tuple[str, str]] = set()
    for one in sets:
        if (one.preset, one.suite) in seen:
            raise UsageError(
                f"{path}: observed two pools for {one.suite} {one.preset}, expected one; freeze the results "
                "of one device and one version of the software"
            )
        seen.add((one.preset, one.suite))
    content = {"format": FORMAT, "sets": [_as_json(one, path.stem) for one in sets]}
    with atomically(path) as draft:
        draft.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sum(len(one.constants.scales) for one in sets)


def load(path: Path) -> FrozenScales:
    """Read scales. Raises UsageError for a file that holds none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads {FORMAT}")
        sets = [_from_json(one) for one in content["sets"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path}: observed no scales ({error}), expected a file of `attnbench score --freeze`"
        ) from None
    return {(one.preset, one.suite): one for one in sets}


def _as_json(one: Frozen, name: str) -> dict[str, Any]:
    return {
        "name": f"{name}: {one.constants.name}",
        "preset": one.preset,
        "suite": one.suite,
        "data": {task: list(found) for task, found in one.data.items()},
        "scales": [asdict(scale) for scale in one.constants.scales],
        "left_out": [{"metric": asdict(m), "why": why} for m, why in one.constants.left_out.items()],
    }


def _from_json(one: Mapping[str, Any]) -> Frozen:
    scales = tuple(_scale(scale) for scale in one["scales"])
    left_out = {Metric(**entry["metric"]): str(entry["why"]) for entry in one["left_out"]}
    data = {str(task): [str(f) for f in found] for task, found in one["data"].items()}
    return Frozen(str(one["preset"]), str(one["suite"]), Constants(str(one["name"]), scales, left_out), data)


def _scale(given: Mapping[str, Any]) -> MetricScale:
    mu, sigma = float(given["mu"]), float(given["sigma"])
    if not (sigma > 0 and math.isfinite(mu)) or given["better"] not in ("higher", "lower"):
        raise ValueError(f"a scale with sigma {sigma}, mu {mu}, better {given['better']!r}")
    return MetricScale(Metric(**given["metric"]), given["better"], mu, sigma, bool(given["log"]))
