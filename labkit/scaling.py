"""How many workers: the cores that this process may use, and the search behind n_workers="auto"."""

import math
import os
import time
from pathlib import Path

_WINDOW = 0.8


def usable_cores() -> int:
    """Processor cores this process may use: the affinity mask and the container's quota, not the
    number installed. At least 1.

    Sources: sched_getaffinity(2); cgroup v2 `cpu.max`, cgroup v1 `cpu.cfs_quota_us`.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = _cgroup_cores()
    return max(1, min(cores, math.floor(quota)) if quota else cores)


def _cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    try:
        quota, period = (root / "cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return float(quota) / float(period)


class Scaler:
    """Finds the number of workers that should be producing, `count`, from what the feeder sees.

    A feeder that is held up by a full queue means that the model is the slower: enough. Otherwise
    the number doubles, as long as the rate grows with it. Each decision is printed once.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 1
        self.best = (0.0, 0)
        self.settled = False
        self._begin()

    def _begin(self) -> None:
        self.began, self.blocked, self.samples = time.monotonic(), 0.0, 0

    def note(self, seconds: float, samples: int) -> None:
        """Called for each enqueue: how long it took, how many samples it carried."""
        self.blocked += seconds
        self.samples += samples
        elapsed = time.monotonic() - self.began
        if elapsed > _WINDOW:
            self._decide(self.blocked / elapsed, self.samples / elapsed)
            self._begin()

    def _decide(self, blocked: float, rate: float) -> None:
        count, (best_rate, best_count) = self.count, self.best
        if blocked > 0.5:
            needed = max(1, math.ceil(count * (1 - blocked) * 1.25))
            if needed < count:
                self._set(needed, f"the queue was full {blocked:.0%} of the time")
                self.settled = True
                self.best = (rate, needed)
            return
        if self.settled and rate > 0.8 * best_rate:
            return
        if rate < 1.08 * best_rate and count > best_count > 0:
            self._set(best_count, f"{count} gave {rate:.0f} samples/s, no more than {best_count}")
            self.settled = True
        elif count < self.limit:
            self.best = (rate, count)
            self._set(
                min(2 * count, self.limit),
                f"at {rate:.0f} samples/s the queue is not full",
            )
            self.settled = False
        else:
            self.best, self.settled = (rate, count), True

    def _set(self, count: int, why: str) -> None:
        print(f"QueueRunner: {self.count} -> {count} workers: {why}", flush=True)
        self.count = count
