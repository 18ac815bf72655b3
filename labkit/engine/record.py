"""Which chunks came in a pass, and so what is left of it at any of its batches.

A reservoir's draws follow from the seed, the pass and the number of the chunk. So what it holds is
found again from the sizes of the chunks that came last, without a sample of them.
"""

import base64
import math
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from labkit.engine.messages import Chunk, Skipped
from labkit.engine.order import places
from labkit.engine.produce import Stretches

Key = tuple[int, int]  # a chunk: its worker, and its number there
_SURE = 30  # e ** -30 is how likely a sample is to stay longer than is kept
AHEAD = 4096  # batches that a pipeline may have taken ahead of the step
_READABLE = 8  # runs in a state; more are packed


@dataclass(frozen=True)
class Run:
    """Chunks of one size that came in turn: `number` of `worker`, then of the worker behind.

    Those that were left out have no rows.
    """

    worker: int
    number: int
    rows: int
    count: int

    @property
    def chunks(self) -> int:
        """How many came."""
        return self.count if self.rows else 0

    def chunk(self, place: int, n_workers: int) -> Key:
        turn = self.worker + place
        return turn % n_workers, self.number + turn // n_workers


@dataclass(frozen=True)
class Mixed:
    """The chunks of a pass up to one of them.

    Attributes:
        chunks, rows: how many came.
        begins: of each worker, the number of its first chunk behind them.
        turn: the worker who comes next.
        runs: the last of them.
    """

    chunks: int
    rows: int
    begins: tuple[int, ...]
    turn: int
    runs: tuple[Run, ...]

    @classmethod
    def none(cls, n_workers: int) -> "Mixed":
        return cls(0, 0, (0,) * n_workers, 0, ())

    def as_list(self) -> list[Any]:
        """For JSON."""
        runs: Any = [[run.worker, run.number, run.rows, run.count] for run in self.runs]
        if len(runs) > _READABLE:  # of workers that do not take turns: about 2 bytes each
            steps = np.diff(np.array(runs, "<i8"), axis=0, prepend=0)
            runs = base64.b64encode(zlib.compress(steps.T.tobytes(), 9)).decode()
        return [self.chunks, self.rows, list(self.begins), self.turn, runs]

    @classmethod
    def of_list(cls, given: list[Any]) -> "Mixed":
        chunks, rows, begins, turn, runs = given
        if isinstance(runs, str):
            steps = np.frombuffer(zlib.decompress(base64.b64decode(runs)), "<i8")
            runs = np.cumsum(steps.reshape(4, -1), axis=1).T.tolist()
        return cls(chunks, rows, tuple(begins), turn, tuple(Run(*run) for run in runs))


