"""MNIST and the generator that cuts it into batches: NumPy only, so worker processes stay light.

Images and labels: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits",
licensed CC BY-SA 3.0. `mnist.npz` holds all 70,000 of them, unchanged, as uint8.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from labkit.checks import expect, is_integer

Batch = tuple[np.ndarray, np.ndarray]
_ONE_HOT = np.eye(10, dtype=np.float32)


class Mnist(NamedTuple):
    """uint8 arrays: images `[60000 or 10000, 28, 28]`, labels `[60000 or 10000]`, read-only."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@lru_cache(maxsize=1)
def load_mnist() -> Mnist:
    """All 60,000 training and 10,000 test digits, from the file that ships with the package."""
    with np.load(Path(__file__).with_name("mnist.npz")) as archive:
        mnist = Mnist(*(archive[name] for name in Mnist._fields))
    for array in mnist:
        array.flags.writeable = False  # one cached copy serves every caller
    return mnist


@lru_cache(maxsize=2)
def _order(seed: int, turn: int, epoch: int, n: int) -> np.ndarray:
    # Cached, because 32 threads that each shuffle 60,000 numbers under one lock start late.
    order = np.random.default_rng([seed, turn, epoch]).permutation(n)
    order.flags.writeable = False
    return order


def _takes_rng(work: Callable[..., Batch] | None) -> bool:
    if work is None:
        return False
    try:
        rng = inspect.signature(work).parameters.get("rng")
    except (TypeError, ValueError):  # some built-in functions do not tell
        return False
    # A generator that the user has bound to it, as by functools.partial, is left to it.
    return rng is not None and (rng.default is rng.empty or rng.default is None)


