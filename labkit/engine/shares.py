"""One data set for several trainers: whose part is how long, and equally many steps for all.

One step more on one of them would wait for ever in an all-reduce. They do not ask each other: each
calculates all parts.
"""

import functools
import sys
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from labkit.engine.heard import Heard
from labkit.engine.messages import WorkerError


class Queue(Protocol):
    """Where batches go; one for each pass."""

    def enqueue(self, arrays: list[Any]) -> bool:
        """Puts samples in, waiting for room. False if the queue was cancelled meanwhile."""

    def size(self) -> int:
        """Samples in it now; 0 once it cannot be asked any more."""

    def close(self, cancel: bool) -> None:
        """No more samples come; `cancel`: those that are in it are dropped, too."""


@dataclass(frozen=True)
class Share:
    """A trainer's part of a data set of which worker i of m makes the batches i, i + m, ...

    Attributes:
        rank, world: the trainer's number, and how many there are.
        n_workers: of each.
        samples: of a pass of all; None: it has no end.
        batch_size: samples that a trainer takes per step.
        pads: short parts are filled up; or else long ones are cut.
        rows: of each batch of a worker but the last, where the iterator tells; or else 0.
    """

    rank: int
    world: int
    n_workers: int
    samples: int | None
    batch_size: int
    pads: bool
    rows: int = 0

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

    def possible(self, size: int, worker: int, number: int) -> list[int]:
        """The `rows` for which a trainer's worker has a batch of this size and number: as many as
        that, or more, of which it is the last batch, and a short one."""
        assert self.samples is not None
        before = number * self.n_workers * self.world + worker
        rows, over = divmod(self.samples - size, before or self.samples)
        return [size, rows] if not over and rows > size else [size]

    @functools.lru_cache(maxsize=8)  # noqa: B019 - asked for with each chunk; a share is small
    def count(self, rows: int) -> int:
        """Steps of every trainer in a pass; 0 if one of them would have none."""
        sizes = self.sizes(rows)
        steps = -(-max(sizes) // self.batch_size) if self.pads else min(sizes) // self.batch_size
        return steps if min(sizes) else 0

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def steps(self, rows: int) -> int:
        """The same. Raises WorkerError where it is none, or one of them could not tell, and so in
        all trainers alike."""
        sizes = self.sizes(rows)
        if not (steps := self.count(rows)):
            raise WorkerError(
                f"labkit: the {self.world} trainers have {sizes} samples of a pass, expected at "
                f"least {1 if self.pads else self.batch_size} each. Give the iterator smaller "
                "batches, so that there is one for every worker of every trainer."
            )
        alike = [rows]  # for all that a trainer of one batch knows, and for those that are so to it
        for its in [] if self.rows else alike:
            for rank, size in enumerate(self.sizes(its)):
                for other in self.possible(size, rank * self.n_workers, 0) if size <= its else ():
                    if self.sizes(other)[rank] == size and self.count(other) not in (0, steps):
                        raise self.unsure(rank)
                    if self.sizes(other)[rank] == size and self.count(other) and other not in alike:
                        alike.append(other)
        return steps

    def unsure(self, rank: int) -> WorkerError:
        return WorkerError(
            f"labkit: trainer {rank} of {self.world} has too few batches of a pass, expected two "
            "at the least: with fewer it cannot tell how many samples those of the others have, "
            "and so how many steps all take. Give the iterator smaller batches."
        )


class EvenQueue:
    """A queue of one pass, into which as many samples go as into those of the other trainers.

    What comes is held back while it is not certain how many that are: until a second batch of the
    trainer, or the end of the pass, tells a short one from a whole one.
    """

    def __init__(self, queue: Queue, share: Share, heard: Heard, given: int) -> None:
        self._queue, self._share, self._heard = queue, share, heard
        self._given = given
        self._first: list[Any] = []  # to fill up with
        self._held: list[list[Any]] = []

    def size(self) -> int:
        return self._queue.size()

    def enqueue(self, arrays: list[Any]) -> bool:
        endless = self._share.samples is None
        most = sys.maxsize if endless else self._most(self._rows())
        if most is None:
            self._held.append([_kept(array) for array in arrays])
            return True
        return self._put([*self._held, arrays], most)

    def close(self, cancel: bool) -> None:
        if not cancel:
            self._fill()
        self._queue.close(cancel)

    def _rows(self) -> list[int]:
        """What a worker's whole batches may have, by what came."""
        share, sizes = self._share, self._heard.sizes
        if share.rows or len(sizes) > 1:
            return [share.rows or max(sizes.values())]
        first = share.rank * share.n_workers
        return [rows for (i, n), its in sizes.items() for rows in share.possible(its, first + i, n)]

    def _most(self, rows: list[int], over: bool = False) -> int | None:
        """Samples that all trainers take of the pass; None while that is not certain."""
        able = [its for its in rows if self._share.count(its)] or rows
        steps = {self._share.count(its) for its in able}
        if len(steps) == 1 and (over or len(rows) == 1):
            steps = {self._share.steps(able[0])}
        return steps.pop() * self._share.batch_size if len(steps) == 1 else None

    def _put(self, parts: list[list[Any]], most: int) -> bool:
        self._held = []
        for arrays in parts:
            arrays = [array[: max(most - self._given, 0)] for array in arrays]
            rows = len(arrays[0])
            self._given += rows
            if rows and not self._first:
                self._first = [_kept(array[: self._share.batch_size]) for array in arrays]
            if rows and not self._queue.enqueue(arrays):
                return False
        return True

    def _fill(self) -> None:
        share, came, rows = self._share, self._heard.samples, self._rows()
        if share.samples is None:
            raise WorkerError(
                "labkit: the iterator ended, expected no end, as uneven='endless' says. Give "
                "samples=, of a pass of all trainers, and uneven='drop' or 'pad'."
            )
        if rows and not self._heard.lacking:
            owns = {its: share.sizes(its)[share.rank] for its in rows}
            rows = [its for its in rows if owns[its] == came]
            if not rows:
                size, own = next(iter(owns.items()))
                raise WorkerError(
                    f"labkit: trainer {share.rank} of {share.world} got {came} samples of a pass, "
                    f"expected {own} of {share.samples} (samples=) in batches of {size}. Let "
                    "worker i of n_workers make the batches i, i + n_workers, ..., all of one size "
                    "but the last."
                )
        most = self._most(rows, over=True)
        while most is None or (self._put(self._held, most) and self._given < most):
            if most is None or not self._first:
                raise share.unsure(share.rank)
            self._held = [self._first]


def _kept(array: Any) -> Any:
    """Lent samples may be kept, an array is written over."""
    return array.copy() if isinstance(array, np.ndarray) else array
