"""Images: faces of FFHQ and CelebA-HQ for super-resolution, CIFAR-10 as a sequence of pixels."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from attnbench.tasks.data.loaders import _read
from attnbench.tasks.data.sources import Parts, Source, damaged

Pixels = NDArray[np.uint8]
"""(height, width, 3) or (images, height, width, 3), RGB."""

SUFFIXES = (".png", ".jpg", ".jpeg")


def resized(image: Pixels, size: int) -> Pixels:
    """``image`` with its shorter side resized to ``size`` (bicubic), then cropped around the centre."""
    from PIL import Image

    height, width = image.shape[:2]
    scale = size / min(height, width)
    new = (max(size, round(width * scale)), max(size, round(height * scale)))
    picture = Image.fromarray(image).resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


class _Faces(Source):
    """A tree of images, or the three folders that SR3 prepares from one."""

    marks = tuple(f"{depth}*{suffix}" for depth in ("", "*/", "*/*/") for suffix in SUFFIXES)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Paths of the full-resolution images, sorted by name: those of ``hr_<size>/`` where there is one."""
        prepared = sorted(self.root.glob("hr_*"))
        folder = prepared[-1] if prepared else self.root
        return tuple(sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES))

    def image(self, index: int) -> Pixels:
        """Image number ``index``, as stored."""
        return _read.image(self.paths[index])

    def pair(self, index: int, high: int, low: int) -> tuple[Pixels, Pixels]:
        """Image ``index`` at ``high`` pixels, and its ``low`` pixels resized up to as many, both bicubic.

        Prepared files ``hr_<high>/`` and ``sr_<low>_<high>/`` are read where they are.
        """
        path = self.paths[index]
        condition = self.root / f"sr_{low}_{high}" / path.name
        if path.parent.name == f"hr_{high}" and condition.is_file():
            return self._square(path, high), self._square(condition, high)
        sharp = resized(_read.image(path), high)
        return sharp, resized(resized(sharp, low), high)

    def _square(self, path: Path, size: int) -> Pixels:
        found = _read.image(path)
        if found.shape[:2] != (size, size):
            raise damaged(path, f"{found.shape[1]} × {found.shape[0]} pixels", f"{size} × {size}")
        return found

    def count(self, part: str) -> int:
        """Number of images."""
        return len(self.paths)

    def sample(self, part: str) -> Pixels:
        """The first image."""
        return self.image(0)

    def files(self) -> Iterable[Path]:
        """All images."""
        return self.paths


class FFHQ(_Faces):
    """Flickr-Faces-HQ (arXiv 1812.04948)."""

    nested = ("thumbnails128x128", "images1024x1024")
    published: ClassVar[Parts] = {"images": 70_000}


class CelebAHQ(_Faces):
    """CelebA-HQ (arXiv 1710.10196)."""

    nested = ("CelebA-HQ-img",)
    published: ClassVar[Parts] = {"images": 30_000}


class CIFAR10(Source):
    """CIFAR-10 (Krizhevsky, 2009): parts train and test; from its binary version or a Parquet copy."""

    marks = ("test_batch.bin", "test/*.parquet", "*/test/*.parquet", "data/test-*.parquet")
    nested = ("cifar-10-batches-bin",)
    published: ClassVar[Parts] = {"train": 50_000, "test": 10_000}

    RECORD = 1 + 3 * 32 * 32
    """Bytes of one image with its label."""

    def arrays(self, part: str) -> tuple[Pixels, NDArray[np.int64]]:
        """Images (n, 32, 32, 3) and labels (n) of ``part``, in the order of the files."""
        own = self._own_files(part)
        if own:
            records = np.concatenate([self._batch(path) for path in own])
            planes = records[:, 1:].reshape(-1, 3, 32, 32)
            return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].astype(np.int64)
        found = _read.parquet_files(self.root, part)
        if not found:
            raise self.missing(part)
        rows = list(_read.parquet_records(found, ("img", "label")))
        images = np.stack([_read.image(row["img"]["bytes"], found[0]) for row in rows])
        return images, np.array([row["label"] for row in rows], np.int64)

    def _batch(self, path: Path) -> NDArray[np.uint8]:
        content = np.fromfile(path, np.uint8)
        if len(content) == 0 or len(content) % self.RECORD:
            raise damaged(path, f"{len(content)} bytes", f"a multiple of {self.RECORD}")
        records = content.reshape(-1, self.RECORD)
        if records[:, 0].max() > 9:
            raise damaged(path, f"label {records[:, 0].max()}", "labels 0 to 9")
        return records

    def _own_files(self, part: str) -> list[Path]:
        pattern = "data_batch_*.bin" if self.part(part) == "train" else "test_batch.bin"
        return sorted(self.root.glob(pattern))

    def count(self, part: str) -> int:
        """Images of ``part``, from the sizes of its files."""
        own = self._own_files(part)
        if own:
            return sum(path.stat().st_size // self.RECORD for path in own)
        return _read.parquet_rows(_read.parquet_files(self.root, part))

    def sample(self, part: str) -> tuple[Pixels, NDArray[np.int64]]:
        """All images: they are few."""
        return self.arrays(part)

    def files(self) -> Iterable[Path]:
        """The batches, or the Parquet files."""
        for part in self.published:
            yield from self._own_files(part) or _read.parquet_files(self.root, part)
