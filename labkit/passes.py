"""A runner's passes as a tf.data.Dataset, for `fit` and for loops in Python.

QueueRunner.dataset() ──► a data set ──iter()──► a pass, with a queue of its own ──► batches
"""

import collections
import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from labkit.engine import interrupts
from labkit.engine.batches import Spec
from labkit.engine.feeder import Feeder
from labkit.engine.heard import steps_asked_for, warned_of_too_few
from labkit.engine.messages import WorkerError
from labkit.engine.options import Options
from labkit.engine.state import Place
from labkit.engine.tf_queue import EagerQueue, Shape, counted, dequeue, shaped
from labkit.quiet import tf

from tensorflow.python.data.ops.iterator_ops import OwnedIterator  # isort: skip


class EagerPasses:
    """What a `QueueRunner` does without a graph."""

    raise_if_failed: Callable[[], None]
    _exited: bool
    _feeder: Feeder | None
    _graph: Any
    _listen: Callable[[], None]
    _lock: Any
    _options: Options
    _place: Place
    _shape: Callable[[], Shape]
    _with_workers: Callable[[Spec | None], Feeder]

    def __init__(self) -> None:
        # An iterator that is still at one of these is told so, not that its queue is missing.
        self._passed: collections.deque[EagerQueue] = collections.deque(maxlen=8)
        self._asked: tuple[int, int] | None = None  # by fit: steps in an epoch, and epochs
        self._told = False

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset())

    def dataset(self) -> tf.data.Dataset:
        """A `tf.data.Dataset` of batches for `model.fit`, `evaluate` and `for` loops.

        Workers start here and stay. Each iteration is a fresh pass, as over any dataset: they call
        the iterator factory again, with `epoch` one higher. Over a finite iterator that is every
        sample once, then the end: where its length is not known (`samples=` tells it), Keras warns
        at the first end that it "ran out of data", and trains on. Over an endless one give
        `steps_per_epoch` to `fit`. One iterator that is kept goes on where it is. There is one
        iteration at a time: when a second one begins, the first ends with an error.

        A worker's error is raised as `tf.errors.OpError` with the WorkerError's text, and as the
        WorkerError itself on leaving `with runner:`.
        """
        if self._graph is not None:
            raise RuntimeError("QueueRunner.dataset: it serves a graph already. Make another one.")
        self._exited = False
        shape = self._shape()
        self._listen()
        # TensorFlow keeps the functions of a dataset for ever, so they know of the runner weakly;
        # the dataset, and with it whatever is derived from it, keeps the runner.
        asked = weakref.WeakMethod(self._note_asked)
        begin, end = weakref.WeakMethod(self._open_pass), weakref.WeakMethod(self._end_pass)
        dataset = dataset_of_passes(
            shape,
            lambda: _still(asked)(),
            lambda: _still(begin)(shape),
            lambda number: _still(end)(number),
            self._batches(),
        )
        dataset._labkit_runner = self
        return dataset

    def _note_asked(self) -> bool:
        self._asked = steps_asked_for()
        return self._place.goes_on

    def _open_pass(self, shape: Shape) -> tuple[EagerQueue, int]:
        since = interrupts.ear.now()  # from here on the consumer waits
        with self._lock:
            # A pipeline that reads ahead, of fit or of repeat(), outlives the `with` block.
            if self._exited:
                raise WorkerError(
                    "QueueRunner: its `with` block has ended. Enter it again, or call dataset()."
                )
            feeder = self._with_workers(shape.spec)
            queue = EagerQueue(shape)
            self._place.begin(queue)
            self._passed.append(queue)
            feeder.feed(queue, self._place.newest, since)
            return queue, self._place.newest

    def _end_pass(self, number: int) -> None:
        if number != self._place.newest:
            raise WorkerError(
                "QueueRunner: another iteration over this runner's dataset() has begun, which "
                "ended this one; expected one at a time. Make a QueueRunner for each."
            )
        self.raise_if_failed()
        self._place.end()
        if self._feeder and self._asked and not self._told and self._batches() is None:
            batches = -(-self._feeder.samples // self._options.batch_size)
            self._told = warned_of_too_few(batches, *self._asked)

    def _batches(self) -> int | None:
        rows = 0 if self._feeder is None else self._feeder.heard.rows
        return None if self._place.goes_on else self._options.batches(rows)


def _still(method: weakref.WeakMethod) -> Callable[..., Any]:
    found = method()
    if found is None:
        raise WorkerError("QueueRunner: the runner of this dataset is gone, and its workers.")
    return found


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
    opened = _Opened()

    def begin() -> tuple[tf.Tensor, tf.Tensor, int]:
        queue, number = open_pass()
        opened.note(queue)
        return queue.handle, queue.counter.handle, number

    @functools.cache
    def passes(ahead: int) -> tf.data.Dataset:
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False
        # An interrupt while TensorFlow traces gets lost, or leaves its graphs in disorder.
        with interrupts.held_back(), _debug_mode_off():
            made = _dataset(shape, begin, end_pass, ahead)
        return untuned(made.with_options(options))

    # A step of fit overlaps with the dequeuing of the next batch. Batches in order are not taken
    # ahead: nobody could tell those from what was used.
    dataset = of_any_length = passes(int(shape.mixes))
    if batches is not None:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(batches))

    class Passes(type(dataset)):  # type: ignore[misc]
        def __iter__(self) -> Any:
            most = None if on_iteration() else batches
            rest = most is None and batches is not None
            if tf.executing_eagerly():
                its = of_any_length if rest else self
                return InPython(its, functools.partial(passes, 0), opened, most)
            return iter(of_any_length) if rest else super().__iter__()

    dataset.__class__ = Passes
    return dataset


