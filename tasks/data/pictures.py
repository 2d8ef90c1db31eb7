"""Photos and digits inside the wheels of scikit-learn and scikit-image: images without a download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnbench.tasks.data.extras import require

Pixels = NDArray[np.uint8]
"""(height, width, 3), RGB."""

TRAIN_PHOTOS = ("china", "flower", "astronaut", "coffee", "immunohistochemistry")
TEST_PHOTOS = ("chelsea", "rocket")


def photo(name: str) -> Pixels:
    """A photo by name. Raises UsageError without the library that carries it."""
    if name in ("china", "flower"):
        datasets = require("sklearn.datasets", "scikit-learn", f"photo {name}")
        return np.asarray(datasets.load_sample_image(f"{name}.jpg"), np.uint8)
    return np.asarray(getattr(require("skimage.data", "scikit-image", f"photo {name}"), name)(), np.uint8)


def digits() -> NDArray[np.float32]:
    """1,797 handwritten digits (n, 8, 8) with values from 0 to 1, in the library's order."""
    datasets = require("sklearn.datasets", "scikit-learn", "handwritten digits")
    return np.asarray(datasets.load_digits().images / 16.0, np.float32)


def reduced(image: Pixels, factor: int) -> Pixels:
    """``image`` with its sides divided by ``factor``: means of squares; what does not fill one is cut."""
    if factor == 1:
        return image
    height, width = (side - side % factor for side in image.shape[:2])
    squares = image[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return np.round(squares.mean((1, 3))).astype(np.uint8)


def tiles(image: Pixels, size: int) -> list[Pixels]:
    """Squares of ``size`` pixels that cover ``image`` without overlap; what does not fill one is cut."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    return [
        image[y * size : (y + 1) * size, x * size : (x + 1) * size]
        for y in range(rows)
        for x in range(columns)
    ]


def crop(images: Sequence[Pixels], size: int, draw: np.random.Generator) -> Pixels:
    """A random square of a random image, mirrored in half of the cases."""
    image = images[int(draw.integers(len(images)))]
    y, x = (int(draw.integers(side - size + 1)) for side in image.shape[:2])
    found = image[y : y + size, x : x + size]
    return found[:, ::-1] if draw.integers(2) else found


def psnr_ssim(image: Pixels, truth: Pixels) -> dict[str, float]:
    """PSNR in dB and SSIM (11 × 11 Gaussian window, mean over the channels) of two RGB images."""
    metrics: Any = require("skimage.metrics", "scikit-image", "super-resolution")
    return {
        "psnr_db": float(metrics.peak_signal_noise_ratio(truth, image, data_range=255)),
        "ssim": float(
            metrics.structural_similarity(
                truth,
                image,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=255,
                channel_axis=-1,
            )
        ),
    }
