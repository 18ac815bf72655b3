"""A moment in which no thread makes batches: `watch` holds the steps of it against all others."""

import threading
import time

LONGEST = 2.0  # seconds, whatever becomes of whoever began it


class Rest:
    """Of all threads of this process: each ends the batch that it is at, and begins no other.

    Attributes:
        until: when it ends, or has ended, as `time.monotonic` counts.
    """

    def __init__(self) -> None:
        self.until, self._over = 0.0, threading.Event()

    def begin(self) -> None:
        self._over.clear()
        self.until = time.monotonic() + LONGEST

    def end(self) -> None:
        self.until = min(self.until, time.monotonic())
        self._over.set()

    def wait(self) -> None:
        left = self.until - time.monotonic()
        if left > 0:
            self._over.wait(left)


rest = Rest()
