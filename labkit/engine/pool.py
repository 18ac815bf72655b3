"""A pool of workers: who is active, who is waiting, who is late. No transport of its own.

    feeder ── set_active(k), get(seconds), release(chunk), next_epoch(e), stop() ──► Pool
    Pool   ── _start, _receive, _refill, _go_on, _room, _doing, _end, wake ──► threads, ...

A new kind of worker is a subclass with these eight methods, and a line in `engine.KINDS`.
"""

import collections
import contextlib
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from labkit.engine import interrupts
from labkit.engine.batches import Spec
from labkit.engine.messages import Chunk, Ended, Lost, Message, Skipped
from labkit.engine.produce import IteratorFactory
from labkit.engine.rest import LONGEST, rest

_LOOK = 0.1  # seconds between two looks for a worker that is late


@dataclass
class _State:
    """One worker, as the pool sees it."""

    since: float = field(default_factory=time.monotonic)  # it was last heard of, or refilled
    taken: int = 0  # its chunks that are not released yet
    held: list[tuple[int, ...]] = field(default_factory=list)  # kept from it while it pauses
    unheard: int = 0  # its batches that were left out, and are not released yet
    ended: bool = False
    lost: bool = False
    life: int = 0  # how often it was started again
    done: int = 0  # chunks of this pass that came whole
    rows: int = 0  # of the next one that came
    seen: int = 0  # of that one in this life


@dataclass(frozen=True)
class Job:
    """What a pool is asked for.

    Attributes:
        factory: makes each worker's iterator.
        spec: what batches look like; None: as the first one does.
        timeout: seconds that a worker may spend on one batch; None: for ever.
        kept: samples that whoever takes the chunks will hold at a time.
        copies: the iterators may write into an array again after they have yielded it.
        keeps: whoever takes the chunks keeps their arrays, so they are nobody else's.
        epoch: the number of the first pass.
        stages: the iterators' stages are to be timed; a kind that cannot do that leaves them away.
        skip: a batch that fails is to be left out; of a kind that cannot do that, it is a loss.
        restarts: how often a worker that was lost is started again.
        options: of the workers, for a kind that has any.
        aligned: samples of a chunk that goes to TensorFlow as it lies; 0 if none does.
    """

    factory: IteratorFactory
    spec: Spec | None = None
    timeout: float | None = None
    kept: int = 0
    copies: bool = True
    keeps: bool = False
    epoch: int = 0
    stages: bool = False
    skip: bool = False
    restarts: int = 0
    options: dict[str, Any] | None = None
    aligned: int = 0


