"""An order of samples that is known: mixed by a seed and no timing, and cut into batches.

pool ──messages──► Turns: a batch, and another one, ... ──► Reservoir ──► Cutter ──► queue
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from labkit.engine.batches import joined
from labkit.engine.memory import aligned_empty


class Reservoir:
    """Mixes samples as widely as a `RandomShuffleQueue` with `min_after_dequeue` = `size`.

    Once it is full, each sample of a batch takes the place of another one, which comes out. Which
    one is drawn from the seed, the number of the pass and the number of the batch in it.

    Args:
        batch: how many came before, where a pass goes on.
        used: how many of the samples that come out first are left out.
    """

    def __init__(self, size: int, seed: int, epoch: int, batch: int = 0, used: int = 0) -> None:
        self._size, self._seed, self._epoch = size, seed, epoch
        self._batch, self._used = batch, used
        self._kept: list[np.ndarray] = []
        self._lent = False
        self._parts: list[list[np.ndarray]] = []
        self.count = 0

    def mix(self, arrays: list[Any], last: bool) -> list[Any]:
        """Takes a batch, or a part of one, and gives the samples that come out, maybe none.

        Nothing of `arrays` is kept but samples that are lent, see `Chunk`.
        """
        if not self._size:
            return self._unused(arrays)
        columns = self.columns(arrays)
        if not last:
            self._parts.append([column.copy() for column in columns])
            return self._given([column[:0] for column in columns])
        columns, self._parts = joined([*self._parts, columns]), []
        return self._given(self._exchange(columns))

    def break_off(self) -> None:
        """Forgets the parts of a batch of which no more come."""
        self._parts = []

    def rest(self) -> list[Any]:
        """What is left at the end of the pass, mixed; no array at all if nothing ever came."""
        order = _draws(self._seed, self._epoch, self._batch).permutation(self.count)
        self.count = 0
        return self._given([kept[order] for kept in self._kept])

    def columns(self, arrays: list[Any]) -> list[np.ndarray]:
        """Arrays as they are, and samples that are lent as arrays of these."""
        self._lent = not isinstance(arrays[0], np.ndarray)
        return [_objects(array) for array in arrays] if self._lent else arrays

    def restore(self, columns: list[np.ndarray], rows: np.ndarray, spots: np.ndarray) -> None:
        """Puts these rows of a whole batch where they lay."""
        self._put(spots, [column[rows] for column in columns])
        self.count += len(rows)

    def _exchange(self, columns: list[np.ndarray]) -> list[np.ndarray]:
        rows = len(columns[0])
        came, done, empty = [], 0, self._size - self.count
        at = (self._seed, self._epoch, self._batch)
        for spots in places(self._size, self.count, rows, *at):
            if not len(spots):
                continue
            if done >= empty:
                came.append([kept[spots] for kept in self._kept])
            self._put(spots, [column[done : done + len(spots)] for column in columns])
            done += len(spots)
        self.count += min(rows, empty)
        self._batch += 1
        return joined(came) if came else [kept[:0] for kept in self._kept]

    def _put(self, spots: np.ndarray, columns: list[np.ndarray]) -> None:
        if not self._kept:
            # Text may be longer in a later batch, so it is kept as objects.
            kinds = [object if column.dtype.kind in "SU" else column.dtype for column in columns]
            shapes = [(self._size, *column.shape[1:]) for column in columns]
            self._kept = [np.empty(*pair) for pair in zip(shapes, kinds, strict=True)]
        for kept, column in zip(self._kept, columns, strict=True):
            kept[spots] = column

    def _given(self, columns: list[np.ndarray]) -> list[Any]:
        return self._unused([tuple(column) for column in columns] if self._lent else columns)

    def _unused(self, arrays: list[Any]) -> list[Any]:
        if not self._used or not arrays:
            return arrays
        used = min(self._used, len(arrays[0]))
        self._used -= used
        return [array[used:] for array in arrays]


def places(
    size: int, count: int, rows: int, seed: int, epoch: int, batch: int
) -> Iterator[np.ndarray]:
    """Where the rows of a batch go in a reservoir of `size` samples that has `count`.

    The first come where nothing is; those after them in turns of at most `size`.
    """
    draws, done = _draws(seed, epoch, batch), min(rows, size - count)
    yield np.arange(count, count + done)
    while done < rows:
        number = min(size, rows - done)
        yield draws.choice(size, number, replace=False)
        done += number


def _draws(seed: int, epoch: int, batch: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, batch)))


class Cutter:
    """Cuts what comes into batches of `size` samples. What is one already passes as it is."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rest: list[list[np.ndarray]] = []
        self._count = 0

    def cut(self, arrays: list[Any]) -> Iterator[list[np.ndarray]]:
        """The batches that `arrays` complete; may keep them, but for views of them."""
        if not isinstance(arrays[0], np.ndarray):
            arrays = [_stacked(samples) for samples in arrays]
        begin = 0
        while (end := begin + self._size - self._count) <= len(arrays[0]):
            piece = arrays if end - begin == len(arrays[0]) else [a[begin:end] for a in arrays]
            yield self._joined(piece)
            begin = end
        if begin < len(arrays[0]):
            self._rest.append([array[begin:] for array in arrays])
            self._count += len(arrays[0]) - begin

    def rest(self) -> list[np.ndarray] | None:
        """The last batch, which is smaller; None if there is none."""
        return self._joined() if self._rest else None

    def _joined(self, *more: list[np.ndarray]) -> list[np.ndarray]:
        parts, self._rest, self._count = [*self._rest, *more], [], 0
        return joined(parts)


def _stacked(samples: Sequence[np.ndarray]) -> np.ndarray:
    first = samples[0]
    return np.stack(samples, out=aligned_empty((len(samples), *first.shape), first.dtype))


def _objects(samples: tuple[np.ndarray, ...]) -> np.ndarray:
    column = np.empty(len(samples), object)
    for place, sample in enumerate(samples):
        column[place] = sample
    return column
