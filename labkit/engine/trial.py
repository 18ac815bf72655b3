"""Which kind of worker: the trial behind workers="auto"."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from labkit.engine import KINDS, TRIED
from labkit.engine.messages import WorkerError
from labkit.engine.pool import Job, delivered
from labkit.engine.produce import IteratorFactory
from labkit.machine import usable_cores

_SECONDS, _PATIENCE = 0.5, 3.0  # counted; to wait until all deliver
_LEAST = 4  # batches, of all workers together
_MOST = 8  # workers: each process takes memory, and a second to start
_HELPS, _BETTER = 0.75, 1.15


class Choice(NamedTuple):
    """A kind of worker, and why."""

    kind: str
    why: str


def chosen_kind(
    iterator: Callable[..., Any], copies: bool = True, most: int | None = None
) -> Choice:
    """Runs one and two workers of the cheapest kind, threads, for half a second each, and as many
    as there are cores, 8 or `most` at most. Where these bring less than three quarters of their
    number, as many of each kind with a lock of its own are run, too: two threads can help each
    other where eight wait for Python's. The run that follows calls the factory anew.

    The cheapest kind it is where no other can be had, or nothing comes in time.
    """
    cheapest = next(iter(KINDS))
    told = (getattr(iterator, name, "") for name in ("_labkit_stays", "_labkit_whole"))
    stays = next(filter(None, told), "")
    if stays:
        return Choice(cheapest, stays.split(". ")[0].rstrip("."))
    one = best = _rate(iterator, cheapest, 1, copies)
    why = f"no {_LEAST} batches came within {_PATIENCE:g} s to tell by"
    for n in sorted({2, max(2, min(usable_cores(), _MOST, most or _MOST))}):
        rate, several = _rate(iterator, cheapest, n, copies) if one else 0.0, {2: "two"}.get(n, n)
        if not rate:
            return Choice(cheapest, why)
        best, why = max(best, rate), f"{several} make {rate / one:.1f} times the batches of one"
        if rate < _HELPS * n * one:
            break
    else:
        return Choice(cheapest, why)
    rates, reasons = {cheapest: _BETTER * best}, []
    for name in (name for name in TRIED if not KINDS[name].shares_lock):
        plural = KINDS[name].plural
        try:
            rates[name] = _rate(iterator, name, n, copies)
            reasons.append(f"{several} {plural} make {rates[name]:.4g} batches/s")
        except (TypeError, OSError, MemoryError) as error:
            reasons.append(f"{plural} cannot be had: {error}")
    reasons.append(f"{several} {KINDS[cheapest].plural} {rate:.4g}")
    return Choice(max(rates, key=rates.__getitem__), ", ".join(reasons))


def _rate(iterator: Callable[..., Any], kind: str, n: int, copies: bool) -> float:
    """Batches/s of n workers, once all of them deliver; 0 where they do not in time."""
    pool = KINDS[kind].pool(Job(IteratorFactory(iterator, n), copies=copies))
    heard: set[int] = set()
    began = now = time.monotonic()
    first, chunks, least = 0.0, 0, max(_LEAST, n)
    try:
        for chunk in delivered(pool, 0.1):
            now = time.monotonic()
            if chunk is not None:
                chunks += bool(first) and chunk.last
                heard.add(chunk.worker)
                if not first and len(heard) == n:
                    first = now
            if first and now - first >= _SECONDS and chunks >= least:
                break
            if now - (first or began) > _PATIENCE:
                return 0.0
    except WorkerError:
        return 0.0  # the run will meet it, too, and tell
    finally:
        pool.stop()
    return chunks / (now - first) if chunks >= least else 0.0