class Pool(ABC):
    """Workers that walk one iterator each, a pass at a time."""

    def __init__(self, job: Job) -> None:
        self.job, self.factory, self.spec = job, job.factory, job.spec
        self.epoch, self.active = job.epoch, 0
        self._states: list[_State] = []
        self._inbox: collections.deque[Message] = collections.deque()
        self._look_again = 0.0
        self._stopping = False
        self._ending = threading.Lock()
        self._ended = False

    # ---------------------------------------------------------------- for the feeder

    @property
    def n_workers(self) -> int:
        return self.factory.n_workers

    def takes(self, count: int) -> bool:
        """Whether `n_workers` can become `count` as it runs: not if that shares the data anew."""
        return not self.factory.shards and self.active <= count

    def set_active(self, count: int) -> None:
        """Lets workers 0 to count - 1 produce, starting those not yet started; others pause."""
        self.active = count
        while len(self._states) < count and not self._stopping:
            with interrupts.held_back():
                self._start(len(self._states), 0, 0)
                self._states.append(_State())
        for worker, state in enumerate(self._states[:count]):
            while state.held:
                self._refill(worker, state.held.pop())

    def get(self, seconds: float) -> Message | None:
        """The next message of any worker, or None after `seconds`. A stall is a message as well.

        What workers still send of a pass that was given up goes back to them unseen, and one that
        is lost is started again, as often as the job says.
        """
        if not self._inbox or time.monotonic() > self._look_again:
            for message in self._receive(0.0 if self._inbox else seconds):
                self._take_in(message)
            # After what has come is taken in: whoever sent it is not late.
            late = self._late()
            if late is not None:
                self._inbox.appendleft(late)
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Lost):
                if not self._restarted(message):
                    return message
            elif message.epoch == self.epoch:
                return message
            elif isinstance(message, Chunk | Skipped):
                self.release(message)
        return None

    def put_back(self, message: Message) -> None:
        """Makes `message` the next one that `get` returns."""
        self._inbox.appendleft(message)

    def release(self, chunk: Chunk | Skipped) -> None:
        """Gives a chunk's slots back to its worker, once its arrays are not needed any more."""
        state = self._states[chunk.worker]
        if chunk.life != state.life:
            return
        if isinstance(chunk, Chunk):
            state.taken -= 1
        elif chunk.released:
            return
        else:
            chunk.released = True
            state.unheard -= 1
        state.since = time.monotonic()
        self._give_back(chunk)

    def next_epoch(self, epoch: int) -> None:
        """Every worker begins the pass of this number, at its next batch if it is in another."""
        self.epoch = epoch
        for worker, state in enumerate(self._states):
            state.ended, state.since = state.lost, time.monotonic()
            state.done = state.rows = state.seen = 0
            self._go_on(worker)

    @abstractmethod
    def wake(self) -> None:
        """Lets a `get` of another thread return at once."""

    def stop(self, seconds: float = 2.0) -> list[str]:
        """Ends every worker; a line for each that still runs after `seconds`. May come twice."""
        self._stopping = True
        with self._ending:
            ended, self._ended = self._ended, True
            left = [] if ended else self._end(seconds)
            self._inbox.clear()
            return left

    def begin_stop(self) -> None:
        """Ahead of `stop`: no worker is started any more, and a waiting `get` returns."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self.wake()

    # ---------------------------------------------------------------- its own

    def _give_back(self, chunk: Chunk | Skipped) -> None:
        if chunk.worker < self.active:
            self._refill(chunk.worker, chunk.slots)
        else:
            self._states[chunk.worker].held.append(chunk.slots)

    def _take_in(self, message: Message) -> None:
        state = self._states[message.worker]
        if message.life != state.life:
            return
        if isinstance(message, Chunk) and not len(message.arrays[0]):
            self._give_back(message)  # no sign of life: who makes only these is late one day
            return
        state.since = time.monotonic()
        if isinstance(message, Chunk) and message.epoch == self.epoch:
            came_before = self._came_before(message, state)
            if came_before == len(message.arrays[0]):
                self._give_back(message)
                return
            if came_before:
                message.arrays = [part[came_before:] for part in message.arrays]
        if isinstance(message, Chunk):
            state.taken += 1
        elif isinstance(message, Skipped):
            state.unheard += 1
        elif isinstance(message, Lost):
            state.ended = state.lost = True
        elif message.epoch == self.epoch:
            state.ended = True
        self._inbox.append(message)

    def _came_before(self, chunk: Chunk, state: _State) -> int:
        """How many of its rows an earlier life of its worker has delivered; notes the others."""
        rows = len(chunk.arrays[0])
        if chunk.number < state.done and state.life:
            return rows
        if chunk.number != state.done:
            state.done, state.rows, state.seen = chunk.number, 0, 0
        before = min(rows, max(0, state.rows - state.seen))
        state.seen += rows
        state.rows = max(state.rows, state.seen)
        if chunk.last:
            state.done, state.rows, state.seen = chunk.number + 1, 0, 0
        return before

    def _restarted(self, lost: Lost) -> bool:
        """Whether another one makes what the lost worker has not delivered of this pass."""
        if lost.life >= self.job.restarts or self._stopping:
            return False
        worker, state = lost.worker, self._states[lost.worker]
        new = _State(life=state.life + 1, done=state.done, rows=state.rows)
        begin = state.done if self.factory.can_resume else 0
        try:
            with interrupts.held_back():
                self._start(worker, new.life, begin)
                self._states[worker] = new
        except Exception as error:
            lost.text += f"\nAnother one could not be started in its place: {error}"
            return False
        text = f"{lost.as_error()}\nIt is started again, {new.life} of {self.job.restarts} times."
        warnings.warn(text, RuntimeWarning, stacklevel=1)
        return True

    def _late(self) -> Lost | None:
        now, timeout = time.monotonic(), self.job.timeout
        if now < self._look_again:
            return None
        self._look_again = now + _LOOK
        if timeout is None:
            return None
        for worker, state in enumerate(self._states[: self.active]):
            idle = state.ended or state.lost or state.unheard
            idle = idle or state.taken >= self._room(worker)
            # Between two batches a thread rests once, at most.
            if not idle and now - state.since > timeout + LONGEST * (rest.until > state.since):
                state.ended = state.lost = True
                self.factory.late(worker)
                return Lost(
                    worker,
                    f"has delivered nothing for {timeout:g} s, expected a batch within timeout="
                    f"{timeout:g} s. Find out what it waits for, or raise timeout",
                    f"What it was doing:\n{self._doing(worker)}",
                    life=state.life,
                )
        return None

    # ---------------------------------------------------------------- for a kind of worker

    @abstractmethod
    def _start(self, worker: int, life: int, begin: int) -> None:
        """Starts worker number `worker` on pass `self.epoch`, at its chunk number `begin`. Its
        messages have this `life`; the one before, if there was one, is lost, and is ended."""

    @abstractmethod
    def _receive(self, seconds: float) -> list[Message]:
        """All messages that are there; waits up to `seconds` for the first."""

    @abstractmethod
    def _refill(self, worker: int, slots: tuple[int, ...]) -> None:
        """A chunk's slots may be filled again."""

    @abstractmethod
    def _go_on(self, worker: int) -> None:
        """The worker begins pass `self.epoch`."""

    @abstractmethod
    def _room(self, worker: int) -> int:
        """Chunks that a worker can have under way."""

    @abstractmethod
    def _doing(self, worker: int) -> str:
        """The lines of the user's code that it is in now."""

    @abstractmethod
    def _end(self, seconds: float) -> list[str]:
        """Ends every worker, and gives back all that the pool holds."""


def delivered(pool: Pool, seconds: float, who: str = "labkit") -> Iterator[Chunk | None]:
    """What all workers of a pool deliver, pass after pass, for whoever looks only at how fast.

    Each chunk, which has been given back; and None where none comes within `seconds`. It ends with
    a pass in which nothing came. Raises WorkerError, in the name of `who`, for a lost worker.
    """
    pool.set_active(pool.n_workers)
    ended: set[int] = set()
    nothing = True  # came in this pass
    while True:
        message = pool.get(seconds)
        if isinstance(message, Lost):
            raise message.as_error(who)
        if isinstance(message, Ended):
            ended.add(message.worker)
            if len(ended) == pool.n_workers:
                if nothing:
                    return
                ended.clear()
                nothing = True
                pool.next_epoch(pool.epoch + 1)
        elif isinstance(message, Chunk):
            pool.release(message)
            nothing = False
            yield message
        else:
            yield None
