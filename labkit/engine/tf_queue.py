"""The queue, in a graph and without one: all that the engine knows of TensorFlow."""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.engine.batches import Component, Spec, short
from labkit.engine.filled import FilledQueue
from labkit.engine.handover import Handover
from labkit.quiet import tf

from tensorflow.python.framework.ops import EagerTensor  # isort: skip

_v1 = tf.compat.v1
_GROUPS = (32, 8, 1)
_RESTING = 64
_CLOSED = (tf.errors.OpError, RuntimeError)


@dataclass(frozen=True)
class Shape:
    """What a queue is made of: samples it holds, samples that stay behind, samples per batch.

    One that `mixes` is a RandomShuffleQueue of samples; one that does not is a FIFOQueue of whole
    batches, which nobody copies."""

    spec: Spec
    batch_size: int
    capacity: int
    min_after_dequeue: int
    seed: int | None
    mixes: bool = True

    @property
    def types(self) -> list[tf.DType]:
        return [_tf_type(component) for component in self.spec.components]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [component.shape for component in self.spec.components]

    def new_queue(self) -> tf.queue.QueueBase:
        if not self.mixes:
            return tf.queue.FIFOQueue(self.capacity // self.batch_size, self.types)
        return tf.queue.RandomShuffleQueue(
            self.capacity, self.min_after_dequeue, self.types, self.shapes, seed=self.seed
        )


class GraphQueue:
    """The queue and its ops in the default graph; `attach` makes it the queue of one session."""

    def __init__(self, shape: Shape) -> None:
        self.spec, self._shape = shape.spec, shape
        self._attached: weakref.WeakSet[Any] = weakref.WeakSet()
        with tf.name_scope("queue_runner") as scope:
            self._queue = shape.new_queue()
            with tf.device("/CPU:0"):
                self._counter = tf.raw_ops.VarHandleOp(
                    dtype=tf.int64, shape=[], shared_name=f"{scope}taken"
                )
                zero = tf.zeros([], tf.int64)
                self._zero = tf.raw_ops.AssignVariableOp(resource=self._counter, value=zero)
                self._taken = tf.raw_ops.ReadVariableOp(resource=self._counter, dtype=tf.int64)
            rows = [(None, *size) for size in shape.shapes]
            self._feeds = list(map(_v1.placeholder, shape.types, rows))
            put = self._queue.enqueue_many if shape.mixes else self._queue.enqueue
            self._enqueue = put(self._feeds)
            # Large samples are queued one by one, as they lie, where enqueue_many copies them while
            # dequeues have to wait. In groups, since a call costs more than an op.
            feeds, singles = [], []
            one_by_one = shape.spec.large and shape.mixes
            for _ in range(_GROUPS[0] if one_by_one else 0):
                sample = list(map(_v1.placeholder, shape.types, shape.shapes))
                feeds += sample
                singles.append(self._queue.enqueue(sample))
            self._groups = [
                (size, tf.group(singles[:size]), feeds[: size * len(rows)])
                for size in (_GROUPS if one_by_one else ())
            ]
            self._close = self._queue.close()
            self._cancel = self._queue.close(cancel_pending_enqueues=True)
            self._size = self._queue.size()
            self._drain = tf.group(self._dequeue())

    def _dequeue(self) -> Any:
        if self._shape.mixes:
            return self._queue.dequeue_up_to(self._shape.batch_size)
        return self._queue.dequeue()

    def inputs(self) -> Any:
        """The tensors of one batch, in the batch's structure."""
        parts = self._dequeue()
        parts = parts if isinstance(parts, list) else [parts]
        return shaped(self.spec, parts if self._shape.mixes else counted(parts, self._counter))

    def attach(self, sess: Any) -> "SessionQueue":
        """Raises RuntimeError for a session that had it before: there it is closed for good; and
        TypeError for what is no session, nor one of `tf.compat.v1.train` around a session."""
        sess = sess._tf_sess() if hasattr(sess, "_tf_sess") else sess
        if not hasattr(sess, "_make_callable_from_options"):
            raise TypeError(
                f"QueueRunner.start: sess must be an open session, got {short(sess)}. Pass a "
                "tf.compat.v1.Session, or a MonitoredSession within its `with` block; of another "
                "wrapper the session that it wraps."
            )
        if sess in self._attached:
            raise RuntimeError(
                "QueueRunner.start: the queue of this session was closed by stop(), and cannot be "
                "opened again. Start in a new session of the same graph."
            )
        self._attached.add(sess)
        call = _in_callers_thread
        call(sess, self._zero)()
        return SessionQueue(
            self._shape,
            call(sess, self._enqueue, self._feeds),
            [(size, call(sess, group, feeds)) for size, group, feeds in self._groups],
            call(sess, self._close),
            call(sess, self._cancel),
            call(sess, self._size),
            call(sess, self._drain),
            call(sess, self._taken),
        )


@dataclass(eq=False)
class SessionQueue(FilledQueue):
    """A graph's queue in one session, by callables that are made before anything can go wrong."""

    _shape: Shape
    _enqueue: Callable[..., Any]
    _groups: list[tuple[int, Callable[..., Any]]]
    _close: Callable[[], Any]
    _cancel: Callable[[], Any]
    _size: Callable[[], Any]
    _drain: Callable[[], Any]
    _taken: Callable[[], Any]
    _closed = _CLOSED

    def _put(self, arrays: list[Any]) -> None:
        if isinstance(arrays[0], np.ndarray):
            self._enqueue(*arrays)
            return
        samples = list(zip(*arrays, strict=True))
        for size, call in self._groups:
            while len(samples) >= size:
                call(*(part for sample in samples[:size] for part in sample))
                del samples[:size]

    def _count(self) -> int:
        return int(self._size()[0])

    def _close_it(self, cancel: bool) -> None:
        (self._cancel if cancel else self._close)()

    def _drain_some(self) -> None:
        self._drain()

    def taken(self) -> int:
        """Batches that came out, of a queue that does not mix."""
        return int(self._taken()[0])


def _in_callers_thread(
    sess: "tf.compat.v1.Session", op: tf.Operation | tf.Tensor, feeds: Iterable[tf.Tensor] = ()
) -> Callable[..., Any]:
    """A function that runs `op` in the thread that calls it, with an array for each of `feeds`.

    In a session's own pool, often of one thread, it would wait for whatever the step runs there.
    And `run` takes Python locks of the graph, which an interrupt in another `run` leaves locked.
    """
    from tensorflow.core.protobuf.config_pb2 import CallableOptions

    options = CallableOptions(feed=[feed.name for feed in feeds])
    (options.fetch if isinstance(op, tf.Tensor) else options.target).append(op.name)
    options.run_options.inter_op_thread_pool = -1
    # make_callable takes no such options, and run() takes longer than the enqueue itself.
    return sess._make_callable_from_options(options)


def _eagerly(call: Callable[[], Any]) -> Any:
    """The result of `call`, also where the caller is building a graph: no other thread is."""
    if tf.executing_eagerly():
        with tf.device("/CPU:0"):
            return call()
    with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(_eagerly, call).result()


class _Names:
    """Names for eager queues, used again: TensorFlow keeps a kernel for ever for each that it saw.

    A queue that is alive has a name of its own, since two of one name would be one queue. A name
    rests long after its queue is gone, since a forgotten iterator may still have it.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._resting: collections.deque[str] = collections.deque()
        self._gone: collections.deque[tuple[str, tf.Tensor]] = collections.deque()
        self._made = itertools.count()

    def take(self) -> str:
        while self._gone:
            name, handle = self._gone.popleft()
            with contextlib.suppress(*_CLOSED), tf.device("/CPU:0"):
                tf.raw_ops.DestroyResourceOp(resource=handle)
            self._resting.append(name)
        with contextlib.suppress(IndexError):
            if len(self._resting) > _RESTING:
                return self._resting.popleft()
        return f"labkit_{self._kind}_{os.getpid()}_{next(self._made)}"

    def give_back(self, name: str, handle: tf.Tensor) -> None:
        """From a finalizer, whose thread may be in the midst of tracing: no op may run here."""
        self._gone.append((name, handle))


_names = {mixes: _Names("shuffle" if mixes else "fifo") for mixes in (True, False)}


class EagerQueue(FilledQueue):
    """The same queue without a graph, one for each pass."""

    _shape: Shape
    _closed = _CLOSED

    def __init__(self, shape: Shape) -> None:
        self._shape, self._kinds = shape, shape.types
        # Under tf.random.set_seed TensorFlow would draw another seed, so keep another kernel, each
        # time. Without `seed` the order is not repeatable anyway: it depends on who comes first.
        seeds = (0, 0) if shape.seed is None else _v1.get_seed(shape.seed)
        names = _names[shape.mixes]
        name = names.take()
        common = {"component_types": self._kinds, "shared_name": name}
        with tf.device("/CPU:0"):
            # Not tf.queue.RandomShuffleQueue: each of those costs 37 KB for ever.
            self.handle = (
                tf.raw_ops.RandomShuffleQueueV2(
                    shapes=shape.shapes,
                    capacity=shape.capacity,
                    min_after_dequeue=shape.min_after_dequeue,
                    seed=seeds[0],
                    seed2=seeds[1],
                    **common,
                )
                if shape.mixes
                else tf.raw_ops.FIFOQueueV2(capacity=shape.capacity // shape.batch_size, **common)
            )
            self.counter = tf.Variable(0, trainable=False, dtype=tf.int64)
        self._device = self.handle.device
        self._here, self._counting = 0, threading.Lock()  # batches that came out by `take`
        self._handover = None if shape.mixes else Handover(shape.capacity // shape.batch_size)
        weakref.finalize(self, names.give_back, name, self.handle).atexit = False

    def _put(self, arrays: list[Any]) -> None:
        if self._handover is not None and self._handover.put(lambda: self._tensors(arrays)):
            return
        with tf.device("/CPU:0"):
            if not self._shape.mixes:
                self._queue_up(arrays)
                return
            if isinstance(arrays[0], np.ndarray):
                tf.raw_ops.QueueEnqueueManyV2(handle=self.handle, components=arrays)
                return
            for sample in zip(*arrays, strict=True):
                tf.raw_ops.QueueEnqueueV2(handle=self.handle, components=sample)

    def _tensors(self, arrays: list[np.ndarray]) -> list[tf.Tensor]:
        """Arrays as they lie: `tf.constant` would copy them, and an op takes five times as long."""
        return [EagerTensor(array, self._device, None) for array in arrays]

    def _queue_up(self, parts: list[Any]) -> None:
        tf.raw_ops.QueueEnqueueV2(handle=self.handle, components=parts)

    def _count(self) -> int:
        return int(tf.raw_ops.QueueSizeV2(handle=self.handle)) + len(self._handover or ())

    def by_ops(self) -> None:
        """Others than a loop in Python take as well: all batches go into TensorFlow's queue."""
        if self._handover is not None:
            _eagerly(functools.partial(self._handover.end, self._queue_up))

    def _close_it(self, cancel: bool) -> None:
        if self._handover is not None:
            self._handover.end((lambda parts: None) if cancel else self._queue_up)
        tf.raw_ops.QueueCloseV2(handle=self.handle, cancel_pending_enqueues=cancel)

    def _drain_some(self) -> None:
        dequeue(self.handle, self._shape)

    def take(self) -> Any:
        """The next batch, in the batch's structure. Raises OpError if the queue is closed."""
        if self._handover is None:
            parts = self._dequeue()
        else:
            try:
                parts = self._handover.take(self.taken, self._dequeue)
            except BaseException:  # an interrupt may have lost one that was on its way
                self.by_ops()
                raise
        with self._counting:
            self._here += 1
        return self._shape.spec.pack(iter(parts))

    def _dequeue(self) -> list[tf.Tensor]:
        with tf.device("/CPU:0"):
            return dequeue(self.handle, self._shape)

    def taken(self) -> int:
        """Batches that came out, of a queue that does not mix."""
        return self._here + _eagerly(lambda: int(self.counter.read_value()))

    def size(self) -> int:
        return _eagerly(super().size)

    def close(self, cancel: bool) -> None:
        _eagerly(functools.partial(super().close, cancel))


def dequeue(handle: tf.Tensor, shape: Shape) -> list[tf.Tensor]:
    if not shape.mixes:
        return tf.raw_ops.QueueDequeueV2(handle=handle, component_types=shape.types)
    return tf.raw_ops.QueueDequeueUpToV2(
        handle=handle, n=shape.batch_size, component_types=shape.types
    )


def counted(parts: list[tf.Tensor], counter: tf.Tensor) -> list[tf.Tensor]:
    """A batch that came out, noted where TensorFlow takes it: whoever puts batches in knows of it a
    little later, so that the queue's size does not tell."""
    with tf.control_dependencies(parts), tf.device("/CPU:0"):
        one = tf.ones([], tf.int64)
        noted = tf.raw_ops.AssignAddVariableOp(resource=counter, value=one)
        with tf.control_dependencies([noted]):
            return [tf.identity(part) for part in parts]


def _tf_type(component: Component) -> tf.DType:
    return tf.string if component.is_text else tf.as_dtype(component.dtype)


def shaped(spec: Spec, parts: Iterable[tf.Tensor]) -> Any:
    pairs = zip(spec.components, parts, strict=True)
    return spec.pack(tf.ensure_shape(part, (None, *c.shape)) for c, part in pairs)
