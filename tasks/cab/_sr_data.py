"""Pairs of a small image scaled up and the image it was made from: photos in wheels, or faces on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from attnbench.tasks.base import Corpus
from attnbench.tasks.data import pictures, sources
from attnbench.tasks.data.loaders.images import FFHQ, CelebAHQ, Pixels, resized
from attnbench.tasks.data.pool import epochs

Pair = tuple[Tensor, Tensor]
"""Bicubic images and sharp ones, (B, 3, size, size) with values in [-1, 1]."""


@dataclass(frozen=True)
class Pictures:
    """Images of ``high`` pixels to be restored from ``low``; ``tested`` of them, ``source`` photos or faces.

    Photos are trained on at each of ``reductions`` and tested at ``test_reduction``.
    """

    source: str
    high: int
    low: int
    tested: int
    reductions: tuple[int, ...] = (1, 2, 3, 4)
    test_reduction: int = 2


class PairSource(Protocol):
    """What a session needs of its data."""

    corpus: Corpus

    def batches(self, batch: int, seed: int) -> Callable[[], Pair]:
        """Training pairs on the CPU that ``seed`` alone determines."""
        ...

    def test(self) -> list[tuple[Pixels, Pixels]]:
        """Bicubic and sharp test images, always the same."""
        ...


def load(pictures_: Pictures) -> PairSource:
    """The data of a preset. Raises DataMissing where it asks for faces that are not here."""
    return Faces(pictures_) if pictures_.source == "faces" else Photos(pictures_)


def to_tensor(images: list[Pixels]) -> Tensor:
    """Images (size, size, 3) of bytes as (B, 3, size, size) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pixels(images: Tensor) -> Pixels:
    """The inverse, rounded to bytes after a clamp: (B, size, size, 3)."""
    scaled = ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def bicubic(sharp: Pixels, low: int) -> Pixels:
    """A square image shrunk to ``low`` pixels and enlarged again."""
    return resized(resized(sharp, low), sharp.shape[0])


class Photos:
    """Five photos to train on, two to test, as scikit-learn and scikit-image carry them."""

    def __init__(self, wanted: Pictures) -> None:
        self.wanted = wanted
        originals = [pictures.photo(name) for name in pictures.TRAIN_PHOTOS]
        self.train_part = [pictures.reduced(p, factor) for p in originals for factor in wanted.reductions]
        held_out = [pictures.photo(name) for name in pictures.TEST_PHOTOS]
        found = [
            tile
            for image in held_out
            for tile in pictures.tiles(pictures.reduced(image, wanted.test_reduction), wanted.high)
        ]
        chosen = np.linspace(0, len(found) - 1, wanted.tested).round().astype(int)
        self.test_part = [found[i] for i in chosen]
        digest = hashlib.sha256(repr(wanted).encode())
        for image in (*originals, *held_out):
            digest.update(np.ascontiguousarray(image).tobytes())
        self.corpus = Corpus("photos of scikit-learn and scikit-image", "embedded", digest.hexdigest())

    def batches(self, batch: int, seed: int) -> Callable[[], Pair]:
        """Random crops."""
        draw = np.random.default_rng(seed)

        def pairs() -> Pair:
            sharp = [pictures.crop(self.train_part, self.wanted.high, draw) for _ in range(batch)]
            return to_tensor([bicubic(image, self.wanted.low) for image in sharp]), to_tensor(sharp)

        return pairs

    def test(self) -> list[tuple[Pixels, Pixels]]:
        """Tiles of the two test photos, evenly chosen."""
        return [(bicubic(image, self.wanted.low), image) for image in self.test_part]


class Faces:
    """FFHQ to train on, the first images of CelebA-HQ to test; read from disk image by image."""

    def __init__(self, wanted: Pictures) -> None:
        train, test = sources.find("ffhq"), sources.find("celebahq")
        assert isinstance(train, FFHQ)
        assert isinstance(test, CelebAHQ)
        train.require_complete()
        self.wanted, self.train_part, self.test_part = wanted, train, test
        joint = f"{train.fingerprint()}/{test.fingerprint()}"
        self.corpus = Corpus("ffhq, celebahq", "real", hashlib.sha256(joint.encode()).hexdigest())

    def batches(self, batch: int, seed: int) -> Callable[[], Pair]:
        """Faces in a new order each epoch, half of them mirrored."""
        take = epochs([torch.arange(len(self.train_part.paths))], batch, seed)
        draw = np.random.default_rng(seed)

        def pairs() -> Pair:
            high, low = self.wanted.high, self.wanted.low
            read = [self.train_part.pair(i, high, low) for i in take()[0].tolist()]
            turned = [(s[:, ::-1], c[:, ::-1]) if draw.integers(2) else (s, c) for s, c in read]
            return to_tensor([c for _, c in turned]), to_tensor([s for s, _ in turned])

        return pairs

    def test(self) -> list[tuple[Pixels, Pixels]]:
        """The first images by name."""
        read = [
            self.test_part.pair(i, self.wanted.high, self.wanted.low)
            for i in range(min(self.wanted.tested, len(self.test_part.paths)))
        ]
        return [(condition, sharp) for sharp, condition in read]
