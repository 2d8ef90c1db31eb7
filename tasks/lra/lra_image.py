"""Image classification pixel by pixel (noncausal self attention), after Long Range Arena (arXiv 2011.04006).

The pixels are a sequence behind one more token, so that two dimensions must be learned. ``paper`` reads
CIFAR-10 in gray; the smaller sizes use the handwritten digits of scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnbench.errors import UsageError
from attnbench.impls.spec import Pattern
from attnbench.tasks.base import Corpus, LearningCheck
from attnbench.tasks.data.pool import Part, generator
from attnbench.tasks.lra._session import ArenaTask, Data, Examples, arena_preset, content
from attnbench.tasks.trainer import Recipe

VERSION = 1
"""Part of every seed: raised when the split or the placing of digits changes."""

DIGIT = 8
"""Pixels on a side of a digit."""
LEVELS = 17
"""Gray levels of a digit."""
TEST_DIGITS = 397
GRAY = (0.2989, 0.5870, 0.1140)
"""Weights of red, green and blue, those of the arena's data pipeline."""


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, enlarged ``scale`` times, at random places of a canvas of ``side``² pixels.

    ``copies`` training images are made of every digit of the training part, each at a place of its own.
    """

    side: int = DIGIT
    scale: int = 1
    copies: int = 1
    vocabulary: int = LEVELS
    classes: int = 10
    pairs: bool = False

    @property
    def length(self) -> int:
        """Pixels of the canvas."""
        return self.side**2

    def load(self) -> Data:
        """Split and place the digits. Raises UsageError without scikit-learn."""
        images, labels = digits()
        order = np.random.default_rng(VERSION).permutation(len(images))
        held_out, rest = order[:TEST_DIGITS], np.tile(order[TEST_DIGITS:], self.copies)
        train = Examples(self._placed(images[rest], "train"), labels[rest])
        test = Examples(self._placed(images[held_out], "test"), labels[held_out])
        return Data(train, test, Corpus("scikit-learn digits", "embedded", content(self, train, test)))

    def _placed(self, images: NDArray[np.uint8], part: Part) -> NDArray[np.uint8]:
        size = self.scale * DIGIT
        large = images.repeat(self.scale, 1).repeat(self.scale, 2)
        canvas = np.zeros((len(images), self.side, self.side), np.uint8)
        at = generator(self, part, VERSION).integers(self.side - size + 1, size=(len(images), 2))
        for image, row, (y, x) in zip(large, canvas, at, strict=True):
            row[y : y + size, x : x + size] = image
        return canvas.reshape(len(images), self.length)


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """1,797 images (n, 8, 8) with levels 0 to 16, and their digits. UsageError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            f"task lra_image: observed no scikit-learn ({error}), expected it for its handwritten digits; "
            "install attnbench[tasks]"
        ) from None
    found = load_digits()
    return found.images.astype(np.uint8), found.target.astype(np.int64)


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10 in gray: 50,000 images of 32² pixels with 256 levels, 10,000 more to test."""

    length: int = 1024
    vocabulary: int = 256
    classes: int = 10
    pairs: bool = False

    def load(self) -> Data:
        """Read the images. Raises UsageError when they are not on this machine, or are not all there."""
        from attnbench.tasks.data import sources
        from attnbench.tasks.data.loaders.images import CIFAR10

        source = sources.find("cifar10")
        assert isinstance(source, CIFAR10)
        source.require_complete()
        train, test = (gray(*source.arrays(part)) for part in ("train", "test"))
        return Data(train, test, source.corpus("gray"))


def gray(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Examples:
    """Gray levels of colour images (S, h, w, 3), row by row."""
    levels = (images @ np.array(GRAY)).astype(np.uint8)
    return Examples(levels.reshape(len(images), -1), labels)


TINY = arena_preset(
    "lra_image",
    "tiny",
    Digits(),
    Recipe(steps=400, lr=3e-3, warmup=40),
    batch=32,
    heads=4,
    head_dim=16,
    layers=2,
    ratio=2,
    eval_batch=397,
    check=LearningCheck(softmax=0.85, no_mixing=0.2),
)
"""Measured with seed 0: softmax 0.945, uniform averaging 0.504, no mixing 0.083, which is chance."""

SMALL = arena_preset(
    "lra_image",
    "small",
    Digits(side=32, scale=3, copies=20),
    Recipe(steps=6_000, lr=1e-3, warmup=300, weight_decay=0.1, dtype="bfloat16", max_seconds=420.0),
    batch=128,
    heads=8,
    head_dim=16,
    layers=2,
    ratio=2,
    eval_batch=128,
)
"""As many pixels as CIFAR-10 has."""

PAPER = arena_preset(
    "lra_image",
    "paper",
    Cifar(),
    Recipe(steps=35_200, lr=5e-4, warmup=176, weight_decay=0.0),
    batch=256,
    heads=8,
    head_dim=16,
    layers=1,
    ratio=1,
    eval_batch=256,
    dropout=0.3,
)
"""The net of the arena's repository: one layer, 200 epochs. Its heads are 8 wide in 64 channels, ours 16 in
128; its attention dropout of 0.2 is left out, and nothing is held out of the training part."""

TASK = ArenaTask(
    id="lra_image",
    title="Pixel-by-pixel image classification",
    patterns=(Pattern.NS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Handwritten digits of scikit-learn (tiny, small), or CIFAR-10 in gray (paper)",
    source="Long Range Arena: A Benchmark for Efficient Transformers (arXiv 2011.04006)",
)
