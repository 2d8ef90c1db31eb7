"""Point clouds: the PCN set and ShapeNet-55, and readers of .pcd, .ply, .xyz and .npy files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from attnbench.tasks.data.loaders import _read
from attnbench.tasks.data.sources import Parts, Source, damaged

Points = NDArray[np.float32]
"""(points, 3): x, y, z."""

SUFFIXES = (".pcd", ".npy", ".ply", ".xyz")


def read_points(path: Path) -> Points:
    """The points of a file, by its suffix. Raises DataDamaged when it is not what the suffix says."""
    content = path.read_bytes()
    if path.suffix == ".pcd":
        return _pcd(content, path)
    if path.suffix == ".npy":
        return _npy(path)
    if path.suffix == ".ply":
        return _ply(content, path)
    if path.suffix == ".xyz":
        rows = content.decode("ascii", "replace").splitlines()
        return _ascii(rows, (0, 1, 2), path)
    raise damaged(path, f"suffix {path.suffix!r}", f"one of {', '.join(SUFFIXES)}")


def _npy(path: Path) -> Points:
    try:
        points = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise damaged(path, str(error).splitlines()[0], "an array of numbers") from None
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind != "f":
        raise damaged(path, f"{points.dtype} of shape {points.shape}", "floating-point numbers (points, 3)")
    return _finite(points[:, :3], path)


def _finite(points: NDArray[Any], path: Path) -> Points:
    if not np.isfinite(points).all():
        raise damaged(path, "a coordinate that is no finite number", "finite coordinates")
    return points.astype(np.float32)


def _ascii(rows: list[str], columns: tuple[int, int, int], path: Path) -> Points:
    found = []
    for number, row in enumerate(rows, 1):
        fields = row.split()
        if not fields:
            continue
        try:
            found.append([float(fields[c]) for c in columns])
        except (ValueError, IndexError):
            raise damaged(path, f"{row[:40]!r} as point {number}", "x, y and z") from None
    return _finite(np.array(found, np.float64).reshape(-1, 3), path)


def _pcd(content: bytes, path: Path) -> Points:
    """Point Cloud Data of version 0.7: a header in ASCII, then points as text or as packed records."""
    header: dict[str, list[str]] = {}
    at = 0
    while "DATA" not in header:
        end = content.find(b"\n", at)
        if end < 0:
            raise damaged(path, "no line DATA", "a PCD header")
        words = content[at:end].decode("ascii", "replace").split("#")[0].split()
        if words:
            header[words[0]] = words[1:]
        at = end + 1
    fields, kind = header.get("FIELDS", []), "".join(header["DATA"])
    if not {"x", "y", "z"} <= set(fields):
        raise damaged(path, f"fields {' '.join(fields) or 'none'}", "fields x y z")
    try:
        count = int(header["POINTS"][0])
        sizes = [int(size) for size in header["SIZE"]]
        counts = [int(c) for c in header.get("COUNT", ["1"] * len(fields))]
        types = [
            f"<{ {'F': 'f', 'I': 'i', 'U': 'u'}[t] }{s}" for t, s in zip(header["TYPE"], sizes, strict=True)
        ]
        record = np.dtype([(n, t, (c,)) for n, t, c in zip(fields, types, counts, strict=True)])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise damaged(path, f"a header without a valid {error}", "POINTS, SIZE and TYPE") from None
    if kind == "ascii":
        starts = np.cumsum([0, *counts])
        x, y, z = (int(starts[fields.index(axis)]) for axis in "xyz")
        points = _ascii(content[at:].decode("ascii", "replace").splitlines(), (x, y, z), path)
    elif kind == "binary":
        whole = (len(content) - at) // record.itemsize
        packed = np.frombuffer(content, record, min(count, whole), at)
        points = _finite(np.stack([packed[axis][:, 0] for axis in "xyz"], 1), path)
    else:
        raise damaged(path, f"DATA {kind}", "DATA ascii or binary")
    if len(points) != count:
        raise damaged(path, f"{len(points)} points", f"{count} as in its header")
    return points


def _ply(content: bytes, path: Path) -> Points:
    """Vertices of a Polygon file in its ASCII form."""
    rows = content.decode("ascii", "replace").splitlines()
    if rows[:1] != ["ply"] or "end_header" not in rows:
        raise damaged(path, "no header from ply to end_header", "a PLY file")
    end = rows.index("end_header")
    head = [row.split() for row in rows[1:end]]
    if ["format", "ascii", "1.0"] not in head:
        raise damaged(
            path, next((" ".join(r) for r in head if r[:1] == ["format"]), "no format"), "format ascii 1.0"
        )
    elements = [i for i, row in enumerate(head) if row[:1] == ["element"]]
    if not elements or head[elements[0]][1] != "vertex":
        raise damaged(path, "other elements before the vertices", "element vertex first")
    stop = elements[1] if len(elements) > 1 else len(head)
    names = [row[-1] for row in head[elements[0] + 1 : stop] if row[:1] == ["property"]]
    if not {"x", "y", "z"} <= set(names):
        raise damaged(path, f"properties {' '.join(names)}", "properties x y z")
    count = int(head[elements[0]][2])
    body = rows[end + 1 : end + 1 + count]
    points = _ascii(body, (names.index("x"), names.index("y"), names.index("z")), path)
    if len(points) != count:
        raise damaged(path, f"{len(points)} points", f"{count} as in its header")
    return points


def _beside(stem: Path) -> Path | None:
    """The file ``stem`` with one of the suffixes."""
    candidates = (stem.with_name(stem.name + suffix) for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


@dataclass(frozen=True)
class Model:
    """One model of a set; ``category`` is the name of its taxonomy, or the number where it has none."""

    part: str
    taxonomy: str
    category: str
    id: str


class PCN(Source):
    """Eight categories of ShapeNet with partial scans (Point Completion Network, arXiv 1808.00671)."""

    marks = ("PCN.json",)
    nested = ("ShapeNetCompletion", "PCN")
    published: ClassVar[Parts] = {"train": 28_974, "val": 800, "test": 1_200}

    VIEWS: ClassVar[Mapping[str, int]] = {"train": 8, "val": 1, "test": 1}
    """Partial scans of every model."""

    @cached_property
    def _models(self) -> dict[str, tuple[Model, ...]]:
        path = self.root / "PCN.json"
        try:
            listed = json.loads(_read.text(path))
            return {
                part: tuple(
                    Model(part, entry["taxonomy_id"], entry.get("taxonomy_name", entry["taxonomy_id"]), name)
                    for entry in listed
                    for name in entry[part]
                )
                for part in self.published
            }
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(
                path, f"{type(error).__name__} {error}", "a list of taxonomies with train, val, test"
            ) from None

    def models(self, part: str) -> tuple[Model, ...]:
        """The models of ``part``, in the order of the list."""
        return self._models[self.part(part)]

    def complete(self, model: Model) -> Points:
        """The whole surface: 16,384 points as published."""
        return self._points(f"{model.part}/complete/{model.taxonomy}/{model.id}")

    def partial(self, model: Model, view: int = 0) -> Points:
        """The points that one depth image shows; ``view`` counts up to ``VIEWS``."""
        return self._points(f"{model.part}/partial/{model.taxonomy}/{model.id}/{view:02d}")

    def _points(self, name: str) -> Points:
        path = _beside(self.root / name)
        if path is None:
            raise self.missing(f"{name}.pcd")
        return read_points(path)

    def count(self, part: str) -> int:
        """Models that the list names."""
        return len(self.models(part))

    def sample(self, part: str) -> tuple[Points, Points]:
        """The first model, a scan and the whole."""
        first = self.models(part)[0]
        return self.partial(first), self.complete(first)

    def files(self) -> Iterable[Path]:
        """The list and all clouds."""
        clouds = (p for part in self.published for p in (self.root / part).rglob("*") if p.suffix in SUFFIXES)
        return [self.root / "PCN.json", *clouds]


class ShapeNet55(Source):
    """Complete clouds of 55 categories (PoinTr, arXiv 2108.08839); parts train and test."""

    marks = ("ShapeNet-55/test.txt",)
    nested = ("ShapeNet55-34", "ShapeNet55")
    published: ClassVar[Parts] = {"train": 41_952, "test": 10_518}

    def models(self, part: str) -> tuple[Model, ...]:
        """The models of ``part``, in the order of the list."""
        path = self.root / "ShapeNet-55" / f"{self.part(part)}.txt"
        if not path.is_file():
            raise self.missing(f"ShapeNet-55/{path.name}")
        found = []
        for line in _read.lines(path):
            name = line.strip().removesuffix(".npy")
            taxonomy, _, model = name.partition("-")
            if not model:
                raise damaged(path, f"a line {line[:40]!r}", "<taxonomy>-<model>.npy")
            found.append(Model(part, taxonomy, taxonomy, model))
        return tuple(found)

    def points(self, model: Model) -> Points:
        """The whole surface: 8,192 points as published."""
        path = self.root / "shapenet_pc" / f"{model.taxonomy}-{model.id}.npy"
        if not path.is_file():
            raise self.missing(f"shapenet_pc/{path.name}")
        return read_points(path)

    def count(self, part: str) -> int:
        """Models that the list names."""
        return len(self.models(part))

    def sample(self, part: str) -> Points:
        """The first model."""
        return self.points(self.models(part)[0])

    def files(self) -> Iterable[Path]:
        """The lists and all clouds."""
        lists = (self.root / "ShapeNet-55" / f"{part}.txt" for part in self.published)
        return [*(p for p in lists if p.is_file()), *(self.root / "shapenet_pc").glob("*.npy")]