class MnistDataGenerator:
    """Batches of MNIST, with the heavy work of a real input pipeline as a part passed in.

    Every iterator yields `(images, labels)`: float32 in 0..1 `[batch, 28, 28, 1]`, and one-hot
    float32 `[batch, 10]`. Samples are kept as uint8 and converted batch by batch (47 MB instead of
    the 376 MB of float64). Each method named `..._iterator` is an iterator factory that a
    `QueueRunner` takes as it is. `start` is how many batches are left out at first, of all workers
    together where they share.

    Args:
        batch_size: samples per batch, 1 to 60,000. Default 32.
        work: called as `work(images, labels)` for each training batch, returns the batch to
            deliver; see `labkit.workloads`. Default: none. A work that has a parameter `rng` gets
            a `numpy.random.Generator` of the batch's own, made from the seed, the pass or epoch
            and the batch's number, so that a repeated run gives the same samples.
        seed: fixes the order. The stream of each worker depends on the seed and on the worker's
            index, and no two are the same.
        data: a `Mnist`-like tuple of uint8 arrays; default `load_mnist()`.

    Raises:
        ValueError: batch_size out of range, work not callable, or images and labels that differ
            in length.
    """

    def __init__(
        self,
        batch_size: int = 32,
        work: Callable[..., Batch] | None = None,
        seed: int = 0,
        data: Mnist | None = None,
    ) -> None:
        self.data = load_mnist() if data is None else Mnist(*data)
        for x, y in ((self.data.x_train, self.data.y_train), (self.data.x_test, self.data.y_test)):
            if len(x) != len(y):
                raise ValueError(
                    f"MnistDataGenerator: expected as many images as labels, got {len(x)} images "
                    f"and {len(y)} labels. Pass arrays of the same length."
                )
        n = len(self.data.x_train)
        what = f"batch_size must be an integer from 1 to {n} (the training samples)"
        expect(is_integer(batch_size, 1, n), f"MnistDataGenerator: {what}", batch_size)
        if work is not None and not callable(work):
            raise ValueError(
                f"MnistDataGenerator: work must be callable as work(images, labels), got {work!r}. "
                "To sleep 0.05 s a batch, pass labkit.workloads.sleep(0.05)."
            )
        expect(is_integer(seed, 0), "MnistDataGenerator: seed must be an integer >= 0", seed)
        self.batch_size, self.work, self.seed = int(batch_size), work, int(seed)
        self._draws = _takes_rng(work)

    def train_iterator(self, worker: int = 0, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Endless: windows of consecutive samples from random starts, with replacement.

        This is the article's iterator. An "epoch" of it repeats some samples and misses others.
        Another `epoch` number, which a `QueueRunner` gives each fresh pass, begins other windows.
        """
        rng = np.random.default_rng([self.seed, worker, epoch])
        for number in count():
            begin = int(rng.integers(len(self.data.x_train) - self.batch_size + 1))
            if number >= start:
                part = slice(begin, begin + self.batch_size)
                yield self._train_batch(part, worker, epoch, number)

    def epoch_iterator(
        self, worker: int = 0, n_workers: int = 1, epoch: int = 0, start: int = 0
    ) -> Iterator[Batch]:
        """Finite: every training sample exactly once over all `n_workers`, shuffled.

        Worker `worker` of `n_workers` yields its share, every `n_workers`-th batch of the epoch's
        order; the shares are disjoint and together are the whole training set. The epoch's last
        batch may be smaller. Another `epoch` number gives another order.
        """
        self._check_share("epoch_iterator", worker, n_workers)
        yield from self._batches(epoch, 0, range(start + worker, self._per_pass, n_workers))

    def passes_iterator(
        self, worker: int = 0, n_workers: int = 1, epoch: int = 0, start: int = 0
    ) -> Iterator[Batch]:
        """Endless: one pass over the training set after the other, each in its own order.

        Pass `k` of epoch 0 is `epoch_iterator(epoch=k)`. The batches are numbered through all
        passes, and worker `worker` yields every `n_workers`-th of them. Another `epoch` number,
        which a `QueueRunner` gives each fresh pass over its dataset, gives other orders.
        """
        self._check_share("passes_iterator", worker, n_workers)
        done, first = divmod(start + worker, self._per_pass)
        for turn in count(done):
            yield from self._batches(turn, epoch, range(first, self._per_pass, n_workers))
            # A pass need not be a multiple of n_workers, so whose turn is first moves on.
            first = (first - self._per_pass) % n_workers

    def test_iterator(self) -> Iterator[Batch]:
        """Finite: the real test set in order, each sample once, a smaller last batch included."""
        for start in range(0, len(self.data.x_test), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self._convert(self.data.x_test[part], self.data.y_test[part])

    @property
    def _per_pass(self) -> int:
        return -(-len(self.data.x_train) // self.batch_size)

    @staticmethod
    def _check_share(name: str, worker: int, n_workers: int) -> None:
        what = f"{name}: worker must be from 0 to n_workers - 1 = {n_workers - 1}"
        expect(0 <= worker < n_workers, what, worker)

    def _batches(self, turn: int, epoch: int, numbers: Iterable[int]) -> Iterator[Batch]:
        order = _order(self.seed, turn, epoch, len(self.data.x_train))
        for number in numbers:
            start = number * self.batch_size
            part = order[start : start + self.batch_size]
            yield self._train_batch(part, turn, epoch, number)

    def _train_batch(self, part: slice | np.ndarray, *key: int) -> Batch:
        batch = self._convert(self.data.x_train[part], self.data.y_train[part])
        if self.work is None:
            return batch
        if not self._draws:
            return self.work(*batch)
        # By spawn_key, or number 0 would draw from the very stream that made the order.
        *entropy, number = self.seed, *key
        stream = np.random.SeedSequence(entropy, spawn_key=(number,))
        return self.work(*batch, rng=np.random.default_rng(stream))

    @staticmethod
    def _convert(x: np.ndarray, y: np.ndarray) -> Batch:
        images = np.multiply(x[..., np.newaxis], np.float32(1 / 255), dtype=np.float32)
        return images, _ONE_HOT[y]

    def __reduce__(self) -> tuple:
        # A tuple of plain arrays: the engine then puts them into memory that processes share.
        return type(self), (self.batch_size, self.work, self.seed, tuple(self.data))
