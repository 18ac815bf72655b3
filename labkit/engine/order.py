"""A fixed order of samples: workers take turns, and no timing has a part in the shuffling.

    pool ──messages──► Turns: worker 0's batch, worker 1's, ... ──► Reservoir ──► Cutter ──► queue

The price is that the slowest worker sets the pace: the others wait for their turn.
"""

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np

from labkit.engine.batches import joined
from labkit.engine.messages import Chunk, Lost, Message, Skipped
from labkit.engine.pool import Pool


class Turns:
    """A pool's messages of one pass, in turn: a whole batch of each worker that is not over.

    Attributes:
        reservoir: mixes them; of size 0 where they are to stay as they come.
    """

    def __init__(self, pool: Pool, over: set[int], reservoir: "Reservoir") -> None:
        self._pool, self._over, self.reservoir = pool, over, reservoir
        self._early = [collections.deque[Message]() for _ in range(pool.n_workers)]
        self._turn = 0

    def get(self, seconds: float) -> Message | None:
        """The next message in turn, or None if nothing comes within `seconds`."""
        while not self._over.issuperset(range(len(self._early))):
            early = self._early[self._turn]
            if early:
                message = early.popleft()
                if not isinstance(message, Chunk) or message.last:
                    self._next()
                return message
            if self._turn in self._over:
                self._next()
                continue
            came = self._pool.get(seconds)
            if came is None:
                return None
            self._early[came.worker].append(came)
        return None

    def put_back(self, message: Message) -> None:
        """Makes `message` the next one that `get` returns."""
        self._early[message.worker].appendleft(message)
        self._turn = message.worker

    def give_up(self) -> None:
        """Ahead of another pass: batches go back unseen, losses stay to be heard."""
        for early in self._early:
            for message in early:
                if isinstance(message, Chunk | Skipped):
                    self._pool.release(message)
                elif isinstance(message, Lost):
                    self._pool.put_back(message)
            early.clear()

    def _next(self) -> None:
        self._turn = (self._turn + 1) % len(self._early)


class Reservoir:
    """Mixes samples as widely as a `RandomShuffleQueue` with `min_after_dequeue` = `size`.

    Once it is full, each sample of a batch takes the place of another one, which comes out. Which
    one is drawn from the seed, the number of the pass and the number of the batch in it.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self._size, self._seed, self._epoch = size, seed, epoch
        self._batch = 0
        self._kept: list[np.ndarray] = []
        self._lent = False
        self._parts: list[list[np.ndarray]] = []
        self.count = 0

    def mix(self, arrays: list[Any], last: bool) -> list[Any]:
        """Takes a batch, or a part of one, and gives the samples that come out, maybe none.

        Nothing of `arrays` is kept but samples that are lent, see `Chunk`.
        """
        if not self._size:
            return arrays
        self._lent = not isinstance(arrays[0], np.ndarray)
        columns = [_objects(array) for array in arrays] if self._lent else arrays
        if not last:
            self._parts.append([column.copy() for column in columns])
            return self._given([column[:0] for column in columns])
        columns, self._parts = joined([*self._parts, columns]), []
        return self._given(self._exchange(columns))

    def rest(self) -> list[Any]:
        """What is left at the end of the pass, mixed; no array at all if nothing ever came."""
        order, self.count = self._draws().permutation(self.count), 0
        return self._given([kept[order] for kept in self._kept])

    def _exchange(self, columns: list[np.ndarray]) -> list[np.ndarray]:
        draws = self._draws()
        self._batch += 1
        if not self._kept:
            # Text may be longer in a later batch, so it is kept as objects.
            kinds = [object if column.dtype.kind in "SU" else column.dtype for column in columns]
            shapes = [(self._size, *column.shape[1:]) for column in columns]
            self._kept = [np.empty(*pair) for pair in zip(shapes, kinds, strict=True)]
        done = min(len(columns[0]), self._size - self.count)
        self._put(slice(self.count, self.count + done), columns, 0, done)
        self.count += done
        came = []
        while done < len(columns[0]):
            number = min(self._size, len(columns[0]) - done)
            places = draws.choice(self._size, number, replace=False)
            came.append([kept[places] for kept in self._kept])
            self._put(places, columns, done, done + number)
            done += number
        return joined(came) if came else [kept[:0] for kept in self._kept]

    def _put(
        self, places: slice | np.ndarray, columns: list[np.ndarray], begin: int, end: int
    ) -> None:
        for kept, column in zip(self._kept, columns, strict=True):
            kept[places] = column[begin:end]

    def _draws(self) -> np.random.Generator:
        key = (self._epoch, self._batch)
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))

    def _given(self, columns: list[np.ndarray]) -> list[Any]:
        return [tuple(column) for column in columns] if self._lent else columns


class Cutter:
    """Cuts what comes into batches of `size` samples. What is one already passes as it is."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rest: list[list[np.ndarray]] = []
        self._count = 0

    def cut(self, arrays: list[Any]) -> Iterator[list[np.ndarray]]:
        """The batches that `arrays` complete; may keep them, but for views of them."""
        if not isinstance(arrays[0], np.ndarray):
            arrays = [np.stack(samples) for samples in arrays]
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


def _objects(samples: tuple[np.ndarray, ...]) -> np.ndarray:
    column = np.empty(len(samples), object)
    for place, sample in enumerate(samples):
        column[place] = sample
    return column
