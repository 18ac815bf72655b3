"""Which kind of worker: the trial behind workers="auto"."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from labkit.engine import KINDS, TRIED
from labkit.engine.messages import WorkerError
from labkit.engine.pool import Job, delivered
from labkit.engine.produce import IteratorFactory

_SECONDS, _PATIENCE = 0.5, 3.0  # counted; to wait until all deliver
_LEAST = 4  # batches, of all workers together
_HELPS, _BETTER = 1.5, 1.15


class Choice(NamedTuple):
    """A kind of worker, and why."""

    kind: str
    why: str


def chosen_kind(iterator: Callable[..., Any], copies: bool = True) -> Choice:
    """Runs one and two workers of the cheapest kind, threads, for half a second each and, if the
    second one does not help, two of each kind that does not share Python's lock. Their batches are
    thrown away; the run that follows calls the factory anew.

    The cheapest kind it is where no other can be had, or nothing comes in time.
    """
    cheapest = next(iter(KINDS))
    told = (getattr(iterator, name, "") for name in ("_labkit_stays", "_labkit_whole"))
    stays = next(filter(None, told), "")
    if stays:
        return Choice(cheapest, stays.split(". ")[0].rstrip("."))
    one = _rate(iterator, cheapest, 1, copies)
    two = _rate(iterator, cheapest, 2, copies) if one else 0.0
    if not two:
        return Choice(cheapest, f"no {_LEAST} batches came within {_PATIENCE:g} s to tell by")
    if two >= _HELPS * one:
        return Choice(cheapest, f"two make {two / one:.1f} times the batches of one")
    rates, why = {cheapest: _BETTER * two}, []
    for name in (name for name in TRIED if not KINDS[name].shares_lock):
        plural = KINDS[name].plural
        try:
            rates[name] = _rate(iterator, name, 2, copies)
            why.append(f"two {plural} make {rates[name]:.4g} batches/s")
        except (TypeError, OSError, MemoryError) as error:
            why.append(f"{plural} cannot be had: {error}")
    why.append(f"two {KINDS[cheapest].plural} {two:.4g}")
    return Choice(max(rates, key=rates.__getitem__), ", ".join(why))


def _rate(iterator: Callable[..., Any], kind: str, n: int, copies: bool) -> float:
    """Batches/s of n workers, once all of them deliver; 0 where they do not in time."""
    pool = KINDS[kind].pool(Job(IteratorFactory(iterator, n), copies=copies))
    heard: set[int] = set()
    began = now = time.monotonic()
    first, chunks = 0.0, 0
    try:
        for chunk in delivered(pool, 0.1):
            now = time.monotonic()
            if chunk is not None:
                chunks += bool(first) and chunk.last
                heard.add(chunk.worker)
                if not first and len(heard) == n:
                    first = now
            if first and now - first >= _SECONDS and chunks >= _LEAST:
                break
            if now - (first or began) > _PATIENCE:
                return 0.0
    except WorkerError:
        return 0.0  # the run will meet it, too, and tell
    finally:
        pool.stop()
    return chunks / (now - first) if chunks >= _LEAST else 0.0
