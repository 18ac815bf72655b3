"""One data set for several trainers: whose part is how long, and equally many steps for all.

One step more on one of them would wait for ever in an all-reduce. They do not ask each other: each
calculates all parts.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from labkit.engine.messages import WorkerError


class Queue(Protocol):
    """What is to be known of the trainer's own queue."""

    def enqueue(self, arrays: list[Any]) -> bool: ...

    def size(self) -> int: ...

    def close(self, cancel: bool) -> None: ...


class Chunks(Protocol):
    """What this trainer's workers delivered in the pass."""

    @property
    def samples(self) -> int: ...

    @property
    def whole(self) -> int: ...


@dataclass(frozen=True)
class Share:
    """A trainer's part of a data set of which worker i of m makes the batches i, i + m, ...

    Attributes:
        rank, world: the trainer's number, and how many there are.
        n_workers: of each.
        samples: of a pass of all; None: it has no end.
        batch_size: samples that a trainer takes per step.
        pads: short parts are filled up; or else long ones are cut.
        exact: nothing may be left out.
    """

    rank: int
    world: int
    n_workers: int
    samples: int | None
    batch_size: int
    pads: bool
    exact: bool

    def sizes(self, rows: int) -> list[int]:
        """Samples of each trainer, if a worker's batches have `rows`, and the last one the rest."""
        assert self.samples is not None
        chunks = -(-self.samples // rows)
        turns, more = divmod(chunks, self.n_workers * self.world)
        first = [rank * self.n_workers for rank in range(self.world)]
        counts = [turns * self.n_workers + min(max(more - f, 0), self.n_workers) for f in first]
        sizes = [count * rows for count in counts]
        last = (chunks - 1) % (self.n_workers * self.world) // self.n_workers
        sizes[last] -= chunks * rows - self.samples
        return sizes

    @functools.lru_cache(maxsize=8)  # noqa: B019 - asked for with each chunk; a share is small
    def steps(self, rows: int) -> int:
        """Of every trainer in a pass."""
        sizes = self.sizes(rows)
        steps = -(-max(sizes) // self.batch_size) if self.pads else min(sizes) // self.batch_size
        if not min(sizes) or not steps:
            raise WorkerError(
                f"labkit: the {self.world} trainers have {sizes} samples of a pass, expected at "
                f"least {1 if self.pads else self.batch_size} each. Give the iterator smaller "
                "batches, so that there is one for every worker of every trainer."
            )
        return steps


class EvenQueue:
    """A queue of one pass, into which as many samples go as into those of the other trainers."""

    def __init__(self, queue: Queue, share: Share, chunks: Chunks, given: int) -> None:
        self._queue, self._share, self._chunks = queue, share, chunks
        self._given = given
        self._first: list[Any] = []  # to fill up with

    def size(self) -> int:
        return self._queue.size()

    def enqueue(self, arrays: list[Any]) -> bool:
        if self._share.samples is not None and self._chunks.whole:
            left = self._steps() * self._share.batch_size - self._given
            arrays = [array[: max(left, 0)] for array in arrays]
        rows = len(arrays[0])
        self._given += rows
        if rows and not self._first:
            self._first = [_kept(array[: self._share.batch_size]) for array in arrays]
        return not rows or self._queue.enqueue(arrays)

    def close(self, cancel: bool) -> None:
        if not cancel:
            self._fill()
        self._queue.close(cancel)

    def _steps(self) -> int:
        return self._share.steps(self._chunks.whole)

    def _fill(self) -> None:
        share, came, rows = self._share, self._chunks.samples, self._chunks.whole
        if share.samples is None:
            raise WorkerError(
                "labkit: the iterator ended, expected no end, as uneven='endless' says. Give "
                "samples=, of a pass of all trainers, and uneven='drop' or 'pad'."
            )
        own = share.sizes(rows)[share.rank]
        if share.exact and came != own:
            raise WorkerError(
                f"labkit: trainer {share.rank} of {share.world} got {came} samples of a pass, "
                f"expected {own} of {share.samples} (samples=) in batches of {rows}. Let worker i "
                "of n_workers make the batches i, i + n_workers, ..., all of one size but the last."
            )
        missing = self._steps() * share.batch_size - self._given
        while missing > 0 and self._first:
            some = [array[:missing] for array in self._first]
            if not self._queue.enqueue(some):
                return
            missing -= len(some[0])


def _kept(array: Any) -> Any:
    """Lent samples may be kept, an array is written over."""
    return array.copy() if isinstance(array, np.ndarray) else array