class Record:
    """Notes the chunks of a pass as they come.

    Args:
        epoch: the number of the pass.
        mixed: what had come before it went on.
        size: of the reservoir, in samples.
        ahead: samples that may have come and are not used yet.
    """

    def __init__(self, epoch: int, mixed: Mixed, size: int, ahead: int) -> None:
        self.epoch, self._size = epoch, size
        self._reach = int(size * (math.log(size + 1) + _SURE))
        self._kept = ahead + self._reach
        self._begins, self._turn = list(mixed.begins), mixed.turn
        self._runs = list(mixed.runs)
        self._here = _rows(self._runs)
        # Of those ahead of the runs:
        self._chunks = mixed.chunks - sum(run.chunks for run in self._runs)
        self._rows = mixed.rows - self._here
        self._part = 0
        self._lock = threading.Lock()

    @property
    def samples(self) -> int:
        """All that came so far."""
        with self._lock:
            return self._rows + self._here + self._part

    def note(self, chunk: Chunk) -> None:
        """Of a chunk that comes in parts, each of them; it counts once it is whole."""
        with self._lock:
            self._part += len(chunk.arrays[0])
            if chunk.last:
                self._add(chunk.worker, chunk.number, self._part)
                self._part = 0

    def left_out(self, chunk: Skipped) -> None:
        """Of one that had its turn."""
        with self._lock:
            self._add(chunk.worker, chunk.number, 0)

    def break_off(self) -> None:
        """Of a chunk that came in parts, no more come."""
        with self._lock:
            self._part = 0

    def _add(self, worker: int, number: int, rows: int) -> None:
        last = self._runs[-1] if self._runs else None
        next_one = last and last.chunk(last.count, len(self._begins))
        if last and last.rows == rows and next_one == (worker, number):
            self._runs[-1] = replace(last, count=last.count + 1)
        else:
            self._runs.append(Run(worker, number, rows, 1))
        self._here += rows
        self._forget()

    def _forget(self) -> None:
        """What nobody can ask for any more, if that is many runs."""
        if len(self._runs) % 1024:
            return
        while self._here - _rows(self._runs[:1]) > self._kept:
            run = self._runs.pop(0)
            _advance(self._begins, run)
            self._chunks += run.chunks
            self._rows += run.rows * run.count
            self._here -= run.rows * run.count

    def up_to(self, used: int) -> Mixed:
        """The chunks after which no more than `used` samples had come out of the reservoir.

        Raises RuntimeError if that is too long ago.
        """
        with self._lock:
            chunks, rows, begins = self._chunks, self._rows, list(self._begins)
            if rows and used + self._size < rows + self._reach:
                raise RuntimeError(
                    f"QueueRunner.state_dict: sample {used} of the pass is too long ago, expected "
                    f"fewer than {AHEAD} batches between those taken and those used."
                )
            runs: list[Run] = []
            for run in self._runs:
                count = run.count
                if run.rows:
                    count = min(count, (used + self._size - rows) // run.rows)
                if count:
                    runs.append(run if count == run.count else replace(run, count=count))
                    _advance(begins, runs[-1])
                    chunks += runs[-1].chunks
                rows += count * run.rows
                if count < run.count:
                    break
        turn = self._turn
        if runs:
            turn = (runs[-1].chunk(runs[-1].count - 1, len(begins))[0] + 1) % len(begins)
        spare = _rows(runs) - self._reach
        while len(runs) > 1 and (spare := spare - _rows(runs[:1])) >= 0:
            runs.pop(0)
        return Mixed(chunks, rows, tuple(begins), turn, tuple(runs))


class Part(NamedTuple):
    """What a reservoir has of a chunk of `size` samples: which of its rows, and their places."""

    size: int
    rows: Any = ()
    places: Any = ()


def held(mixed: Mixed, size: int, seed: int, epoch: int) -> dict[Key, Part]:
    """What a reservoir of `size` samples holds after these chunks."""
    missing = np.ones(min(size, mixed.rows), bool)
    found: dict[Key, Part] = {}
    chunks, rows = mixed.chunks, mixed.rows
    for key, its in _backwards(mixed):
        if not missing.any():
            break
        chunks, rows = chunks - 1, rows - its
        put = np.concatenate([*places(size, min(size, rows), its, seed, epoch, chunks)])
        # A later row of the chunk may have taken the place of an earlier one.
        spots, last = np.unique(put[::-1], return_index=True)
        new = missing[spots]
        missing[spots] = False
        if new.any():
            found[key] = Part(its, (its - 1 - last)[new], spots[new])
    if missing.any():
        raise ValueError("QueueRunner.load_state_dict: the state has too few of its last chunks.")
    return found


def stretches(epoch: int, mixed: Mixed, again: set[Key]) -> Stretches:
    """What each worker makes: those of `again`, no other ahead of them, and all behind."""
    of_worker: list[list[tuple[int, int | None]]] = []
    for worker, begin in enumerate(mixed.begins):
        its: list[tuple[int, int | None]] = []
        for number in sorted(number for who, number in again if who == worker):
            first = its.pop()[0] if its and its[-1][1] == number else number
            its.append((first, number + 1))
        first = its.pop()[0] if its and its[-1][1] == begin else begin
        of_worker.append([*its, (first, None)])
    return Stretches(epoch, of_worker)


def _backwards(mixed: Mixed) -> Iterator[tuple[Key, int]]:
    for run in reversed(mixed.runs):
        for place in reversed(range(run.chunks)):
            yield run.chunk(place, len(mixed.begins)), run.rows


def _rows(runs: list[Run]) -> int:
    return sum(run.rows * run.count for run in runs)


def _advance(begins: list[int], run: Run) -> None:
    for place in range(max(0, run.count - len(begins)), run.count):
        worker, number = run.chunk(place, len(begins))
        begins[worker] = number + 1
