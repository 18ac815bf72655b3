"""Taking batches from Keras's iterator for `watch`: each in its time, or some ahead of theirs."""

import functools
import time
from typing import Any

from labkit.engine.rest import rest
from labkit.passes import InPython, untuned
from labkit.quiet import tf

_AT_ONCE, _READY_EVERY = 10, 15  # takes of one that is ready: 10 at the start, then one of 15
_WAITS = 2.0  # times as long as one that is ready
_MOST_BYTES = 1 << 28  # held at a time
_LOOK, _LONGEST, _AT_REST = 0.01, 0.15, 0.1  # seconds, seconds, of a core


class Taker:
    """Takes the batches that Keras's step trains on, `steps_per_execution` of them a call.

    Attributes:
        held: calls whose batches were taken ahead and that are still to come.
        spec: of a batch.
    """

    def __init__(self, iterator: Any, model: Any) -> None:
        self.number = model.steps_per_execution
        self.one_device = isinstance(iterator, tf.data.Iterator)
        self.spec = iterator.element_spec
        if isinstance(iterator, InPython):
            iterator.as_in_fit()
        self.held = 0
        self._ahead: Any = None
        self._over = False
        self._error: Exception | None = None
        self._ready: Any = None
        self._ready_seconds, self._ready_takes, self._seen = 0.0, 0, 0

    def waited(self, seconds: float) -> float:
        """Of the seconds that a take took, those above what taking one that is ready takes. Below 0
        for some of those that are ready: their sum is about 0, since none of either is left out,
        however long the machine was busy with something else. Of those that have to be waited for,
        all: Keras's own take, inside of its step, is quick, and would wait that much longer."""
        ready = self._ready_seconds / max(1, self._ready_takes)
        return seconds if seconds > _WAITS * ready else seconds - ready

    def next(self, iterator: Any) -> Any:
        """The next batch.

        Raises:
            StopIteration: at the end of the data.
        """
        return next(self.source(iterator))

    def source(self, iterator: Any) -> Any:
        """An iterator with the batches of the next call. What failed while they were taken ahead is
        raised when its turn comes."""
        if self.held:
            self.held -= 1
            return self._ahead
        if self._ahead is not None:
            rest.end()
        self._ahead = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return iter(()) if self._over and self.number == 1 else iterator

    def hold(self, iterator: Any, calls: int) -> None:
        """Takes the batches of the next calls, fewer if they would take more than 256 MB."""
        batches: list[Any] = []
        wanted, size = calls * self.number, 0
        try:
            while len(batches) < wanted and (size < _MOST_BYTES or len(batches) % self.number):
                batches.append(next(iterator))
                size += _bytes_of(batches[-1])
        except StopIteration:
            self._over = True
        except Exception as error:
            self._error = error
        else:
            rest.begin()
            _until_at_rest()
        self.held = -(-len(batches) // self.number)
        self._ahead = iter(batches)
        if batches and self.number > 1:
            self._ahead = _iterator(batches, self.spec)

    def begin_epoch(self) -> None:
        self._over = False

    def take_one_that_is_ready(self, batch: Any) -> None:
        """Measures it, now and then: after a step, where caches are as cold as they will be."""
        self._seen += 1
        if not self.one_device or (self._seen > _AT_ONCE and self._seen % _READY_EVERY):
            return
        if self._ready is None:
            self._ready = iter(untuned(tf.data.Dataset.from_tensors(batch).repeat()))
            next(self._ready)
        began = time.perf_counter()
        next(self._ready)
        self._ready_seconds += time.perf_counter() - began
        self._ready_takes += 1


def _until_at_rest() -> None:
    """Waits for those who fill up what was taken, as far as this process's cores tell of them."""
    ends = time.perf_counter() + _LONGEST
    while time.perf_counter() < ends:
        busy, began = time.process_time(), time.perf_counter()
        time.sleep(_LOOK)
        if time.process_time() - busy < _AT_REST * (time.perf_counter() - began):
            break


def _bytes_of(batch: Any) -> int:
    parts = tf.nest.flatten(batch, expand_composites=True)
    return sum(part.shape.num_elements() * part.dtype.size for part in parts)


def _iterator(batches: list[Any], spec: Any) -> Any:
    """Like Keras's own, so that its step takes it without compiling anew."""
    data = tf.data.Dataset
    try:
        made = data.from_tensor_slices(
            tf.nest.map_structure(lambda *parts: tf.stack(parts), *batches)
        )
    except (TypeError, ValueError, tf.errors.InvalidArgumentError):  # shapes differ
        made = functools.reduce(data.concatenate, map(data.from_tensors, batches))
    as_variant = tf.data.experimental.to_variant(untuned(made))
    return iter(tf.data.experimental.from_variant(as_variant, spec))
