"""QueueRunner: your iterator, run by workers in the background, behind a TensorFlow queue.

    workers ──chunks──► feeder thread ──enqueue_many──► RandomShuffleQueue ──► training

Producers only produce. One feeder thread enqueues for all of them, so that a producer's cycle
never waits for the step that is running.
"""

import atexit
import contextlib
import copy
import signal
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import numpy as np
import psutil

from labkit.quiet import tf
from labkit.scaling import Scaler, usable_cores
from labkit.workers import (
    Chunk,
    Component,
    Died,
    Ended,
    Failed,
    IteratorFactory,
    Message,
    Pool,
    ProcessPool,
    Spec,
    ThreadPool,
    WorkerError,
    interrupts_held_back,
)

_v1 = tf.compat.v1
_TICK = 0.1
_SMALL_BYTES, _TOGETHER = 1 << 20, 8
_GROUPS = (32, 8, 1)
_POOLS: dict[str, type[Pool]] = {"thread": ThreadPool, "process": ProcessPool}
_RUNNING: "weakref.WeakSet[QueueRunner]" = weakref.WeakSet()


class QueueRunner:
    """Feeds a `RandomShuffleQueue` from `n_workers` copies of an iterator.

    In a graph (TensorFlow 1 style):

        runner = QueueRunner(data.train_iterator, batch_size=32)
        images, labels = runner.get_inputs()
        ...
        with tf.compat.v1.Session() as sess, runner.start(sess, n_threads=4):
            sess.run(train_op)

    In Keras and plain loops: `model.fit(runner.dataset(), steps_per_epoch=...)`.

    Args:
        iterator: a function that returns a new iterator of batches: tuples or dicts (also nested)
            of arrays of any dtype and shape, whose first axis counts samples. It runs once in each
            worker. If it has parameters named `worker`, `n_workers` or `epoch`, it receives the
            worker's number (from 0), their count, and the epoch (from 0), so that workers can
            share one data set out among themselves.
        batch_size: samples that the model takes per step; free of the iterator's own chunk size.
        n_workers: how many workers, or "auto": grows and shrinks while it runs, up to
            `max_workers`, and prints each decision.
        workers: "thread", for iterators that wait (disk, network); or "process", for iterators
            that compute in Python and hold its lock (GIL).
        capacity: samples the queue can hold. Default 2000.
        min_after_dequeue: samples that stay behind for mixing; training starts above it.
            Default 1000.
        spec: structure like a batch, with `labkit.Component(name, shape, dtype)` at each leaf (the
            shape without the batch axis). Default: read from the first batch, which is not lost.
        on_error: "raise", or "continue": go on with the other workers and warn once.
        timeout: seconds that a worker may spend on one batch before that counts as a failure and
            the error shows what it was doing; None waits for ever. Default 60.
        max_workers: the limit for "auto". Default: 32 threads, or one process per usable core.
        seed: of the queue's shuffling.

    Attributes:
        error: the WorkerError that ended the run, or None.
        samples: how many were put into the queue since the start.
        delivering: numbers of the workers that have delivered since the start.

    Raises:
        TypeError, ValueError: an argument is not as above.
        MemoryError: the queue would need more than half of the free memory.
        WorkerError: in the consumer (by `with` or `raise_if_failed`): a worker's exception, death,
            stall or misfit batch, with the worker's number and traceback.
    """

    def __init__(
        self,
        iterator: Callable[..., Iterable[Any]],
        batch_size: int = 32,
        n_workers: int | Literal["auto"] = 1,
        workers: Literal["thread", "process"] = "thread",
        capacity: int = 2000,
        min_after_dequeue: int = 1000,
        spec: Any = None,
        on_error: Literal["raise", "continue"] = "raise",
        timeout: float | None = 60.0,
        max_workers: int | None = None,
        seed: int | None = None,
    ) -> None:
        _expect(workers in _POOLS, "workers must be 'thread' or 'process'", workers)
        _expect(
            on_error in ("raise", "continue"), "on_error must be 'raise' or 'continue'", on_error
        )
        _expect(
            n_workers == "auto" or _is_count(n_workers),
            "n_workers must be 'auto' or >= 1",
            n_workers,
        )
        _expect(_is_count(batch_size), "batch_size must be an integer >= 1", batch_size)
        _expect(
            max_workers is None or _is_count(max_workers),
            "max_workers must be None or >= 1",
            max_workers,
        )
        _expect(
            _is_count(capacity)
            and isinstance(min_after_dequeue, (int, np.integer))
            and min_after_dequeue >= 0
            and capacity >= min_after_dequeue + batch_size,
            f"capacity must be at least min_after_dequeue + batch_size "
            f"({min_after_dequeue} + {batch_size})",
            capacity,
        )
        _expect(
            timeout is None or (isinstance(timeout, (int, float)) and timeout > 0),
            "timeout must be None or seconds > 0",
            timeout,
        )
        self.batch_size, self.workers, self.on_error = int(batch_size), workers, on_error
        self.capacity, self.min_after_dequeue, self.seed = (
            int(capacity),
            int(min_after_dequeue),
            seed,
        )
        self.timeout, self.iterator, self.n_workers = timeout, iterator, n_workers
        self.max_workers = max_workers or (32 if workers == "thread" else usable_cores())
        self._given_spec = None if spec is None else _spec_from(spec)
        self.error: BaseException | None = None
        self.samples = 0
        self.delivering: set[int] = set()
        self._pool: Pool | None = None
        self._queue: _GraphQueue | _EagerQueue | None = None
        self._feeder: threading.Thread | None = None
        self._first: list[Message] = []
        self._lost: set[int] = set()
        self._scaler: Scaler | None = None
        self._watch: _InterruptWatch | None = None
        self._stopping = threading.Event()
        self._left = False
        self._lock = threading.RLock()
        self._abandoned = weakref.finalize(self, list)
        IteratorFactory(iterator, 1)

    # ------------------------------------------------------------------ graph mode

    def get_inputs(self) -> Any:
        """Builds the queue in the default graph and returns the batch that it yields.

        The workers begin to produce here, so that they have batches ready by the time that the
        rest of the graph is built; with a given `spec`, not before `start`. Until then `stop()`
        ends them, so write `with runner:` around both where the code between may fail.

        Returns:
            Tensors in the iterator's structure, each `[batch, ...]`; the batch axis is
            `batch_size`, and smaller only for the last batch of a finite iterator.

        Raises:
            WorkerError: the first batch, from which the spec is read, could not be had.
            MemoryError: see the class.
        """
        if tf.executing_eagerly():
            raise RuntimeError(
                "QueueRunner.get_inputs: expected a graph to build in, got eager mode. Call it "
                "inside `with tf.Graph().as_default():`, or use dataset()."
            )
        if self._queue is not None:
            raise RuntimeError(
                "QueueRunner.get_inputs: this runner has a queue already. Reuse the tensors it "
                "returned, or make another QueueRunner."
            )
        spec = self._ready_spec()
        try:
            # An interrupt while TensorFlow builds may get lost, or leave the graph locked.
            with interrupts_held_back():
                with self._lock:  # stop() may come from another thread
                    if self._given_spec is None and not self._stopping.is_set():
                        self._start_workers()
                self._queue = _GraphQueue(self, spec)
                return self._queue.inputs(spec)
        except BaseException:
            self.stop()
            raise

    def start(self, sess: "tf.compat.v1.Session", n_threads: int | None = None) -> "QueueRunner":
        """Begins to feed the queue and returns the runner, for use as `with runner.start(sess):`.

        Leaving the `with` block stops everything, and raises the worker's error if there was one.

        Args:
            sess: a session of the graph in which `get_inputs` was called.
            n_threads: how many workers, in place of the constructor's `n_workers`.
        """
        if not isinstance(self._queue, _GraphQueue):
            raise RuntimeError(
                "QueueRunner.start: expected get_inputs() to have been called, in the session's "
                "graph, got no queue. Build the graph first."
            )
        if n_threads is not None:
            _expect(_is_count(n_threads), "n_threads must be an integer >= 1", n_threads)
        try:
            if n_threads not in (None, self.n_workers):
                self._change_count(int(n_threads))
            self._watch = self._watch or _InterruptWatch()
            self._launch(sess)
        except BaseException:
            self.stop()
            raise
        return self

    # ------------------------------------------------------------------ eager mode

    def dataset(self) -> tf.data.Dataset:
        """A `tf.data.Dataset` of batches for `model.fit`, `evaluate` and `for` loops.

        Workers start at the first iteration and stay for later ones. Over a finite iterator each
        iteration is one epoch: every sample once, then the end. An iteration left early goes on
        where it was left. Over an endless iterator give `steps_per_epoch` to `fit`.
        A worker's error is raised as `tf.errors.OpError` with the WorkerError's text, and as the
        WorkerError itself on leaving `with runner:`.
        """
        if isinstance(self._queue, _GraphQueue):
            raise RuntimeError(
                "QueueRunner.dataset: this runner serves a graph already. Make another."
            )
        self._left = False
        spec = self._ready_spec()
        self._watch = self._watch or _InterruptWatch()
        types = [_tf_type(component) for component in spec.components]

        def one_epoch(_: tf.Tensor) -> tf.data.Dataset:
            handle = tf.py_function(self._open_epoch, [], tf.resource)

            def dequeue(_: tf.Tensor) -> Any:
                parts = tf.raw_ops.QueueDequeueUpToV2(
                    handle=handle, n=self.batch_size, component_types=types
                )
                return _shaped(spec, parts)

            # The v1 map ends quietly where the queue is closed and empty; the v2 map would raise.
            steps = _v1.data.Dataset.range(np.iinfo(np.int64).max)
            return steps.map(tf.autograph.experimental.do_not_convert(dequeue))

        def never(_: tf.Tensor) -> tf.Tensor:
            return tf.ensure_shape(tf.py_function(self._end_of_dataset, [], tf.bool), [])

        plain = tf.autograph.experimental.do_not_convert
        batches = tf.data.Dataset.range(1).flat_map(plain(one_epoch))
        check = tf.data.Dataset.range(1).filter(plain(never)).flat_map(plain(one_epoch))
        return batches.concatenate(check)

    def _open_epoch(self) -> tf.Tensor:
        with self._lock:
            # A pipeline that reads ahead, of fit or of repeat(), outlives the `with` block.
            if self._left:
                raise WorkerError(
                    "QueueRunner: its `with` block has ended. Enter it again, or call dataset()."
                )
            if self._stopping.is_set() or self.error:
                self._reset()
            if not isinstance(self._queue, _EagerQueue) or self._queue.finished:
                again = self._pool is not None and self._feeder is not None
                self._queue = _EagerQueue(self, self._ready_spec())
                if again and self._pool is not None:
                    self._join_feeder()
                    self._pool.next_epoch()
                self._launch()
            return self._queue.queue.queue_ref

    def _end_of_dataset(self) -> bool:
        queue = self._queue
        if isinstance(queue, _EagerQueue):
            queue.finished = True
        self.raise_if_failed()
        return False

    # ------------------------------------------------------------------ both

    def depth(self) -> int:
        """Samples in the queue now; 0 when it is not running."""
        queue = self._queue
        if queue is None or self._feeder is None:
            return 0
        try:
            return queue.size()
        except (tf.errors.OpError, RuntimeError):
            return 0

    def raise_if_failed(self) -> None:
        """Raises the WorkerError of a failed worker; for loops without a `with` block."""
        if self.error is not None:
            # A copy, since an exception keeps the frames that it passes through, and with them the
            # caller's iterator over dataset(): this runner must not hold on to those.
            raise copy.copy(self.error) from self.error.__cause__

    def stop(self) -> None:
        """Ends and joins every worker and the feeder, and closes the queue. May be called twice."""
        with interrupts_held_back():
            left = self._stop()
        if left:
            warnings.warn(
                f"QueueRunner.stop: {len(left)} thread(s) did not end within 2 s. A thread cannot "
                "be stopped from outside: let the iterator return, or use workers='process'.\n"
                + "\n".join(left),
                RuntimeWarning,
                stacklevel=2,
            )

    def _stop(self) -> list[str]:
        self._stopping.set()
        while not self._lock.acquire(timeout=_TICK):
            self._stopping.set()  # whoever has the lock may have begun anew just now
        try:
            self._stopping.set()
            queue = None if self._feeder is None else self._queue
            if queue is not None:
                with contextlib.suppress(tf.errors.OpError, RuntimeError):
                    queue.close(cancel=True)
            if self._pool is not None:
                self._pool.wake()
            # The feeder goes first: it must not meet a pool that is half gone.
            self._join_feeder()
            if queue is not None:
                # Large samples lie in the workers' memory, which could not be given back.
                with contextlib.suppress(tf.errors.OpError, RuntimeError):
                    queue.drain()
            left = self._pool.stop() if self._pool else []
            self._pool, self._first = None, []
            self._abandoned.detach()
            if self._watch is not None:
                self._watch.close()
                self._watch = None
            _InterruptWatch.close_those_left()
            _RUNNING.discard(self)
            return left
        finally:
            self._lock.release()

    def __enter__(self) -> "QueueRunner":
        self._left = False
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._left = True
        self.stop()
        consequence = isinstance(error, (tf.errors.OutOfRangeError, tf.errors.CancelledError))
        consequence |= isinstance(error, tf.errors.OpError) and "WorkerError" in str(error)
        if error is None or consequence:
            self.raise_if_failed()

    def _reset(self) -> None:
        """Back to the state before the first batch, so that a stopped runner can run again."""
        self.stop()
        self._stopping.clear()
        self.error, self._queue = None, None

    def _ready_spec(self) -> Spec:
        """The given spec, or the first batch's: worker 0 starts, and its batch is kept."""
        with self._lock:
            if self._stopping.is_set():
                self._reset()
            if self._pool is None:
                self._new_pool()
            assert self._pool is not None
            if self._pool.spec is None:
                self._await_first(self._pool)
            assert self._pool.spec is not None
            self._check_memory(self._pool.spec)
            return self._pool.spec

    def _await_first(self, pool: Pool) -> None:
        """Starts workers one by one until one delivers; what they say is kept for the feeder."""
        began = time.monotonic()
        try:
            while not any(isinstance(message, Chunk) for message in self._first):
                if self._stopping.is_set():
                    raise WorkerError("QueueRunner: stopped before the first batch.")
                pool.set_active(max(1, pool.active))
                message = pool.get(_TICK)
                if message is None:
                    if self.timeout is not None and time.monotonic() - began > self.timeout:
                        raise self._as_error(self._stalled(pool, pool.active - 1))
                    continue
                self._first.append(message)
                if isinstance(message, Chunk):
                    break
                go_on = isinstance(message, Ended) or self.on_error == "continue"
                if not go_on or pool.active == pool.n_workers:
                    error = self._as_error(message)
                    raise error from error.__cause__
                pool.set_active(pool.active + 1)
        except BaseException:
            self.stop()
            raise

    def _new_pool(self) -> None:
        count = self.max_workers if self.n_workers == "auto" else int(self.n_workers)
        factory = IteratorFactory(self.iterator, count)
        with interrupts_held_back():
            self._pool = _POOLS[self.workers](factory, self._given_spec)
            self._pool.kept = self.capacity + 2 * self.batch_size
            # An interrupt between get_inputs and start leaves no one to call stop.
            self._abandoned = weakref.finalize(self, self._pool.stop)
        self._lost, self._scaler, self.delivering = set(), None, set()
        _RUNNING.add(self)

    def _change_count(self, count: int) -> None:
        self.n_workers = count
        if self._pool is None:
            return
        if self._pool.factory.shards or self._pool.active > count:
            # What has begun is another partition of the data, or more: begin again with this one.
            spec = self._pool.spec
            self._pool.stop()
            self._abandoned.detach()
            self._first = []
            self._new_pool()
            self._pool.spec = spec
        self._pool.factory.n_workers = self._pool.n_workers = count

    def _check_memory(self, spec: Spec) -> None:
        need, free = self.capacity * spec.bytes_per_sample, psutil.virtual_memory().available
        if need > free / 2:
            fits = int(free / 2 / max(spec.bytes_per_sample, 1))
            self.stop()
            raise MemoryError(
                f"QueueRunner: capacity={self.capacity} samples of {spec.bytes_per_sample:,} bytes "
                f"need {need / 1e9:.2f} GB, expected at most half of the free memory, "
                f"{free / 2e9:.2f} GB. Set capacity to {fits} or less, and min_after_dequeue below "
                "it."
            )

    def _launch(self, sess: "tf.compat.v1.Session | None" = None) -> None:
        with self._lock:
            if self._feeder is not None:
                raise RuntimeError("QueueRunner.start: it is running already. Call stop() first.")
            self._stopping.clear()
            if self._pool is None:
                self._new_pool()
            self.error, self.samples = None, 0
            assert self._pool is not None and self._queue is not None
            self._start_workers()
            if isinstance(self._queue, _GraphQueue):
                with interrupts_held_back():  # they produce while the queue's ops are prepared
                    self._queue.attach(sess)
            self._feeder = threading.Thread(
                target=self._feed, args=(self._pool, self._queue), name="labkit feeder", daemon=True
            )
            _RUNNING.add(self)
            self._feeder.start()

    def _start_workers(self) -> None:
        # By the caller, not the feeder: threads start twice as fast while the caller waits than
        # while its first step is being prepared.
        if self._pool is not None and self.n_workers != "auto":
            self._pool.set_active(self._pool.n_workers)

    def _join_feeder(self) -> None:
        feeder, self._feeder = self._feeder, None
        if feeder is not None and feeder is not threading.current_thread():
            feeder.join(2.0)

    # ------------------------------------------------------------------ the feeder thread

    def _feed(self, pool: Pool, queue: "_GraphQueue | _EagerQueue") -> None:
        if self.n_workers == "auto" and self._scaler is None:
            self._scaler = Scaler(pool.n_workers)
        scaler, watch, lost = self._scaler, self._watch, self._lost
        ended = set(lost)
        try:
            pool.set_active(_wanted(pool, scaler, ended))
            waiting, self._first = self._first, []
            look_again = 0.0
            while not self._stopping.is_set():
                message = waiting.pop(0) if waiting else pool.get(_TICK)
                if watch and watch.asked() and self._goes_on(watch, queue.size()):
                    self.error = WorkerError(
                        "QueueRunner: ended by an interrupt from which the consumer did not learn, "
                        "since it waited for data, or TensorFlow dropped the KeyboardInterrupt."
                    )
                    break
                if self.timeout is not None and time.monotonic() > look_again:
                    # Also while other workers deliver. What came while the consumer paused is taken
                    # in first: whoever sent it is not late.
                    look_again = time.monotonic() + _TICK
                    while (more := pool.get(0)) is not None:
                        waiting.append(more)
                    late = pool.late(self.timeout)
                    if late is not None:
                        waiting[:0] = [] if message is None else [message]
                        message = self._stalled(pool, late)
                if message is None:
                    continue
                if isinstance(message, Chunk):
                    chunks = _ready_together(message, waiting, pool)
                    arrays = message.arrays
                    if len(chunks) > 1:
                        columns = zip(*(chunk.arrays for chunk in chunks), strict=True)
                        arrays = [np.concatenate(column) for column in columns]
                    queue.enqueue(arrays)
                    self.samples += len(arrays[0])
                    for chunk in chunks:
                        self.delivering.add(chunk.worker)
                        pool.release(chunk)
                    if scaler and _window_over(scaler, chunks, pool.active - 1):
                        least = self.min_after_dequeue + self.batch_size
                        scaler.decide(full=queue.size() > (least + self.capacity) / 2)
                        pool.set_active(_wanted(pool, scaler, ended))
                    continue
                if not isinstance(message, Ended):
                    error = self._as_error(message)
                    first_loss = not lost
                    lost.add(message.worker)
                    if self.on_error == "raise" or len(lost) == pool.n_workers:
                        self.error = error
                        break
                    if first_loss:
                        warnings.warn(
                            f"{error}\nGoing on with the other workers.",
                            RuntimeWarning,
                            stacklevel=1,
                        )
                ended.add(message.worker)
                if scaler:
                    pool.set_active(_wanted(pool, scaler, ended))
                while ended.issuperset(range(pool.active)):
                    if pool.active == pool.n_workers or not pool.factory.shards:
                        return self._finish(pool)
                    pool.set_active(pool.active + 1)
        except BaseException as error:
            if not self._stopping.is_set():
                self.error = error
        finally:
            with contextlib.suppress(tf.errors.OpError, RuntimeError):
                queue.close(cancel=self.error is not None)
                if self.error is not None:
                    queue.drain()

    def _goes_on(self, watch: "_InterruptWatch", size: int) -> bool:
        """Whether the consumer still waits for data, or takes them, after an interrupt."""
        taken = self.samples - size
        watch.taken = taken if watch.taken is None else min(taken, watch.taken)
        waits = size < self.min_after_dequeue + self.batch_size
        return waits or taken > watch.taken + 2 * self.batch_size

    def _finish(self, pool: Pool) -> None:
        if not self.samples and not self._lost:
            self.error = self._as_error(Ended(0))
        elif pool.active > 1 and not pool.factory.shards:
            warnings.warn(
                f"QueueRunner: {pool.active} workers each delivered the whole of a finite "
                f"iterator, so every sample came {pool.active} times. Give the factory the "
                "parameters (worker, n_workers) and let it yield its share.",
                RuntimeWarning,
                stacklevel=1,
            )

    def _stalled(self, pool: Pool, worker: int) -> Failed:
        return Failed(
            worker,
            f"has delivered nothing for {self.timeout:g} s, expected a batch within timeout="
            f"{self.timeout:g} s. Find out what it waits for, or raise timeout",
            f"What it was doing:\n{pool.where(worker)}",
        )

    def _as_error(self, message: Message) -> WorkerError:
        if isinstance(message, Failed):
            text = f"QueueRunner: worker {message.worker} {message.summary}\n\n{message.text}"
        elif isinstance(message, Died):
            text = (
                f"QueueRunner: worker {message.worker} {message.how}. Its process left no "
                "traceback; look for a crash in native code, or for the system's killer of "
                "processes that use too much memory."
            )
        else:
            text = (
                "QueueRunner: the iterator ended before its first batch, expected at least one. "
                "Check that the factory returns a new iterator at each call, and that its data "
                "are found."
            )
        error = WorkerError(text)
        error.worker = message.worker
        if isinstance(message, Failed):
            error.__cause__ = message.error
        return error


