"""Putting samples into a queue of samples, or of whole batches, until it is closed."""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from labkit.engine.order import Cutter


class Shape(Protocol):
    """What is to be known of a queue's."""

    @property
    def batch_size(self) -> int: ...

    @property
    def mixes(self) -> bool: ...


class FilledQueue:
    """A queue, as the feeder sees it: `_put`, `_count`, `_close_it` and `_drain_some` are its own.

    `_closed` are the errors of one that was closed meanwhile.

    Attributes:
        again: how often the first batch comes once more, in place of batches that were used before
            the pass went on.
    """

    again = 0

    _cancelled = False
    _cutter: Cutter | None = None
    _closed: tuple[type[BaseException], ...] = ()
    _shape: Shape

    @property
    def mixes(self) -> bool:
        return self._shape.mixes

    def enqueue(self, arrays: list[Any]) -> bool:
        """Puts samples in, waiting for room. False if it was cancelled meanwhile."""
        if not self._shape.mixes:
            self._cutter = self._cutter or Cutter(self._shape.batch_size)
            return all(self._enqueue_as_is(batch) for batch in self._cutter.cut(arrays))
        return self._enqueue_as_is(arrays)

    def _enqueue_as_is(self, arrays: list[Any]) -> bool:
        again, self.again = self.again, 0
        try:
            for _ in range(1 + again):
                self._put(arrays)
        except self._closed:
            if not self._cancelled:
                raise
        return not self._cancelled

    def size(self) -> int:
        """Samples in it now; 0 once it cannot be asked any more."""
        with contextlib.suppress(*self._closed):
            return self._count() * (1 if self._shape.mixes else self._shape.batch_size)
        return 0

    def close(self, cancel: bool) -> None:
        """No more samples come; `cancel`: those that are in it are dropped, too."""
        self._cancelled |= cancel
        left = None if cancel or self._cutter is None else self._cutter.rest()
        if left is not None:
            self._enqueue_as_is(left)
        with contextlib.suppress(*self._closed):
            self._close_it(cancel)
            while cancel and self._count():
                self._drain_some()

    _put: Callable[[list[Any]], None]
    _count: Callable[[], int]
    _close_it: Callable[[bool], None]
    _drain_some: Callable[[], None]
