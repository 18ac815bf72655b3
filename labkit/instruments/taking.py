"""The batches of Keras's steps for `watch`: each taken in its time, or some ahead of theirs."""

import functools
import time
from collections.abc import Callable
from typing import Any

from labkit.engine import interrupts
from labkit.engine.rest import rest
from labkit.instruments.meter import Meter, of_a_ready_batch
from labkit.passes import InPython, untuned
from labkit.quiet import tf

_MOST_BYTES = 1 << 28  # held at a time
_LOOK, _LONGEST, _AT_REST = 0.01, 0.3, 0.02  # seconds, seconds, of a core
_COLD, _WARM_UP = 0.02, 0.1  # seconds without a step after which it has to warm up, and how long


class Taker:
    """Has Keras's step train on the next batches, and tells how long that waited for them.

    Attributes:
        held: calls whose batches were taken ahead and that are still to come.
        one_device: not of a strategy, whose iterator has a batch for each replica.
    """

    def __init__(self, iterator: Any, model: Any) -> None:
        self._number, self._eagerly = model.steps_per_execution, model.run_eagerly
        self.one_device = isinstance(iterator, tf.data.Iterator)
        self._spec = iterator.element_spec
        self._meter = Meter(self._spec) if self.one_device and self._number == 1 else None
        self._waited, self._calls = 0.0, 0  # since `waited` was asked last
        self.held = 0
        self._ahead: Any = None
        self._error: Exception | None = None
        self._step: Callable[[Any], Any] | None = None

    def call(self, iterator: Any, inner: Callable[[Any], Any]) -> Any:
        """The result of `inner`, Keras's train_function, with its next batches.

        What failed while batches were taken ahead is raised when its turn comes.
        """
        source = self._source(iterator)
        if self._number > 1 or source is self._ahead:
            return inner(source)
        self._calls += 1
        if self._meter is not None:
            return inner(self._meter.over(source))
        began = time.perf_counter()
        try:
            batch = next(source)
        except StopIteration:
            # As Keras ends a pass of unknown length: it counts one more step for the optimizer.
            return inner(iterator)
        self._waited += time.perf_counter() - began
        self._step = self._step or self._with_a_batch(inner)
        return self._step(batch)

    def waited(self) -> tuple[float, float]:
        """Seconds of waiting for the batches of one step a call, since this was asked last, and
        what the meter took. Of several Keras takes the next one while it trains; 0 for those."""
        waited, self._waited = self._waited, 0.0
        calls, self._calls = self._calls, 0
        if self._meter is None:
            return waited, 0.0
        taken = calls * of_a_ready_batch()
        return self._meter.read() - taken, taken

    def _source(self, iterator: Any) -> Any:
        """An iterator with the batches of the next call."""
        if isinstance(iterator, InPython):
            iterator.as_in_fit()
        if self.held:
            self.held -= 1
            return self._ahead
        if self._ahead is not None:
            rest.end()
        self._ahead = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return iterator

    def _with_a_batch(self, inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Keras's step as a call with a batch.

        With the shapes that the data set declares, as Keras compiles it: with those of each batch
        the losses would differ in their last bit, and a shorter batch would compile anew.
        """

        def step(batch: Any) -> Any:
            return inner(iter((batch,)))

        if self._eagerly:
            return step
        own = tf.function(step, input_signature=(self._spec,), autograph=False)
        # Each fit traces one; after some, TensorFlow would warn of a function made in a loop.
        own._omit_frequent_tracing_warning = True
        return own

    def hold(self, iterator: Any, calls: int) -> None:
        """Takes the batches of the next calls, fewer if they would take more than 256 MB."""
        batches: list[Any] = []
        wanted, size, began = calls * self._number, 0, time.perf_counter()
        try:
            while len(batches) < wanted and (size < _MOST_BYTES or len(batches) % self._number):
                batches.append(next(iterator))
                size += _bytes_of(batches[-1])
        except StopIteration:
            pass
        except Exception as error:
            self._error = error
        else:
            is_cold = time.perf_counter() - began > _COLD
            rest.begin()
            _until_at_rest()
            if is_cold:
                _warm_up()
        self.held = -(-len(batches) // self._number)
        if batches:
            self._ahead = _iterator(batches, self._spec)


def _until_at_rest() -> None:
    """Waits for those who fill up what was taken, as far as this process's cores tell of them."""
    ends = time.perf_counter() + _LONGEST
    while time.perf_counter() < ends:
        busy, began = time.process_time(), time.perf_counter()
        time.sleep(_LOOK)
        if time.process_time() - busy < _AT_REST * (time.perf_counter() - began):
            break


def _warm_up() -> None:
    """Has TensorFlow's threads compute. After 0.3 s without, a step of 2 ms took 1.08 to 1.16 times
    as long at first, and 1.02 to 1.05 at the fiftieth; after this, as long as ever. Ops that Python
    calls one by one do not help."""
    computing, given = _computing(), tf.fill((256, 256), 1e-3)
    ends = time.perf_counter() + _WARM_UP
    while time.perf_counter() < ends:
        computing(given).numpy()


@functools.cache
def _computing() -> Callable[[Any], Any]:
    def several_at_a_time(given: Any) -> Any:
        parts = [given, 2 * given, 3 * given]
        for _ in range(6):
            parts = [tf.nn.relu(tf.linalg.matmul(given, part)) for part in parts]
        return tf.add_n(parts)[0, 0]

    with interrupts.held_back():  # one that comes while TensorFlow traces is lost
        traced = tf.function(several_at_a_time, autograph=False)
        return traced.get_concrete_function(tf.TensorSpec((256, 256)))


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