class _GraphQueue:
    """The queue and its ops in one graph, run through one session."""

    def __init__(self, runner: QueueRunner, spec: Spec) -> None:
        self.batch_size = runner.batch_size
        types = [_tf_type(c) for c in spec.components]
        shapes = [c.shape for c in spec.components]
        with tf.name_scope("queue_runner"):
            self.queue = tf.queue.RandomShuffleQueue(
                runner.capacity, runner.min_after_dequeue, types, shapes, seed=runner.seed
            )
            self.placeholders = [
                _v1.placeholder(kind, (None, *shape))
                for kind, shape in zip(types, shapes, strict=True)
            ]
            self._enqueue_op = self.queue.enqueue_many(self.placeholders)
            # Large samples are queued one by one, as they lie, where enqueue_many copies them while
            # dequeues have to wait. In groups, since a call costs more than an op.
            feeds, singles = [], []
            for _ in range(_GROUPS[0] if spec.large else 0):
                sample = [_v1.placeholder(k, s) for k, s in zip(types, shapes, strict=True)]
                feeds += sample
                singles.append(self.queue.enqueue(sample))
            self._groups = [
                (size, tf.group(singles[:size]), feeds[: size * len(types)])
                for size in (_GROUPS if spec.large else ())
            ]
            self._close_op = self.queue.close()
            self._cancel_op = self.queue.close(cancel_pending_enqueues=True)
            self._size_op = self.queue.size()
            self._drain_op = tf.group(self.queue.dequeue_up_to(self.batch_size))

    def inputs(self, spec: Spec) -> Any:
        parts = self.queue.dequeue_up_to(self.batch_size)
        return _shaped(spec, parts if isinstance(parts, list) else [parts])

    def attach(self, sess: "tf.compat.v1.Session") -> None:
        self._enqueue_call = _in_callers_thread(sess, self._enqueue_op, self.placeholders)
        self._group_calls = [
            (size, _in_callers_thread(sess, group, feeds)) for size, group, feeds in self._groups
        ]
        self._close_call = _in_callers_thread(sess, self._close_op)
        self._cancel_call = _in_callers_thread(sess, self._cancel_op)
        self._size_call = _in_callers_thread(sess, self._size_op)
        self._drain_call = _in_callers_thread(sess, self._drain_op)

    def enqueue(self, arrays: list[Any]) -> None:
        if isinstance(arrays[0], np.ndarray):
            self._enqueue_call(*arrays)
            return
        samples = list(zip(*arrays, strict=True))
        for size, call in self._group_calls:
            while len(samples) >= size:
                call(*(part for sample in samples[:size] for part in sample))
                del samples[:size]

    def close(self, cancel: bool) -> None:
        (self._cancel_call if cancel else self._close_call)()

    def size(self) -> int:
        return int(self._size_call()[0])

    def drain(self) -> None:
        while self.size():
            self._drain_call()


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