def _dataset(
    shape: Shape,
    begin: Callable[[], tuple[tf.Tensor, tf.Tensor, int]],
    end: Callable[[int], None],
    ahead: int,
) -> tf.data.Dataset:
    plain = tf.autograph.experimental.do_not_convert

    def one_pass(_: tf.Tensor) -> tf.data.Dataset:
        handles = [tf.resource, tf.resource, tf.int64]
        handle, counter, number = tf.py_function(functools.partial(_plainly, begin), [], handles)

        def take(_: tf.Tensor) -> Any:
            parts = dequeue(handle, shape)
            return shaped(shape.spec, parts if shape.mixes else counted(parts, counter))

        def ended(number: tf.Tensor) -> bool:
            _plainly(functools.partial(end, int(number)))
            return False

        def never(_: tf.Tensor) -> tf.Tensor:
            return tf.ensure_shape(tf.py_function(ended, [number], tf.bool), [])

        # The v1 map ends quietly where the queue is closed and empty; the v2 map would raise.
        steps = tf.compat.v1.data.Dataset.range(np.iinfo(np.int64).max).map(plain(take))
        if ahead:
            steps = steps.prefetch(ahead)
        # No element: a place at the end at which to raise, which nobody reaches ahead of the step.
        return steps.concatenate(tf.data.Dataset.range(1).filter(plain(never)).map(plain(take)))

    return tf.data.Dataset.range(1).flat_map(plain(one_pass))


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


class InPython(OwnedIterator):  # type: ignore[misc]
    """An iterator whose `next` takes batches from the queue itself: by way of tf.data each costs
    the loop a good half of a millisecond more. The first one and the end come by that way, and all
    of them in a function: where that begins, `in_functions` has the batches.
    """

    def __init__(
        self,
        in_functions: tf.data.Dataset,
        here: Callable[[], tf.data.Dataset],
        opened: _Opened,
        most: int | None,
    ) -> None:
        spec = in_functions.element_spec
        parts = tf.nest.flatten(spec)
        types, shapes = [part.dtype for part in parts], [part.shape for part in parts]
        with tf.device("/CPU:0"):
            made = tf.raw_ops.AnonymousIteratorV3(output_types=types, output_shapes=shapes)
        self._in_functions, self._here, self._opened, self._most = in_functions, here, opened, most
        self._passes: tf.data.Dataset | None = None
        self._queue: EagerQueue | None = None
        self._came = 0
        self._inside: set[int] = set()  # threads that take by way of tf.data
        self._in_function = False  # an iterator that was asked for may be captured, so for good
        self._turn = threading.Lock()
        super().__init__(components=(made,), element_spec=spec)

    @property
    def _iterator_resource(self) -> tf.Tensor:
        """What TensorFlow asks for, ahead of all that it does with an iterator."""
        if threading.get_ident() not in self._inside:
            self.as_in_fit()
        return self._made

    @_iterator_resource.setter
    def _iterator_resource(self, made: tf.Tensor) -> None:
        self._made = made

    def _begin(self, passes: tf.data.Dataset) -> None:
        self._passes = passes
        with tf.init_scope():  # a function that is being traced may ask
            tf.raw_ops.MakeIterator(dataset=passes._variant_tensor, iterator=self._made)

    def as_in_fit(self) -> None:
        """Whoever calls `next` stands for a step of `fit`: batches come as they come to that."""
        with self._turn:
            self._in_function = True
            if self._passes is None:
                self._begin(self._in_functions)
            queue = self._queue
        if queue is not None:
            queue.by_ops()

    def __next__(self) -> Any:
        try:
            batch = self._next()
        except RuntimeError as error:
            # So TensorFlow tells of a Ctrl-C that waited while its op ended with an error.
            if "REPLACED BY KeyboardInterrupt" in str(error):
                raise KeyboardInterrupt from None
            raise
        self._came += 1
        if self._came > (self._most or self._came):
            raise WorkerError(
                f"QueueRunner: a pass has more than the {self._most} batches that samples= "
                "tells. Correct the number, or let the iterator end."
            )
        return batch

    def _next(self) -> Any:
        if (queue := self._queue) is not None and tf.executing_eagerly():
            with contextlib.suppress(tf.errors.OpError):
                return queue.take()
            self._queue = None
        if not tf.executing_eagerly():
            return super().__next__()
        with self._turn:  # several threads may take
            begun = self._queue is not None
            first = self._passes is None
            if first:
                # Of an endless pass a batch that is taken ahead would never come to a loop.
                self._begin(self._here())
            if not begun:
                self._inside.add(threading.get_ident())
        if begun:
            return self._next()
        before = self._opened.count
        try:
            batch = super().__next__()
            with self._turn:
                # If others have begun as well, in other threads, it is not known whose is whose;
                # and another thread that is in here, or in a function, takes what is queued.
                alone = len(self._inside) == 1 and not self._in_function
                if first and self._opened.count == before + 1 and alone:
                    self._queue = self._opened.newest()
            return batch
        finally:
            self._inside.discard(threading.get_ident())


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
