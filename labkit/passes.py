"""A runner's passes as a tf.data.Dataset, for `fit` and for loops in Python."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from labkit.engine.messages import WorkerError
from labkit.engine.tf_queue import EagerQueue, Shape, counted, dequeue, shaped
from labkit.quiet import tf


def dataset_of_passes(
    shape: Shape,
    on_iteration: Callable[[], bool],
    open_pass: Callable[[], tuple[EagerQueue, int]],
    end_pass: Callable[[int], None],
    batches: int | None,
) -> tf.data.Dataset:
    """A dataset whose every iteration is a pass: what comes out of a queue until it is closed.

    Args:
        on_iteration: called by whoever iterates over the dataset itself, ahead of `open_pass`;
            says whether the pass is only the rest of one.
        open_pass: called at the start of an iteration; returns its queue, and the number of the
            pass.
        end_pass: called with that number when the queue has given its last batch; what it raises
            the iteration raises.
        batches: of a pass, if known.
    """
    plain = tf.autograph.experimental.do_not_convert
    opened = _Opened()

    def one_pass(_: tf.Tensor) -> tf.data.Dataset:
        def begin() -> tuple[tf.Tensor, tf.Tensor, int]:
            queue, number = open_pass()
            opened.note(queue)
            return queue.handle, queue.counter.handle, number

        handles = [tf.resource, tf.resource, tf.int64]
        handle, counter, number = tf.py_function(functools.partial(_plainly, begin), [], handles)

        def take(_: tf.Tensor) -> Any:
            parts = dequeue(handle, shape)
            return shaped(shape.spec, parts if shape.mixes else counted(parts, counter))

        def never(_: tf.Tensor) -> tf.Tensor:
            return tf.ensure_shape(tf.py_function(ended, [number], tf.bool), [])

        # The v1 map ends quietly where the queue is closed and empty; the v2 map would raise.
        steps = tf.compat.v1.data.Dataset.range(np.iinfo(np.int64).max).map(plain(take))
        # No element: a place at the end at which to raise.
        return steps.concatenate(tf.data.Dataset.range(1).filter(plain(never)).map(plain(take)))

    def ended(number: tf.Tensor) -> bool:
        _plainly(functools.partial(end_pass, int(number)))
        return False

    with _debug_mode_off():
        dataset = tf.data.Dataset.range(1).flat_map(plain(one_pass))
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    plainest = untuned(dataset.with_options(options))
    # A step overlaps with the dequeuing of the next batch. Batches in order are not taken ahead:
    # nobody could tell those from what was used.
    dataset = of_any_length = plainest.prefetch(1) if shape.mixes else plainest
    if batches is not None:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(batches))

    class Passes(type(dataset)):  # type: ignore[misc]
        def __iter__(self) -> Any:
            most = None if on_iteration() else batches
            rest = most is None and batches is not None
            iterator = iter(of_any_length) if rest else super().__iter__()
            eager = tf.executing_eagerly()
            return _in_python(iterator, plainest, opened, most) if eager else iterator

    dataset.__class__ = Passes
    return dataset


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The dataset without autotuning. TensorFlow's thread for that may miss that its iterator ends;
    whoever drops the iterator then waits, for up to as long as there has been one."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


class _Opened:
    """How many passes were begun, and the queue of the newest, as long as somebody has it."""

    def __init__(self) -> None:
        self.count = 0
        self.newest: Callable[[], EagerQueue | None] = lambda: None

    def note(self, queue: EagerQueue) -> None:
        self.count, self.newest = self.count + 1, weakref.ref(queue)


def as_in_fit(iterator: Any) -> None:
    """Whoever calls `next` stands for a step of `fit`: batches are to come as they come to that."""
    if isinstance(iterator, tf.data.Iterator):  # else it is one over several devices
        iterator._begins = False


def _in_python(iterator: Any, passes: tf.data.Dataset, opened: _Opened, most: int | None) -> Any:
    kind: Any = type(iterator)
    iterator.__class__ = _kind_in_python(kind)
    iterator._passes, iterator._opened, iterator._most = passes, opened, most
    iterator._before = opened.count
    return iterator


@functools.cache
def _kind_in_python(kind: Any) -> type:
    """The iterator, whose `next` takes batches from the queue itself: by way of tf.data each costs
    the loop a good half of a millisecond more. The first one and the end come by that way."""

    class InPython(kind):  # type: ignore[misc]
        _passes: tf.data.Dataset
        _opened: _Opened
        _most: int | None
        _before: int  # passes that were opened ahead of this iterator
        _queue: EagerQueue | None = None
        _begins = True
        _came = 0

        def __next__(self) -> Any:
            batch = self._next()
            self._came += 1
            if self._came > (self._most or self._came):
                raise WorkerError(
                    f"QueueRunner: a pass has more than the {self._most} batches that samples= "
                    "tells. Correct the number, or let the iterator end."
                )
            return batch

        def _next(self) -> Any:
            if self._queue is not None and tf.executing_eagerly():
                with contextlib.suppress(tf.errors.OpError):
                    return self._queue.take()
                self._queue = None
            begins, self._begins = self._begins and tf.executing_eagerly(), False
            # If others have begun as well, in functions or threads, whose is whose is not known.
            if begins := begins and self._opened.count == self._before:
                # Of an endless pass a batch that is taken ahead would never come to this loop.
                tf.raw_ops.MakeIterator(
                    dataset=self._passes._variant_tensor, iterator=self._iterator_resource
                )
            batch = super().__next__()
            if begins and self._opened.count == self._before + 1:
                self._queue = self._opened.newest()
            return batch

    return InPython


@contextlib.contextmanager
def _debug_mode_off() -> Iterator[None]:
    """tf.data's debug mode would run ops in Python, where a queue's end is no end, but an error."""
    from tensorflow.python.data.ops import debug_mode

    was_on = debug_mode.DEBUG_MODE
    debug_mode.toggle_debug_mode(False)
    try:
        yield
    finally:
        debug_mode.toggle_debug_mode(was_on)


def _plainly(call: Callable[[], Any]) -> Any:
    """The result of `call`. TensorFlow is to print its error, not the cause that it carries."""
    try:
        return call()
    except WorkerError as error:
        raise WorkerError(str(error)) from None