class _EagerQueue:
    """The same queue without a graph, one for each epoch."""

    def __init__(self, runner: QueueRunner, spec: Spec) -> None:
        self.finished = False
        self.batch_size = runner.batch_size
        with tf.device("/CPU:0"):
            self.queue = tf.queue.RandomShuffleQueue(
                runner.capacity,
                runner.min_after_dequeue,
                [_tf_type(c) for c in spec.components],
                [c.shape for c in spec.components],
                seed=runner.seed,
            )

    def enqueue(self, arrays: list[Any]) -> None:
        with tf.device("/CPU:0"):
            if isinstance(arrays[0], np.ndarray):
                self.queue.enqueue_many(arrays)
                return
            for sample in zip(*arrays, strict=True):
                tf.raw_ops.QueueEnqueueV2(handle=self.queue.queue_ref, components=sample)

    def close(self, cancel: bool) -> None:
        self.queue.close(cancel_pending_enqueues=cancel)

    def size(self) -> int:
        return int(self.queue.size())

    def drain(self) -> None:
        with tf.device("/CPU:0"):
            while self.size():
                self.queue.dequeue_up_to(self.batch_size)


class _InterruptWatch:
    """Sees Ctrl-C while the main thread sits inside TensorFlow and cannot run Python's handler.

    Without it, an interrupt during a dequeue that waits for data would have to wait as well.
    Does nothing outside the main thread, or where something else listens already.
    """

    _left_open: ClassVar[list["_InterruptWatch"]] = []

    def __init__(self) -> None:
        self.since = 0.0
        self.taken: int | None = None
        self.sockets: tuple[socket.socket, socket.socket] | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        self.close_those_left()
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self.sockets = reader, writer
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            self._close_sockets()

    def asked(self) -> bool:
        """True from one second after an interrupt that has not ended the run by itself.

        Not where the program has a handler of its own for it.
        """
        if self.sockets is not None and not self.since:
            with contextlib.suppress(BlockingIOError):
                came = signal.SIGINT in self.sockets[0].recv(64)
                if came and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                    self.since = time.monotonic()
        return bool(self.since) and time.monotonic() - self.since > 1.0

    def close(self) -> None:
        if self.sockets is None:
            return
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            self._close_sockets()
        else:
            # Only the main thread may take the descriptor back. Until then it must stay open, or
            # signals would be written into whatever opens next under its number.
            self._left_open.append(self)

    @classmethod
    def close_those_left(cls) -> None:
        if threading.current_thread() is threading.main_thread():
            while cls._left_open:
                cls._left_open.pop().close()

    def _close_sockets(self) -> None:
        for end in self.sockets or ():
            end.close()
        self.sockets = None


