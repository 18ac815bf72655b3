"""What makes a generator heavy: waiting, pure Python that holds the lock, real augmentation.

Each function returns a callable `work(images, labels) -> (images, labels)` for
`MnistDataGenerator(work=...)`; write your own in the same form. One that draws at random takes a
third parameter `rng`, which the generator seeds for each batch. NumPy only.
"""

import time
from collections.abc import Callable

import numpy as np

from labkit.checks import expect, is_number

Work = Callable[..., tuple[np.ndarray, np.ndarray]]


def _amount(name: str, what: str, value: float) -> float:
    expect(is_number(value), f"{name}: {what} must be a number >= 0", value)
    return float(value)


class sleep:  # noqa: N801 - reads as a function where it is used
    """Waits `seconds` per batch without using the processor, as a disk or a network would.

    The article's generator sleeps 0.05 s. Raises ValueError unless seconds is a number >= 0.
    """

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = _amount("sleep", "seconds", seconds)

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(self.seconds)
        return images, labels


class busy_python:  # noqa: N801
    """Computes in pure Python, holding the interpreter's lock (GIL), for `seconds` per batch.

    The work is a count fixed at construction from this machine's own speed, not a deadline: two
    threads that share one lock then take twice as long, as real Python code does. Raises
    ValueError unless seconds is a number >= 0.
    """

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds = _amount("busy_python", "seconds", seconds)
        trials = []
        for _ in range(3):
            start = time.thread_time()
            _count(50_000)
            trials.append(time.thread_time() - start)
        self.loops = round(50_000 * self.seconds / min(trials))

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _count(self.loops)
        return images, labels


def _count(loops: int) -> int:
    total = 0
    for i in range(loops):
        total ^= i
    return total


class distort:  # noqa: N801
    """Real augmentation: each image is rotated, scaled, sheared and shifted at random.

    Bilinear sampling of a random affine map, in NumPy. `strength` 1.0 means up to 15 degrees,
    15 % of scale and shear, and 2.8 pixels of shift at 28 pixels; 0 leaves the images as they are.
    Images: float32 `[batch, height, width, channels]`, returned in the same shape and dtype.
    The draws come from `rng`, which a `MnistDataGenerator` makes from its seed; called with two
    arguments, each call draws differently.
    Raises ValueError unless strength is a number >= 0.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = _amount("distort", "strength", strength)

    def __call__(
        self, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        n, height, width, _ = images.shape
        # A fresh stream a call keeps threads that share this object independent without a lock.
        rng = np.random.default_rng() if rng is None else rng
        angle = np.deg2rad(15) * self.strength * rng.uniform(-1, 1, n)
        scale = 1 + 0.15 * self.strength * rng.uniform(-1, 1, (n, 2))
        shear = 0.15 * self.strength * rng.uniform(-1, 1, n)
        shift = 0.1 * self.strength * rng.uniform(-1, 1, (n, 2)) * [height, width]
        cos, sin = np.cos(angle), np.sin(angle)
        maps = np.stack(
            [
                np.stack([cos * scale[:, 0], -sin + shear], -1),
                np.stack([sin, cos * scale[:, 1]], -1),
            ],
            1,
        )
        centre = np.array([(height - 1) / 2, (width - 1) / 2])
        grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
        source = np.einsum("nij,hwj->nhwi", maps, grid - centre) + (centre + shift)[:, None, None]
        low = np.floor(source).astype(np.int64)
        part = (source - low).astype(images.dtype)[..., np.newaxis]
        rows, columns = low[..., 0], low[..., 1]

        def pixel(r: np.ndarray, c: np.ndarray) -> np.ndarray:
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            which = np.arange(n)[:, None, None]
            found = images[which, r.clip(0, height - 1), c.clip(0, width - 1)]
            return found * inside[..., np.newaxis]

        top = pixel(rows, columns) * (1 - part[..., 1, :])
        top += pixel(rows, columns + 1) * part[..., 1, :]
        bottom = pixel(rows + 1, columns) * (1 - part[..., 1, :])
        bottom += pixel(rows + 1, columns + 1) * part[..., 1, :]
        return (top * (1 - part[..., 0, :]) + bottom * part[..., 0, :]).astype(images.dtype), labels
