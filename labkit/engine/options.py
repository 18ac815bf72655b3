"""A QueueRunner's arguments: checked, and made into a run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil

from labkit.engine import KINDS
from labkit.engine.auto import Scaler
from labkit.engine.batches import Spec
from labkit.engine.feeder import Feeder, Terms
from labkit.engine.pool import Job
from labkit.engine.produce import IteratorFactory


def queue_sizes(batch_size: int, capacity: Any, min_after_dequeue: Any) -> tuple[Any, Any]:
    """Capacity and min_after_dequeue: as given, or else to fit the batch size."""
    mixing = max(1000, 4 * batch_size)
    least = mixing if min_after_dequeue is None else min_after_dequeue
    if capacity is None:
        # What is no number is refused by name later.
        capacity = mixing + (least if isinstance(least, (int, np.integer)) else 0)
    return capacity, least


@dataclass(frozen=True)
class Options:
    """The constructor's arguments, checked."""

    iterator: Callable[..., Iterable[Any]]
    batch_size: int
    n_workers: int | Literal["auto"]
    workers: str
    capacity: int
    min_after_dequeue: int
    spec: Any
    on_error: str
    timeout: float | None
    max_workers: int | None
    seed: int | None
    samples: int | None
    reuses_buffers: bool

    def __post_init__(self) -> None:
        kinds = " or ".join(repr(kind) for kind in KINDS)
        expect(self.workers in KINDS, f"workers must be {kinds}", self.workers)
        expect(
            self.on_error in ("raise", "continue"),
            "on_error must be 'raise' or 'continue'",
            self.on_error,
        )
        expect(
            self.n_workers == "auto" or is_count(self.n_workers),
            "n_workers must be 'auto' or >= 1",
            self.n_workers,
        )
        expect(is_count(self.batch_size), "batch_size must be an integer >= 1", self.batch_size)
        sizes = queue_sizes(self.batch_size, self.capacity, self.min_after_dequeue)
        for name, size in zip(("capacity", "min_after_dequeue"), sizes, strict=True):
            object.__setattr__(self, name, size)
        for name in ("max_workers", "samples"):
            value = getattr(self, name)
            expect(value is None or is_count(value), f"{name} must be None or >= 1", value)
        expect(
            is_count(self.capacity)
            and isinstance(self.min_after_dequeue, (int, np.integer))
            and self.min_after_dequeue >= 0
            and self.capacity >= self.min_after_dequeue + self.batch_size,
            f"capacity must be at least min_after_dequeue + batch_size "
            f"({self.min_after_dequeue} + {self.batch_size})",
            self.capacity,
        )
        expect(
            self.timeout is None or (isinstance(self.timeout, (int, float)) and self.timeout > 0),
            "timeout must be None or seconds > 0",
            self.timeout,
        )
        IteratorFactory(self.iterator, 1)
        if self.spec is not None:
            object.__setattr__(self, "spec", Spec.given(self.spec))

    def feeder(self, n_workers: int | str, spec: Spec | None, epoch: int) -> Feeder:
        """A new run, whose first pass has the number `epoch`."""
        kind = KINDS[self.workers]
        limit = self.max_workers or kind.limit()
        auto = n_workers == "auto"
        job = Job(
            IteratorFactory(self.iterator, limit if auto else int(n_workers)),
            spec or self.spec,
            self.timeout,
            self.capacity + 2 * self.batch_size,
            self.reuses_buffers,
            epoch,
        )
        terms = Terms(
            self.on_error,
            self.batch_size,
            self.min_after_dequeue + self.batch_size,
            self.capacity,
            self.samples,
            Scaler(limit) if auto else None,
        )
        return Feeder(kind.pool(job), terms)

    def check_memory(self, spec: Spec) -> None:
        need, free = self.capacity * spec.bytes_per_sample, psutil.virtual_memory().available
        if need > free / 2:
            fits = int(free / 2 / max(spec.bytes_per_sample, 1))
            raise MemoryError(
                f"QueueRunner: capacity={self.capacity} samples of {spec.bytes_per_sample:,} bytes "
                f"need {need / 1e9:.2f} GB, expected at most half of the free memory, "
                f"{free / 2e9:.2f} GB. Set capacity to {fits} or less, and min_after_dequeue below "
                "it."
            )


def is_count(value: Any) -> bool:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and int(value) >= 1


def expect(condition: bool, what: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"QueueRunner: {what}, got {got!r}.")
