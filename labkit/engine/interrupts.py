"""Ctrl-C around native code: held back where it would do harm, noticed where Python cannot run.

A signal comes to the process, so there is one ear in it, however many runners listen.
"""

import collections
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Ctrl-C waits until the block is done: a half-started process could not be ended."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda *call: held.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[-1])


class _Ear:
    """Hears each Ctrl-C, also while the main thread sits in native code.

    The interpreter writes signals into a descriptor; it has one for the whole process, which only
    the main thread may set. Where the program has set its own, that one stays and nothing is heard.
    """

    def __init__(self) -> None:
        self._listeners = 0
        self._heard: collections.deque[float] = collections.deque(maxlen=64)
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._lock = threading.RLock()

    def open(self) -> None:
        with self._lock:
            self._listeners += 1
            if self._pair is None and threading.current_thread() is threading.main_thread():
                self._listen()

    def close(self) -> None:
        with self._lock:
            self._listeners -= 1
            self.tidy()

    def tidy(self) -> None:
        """Gives the descriptor back if nobody listens and this thread is the one that may.

        Until then it stays open: signals would go into whatever opens next under its number.
        """
        with self._lock:
            main = threading.current_thread() is threading.main_thread()
            if self._pair is not None and not self._listeners and main:
                signal.set_wakeup_fd(-1)
                self._close_pair()

    def now(self) -> float:
        """The time, as `came_since` takes it: what came before has been heard."""
        self.came_since(0.0)
        return time.monotonic()

    def came_since(self, began: float) -> float | None:
        """Seconds since the first Ctrl-C after `began` (monotonic), or None if there was none.

        One for which the program has a handler of its own does not count.
        """
        with self._lock:
            if self._pair is not None:
                with contextlib.suppress(BlockingIOError):
                    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
                    if signal.SIGINT in self._pair[0].recv(64) and ours:
                        self._heard.append(time.monotonic())
            first = next((at for at in self._heard if at > began), None)
        return None if first is None else time.monotonic() - first

    def _listen(self) -> None:
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._pair = reader, writer
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            self._close_pair()

    def _close_pair(self) -> None:
        for end in self._pair or ():
            end.close()
        self._pair = None


ear = _Ear()
