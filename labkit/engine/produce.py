"""The one loop that walks an iterator, whatever runs it: a thread, a process."""

import contextlib
import functools
import inspect
import itertools
import operator
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from labkit.engine.batches import ALONE, Arrays, BatchError, Spec, short
from labkit.engine.stage import Times, take

_KNOWN = ("worker", "n_workers", "epoch", "start", "seed", "rng")
# These may be a factory's own, so one that has a default is left alone unless it is annotated so.
_DRAWN = {"seed": "SeedSequence", "rng": "Generator"}
_MOST_EMPTY = 10_000  # in a row
_OVER = (
    "The batches after it cannot be had, since a generator that raised is over. To leave out that "
    "one alone, give the factory a parameter start, the number of the batch to begin with, or "
    "return an object whose __next__ can be called again."
)


class _ByIndex:
    def __getitem__(self, index: int) -> Any: ...


# What Python makes of an object that has `__getitem__` but no `__iter__`.
_IteratorByIndex = type(iter(_ByIndex()))


class Stretches(NamedTuple):
    """Of a pass that goes on: the chunks that each worker has to make."""

    epoch: int
    of_worker: list[list[tuple[int, int | None]]]


class IteratorFactory:
    """The user's factory, called with those of `_KNOWN` that it names.

    Args:
        seed: of what each worker draws in each pass; None: drawn now.
        shard: of several trainers with as many workers each, which one this is, and how many there
            are. The factory's workers are numbered through all of them.
    """

    def __init__(
        self,
        factory: Callable[..., Iterable[Any]],
        n_workers: int,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if not callable(factory):
            raise TypeError(
                "labkit: iterator must be a function that returns a new iterator, "
                f"got {short(factory)}. {_instead_of(factory)}"
            )
        # What labkit has made of a data set may hold the state of a run: each run has its own.
        self.factory = getattr(factory, "_labkit_fresh", lambda: factory)()
        self.n_workers, self.shard = n_workers, shard
        self.seed = secrets.randbits(64) if seed is None else seed
        self.resumed: Stretches | None = None
        # What labkit has wrapped itself is not what errors should speak of.
        self.users = getattr(factory, "_labkit_wraps", factory)
        parameters = _parameters(factory)
        # What functools.partial has bound is the user's own choice.
        bound = factory.keywords if isinstance(factory, functools.partial) else ()
        named = set(parameters).intersection(_KNOWN).difference(bound)
        self.names = {name for name in named if _is_labkits(name, parameters[name])}
        unknown = [name for name in parameters if name not in _KNOWN and _needed(parameters[name])]
        if unknown:
            raise TypeError(
                f"labkit: the iterator factory needs {', '.join(unknown)}, expected no "
                f"parameter without a default but {', '.join(_KNOWN)}. Rename it if it is one of "
                f"these, or bind it: functools.partial(factory, {unknown[0]}=...)."
            )

    @property
    def shards(self) -> bool:
        return "n_workers" in self.names

    @property
    def can_start_later(self) -> bool:
        # Some would only read up to there, and meet again what failed.
        return "start" in self.names and not getattr(self.factory, "_labkit_reads_up_to", False)

    @property
    def can_resume(self) -> bool:
        """Whether a chunk can be made again without those before it."""
        return self.can_start_later and "rng" not in self.names

    def stretches(self, worker: int, epoch: int) -> list[tuple[int, int | None]]:
        """Which chunks a worker makes in a pass: from one to ahead of another, or to the end."""
        if self.resumed is None or epoch != self.resumed.epoch or not self.can_resume:
            return [(0, None)]
        return list(self.resumed.of_worker[worker])

    def late(self, worker: int) -> None:
        """It is given up, and may stand in the user's code for ever: nobody is to wait for it."""
        getattr(self.factory, "_labkit_late", lambda _: None)(
            self.shard[0] * self.n_workers + worker
        )

    def start(self, done: int) -> int:
        """What the parameter `start` is after `done` chunks of a worker: whoever shares counts
        those of all workers, as in range(start + worker, size, n_workers)."""
        return done * self.n_workers * self.shard[1] if self.shards else done

    def _filled(self, worker: int, epoch: int, done: int = 0) -> dict[str, Any]:
        rank, world = self.shard
        worker, count = rank * self.n_workers + worker, self.n_workers * world
        known: dict[str, Any] = {"worker": worker, "n_workers": count, "epoch": epoch}
        # Keys of their own, apart from all else that is drawn from the seed.
        known["seed"] = np.random.SeedSequence(self.seed, spawn_key=(0, epoch, worker))
        later = np.random.SeedSequence(self.seed, spawn_key=(1, epoch, worker, done))
        known["rng"] = np.random.default_rng(later)
        # A default may have a meaning of its own, as long as there is nothing to leave out.
        if done or ("start" in self.names and _needed(_parameters(self.factory)["start"])):
            known["start"] = self.start(done)
        return {name: value for name, value in known.items() if name in self.names}

    def told(self, worker: int, epoch: int) -> str:
        """A sentence about the user's parameters that were filled in; "" if there are none."""
        filled = []
        parameters = _parameters(self.users)
        for name, value in self._filled(worker, epoch).items():
            if name in parameters:
                default = parameters[name].default
                instead = "" if default is inspect.Parameter.empty else f" (default {default!r})"
                what = value if isinstance(value, int) else f"a {type(value).__name__}"
                filled.append(f"{name}={what}{instead}")
        if not filled:
            return ""
        return (
            f" labkit called it with {', '.join(filled)}: if a name means something else to you "
            "than the worker's number, their count, the number of the pass or of the first batch, "
            "or random numbers of that worker and pass, rename it."
        )

    def __call__(self, worker: int, epoch: int, done: int = 0) -> Iterator[Any]:
        """The iterator of a worker in a pass, without its first `done` chunks."""
        made: Any = self.factory(**self._filled(worker, epoch, done))
        if getattr(made, "ndim", None) is not None:
            raise TypeError(
                f"the iterator factory returned an array of shape {tuple(made.shape)}, whose rows "
                "would be taken for batches; expected an iterator of batches. Return one, such as "
                "iter(np.array_split(array, number_of_batches))."
            )
        try:
            iterator = iter(made)
        except TypeError:
            raise TypeError(
                f"the iterator factory returned {short(made)}, expected an iterator of batches."
            ) from None
        # It ends only by an IndexError, which an object that slices its arrays never raises.
        length = operator.length_hint(iterator, -1) if type(iterator) is _IteratorByIndex else -1
        return iterator if length < 0 else itertools.islice(iterator, length)

    def where(self) -> str:
        """The line at which the factory is defined, as a traceback shows it; "" if unknown."""
        function = inspect.unwrap(getattr(self.users, "func", self.users))
        code = getattr(function, "__code__", None)
        if code is None:
            return ""
        frame = traceback.FrameSummary(code.co_filename, code.co_firstlineno, code.co_name)
        return "Its factory:\n" + "".join(traceback.format_list([frame]))


def _parameters(factory: Any) -> Mapping[str, inspect.Parameter]:
    with contextlib.suppress(TypeError, ValueError):
        return inspect.signature(factory).parameters
    return {}


def _is_labkits(name: str, parameter: inspect.Parameter) -> bool:
    drawn = _DRAWN.get(name)
    meant = inspect.formatannotation(parameter.annotation)
    return drawn is None or _needed(parameter) or drawn in meant


def _instead_of(thing: Any) -> str:
    """What to pass in place of a thing that is no factory."""
    if not hasattr(thing, "__next__"):
        pass_it, name = "Pass the function itself", "data.train_iterator"
        otherwise = "lambda: iter(your_object)"
    else:
        pass_it, name = "It ends after one pass: pass the function that makes it", "your_function"
        otherwise = "lambda: iter(data), of the data that it goes through"
    if inspect.isgenerator(thing):
        name = thing.gi_code.co_name if thing.gi_code.co_name.isidentifier() else name
        otherwise = f"functools.partial({name}, ...) where it takes arguments"
    return f"{pass_it}, without calling it: {name}, or {otherwise}."


def _needed(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variable


class Made(NamedTuple):
    """A batch's arrays, the spec that they fit, the seconds that the iterator and, if anybody
    listens, its stages took, and which one it is of this worker and pass."""

    spec: Spec
    arrays: Arrays
    seconds: float
    stages: Times | None = None
    number: int = 0


class LeftOut(NamedTuple):
    """What went wrong, in place of the batch of this number."""

    error: Exception
    number: int = 0


class _Walk(Iterator[Any]):
    """A worker's iterator in one pass, which can go on after an exception.

    `done` counts its chunks, those left out included.

    Gives a `LeftOut` in place of an exception if it is to `skip` those, except where there is
    nothing left to go on with.
    """

    iterator: Iterator[Any]

    def __init__(
        self, factory: IteratorFactory, worker: int, epoch: int, skip: bool, begin: int
    ) -> None:
        self._factory, self._at, self._skip = factory, (worker, epoch), skip
        self._stretches = [
            (max(first, begin), until)
            for first, until in factory.stretches(worker, epoch)
            if until is None or until > begin
        ]
        self._begin_stretch()
        self._broken: Exception | None = None

    def __next__(self) -> Any:
        if self.done == self._until:
            self._begin_stretch()
        self.done += 1
        broken, self._broken = self._broken, None
        try:
            return next(self.iterator)
        except StopIteration:
            if broken is None:
                raise
        except MemoryError:
            raise
        except Exception as error:
            if not self._skip:
                raise
            if _passed_a_generator(error):
                if self._factory.can_start_later:
                    self.iterator = self._factory(*self._at, self.done)
                elif inspect.isgenerator(self.iterator):
                    error.add_note(_OVER)
                    raise
                else:
                    self._broken = error  # if it ends now, it ended by that
            return LeftOut(error)
        broken.add_note(_OVER)
        raise broken

    def _begin_stretch(self) -> None:
        self.done, self._until = self._stretches.pop(0)
        self.iterator = self._factory(*self._at, self.done)


def _passed_a_generator(error: Exception) -> bool:
    """Whether a generator raised it, or let it through, which is over then."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code.co_flags & inspect.CO_GENERATOR for frame in frames)


def produce(
    factory: IteratorFactory,
    worker: int,
    epoch: int,
    spec: Spec | None,
    copies: bool,
    skip: bool = False,
    begin: int = 0,
    aligned: int = 0,
) -> Iterator[Made | LeftOut]:
    """The batches of one pass, each as it was when it was yielded.

    Args:
        copies: whoever takes the arrays keeps them beyond the next batch, so what the iterator
            could write into again is copied.
        skip: a `LeftOut` comes in place of a batch that fails, if others can come after it.
        begin: the number of the first batch that is wanted.
        aligned: see `Spec.take`.
    """
    walk = _Walk(factory, worker, epoch, skip, begin)
    empty = 0
    take()  # what came after the last batch of another pass
    began = time.perf_counter()
    for batch in walk:
        alone = sys.getrefcount(batch) <= ALONE
        left_out = batch if isinstance(batch, LeftOut) else None
        try:
            if left_out is None:
                spec = spec or Spec.of(batch)
                arrays = spec.take(batch, alone, aligned) if copies else spec.flatten(batch)
                empty = 0 if len(arrays[0]) else empty + 1
                batch = None  # whose memory is warm for the next one, if `arrays` are copies
        except BatchError as error:
            error.add_note(_yielded_at(walk.iterator) or factory.where())
            if not skip:
                raise
            left_out = LeftOut(error)
        if empty == _MOST_EMPTY:
            raise _none_but_empty(walk.iterator, factory)
        seconds, times = time.perf_counter() - began, take()
        if left_out is None:
            assert spec is not None
            yield Made(spec, arrays, seconds, times, walk.done - 1)
            del arrays
        else:
            yield left_out._replace(number=walk.done - 1)
        began = time.perf_counter()


def _yielded_at(iterator: Iterator[Any]) -> str:
    """The line of the user's generator that yielded the last batch."""
    frame = getattr(iterator, "gi_frame", None)
    if frame is None:
        return ""
    where = traceback.format_list(traceback.extract_stack(frame, limit=1))
    return "It was yielded here:\n" + "".join(where)


def _none_but_empty(iterator: Iterator[Any], factory: IteratorFactory) -> BatchError:
    error = BatchError(
        f"delivered {_MOST_EMPTY:,} empty batches in a row, expected samples, or the end. "
        "Let the iterator end where its data do: of an object with an index, return "
        "(data[i] for i in range(number_of_batches)). If it leaves samples out, let "
        "it yield no batch in which none is left."
    )
    error.add_note(_yielded_at(iterator) or factory.where())
    return error
