"""Which kind of worker: the trial behind workers="auto"."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from labkit.engine import KINDS
from labkit.engine.messages import Chunk, Lost
from labkit.engine.pool import Job
from labkit.engine.produce import IteratorFactory

_SECONDS, _PATIENCE = 0.5, 3.0  # counted; to wait until all deliver
_LEAST = 4  # batches, of all workers together
_HELPS, _BETTER = 1.5, 1.15


class Choice(NamedTuple):
    """A kind of worker, and why."""

    kind: str
    why: str


def chosen_kind(iterator: Callable[..., Any], copies: bool = True) -> Choice:
    """Runs one and two threads for half a second each and, if the second one does not help, two
    processes. Their batches are thrown away; the run that follows calls the factory anew.

    Threads it is where processes cannot be had, or nothing comes in time.
    """
    stays = getattr(iterator, "stays", "") or getattr(iterator, "whole", "")
    if stays:
        return Choice("thread", stays.split(". ")[0].rstrip("."))
    one = _rate(iterator, "thread", 1, copies)
    threads = _rate(iterator, "thread", 2, copies) if one else 0.0
    if not threads:
        return Choice("thread", f"no {_LEAST} batches came within {_PATIENCE:g} s to tell by")
    if threads >= _HELPS * one:
        return Choice("thread", f"two make {threads / one:.1f} times the batches of one")
    try:
        processes = _rate(iterator, "process", 2, copies)
    except (TypeError, OSError, MemoryError) as error:
        return Choice("thread", f"processes cannot be had: {error}")
    than = f"two processes make {processes:.4g} batches/s, two threads {threads:.4g}"
    return Choice("process" if processes > _BETTER * threads else "thread", than)


def _rate(iterator: Callable[..., Any], kind: str, n: int, copies: bool) -> float:
    """Batches/s of n workers, once all of them deliver; 0 where they do not in time."""
    pool = KINDS[kind].pool(Job(IteratorFactory(iterator, n), copies=copies))
    heard: set[int] = set()
    ended: set[int] = set()
    began, first, chunks = time.monotonic(), 0.0, 0
    try:
        pool.set_active(n)
        while True:
            message, now = pool.get(0.1), time.monotonic()
            if isinstance(message, Chunk):
                pool.release(message)
                chunks += bool(first) and message.last
                heard.add(message.worker)
                if not first and len(heard) == n:
                    first = now
            elif isinstance(message, Lost):
                return 0.0  # the run will meet it, too, and tell
            elif message is not None:
                ended.add(message.worker)
                if len(ended) == n:
                    if not heard:
                        return 0.0
                    ended.clear()
                    pool.next_epoch(pool.epoch + 1)
            if first and now - first >= _SECONDS and chunks >= _LEAST:
                return chunks / (now - first)
            if now - (first or began) > _PATIENCE:
                return 0.0
    finally:
        pool.stop()
