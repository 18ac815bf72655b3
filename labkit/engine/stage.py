"""Times inside the generator: `with labkit.stage("decode"):` around a part of it. Python alone.

    stage ──► what this thread's batch took ──► take(), by produce ──► Chunk ──► diagnose

Nobody listens but diagnose: it has each worker that it runs alone call `listen`.
"""

import functools
import threading
import time
from collections.abc import Callable
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
Times = dict[str, tuple[float, int]]  # of one batch: seconds, and how many times, by name


class _Here(threading.local):
    """What belongs to one thread; `times` is None while nobody listens."""

    times: Times | None = None

    def __init__(self) -> None:
        self.open: list[list[Any]] = []  # stage, when it began, seconds of stages within it


_here = _Here()


class stage:  # noqa: N801, since it is written as a function is
    """Names a part of your iterator, so that `diagnose` can say what it takes of a batch:

        with labkit.stage("decode"):
            images = decode(files)

    or, above a function of yours that is such a part, `@labkit.stage("decode")`.

    A second in a stage within a stage counts once, for the inner one. A part that raises counts as
    well, and the exception passes. Not timed: what runs in threads that the iterator started, and
    a stage that is left open while a batch is yielded, which would time whoever takes the batch.

    Args:
        name: a text that is not empty. Parts of one name are added up.

    Raises:
        TypeError, ValueError: the name is none, or what stands below `@` is no function, or one
            whose call only makes a generator or coroutine, without running it.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"labkit.stage: name must be a text, such as 'decode', got {name!r}.")
        if not name:
            raise ValueError("labkit.stage: name must not be empty, such as 'decode', got ''.")
        self._name = name

    def __call__(self, function: F) -> F:
        runs_later = any(
            kind(function)
            for kind in (isgeneratorfunction, iscoroutinefunction, isasyncgenfunction)
        )
        if runs_later or not callable(function):
            raise TypeError(
                f"labkit.stage: @stage({self._name!r}) must stand above a function that makes its "
                f"part and returns it, got {function!r}. Inside of your iterator, write "
                f"with labkit.stage({self._name!r}): around the part."
            )

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return cast(F, timed)

    def __enter__(self) -> None:
        if _here.times is not None:
            _here.open.append([self, time.perf_counter(), 0.0])

    def __exit__(self, *error: object) -> None:
        # One that was entered ahead of `listen`, or of a yield, is not the last one any more.
        if _here.times is not None and _here.open and _here.open[-1][0] is self:
            _, began, within = _here.open.pop()
            took = time.perf_counter() - began
            seconds, count = _here.times.get(self._name, (0.0, 0))
            _here.times[self._name] = seconds + took - within, count + 1
            if _here.open:
                _here.open[-1][2] += took


def listen() -> None:
    """From now on the stages of this thread are timed."""
    _here.times = {}


def take() -> Times | None:
    """What they took since the last call; None while nobody listens."""
    times = _here.times
    if times is not None:
        _here.times = {}
        _here.open.clear()
    return times
