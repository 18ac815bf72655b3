"""`state_dict` and `load_state_dict`: where a runner is, and how it goes on from there."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

from labkit.checks import differences, expect, is_integer
from labkit.engine.batches import short
from labkit.engine.feeder import Feeder
from labkit.engine.options import Options
from labkit.engine.produce import IteratorFactory
from labkit.engine.record import Mixed
from labkit.engine.turns import Resumed

_FORMAT = 1
_SAME = ("order", "shuffle", "batch_size", "min_after_dequeue")
_told = False


class Place:
    """How far a runner's passes have come.

    Attributes:
        newest: the number of the newest pass; -1 before the first.
        resumed: where a pass goes on, or None.
        whole: that pass has its whole length: what was used comes as copies of its next batch.
        lengths: of the passes whose end was seen, in batches.
        queue: of the newest pass.
    """

    def __init__(self, resumed: Resumed | None = None, whole: bool = False) -> None:
        self.resumed, self.whole = resumed, whole
        self.newest = -1 if resumed is None else resumed.epoch - 1
        self.lengths: dict[int, int] = {}
        self.queue: Any = None
        self._taken = 0

    def begin(self, queue: Any) -> None:
        """Another pass begins, which ends the one before."""
        if self.queue is not None and not self.queue.mixes:
            self.lengths.setdefault(self.newest, self.taken())
        self.newest, self.queue, self._taken = self.newest + 1, queue, 0
        if self.whole:
            queue.again = self._used(self.newest)

    @property
    def goes_on(self) -> bool:
        """Whether the next pass is only the rest of one."""
        return self.before(self.newest + 1) > 0

    def before(self, epoch: int) -> int:
        """Batches of a pass that were used before it went on, and do not come any more."""
        return 0 if self.whole else self._used(epoch)

    def _used(self, epoch: int) -> int:
        resumed = self.resumed
        return resumed.batches if resumed is not None and resumed.epoch == epoch else 0

    def taken(self) -> int:
        """Batches of the newest pass that came out of its queue, now or before."""
        if self.queue is not None:
            self._taken = self.queue.taken()
        return self.before(self.newest) + self._taken

    def end(self) -> None:
        """The end of the newest pass was seen."""
        self.lengths[self.newest] = self.taken()

    def stop(self) -> None:
        """The queue cannot be asked any more."""
        if self.queue is not None and not self.queue.mixes:
            with contextlib.suppress(Exception):  # of a session that is closed already
                self.taken()
        self.queue = None

    def position(self) -> tuple[int, int]:
        """The number of the pass that the next batch is of, and how many of it were taken."""
        before_first = self.resumed is not None and self.newest < self.resumed.epoch
        if self.newest < 0 or before_first or self.newest in self.lengths:
            return self.newest + 1, self._used(self.newest + 1)
        return self.newest, self.taken()

    def after(self, first: int, used: int, length: int | None) -> tuple[int, int]:
        """The same `used` batches after the beginning, here, of the pass `first`; `length`: of all
        passes, if known."""
        epoch, used = first, used + self._used(first)
        while used >= (its := self.lengths.get(epoch, length or used + 1)):
            epoch, used = epoch + 1, used - its
        return epoch, used


class Resumable:
    """What of a `QueueRunner` says where it is, and goes on from there."""

    n_workers: Any
    _made: Callable[..., Options]
    _options: Options
    _feeder: Feeder | None
    _place: Place
    _lock: Any
    stop: Callable[[], None]

    def state_dict(self, used: int | None = None) -> dict[str, Any]:
        """Where this runner is, between two batches: a small dict that JSON can keep.

        Another runner with the same arguments, in another process and with another kind of worker,
        is given it by `load_state_dict`. With order="fixed" it delivers exactly the batches that
        this one would have delivered next, in the same order, to the bit. With order="any" it is
        each sample once: of the pass that was begun, precisely the samples that were not delivered
        yet, in some order. Past the last batch of a pass that is its end, and then the next pass.
        What a factory keeps from one pass to the next is not part of it.

        With order="any", call this or `load_state_dict` once ahead of `dataset` or `get_inputs`:
        samples are then mixed ahead of the queue, where it is known which, and `seed` is 0 if none
        is given. Later, TensorFlow's queue has mixed them already.

        Args:
            used: how many batches of the newest pass were used, where what lies between, as a
                `.prefetch(4)`, has taken more. Default: all that were taken. In a Keras `fit`,
                `labkit.keras.Resume` counts them.

        Raises:
            ValueError: order is "any", and TensorFlow's queue mixes, see above; or `used` is no
                number of batches that were taken.
            RuntimeError: `used` is thousands of batches behind.
        """
        with self._lock:
            self._know_samples("QueueRunner.state_dict")
            if used is None:
                return self._state_at(*self._place.position())
            newest, taken = self._place.newest, self._place.taken()
            what = f"QueueRunner.state_dict: used must be from 0 to {taken}, the batches taken"
            expect(is_integer(used, 0, taken), what, used)
            return self._state_at(max(0, newest), int(used))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next pass goes on where `state`, of a runner with the same arguments, was taken.

        Before `get_inputs` or `dataset`; or between two passes, if order is "fixed" or the state
        was asked for before. Workers that run are stopped. A factory that has a parameter `start`
        makes only those chunks again of which samples lay in the reservoir or the queue; it is
        called once for each stretch of them. `start` is how many of the pass's first chunks to
        leave out: of all workers together if the factory takes `n_workers`, as in
        `range(start + worker, size, n_workers)`; or else of this worker. Its random numbers must
        follow from the seed, the epoch and the number of the chunk. Any other factory makes all
        chunks of the pass again, which are dropped.

        Raises:
            ValueError: it is no such state, or of a runner with other arguments; it says which.
        """
        self._load(state)

    def _load(self, state: dict[str, Any], whole: bool = False) -> None:
        self._know_samples("QueueRunner.load_state_dict")
        resumed = _read(state, self._options, self.n_workers)
        self.stop()
        with self._lock:
            self._feeder, self._place = None, Place(resumed, whole)

    def _know_samples(self, who: str) -> None:
        """From now on it is known which samples were delivered, whatever their order."""
        if self._options.shard and self._options.uneven == "pad":
            raise ValueError(f"{who}: expected uneven='drop' or 'endless', got 'pad'.")
        if self._options.mixes:
            return
        if self._options.settled:
            raise ValueError(
                f"{who}: nobody knows which samples lie in TensorFlow's queue, which mixes them "
                "already. With order='any', call state_dict() once ahead of dataset() or "
                "get_inputs(), so that they are mixed where it is known; or give order='fixed'."
            )
        if self._options.seed is None:  # a source draws its order from it
            self._options = self._made(seed=0, n_workers=self.n_workers)
        object.__setattr__(self._options, "mixes", True)

    def _state_at(self, epoch: int, batches: int) -> dict[str, Any]:
        options, place = self._options, self._place
        records = () if self._feeder is None else self._feeder.heard.records
        record = next((record for record in records if record.epoch == epoch), None)
        resumed = place.resumed
        if record is None and resumed and (resumed.epoch, resumed.batches) == (epoch, batches):
            return dict(resumed.state)
        samples, mixed = 0, Mixed.none(0 if self.n_workers == "auto" else self.n_workers)
        if record is not None and batches:
            samples = min(batches * options.batch_size, record.samples)
            batches = -(-samples // options.batch_size)
            mixed = record.up_to(samples)
        return {
            "format": _FORMAT,
            **_sameness(options, self.n_workers),
            "pass": epoch,
            "batches": batches,
            "samples": samples,
            "mixed": mixed.as_list(),
        }


def _sameness(options: Options, n_workers: Any) -> dict[str, Any]:
    """What the order of a runner's batches follows from."""
    found = {name: getattr(options, name) for name in _SAME}
    if options.shard is not None:
        found["shard"] = list(options.shard)
    users = IteratorFactory(options.iterator, 1).users
    users = getattr(users, "func", users)
    named = users if hasattr(users, "__qualname__") else type(users)
    name = f"{named.__module__}.{named.__qualname__}"
    return {"factory": name, **found, "seed": options.seed or 0, "n_workers": n_workers}


def _read(state: Any, options: Options, n_workers: Any) -> Resumed:
    who = "QueueRunner.load_state_dict"
    form = state.get("format") if isinstance(state, dict) else None
    if form is None:
        raise ValueError(f"{who}: expected what state_dict() returned, got {short(state)}.")
    if form != _FORMAT:
        raise ValueError(
            f"{who}: the state has format {form!r}, expected {_FORMAT}: it is of another version "
            "of labkit. Go on with that one."
        )
    wrong = differences(state, _sameness(options, n_workers))
    if wrong:
        raise ValueError(
            f"{who}: the state is of a runner with other arguments, so its batches are others: "
            f"{'; '.join(wrong)}."
        )
    try:
        mixed = Mixed.of_list(state["mixed"])
        resumed = Resumed(state["pass"], state["batches"], state["samples"], mixed, state)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{who}: the state is damaged: {error!r}.") from None
    _tell(IteratorFactory(options.iterator, 1), sum(mixed.begins))
    return resumed


def _tell(factory: IteratorFactory, chunks: int) -> None:
    """Once, what going on costs a factory that cannot begin later."""
    global _told
    if factory.can_resume or not chunks or _told:
        return
    _told = True
    why = "draws from a running rng" if "rng" in factory.names else "takes no start"
    warnings.warn(
        f"QueueRunner: {chunks} chunks are made again and dropped, all of this pass so far, since "
        f"the factory {why}. To avoid that, give it a parameter start, the number of the chunk to "
        "begin with (of all workers, if it takes n_workers), and let the random numbers of a chunk "
        "follow from seed, epoch and its number.",
        RuntimeWarning,
        stacklevel=4,
    )
