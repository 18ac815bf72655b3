"""The one loop that walks an iterator, whatever runs it: a thread, a process."""

import contextlib
import functools
import inspect
import itertools
import operator
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from labkit.engine.batches import ALONE, Arrays, BatchError, Spec, short
from labkit.engine.stage import Times, take

_KNOWN = {"worker", "n_workers", "epoch"}
_MOST_EMPTY = 10_000  # in a row


class _ByIndex:
    def __getitem__(self, index: int) -> Any: ...


# What Python makes of an object that has `__getitem__` but no `__iter__`.
_IteratorByIndex = type(iter(_ByIndex()))


class IteratorFactory:
    """The user's factory, called with those of worker, n_workers and epoch that it names."""

    def __init__(self, factory: Callable[..., Iterable[Any]], n_workers: int) -> None:
        if not callable(factory):
            raise TypeError(
                "labkit: iterator must be a function that returns a new iterator, "
                f"got {short(factory)}. Pass the function itself, without calling it: "
                "data.train_iterator, or lambda: iter(your_object)."
            )
        # What labkit has made of a data set may hold the state of a run: each run has its own.
        self.factory = getattr(factory, "_labkit_fresh", lambda: factory)()
        self.n_workers = n_workers
        # What labkit has wrapped itself is not what errors should speak of.
        self.users = getattr(factory, "_labkit_wraps", factory)
        parameters = _parameters(factory)
        # What functools.partial has bound is the user's own choice.
        bound = factory.keywords if isinstance(factory, functools.partial) else ()
        self.names = (set(parameters) & _KNOWN).difference(bound)
        unknown = [name for name in parameters if name not in _KNOWN and _needed(parameters[name])]
        if unknown:
            raise TypeError(
                f"labkit: the iterator factory needs {', '.join(unknown)}, expected no "
                "parameter without a default but worker, n_workers and epoch. Rename it if it is "
                f"one of these, or bind it: functools.partial(factory, {unknown[0]}=...)."
            )

    @property
    def shards(self) -> bool:
        return "n_workers" in self.names

    def _filled(self, worker: int, epoch: int) -> dict[str, int]:
        known = {"worker": worker, "n_workers": self.n_workers, "epoch": epoch}
        return {name: value for name, value in known.items() if name in self.names}

    def told(self, worker: int, epoch: int) -> str:
        """A sentence about the user's parameters that were filled in; "" if there are none."""
        filled = []
        parameters = _parameters(self.users)
        for name, value in self._filled(worker, epoch).items():
            if name in parameters:
                default = parameters[name].default
                instead = "" if default is inspect.Parameter.empty else f" (default {default!r})"
                filled.append(f"{name}={value}{instead}")
        if not filled:
            return ""
        return (
            f" labkit called it with {', '.join(filled)}: if a name means something else to you "
            "than the worker's number, their count or the number of the pass, rename it."
        )

    def __call__(self, worker: int, epoch: int) -> Iterator[Any]:
        made: Any = self.factory(**self._filled(worker, epoch))
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


def _needed(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variable


class Made(NamedTuple):
    """A batch's arrays, the spec that they fit, and the seconds that the iterator and, if anybody
    listens, its stages took."""

    spec: Spec
    arrays: Arrays
    seconds: float
    stages: Times | None = None


def produce(
    factory: IteratorFactory, worker: int, epoch: int, spec: Spec | None, copies: bool
) -> Iterator[Made]:
    """The batches of one pass, each as it was when it was yielded.

    Args:
        copies: whoever takes the arrays keeps them beyond the next batch, so what the iterator
            could write into again is copied.
    """
    iterator = factory(worker, epoch)
    empty = 0
    take()  # what came after the last batch of another pass
    began = time.perf_counter()
    for batch in iterator:
        alone = sys.getrefcount(batch) <= ALONE
        try:
            spec = spec or Spec.of(batch)
            arrays = spec.take(batch, alone) if copies else spec.flatten(batch)
            empty = 0 if len(arrays[0]) else empty + 1
            if empty == _MOST_EMPTY:
                raise BatchError(
                    f"delivered {empty:,} empty batches in a row, expected samples, or the end. "
                    "Let the iterator end where its data do: of an object with an index, return "
                    "(data[i] for i in range(number_of_batches)). If it leaves samples out, let "
                    "it yield no batch in which none is left."
                )
        except BatchError as error:
            error.add_note(_yielded_at(iterator) or factory.where())
            raise
        yield Made(spec, arrays, time.perf_counter() - began, take())
        began = time.perf_counter()


def _yielded_at(iterator: Iterator[Any]) -> str:
    """The line of the user's generator that yielded the last batch."""
    frame = getattr(iterator, "gi_frame", None)
    if frame is None:
        return ""
    where = traceback.format_list(traceback.extract_stack(frame, limit=1))
    return "It was yielded here:\n" + "".join(where)
