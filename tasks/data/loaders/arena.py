"""The files of the Long Range Arena: ListOps, pairs of AAN papers, Pathfinder (arXiv 2011.04006)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from attnbench.errors import unknown_name
from attnbench.tasks.data.caches import cached
from attnbench.tasks.data.loaders import _read
from attnbench.tasks.data.sources import Parts, Source, damaged

RESOLUTIONS = (32, 64, 128, 256)

HARD = "curv_contour_length_14"
"""The difficulty that the arena uses."""


class LongRangeArena(Source):
    """Parts ``listops_*``, ``retrieval_*`` (each train, val, test) and ``pathfinder<size>``."""

    marks = (
        "listops-1000/basic_*.tsv",
        "tsv_data/new_aan_pairs.*.tsv",
        *(f"pathfinder{r}/{HARD}/metadata/*" for r in RESOLUTIONS),
    )
    nested = ("lra_release", "lra_release/lra_release")
    published: ClassVar[Parts] = {
        "listops_train": 96_000,
        "listops_val": 2_000,
        "listops_test": 2_000,
        "retrieval_train": 147_086,
        "retrieval_val": 18_090,
        "retrieval_test": 17_437,
        **{f"pathfinder{r}": 200_000 for r in RESOLUTIONS},
    }

    def listops(self, split: str) -> Iterator[tuple[str, int]]:
        """Expression and value (0 to 9) of train, val or test; the text is as in the file."""
        path = self._path(f"listops_{split}")
        rows = csv.reader(_read.lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(rows, [])
        if header != ["Source", "Target"]:
            raise damaged(path, f"a header {header}", "Source and Target")
        for number, row in enumerate(rows, 2):
            if len(row) != 2 or row[1] not in set("0123456789"):
                raise damaged(path, f"{row[1:]} in line {number}", "an expression and a digit")
            yield row[0], int(row[1])

    def retrieval(self, split: str) -> Iterator[tuple[str, str, int]]:
        """Two texts, and 1 where one paper cites the other, of train, val or test."""
        path = self._path(f"retrieval_{split}")
        for number, line in enumerate(_read.lines(path), 1):
            row = line.split("\t")
            if len(row) != 5 or row[0] not in ("0.0", "1.0", "0", "1"):
                raise damaged(path, f"{len(row)} fields in line {number}", "label, id1, id2, text1, text2")
            yield row[3], row[4], int(float(row[0]))

    def pathfinder_list(self, resolution: int) -> list[tuple[Path, int]]:
        """Path and label of all images, in the order of the metadata; empty image files are left out.

        One image of the published 32-pixel set is an empty file.
        """
        if resolution not in RESOLUTIONS:
            raise unknown_name("resolution of pathfinder", str(resolution), map(str, RESOLUTIONS))
        root = self.root / f"pathfinder{resolution}" / HARD
        lists = sorted((root / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
        if not lists:
            raise self.missing(f"pathfinder{resolution}/{HARD}/metadata")
        found = []
        for path in lists:
            for number, line in enumerate(_read.lines(path), 1):
                fields = line.split()
                if len(fields) < 4 or fields[3] not in ("0", "1"):
                    raise damaged(path, f"{line[:60]!r} in line {number}", "folder, file, number and label")
                image = root / fields[0] / fields[1]
                if not image.is_file():
                    raise self.missing(image.relative_to(self.root).as_posix())
                if image.stat().st_size:
                    found.append((image, int(fields[3])))
        return found

    def pathfinder(self, resolution: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Gray images (n, resolution, resolution) and labels (n); decoded once and then kept in a cache."""

        def decode() -> dict[str, NDArray[np.generic]]:
            listed = self.pathfinder_list(resolution)
            images = np.stack([self._gray(path, resolution) for path, _ in listed])
            return {"x": images, "y": np.array([label for _, label in listed], np.int64)}

        arrays = cached(self, f"pathfinder{resolution}", decode)
        return arrays["x"].astype(np.uint8, copy=False), arrays["y"].astype(np.int64, copy=False)

    def _gray(self, path: Path, resolution: int) -> NDArray[np.uint8]:
        image = _read.image(path)[..., 0]
        if image.shape != (resolution, resolution):
            raise damaged(path, f"{image.shape[1]} × {image.shape[0]} pixels", f"{resolution} × {resolution}")
        return image

    def _path(self, part: str) -> Path:
        task, split = self.part(part).split("_")
        if task == "listops":
            path = self.root / "listops-1000" / f"basic_{split}.tsv"
        else:
            stem = {"val": "eval"}.get(split, split)
            path = self.root / "tsv_data" / f"new_aan_pairs.{stem}.tsv"
        if not path.is_file():
            raise self.missing(path.relative_to(self.root).as_posix())
        return path

    def count(self, part: str) -> int:
        """Lines of the table, or images of the metadata."""
        if self.part(part).startswith("pathfinder"):
            folder = self.root / part / HARD / "metadata"
            return sum(_read.count_lines(path) for path in folder.glob("*.npy"))
        return _read.count_lines(self._path(part)) - part.startswith("listops")

    def sample(self, part: str) -> object:
        """The first example."""
        if part.startswith("pathfinder"):
            resolution = int(part.removeprefix("pathfinder"))
            path, label = self.pathfinder_list(resolution)[0]
            return self._gray(path, resolution), label
        task, split = part.split("_")
        return next(self.listops(split) if task == "listops" else self.retrieval(split))

    def files(self) -> Iterable[Path]:
        """The tables and the metadata; images are known by the metadata."""
        yield from (self.root / "listops-1000").glob("basic_*.tsv")
        yield from (self.root / "tsv_data").glob("new_aan_pairs.*.tsv")
        for resolution in RESOLUTIONS:
            yield from (self.root / f"pathfinder{resolution}" / HARD / "metadata").glob("*.npy")
