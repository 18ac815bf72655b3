"""A moment in which no thread makes batches: `watch` holds the steps of it against all others."""

import threading
import time

_LONGEST = 2.0  # seconds, whatever becomes of whoever began it


class Rest:
    """Of all threads of this process: each ends the batch that it is at, and begins no other.

    Attributes:
        until: when it ends, or has ended, as `time.monotonic` counts.
    """

    def __init__(self) -> None:
        self.until = 0.0
        self._over = threading.Event()
        self._over.set()

    def begin(self) -> None:
        self.until = time.monotonic() + _LONGEST
        self._over.clear()

    def end(self) -> None:
        self.until = min(self.until, time.monotonic())
        self._over.set()

    def wait(self) -> None:
        if not self._over.is_set():
            self._over.wait(max(0.0, self.until - time.monotonic()))


rest = Rest()