def _ready_together(first: Chunk, waiting: list[Message], pool: Pool) -> list[Chunk]:
    """`first`, and what else is ready now if chunks are small: one enqueue then serves several."""
    chunks = [first]
    small = sum(getattr(array, "nbytes", _SMALL_BYTES) for array in first.arrays) < _SMALL_BYTES
    while small and len(chunks) < _TOGETHER:
        message = waiting.pop(0) if waiting else pool.get(0)
        if not isinstance(message, Chunk):
            if message is not None:
                waiting.insert(0, message)
            break
        chunks.append(message)
    return chunks


def _window_over(scaler: Scaler, chunks: list[Chunk], newest: int) -> bool:
    notes = [scaler.note(c.worker, newest, len(c.arrays[0]), c.seconds) for c in chunks]
    return any(notes)


def _wanted(pool: Pool, scaler: Scaler | None, ended: set[int]) -> int:
    """How many workers are to be active: of shares, the next one takes an ended one's turn."""
    if scaler is None:
        return pool.n_workers
    return min(pool.n_workers, scaler.count + (len(ended) if pool.factory.shards else 0))


def _tf_type(component: Component) -> tf.DType:
    return tf.string if component.is_text else tf.as_dtype(component.dtype)


def _shaped(spec: Spec, parts: Iterable[tf.Tensor]) -> Any:
    pairs = zip(spec.components, parts, strict=True)
    return spec.pack(tf.ensure_shape(part, (None, *c.shape)) for c, part in pairs)


def _is_count(value: Any) -> bool:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and int(value) >= 1


def _expect(condition: bool, what: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"QueueRunner: {what}, got {got!r}.")


def _spec_from(given: Any) -> Spec:
    spec = given if isinstance(given, Spec) else Spec(given)
    for component in spec.components:
        if not isinstance(component, Component):
            raise TypeError(
                "QueueRunner: spec must be a tuple or dict with a labkit.Component(name, shape, "
                f"dtype) at each leaf, got {component!r}."
            )
    return spec


def _stop_all() -> None:
    for runner in list(_RUNNING):
        runner.stop()


atexit.register(_stop_all)
