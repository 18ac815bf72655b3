"""A QueueRunner's arguments: checked, and made into a run."""

import secrets
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil

from labkit.checks import expect, is_integer
from labkit.engine import KINDS
from labkit.engine.auto import Scaler
from labkit.engine.batches import Spec
from labkit.engine.feeder import Feeder, Terms
from labkit.engine.pool import Job
from labkit.engine.produce import IteratorFactory
from labkit.engine.record import AHEAD
from labkit.engine.shares import Share
from labkit.engine.trial import chosen_kind
from labkit.engine.turns import Order, Resumed


def queue_sizes(
    batch_size: int, capacity: Any, min_after_dequeue: Any, shuffle: bool = True
) -> tuple[Any, Any]:
    """Capacity and min_after_dequeue: as given, or else to fit the batch size."""
    mixing = max(1000, 4 * batch_size)
    least = mixing * shuffle if min_after_dequeue is None else min_after_dequeue
    if capacity is None:
        # What is no number is refused by name later.
        capacity = mixing + (least if is_integer(least) else 0)
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
    order: str
    shuffle: bool
    max_skipped: int | None
    shard: tuple[int, int] | None
    uneven: str
    max_restarts: int
    worker_options: dict[str, Any] | None
    entropy: int = field(init=False)  # of the workers' random numbers
    mixes: bool = field(init=False)  # the feeder itself, so that it is known what was delivered
    settled: bool = field(init=False, default=False)  # a queue was asked for: it stays as it is

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, what: str) -> None:
            expect(fits, f"QueueRunner: {name} must be {what}", getattr(self, name))

        kinds = (*KINDS, "auto")
        check("workers", self.workers in kinds, " or ".join(map(repr, kinds)))
        kind, options = KINDS.get(self.workers), self.worker_options
        takers = " or ".join(repr(name) for name, its in KINDS.items() if its.takes_options)
        fits = options is None or bool(kind and kind.takes_options and isinstance(options, dict))
        check("worker_options", fits, f"None, or a dict and workers={takers}")
        ways = ("raise", "continue", "skip", "restart")
        check("on_error", self.on_error in ways, "'raise', 'continue', 'skip' or 'restart'")
        check("max_restarts", is_integer(self.max_restarts, 0), "an integer >= 0")
        most = self.max_skipped
        fits = most is None or (self.on_error == "skip" and is_integer(most, 0))
        check("max_skipped", fits, "None, or an integer >= 0 and on_error='skip'")
        several = self.n_workers == "auto" or is_integer(self.n_workers, 1)
        check("n_workers", several, "'auto' or >= 1")
        check("batch_size", is_integer(self.batch_size, 1), "an integer >= 1")
        check("shuffle", isinstance(self.shuffle, bool), "True or False")
        sizes = queue_sizes(self.batch_size, self.capacity, self.min_after_dequeue, self.shuffle)
        for name, size in zip(("capacity", "min_after_dequeue"), sizes, strict=True):
            object.__setattr__(self, name, size)
        for name in ("max_workers", "samples"):
            value = getattr(self, name)
            check(name, value is None or is_integer(value, 1), "None or >= 1")
        least, size = self.min_after_dequeue, self.batch_size
        fits = is_integer(least, 0) and is_integer(self.capacity, least + size)
        check("capacity", fits, f"at least min_after_dequeue + batch_size ({least} + {size})")
        check("order", self.order in ("any", "fixed"), "'any' or 'fixed'")
        check("seed", self.seed is None or is_integer(self.seed), "None or an integer")
        in_turn = self.order == "any" or self.n_workers != "auto"
        check("n_workers", in_turn, "a number for order='fixed', since workers take turns")
        without = self.shuffle or not least
        check("min_after_dequeue", without, "0 or left away for shuffle=False")
        timeout = self.timeout
        in_time = timeout is None or (isinstance(timeout, (int, float)) and timeout > 0)
        check("timeout", in_time, "None or seconds > 0")
        factory = IteratorFactory(self.iterator, 1)
        stays = getattr(self.iterator, "_labkit_stays", "")
        if stays and kind and kind.elsewhere:
            raise ValueError(
                f"QueueRunner: workers={self.workers!r} needs a source that can go to another "
                f"process, got {type(factory.users).__name__}: {stays}. Use workers="
                f"{next(iter(KINDS))!r}, or a factory that makes it inside."
            )
        check("uneven", self.shard is not None or self.uneven == "drop", "left away without shard")
        if self.shard is not None:
            self._check_shard(factory)
        drawn = self.seed is None and self.order == "any" and self.shard is None
        entropy = secrets.randbits(64) if drawn else (self.seed or 0) % 2**64
        object.__setattr__(self, "entropy", entropy)
        object.__setattr__(self, "mixes", self.order == "fixed")
        if self.spec is not None:
            object.__setattr__(self, "spec", Spec.given(self.spec))

    def _check_shard(self, factory: IteratorFactory) -> None:
        pair = self.shard if isinstance(self.shard, (tuple, list)) else ()
        fits = len(pair) == 2 and is_integer(pair[1], 1) and is_integer(pair[0], 0, pair[1] - 1)
        what = "QueueRunner: shard must be (rank, world), integers with 0 <= rank < world"
        expect(fits, what, self.shard)
        fits = is_integer(self.n_workers, 1)
        expect(fits, "QueueRunner: n_workers must be a number for shard", self.n_workers)
        whole = getattr(self.iterator, "_labkit_whole", "")
        expect(not whole, "QueueRunner: shard needs a data set that can be split", whole)
        takes = {"worker", "n_workers"} <= factory.names
        what = "QueueRunner: shard needs an iterator with the parameters worker and n_workers"
        expect(takes, what, sorted(factory.names))
        ways = ("drop", "pad", "endless")
        what = f"QueueRunner: uneven must be one of {ways}"
        expect(self.uneven in ways, what, self.uneven)
        known = (self.samples is not None) == (self.uneven != "endless")
        what = (
            "QueueRunner: shard needs samples=, of a pass of all trainers, for they must all take "
            "as many steps; or uneven='endless' and no samples, of an iterator without an end"
        )
        expect(known, what, (self.samples, self.uneven))

    def _share(self, n_workers: Any) -> Share | None:
        if self.shard is None:
            return None
        rows = getattr(self.iterator, "_labkit_rows", 0)
        pads = self.uneven == "pad"
        return Share(*self.shard, n_workers, self.samples, self.batch_size, pads, rows)

    @property
    def _mixed(self) -> int:
        """Samples that the feeder mixes itself: nobody can look into TensorFlow's queue."""
        return self.min_after_dequeue if self.mixes else 0

    @property
    def _queue_mixes(self) -> bool:
        return self.shuffle and not self.mixes

    def _order(self, resumed: Resumed | None) -> Order | None:
        if not self.mixes:
            return None
        ahead = self.capacity + AHEAD * self.batch_size
        seed = (self.seed or 0) % 2**63
        return Order(self._mixed, seed, ahead, resumed, self.order == "fixed")

    def queue(self, spec: Spec) -> tuple[Any, ...]:
        """What its `tf_queue.Shape` is made of. Raises MemoryError where that would not fit."""
        self.check_memory(spec)
        object.__setattr__(self, "settled", True)
        size, least = self.capacity - self._mixed, self.min_after_dequeue - self._mixed
        return spec, self.batch_size, size, least, self.seed, self._queue_mixes

    def choose_kind(self) -> None:
        """Makes workers="auto" the kind that a trial finds, and prints why; once."""
        if self.workers == "auto":
            most = self.max_workers if self.n_workers == "auto" else self.n_workers
            kind, why = chosen_kind(self.iterator, self.reuses_buffers, most)
            print(f"QueueRunner: workers='auto': {KINDS[kind].plural}: {why}", flush=True)
            object.__setattr__(self, "workers", kind)

    def feeder(
        self,
        n_workers: int | str,
        spec: Spec | None,
        epoch: int,
        resumed: Resumed | None = None,
    ) -> Feeder:
        """A new run, whose first pass has the number `epoch`; it goes on if that is `resumed`."""
        kind = KINDS[self.workers]
        auto, shard = n_workers == "auto", self.shard or (0, 1)
        # Of a cluster, which it may have to connect to, and not of this machine.
        limit = self.max_workers or kind.limit(**(self.worker_options or {})) if auto else 1
        # Batches lie in the queue as they are delivered, unless they are mixed on the way.
        keeps = not (self._queue_mixes or self._mixed)
        job = Job(
            IteratorFactory(self.iterator, limit if auto else int(n_workers), self.entropy, shard),
            spec or self.spec,
            self.timeout,
            self.capacity + 2 * self.batch_size,
            self.reuses_buffers,
            keeps,
            epoch,
            skip=self.on_error == "skip",
            restarts=self.max_restarts if self.on_error == "restart" else 0,
            options=self.worker_options,
            aligned=self.batch_size if keeps else 0,
        )
        order = self._order(resumed)
        begun = resumed is not None and resumed.epoch == epoch and resumed.mixed.begins
        if resumed is not None and order is not None and begun:
            was, now = len(resumed.mixed.begins), job.factory.n_workers
            name = "max_workers" if auto else "n_workers"
            what = f"QueueRunner: {name} must be {was}, as when the loaded state was taken"
            expect(now == was, what, now)
            resumed.begin(job.factory, order.mixed, order.seed)
        terms = Terms(
            self.on_error,
            self.batch_size,
            self.min_after_dequeue - self._mixed + self.batch_size,
            self.capacity - self._mixed,
            self.samples if self.shard is None else None,
            Scaler(limit, resumed.n_workers if resumed else 1) if auto else None,
            order,
            self._share(n_workers),
            self.max_skipped,
        )
        pool = kind.pool(job)
        try:
            feeder = Feeder(pool, terms)
        except BaseException:
            pool.stop()  # of those workers that were started
            raise
        if resumed is not None and begun:
            for run in resumed.mixed.runs:
                places = (run.chunk(at, pool.n_workers) for at in range(min(run.chunks, 2)))
                feeder.heard.sizes |= dict.fromkeys(places, run.rows)
        return feeder

    def batches(self, rows: int) -> int | None:
        """How many a pass has, where that is known and nothing may be left out; `rows`: of the
        first chunk, 0 while that is not known."""
        share = self._share(self.n_workers)
        if share is not None:
            return share.steps(share.rows) if share.rows and share.samples else None
        if self.on_error != "raise":
            return None
        if self.samples is not None:
            return -(-self.samples // self.batch_size)
        if isinstance(self.iterator, Sized) and rows and not self.batch_size % rows:
            return -(-len(self.iterator) * rows // self.batch_size)
        return None

    def check_memory(self, spec: Spec) -> None:
        need, free = self.capacity * spec.bytes_per_sample, psutil.virtual_memory().available
        if need > free / 2:
            fits = int(free / 2 / max(spec.bytes_per_sample, 1))
            raise MemoryError(
                f"labkit: capacity={self.capacity} samples of {spec.bytes_per_sample:,} bytes "
                f"need {need / 1e9:.2f} GB, expected at most half of the free memory, "
                f"{free / 2e9:.2f} GB. Set capacity to {fits} or less, and min_after_dequeue below "
                "it."
            )
