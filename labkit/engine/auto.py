"""How many workers: the search behind n_workers="auto"."""

import math
import time

from labkit.engine.rest import rest
from labkit.machine import usable_cores as usable_cores

_WINDOW, _PATIENCE = 0.7, 3.0  # seconds
_SPARE, _HELPS = 1.15, 1.08


class Scaler:
    """Finds the number of workers that should be producing, `count`, from what the feeder sees.

    The number doubles as long as the rate grows with it. Where it does not, the number goes back,
    and is tried once more if it was the faster one after all: what came before it may have been
    measured while the queue was filling, without the model. Once the queue stays full the model is
    the slower, and Little's law (J. D. C. Little, "A proof for the queuing formula L = λW", 1961)
    says how many workers its rate keeps busy: samples/s times worker seconds per sample. Each
    decision is printed once.
    """

    def __init__(self, limit: int, count: int = 1) -> None:
        self.limit, self.count = limit, count
        self.before = (0.0, 0)  # rate and count before the last growth
        self.enough_seen = self.plateau = False
        self.refused: dict[int, float] = {}  # by count: the rate, 0.0 where tried twice
        self.full_windows = 0
        self._wait_for_newest()

    def _wait_for_newest(self) -> None:
        self.since, self.began = time.monotonic(), 0.0

    def note(self, worker: int, newest: int, samples: int, seconds: float) -> bool:
        """Counts a chunk of `samples` that took its worker `seconds`; True when it is time to
        `decide`. `newest` is the last of the workers that are to produce."""
        now = time.monotonic()
        if self.began and self.began < rest.until:  # in which threads make no batch
            self._wait_for_newest()
        if not self.began:
            # Before the newest worker delivers, the rate is not that of `count` workers.
            if worker >= newest or now - self.since > _PATIENCE:
                self.began, self.chunks, self.samples, self.seconds = now, 0, 0, 0.0
            return False
        self.chunks += 1
        self.samples += samples
        self.seconds += seconds
        return now - self.began > _WINDOW and self.chunks >= 3 * self.count

    def decide(self, full: bool) -> None:
        """Sets `count` anew. `full`: the queue is, so the model is the slower."""
        elapsed = time.monotonic() - self.began
        self._decide(full, self.samples / elapsed, self.seconds / elapsed)
        self._wait_for_newest()

    def _decide(self, full: bool, rate: float, busy: float) -> None:
        self.full_windows = self.full_windows + 1 if full else 0
        if full:
            # One full window may be a pause of the model: compiling, validating.
            if self.full_windows < 2:
                return
            needed = max(1, math.ceil(_SPARE * busy))
            if needed < self.count * (0.7 if self.enough_seen else 1.0):
                self._set(
                    needed,
                    f"the queue is full, and the model's {rate:.0f} samples/s keep "
                    f"{busy:.1f} of them busy",
                )
            self.enough_seen, self.plateau, self.before = True, False, (0.0, 0)
            return
        best_rate, best_count = self.before
        if self.plateau:
            more = max(self.refused, key=self.refused.__getitem__, default=0)
            if more > self.count and self.refused[more] > rate:
                self.refused[more] = 0.0
                self.before, self.plateau = (rate, self.count), False
                self._set(more, f"{rate:.0f} samples/s, less than with {more}")
                return
            if abs(rate / best_rate - 1) < 0.25:
                return
        if self.count > best_count > 0 and rate < _HELPS * best_rate:
            self.refused.setdefault(self.count, rate)
            self._set(best_count, f"{rate:.0f} samples/s, no more than with {best_count}")
            self.plateau = True
        elif self.count < self.limit:
            self.before, self.plateau = (rate, self.count), False
            step = max(1, self.count // 4) if self.enough_seen else self.count
            grown = min(self.count + step, self.limit)
            self._set(grown, f"at {rate:.0f} samples/s the queue is not full")
        else:
            self.before, self.plateau = (rate, self.count), True

    def _set(self, count: int, why: str) -> None:
        print(f"QueueRunner: {self.count} -> {count} workers: {why}", flush=True)
        self.count = count
