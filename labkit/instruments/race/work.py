"""What is raced over: rows, each a generator of batches at a price of its own. NumPy only, since
worker processes import it."""

import io
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from labkit.engine.produce import IteratorFactory
from labkit.workloads import busy_python, distort

_SIZE = 32
_READY = 1 << 26  # bytes
Batch = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Row:
    """One generator, as every contestant may take it.

    Attributes:
        name: as the table has it.
        make: a new batch, by its number: for those that map a function over an index.
        workers: the numbers of workers that it is raced with.
        trains: a step trains the CNN; or else it only takes the batch.
    """

    name: str
    make: Callable[[int], Batch]
    workers: tuple[int, ...]
    trains: bool = True

    def factory(self, worker: int = 0, n_workers: int = 1) -> Iterator[Batch]:
        """The same batches as an iterator, of which each worker has a share."""
        if isinstance(self.make, Own):
            return self.make.passes(worker, n_workers)
        return map(self.make, count(worker, n_workers))

    @property
    def batch_size(self) -> int:
        return len(self.make(0)[0])

    @property
    def queue(self) -> dict[str, Any]:
        """QueueRunner's arguments for this row: batches are handed on as they were made, as by all
        the others, and as many of them lie ready as take 64 MB, but 4 to 20."""
        batch = self.make(0)
        ready = _READY // sum(part.nbytes for part in batch)
        return {"capacity": min(max(ready, 4), 20) * len(batch[0]), "shuffle": False}


class Small:
    """32 images of 28x28x1 and their labels, new arrays each time: 100 KB in float32."""

    def __init__(self, work: Callable[..., Any] | None = None, dtype: str = "float32") -> None:
        rng = np.random.default_rng(0)
        size = _SIZE * 4 // np.dtype(dtype).itemsize
        images = rng.random((size, 28, 28, 1), np.float32) * (1 if dtype == "float32" else 255)
        self.images, self.work = images.astype(dtype), work
        self.labels = np.eye(10, dtype=np.float32)[rng.integers(0, 10, size)]

    def __call__(self, number: int) -> Batch:
        images, labels = np.roll(self.images, number % 28, 1), self.labels.copy()
        return (images, labels) if self.work is None else self.work(images, labels)


class Sleep:
    """Waits, as for a disk or a network."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> Batch:
        time.sleep(self.seconds)
        return images, labels


class Fft:
    """Smooths each image in the frequency domain: NumPy, much of it without Python's lock."""

    def __init__(self, times: int) -> None:
        self.times = times
        distance = np.hypot(np.fft.fftfreq(28)[:, None], np.fft.fftfreq(28))
        self.filter = np.exp(-((4 * distance) ** 2))[None, ..., None]

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> Batch:
        for _ in range(self.times):
            spectrum = np.fft.fft2(images, axes=(1, 2)) * self.filter
            images = np.fft.ifft2(spectrum, axes=(1, 2)).real.astype(np.float32)
        return images, labels


def photographs(folder: Path, size: int = 160, files: int = 256) -> list[Path]:
    """JPEG files in `folder`, of size x size pixels: about 6 KB each of 160, 14 KB of 256."""
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    for number in range(files):
        coarse = Image.fromarray(rng.integers(0, 255, (size // 16, size // 16, 3), np.uint8))
        paths.append(folder / f"{number}.jpg")
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


class Jpeg:
    """Decodes 32 JPEG files with Pillow, and makes 28x28 of them."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.labels = np.eye(10, dtype=np.float32)[np.arange(_SIZE) % 10]

    def __call__(self, number: int) -> Batch:
        from PIL import Image

        images = np.empty((_SIZE, 28, 28, 1), np.float32)
        for place in range(_SIZE):
            data = self.paths[(number * _SIZE + place) % len(self.paths)].read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                images[place, ..., 0] = np.asarray(image.convert("L").resize((28, 28)))
        return images / 255, self.labels.copy()


class Large:
    """19 MB of images, a new array each time, which is given away: nothing else refers to it."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.size = dtype, _SIZE * 4 // np.dtype(dtype).itemsize

    def __call__(self, number: int) -> Batch:
        images = np.full((self.size, 224, 224, 3), number % 251, self.dtype)
        return images, np.full((self.size,), number, np.int64)


class Numbered:
    """4 samples whose values are their numbers: for tests, which count them."""

    def __call__(self, number: int) -> Batch:
        numbers = np.arange(4, dtype=np.float32) + 4 * int(number)
        return np.broadcast_to(numbers[:, None, None, None], (4, 2, 2, 1)).copy(), numbers


class Own:
    """A factory of the user's. `make` takes the next batch of any of its iterators that is free,
    whatever the number: those who map over an index then do the same work, each iterator over the
    whole of the data."""

    def __init__(self, factory: Any) -> None:
        self.factory = factory
        self._free: deque[Iterator[Batch]] = deque()

    def __reduce__(self) -> tuple[Any, ...]:
        import cloudpickle  # for peers that pickle by Python's own, which knows no lambda

        return _own, (cloudpickle.dumps(self.factory),)

    def __call__(self, number: int) -> Batch:
        try:
            batches = self._free.pop()
        except IndexError:
            batches = self.passes(0, 1)
        batch = next(batches)
        self._free.append(batches)
        return batch

    def passes(self, worker: int, n_workers: int) -> Iterator[Batch]:
        """One pass after the other, without end."""
        made = IteratorFactory(self.factory, n_workers)
        for epoch in count():
            nothing = True
            for batch in made(worker, epoch):
                nothing = False
                yield tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            if nothing:
                raise ValueError("race: the iterator ended before its first batch.")


def _own(code: bytes) -> Own:
    return Own(pickle.loads(code))


def rows(folder: Path) -> list[Row]:
    """Those of the full race; JPEG files are written to `folder`."""
    busy = busy_python(0.005)  # measured here, once, so that all do the same work
    return [
        Row("sleep 50 ms", Small(Sleep(0.05)), (1, 4, 16, 32)),
        Row("sleep 5 ms", Small(Sleep(0.005)), (4, 16)),
        Row("pure Python 5 ms", Small(busy), (1, 2)),
        Row("NumPy augmentation", Small(distort()), (2,)),
        Row("NumPy FFT", Small(Fft(3)), (2,)),
        Row("32 JPEG files", Jpeg(photographs(folder)), (2,)),
        Row("free 100 KB float32", Small(), (1,)),
        Row("free 100 KB uint8", Small(dtype="uint8"), (1,)),
        Row("free 19 MB float32", Large("float32"), (2,), trains=False),
        Row("free 19 MB uint8", Large("uint8"), (2,), trains=False),
    ]
