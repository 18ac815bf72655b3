"""Whole batches from the feeder to a loop in Python, past TensorFlow's queue.

    feeder ── put ──► ready ── take ──► loop         while a loop in Python is all that takes
       └────────────► TensorFlow's queue ──► ...     before that, after it, and at the end

An op that puts a batch in and one that takes it out cost a step more processor time than all else
that is done with a small batch, and each gives Python's lock away, for which it then queues.
"""

import collections
import queue
import threading
from collections.abc import Callable
from typing import Any


class Handover:
    """Holds, together with TensorFlow's queue, at most `room` batches, and keeps their order.

    What was queued before comes out first. `end` puts what is here into the queue, from which all
    that follows comes. Nobody waits but at a bell, where no interrupt leaves anything half changed.
    """

    def __init__(self, room: int) -> None:
        # Whoever waits for room waits for a quarter of all: to wake up costs as much as to put.
        self._room, self._low = room, room - max(1, room // 4)
        self._lock = threading.RLock()  # a signal's handler may stop the run in the midst of `take`
        self._ready: collections.deque[Any] = collections.deque()
        self._queued = 0  # batches in TensorFlow's queue, and on the way into it
        self._leaving = 0  # others that lie there, of takers who may not have come to them yet
        self._on = self._over = False
        self._room_for_more, self._more = _Bell(), _Bell()

    def __len__(self) -> int:
        return len(self._ready)

    def put(self, make: Callable[[], Any]) -> bool:
        """Hands over what `make` makes, waiting for room. False: the batch is to be queued."""
        batch = make() if self._on else None  # None: it is queued, though a loop may begin just now
        while True:
            with self._lock:
                if not self._on or batch is None:
                    self._queued += 1
                    return False
                if self._held() < self._room:
                    self._ready.append(batch)
                    self._more.ring()
                    return True
                self._room_for_more.waiting += 1
                if self._over:  # just now, by this thread's handler: nobody rings any more
                    continue
            self._room_for_more.wait()

    def take(self, taken: Callable[[], int], dequeue: Callable[[], Any]) -> Any:
        """The next batch. `taken` were dequeued elsewhere before the first call of this."""
        if not self._on and not self._over:
            gone = taken()
            with self._lock:
                if not self._on and not self._over:  # nor has another thread begun meanwhile
                    self._on, self._queued = True, self._queued - gone
        while True:
            with self._lock:
                batch = self._ready.popleft() if self._ready and not self._queued else None
                if self._held() <= self._low:
                    self._room_for_more.ring()
                if batch is not None:
                    return batch
                if self._over or self._queued:
                    self._queued -= 1
                    self._leaving += 1
                    break
                self._more.waiting += 1
                if self._over:  # see `put`
                    continue
            self._more.wait()
        try:
            return dequeue()
        except BaseException:
            with self._lock:
                self._queued += 1
            raise
        finally:
            with self._lock:
                self._leaving -= 1

    def _held(self) -> int:
        return self._queued + self._leaving + len(self._ready)

    def end(self, enqueue: Callable[[Any], None]) -> None:
        """From now on all batches are queued; those that are here by `enqueue`, which has room."""
        with self._lock:
            self._on, self._over = False, True
            try:
                while self._ready:
                    self._queued += 1
                    enqueue(self._ready.popleft())
            finally:
                self._more.ring_for_all()
                self._room_for_more.ring_for_all()


class _Bell:
    """Wakes as many as wait: `waiting` is theirs to raise, under the lock, ahead of `wait`."""

    def __init__(self) -> None:
        self.waiting = 0
        self._rung: queue.SimpleQueue[None] = queue.SimpleQueue()

    def wait(self) -> None:
        self._rung.get()

    def ring(self) -> None:
        if self.waiting:
            self.waiting -= 1
            self._rung.put(None)

    def ring_for_all(self) -> None:
        while self.waiting:
            self.ring()
