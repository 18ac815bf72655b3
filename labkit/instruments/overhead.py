"""What it costs this process to be handed a batch, whatever it took to make it."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil

from labkit.queue_runner import QueueRunner

_SETTLE = 3  # times what lay ready, so that it is used up


class Overhead(NamedTuple):
    """Seconds per batch: on the clock; of a core, by the feeder, which is one thread; and by all
    threads of this process, the consumer's included."""

    wall: float
    feeder: float
    process: float


def overhead(runner: QueueRunner, batches: int) -> Overhead:
    """Takes `batches` from a runner whose iterator has nothing to do and does not end.

    A rate depends on who else needs the cores; seconds of a thread hardly do. No other runner may
    be running. Not on Windows.

    Raises:
        WorkerError: the iterator failed.
        RuntimeError: it ended before.
    """
    with runner:
        taken = iter(runner.dataset())
        for _ in range(_SETTLE * (1 + runner.capacity // runner.batch_size)):
            next(taken)
        clocks = [time.perf_counter, _clock_of("labkit feeder"), time.process_time]
        began = [clock() for clock in clocks]
        for _ in range(batches):
            next(taken)
        took = [clock() - start for clock, start in zip(clocks, began, strict=True)]
        del taken
    return Overhead(*(seconds / batches for seconds in took))


def _clock_of(name: str) -> Callable[[], float]:
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    clock = time.pthread_getcpuclockid(thread.ident or 0)
    return lambda: time.clock_gettime(clock)


def listening() -> list[tuple[str, str, int]]:
    """Name, address and port of each server that the processes of this one have open."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            lines = process.net_connections("inet")
            name = process.name()
            found += [(name, *line.laddr) for line in lines if line.status == psutil.CONN_LISTEN]
    return sorted(found)
