"""QueueRunner: your iterator, run by workers in the background, behind a TensorFlow queue.

workers ──chunks──► feeder thread ──enqueue_many──► RandomShuffleQueue ──► training

The article's, in a graph; what it does without one is in passes.py.
"""

import threading
import weakref
from typing import Any, Literal

from labkit.checks import expect, is_integer
from labkit.engine import interrupts
from labkit.engine.batches import Spec
from labkit.engine.feeder import Feeder
from labkit.engine.heard import warn_of_left
from labkit.engine.options import Options
from labkit.engine.state import Place, Resumable
from labkit.engine.tf_queue import GraphQueue, Shape
from labkit.passes import EagerPasses
from labkit.quiet import tf
from labkit.sources import taken_in


class QueueRunner(EagerPasses, Resumable):
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
            worker and pass. If it has parameters named `worker`, `n_workers` or `epoch`, it
            receives the worker's number (from 0), their count, and the number of the pass (from
            0), by which workers share one data set. Random numbers come from a parameter `rng`, a
            `numpy.random.Generator` of that worker and pass, or from `seed`, a `SeedSequence` to
            spawn from by the batch's number; both are filled in if they have no default, or the
            type as annotation. Or a data set: `labkit.from_files`, a Keras `PyDataset`, an object
            with `__len__` and `__getitem__`, all split by index; a `tf.data.Dataset` or another
            iterable, run by one worker.
        batch_size: samples that the model takes per step; free of the iterator's own chunk size.
        n_workers: how many, or "auto": grows and shrinks, up to `max_workers`, and prints why.
        workers: "thread", for iterators that wait (disk, network); "process", for those that hold
            Python's lock (GIL); "auto": tries both for a few seconds ahead, and prints why; or
            "ray": actors of a Ray cluster, see `labkit.engine.ray.RayPool`.
        capacity: samples the queue can hold. Default: min_after_dequeue + max(1000, 4 batches).
        min_after_dequeue: samples that stay behind for mixing; training starts above it.
            Default 1000, or four batches where that is more.
        spec: structure like a batch, with `labkit.Component(name, shape, dtype)` at each leaf (the
            shape without the batch axis). Default: read from the first batch, which is not lost.
        on_error: "raise"; "continue": go on with the other workers and warn once; "skip": leave
            out and count a batch that does not fit, or at which the iterator raised (of a data set
            read by sample, its whole batch), and warn of the first. A generator that raised is
            over, and so is the run, unless the factory has a parameter `start`, the number of the
            batch (of all workers, if it takes `n_workers`) to begin with. Or "restart": a new
            worker goes on with the lost one's share from `start`, each sample once. Without `start`
            it makes its pass again and what had come is dropped: once, if the batches are the same.
        timeout: seconds that a worker may spend on one batch before that counts as a failure and
            the error shows what it was doing; None waits for ever. Default 60.
        max_workers: the limit for "auto". Default: 32 threads, a process a core, an actor a CPU.
        seed: of the shuffling, of the order of a data set that is split by index, and of `seed` and
            `rng` of the iterator. None: drawn once.
        samples: of one pass of all workers (and trainers), if known: the length of Keras's epoch;
            another one is an error (not by what was left out). Default: that of a data set read by
            sample, or of a factory's `__len__` (in batches).
        reuses_buffers: the iterator may write into an array that it has yielded, so a thread copies
            what anybody else refers to. False saves that copy. Default True.
        order: "any", as batches come; or "fixed": with the same seed (none is 0) and n_workers the
            same sequence, to the bit, in each run; for every n_workers if worker i makes batches i,
            i + n_workers, ... Workers deliver in turn, so the slowest sets the pace.
        shuffle: False delivers samples in the order in which they come; nothing stays behind.
        shard: (rank, world), which of several trainers on one data set this is, as with
            MultiWorkerMirroredStrategy; each has n_workers, and they are numbered through all.
        uneven: how all trainers take equally many steps: "drop" cuts longer parts; "pad" fills up
            with samples of the pass again; or it is "endless". Two batches for each tell how many.
        max_skipped: how many batches "skip" may leave out of a pass; one more is a WorkerError.
            Default: 1 % of those that came so far, but at least 10.
        max_restarts: how often "restart" may, of a worker; then its error is raised.
        worker_options: of "ray": an actor's (num_cpus, resources, runtime_env, ...), and address.

    Attributes: each argument but `samples`, as it was given, and
        error: the WorkerError that ended the run, or None.
        samples: how many were put into the queue in this pass.
        skipped: batches that were left out since the start.
        delivering: numbers of the workers that have delivered since the start.

    Raises:
        TypeError, ValueError: an argument is not as above.
        MemoryError: the queue would need more than half of the free memory.
        WorkerError: in the consumer (by `with` or `raise_if_failed`): a worker's exception, death,
            stall or misfit batch, with the worker's number and traceback.
    """

    def __init__(
        self,
        iterator: Any,
        batch_size: int = 32,
        n_workers: int | Literal["auto"] = 1,
        workers: Literal["thread", "process", "ray", "auto"] = "thread",
        capacity: int | None = None,
        min_after_dequeue: int | None = None,
        spec: Any = None,
        on_error: Literal["raise", "continue", "skip", "restart"] = "raise",
        timeout: float | None = 60.0,
        max_workers: int | None = None,
        seed: int | None = None,
        samples: int | None = None,
        reuses_buffers: bool = True,
        order: Literal["any", "fixed"] = "any",
        shuffle: bool = True,
        max_skipped: int | None = None,
        shard: tuple[int, int] | None = None,
        uneven: Literal["drop", "pad", "endless"] = "drop",
        max_restarts: int = 3,
        worker_options: dict[str, Any] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        EagerPasses.__init__(self)
        self._made = lambda **new: Options(**taken_in({**given, **new}))
        self._options = self._made()
        self.iterator, self.n_workers = iterator, self._options.n_workers
        self._feeder: Feeder | None = None
        # Both end when nobody has this runner any more.
        self._workers_end: weakref.finalize | None = None
        self._ear_closes: weakref.finalize | None = None
        self._graph: GraphQueue | None = None
        self._place = Place()
        self._exited = False
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        name = getattr(self.iterator, "__qualname__", type(self.iterator).__name__)
        return f"<QueueRunner of {name}; fit, evaluate and predict take its .dataset()>"

    def __getattr__(self, name: str) -> Any:
        # Not `self._options`: while unpickled or half made, that would ask for itself for ever.
        options = self.__dict__.get("_options")
        if options is None or name.startswith("_"):
            raise AttributeError(f"'QueueRunner' object has no attribute {name!r}")
        return getattr(options, name)

    # ------------------------------------------------------------------ graph mode

    def get_inputs(self) -> Any:
        """Builds the queue in the default graph and returns the batch that it yields.

        The workers begin to produce here, but with a given `spec` at `start`. Until then `stop()`
        ends them, so write `with runner:` around both where the code between may fail.

        Returns:
            Tensors in the iterator's structure, each `[batch, ...]`; the batch axis is
            `batch_size`, and smaller only for the last batch of a finite iterator.

        Raises:
            WorkerError, MemoryError: see the class; also of the first batch, which gives the spec.
        """
        if tf.executing_eagerly():
            raise RuntimeError(
                "QueueRunner.get_inputs: expected a graph to build in, got eager mode. Call it "
                "inside `with tf.Graph().as_default():`, or use dataset()."
            )
        if self._graph is not None or self._place.queue is not None:
            raise RuntimeError(
                "QueueRunner.get_inputs: this runner has a queue already. Reuse the tensors it "
                "returned, or make another QueueRunner."
            )
        shape = self._shape()
        try:
            # An interrupt while TensorFlow builds may get lost, or leave the graph locked.
            with interrupts.held_back():
                self._graph = GraphQueue(shape)
                return self._graph.inputs()
        except BaseException:
            self.stop()
            raise

    def start(self, sess: "tf.compat.v1.Session", n_threads: int | None = None) -> "QueueRunner":
        """Begins to feed the queue and returns the runner, for use as `with runner.start(sess):`.

        Leaving the `with` block stops everything, and raises the worker's error if there was one.

        Args:
            sess: a session of the graph in which `get_inputs` was called, or a MonitoredSession.
            n_threads: how many workers, of any kind (the article's name), in place of `n_workers`.
        """
        if self._graph is None:
            raise RuntimeError(
                "QueueRunner.start: expected get_inputs() to have been called, in the session's "
                "graph, got no queue. Build the graph first."
            )
        fits = n_threads is None or is_integer(n_threads, 1)
        expect(fits, "QueueRunner: n_threads must be an integer >= 1", n_threads)
        try:
            with self._lock:
                if self._place.queue is not None and self._alive() is not None:
                    raise RuntimeError("QueueRunner.start: it is running already. stop() it first.")
                self._listen()
                feeder = self._with_workers(self._graph.spec, n_threads)
                with interrupts.held_back():  # they produce while the queue's ops are prepared
                    self._place.begin(self._graph.attach(sess))
                feeder.feed(self._place.queue, self._place.newest, interrupts.ear.now())
        except BaseException:
            self.stop()
            raise
        return self

    # ------------------------------------------------------------------ with or without a graph

    @property
    def error(self) -> BaseException | None:
        return None if self._feeder is None else self._feeder.error

    @property
    def samples(self) -> int:
        return 0 if self._feeder is None else self._feeder.samples

    @property
    def skipped(self) -> int:
        return 0 if self._feeder is None else self._feeder.heard.skips.count

    @property
    def delivering(self) -> set[int]:
        return set() if self._feeder is None else self._feeder.heard.workers

    def depth(self) -> int:
        """Samples in the queue now; 0 when it is not running."""
        return 0 if self._feeder is None else self._feeder.depth()

    def watch(self) -> Any:
        """Shows queue, waiting, CPU and GPUs while it runs: `labkit.instruments.live.of_run`."""
        from labkit.instruments.live import of_run

        return of_run(self)

    def raise_if_failed(self) -> None:
        """Raises the WorkerError of a failed worker; for loops without a `with` block."""
        if self._feeder is not None:
            self._feeder.raise_if_failed()

    def stop(self) -> None:
        """Ends and joins every worker and the feeder, and closes the queue. May be called twice."""
        with interrupts.held_back():
            if (feeder := self._feeder) is not None:
                feeder.begin_stop()  # whoever has the lock may wait for a batch
            with self._lock:
                left = [] if self._feeder is None else self._feeder.stop()
                self._place.stop()
                self._passed.clear()
                if self._workers_end is not None:
                    self._workers_end.detach()
                if self._ear_closes is not None:
                    self._ear_closes()
                    self._ear_closes = None
            interrupts.ear.tidy()
        warn_of_left(left)

    def __enter__(self) -> "QueueRunner":
        self._exited = False
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._exited = True
        self.stop()
        # Where a worker has failed, what TensorFlow says of it is a consequence.
        if error is None or isinstance(error, tf.errors.OpError):
            self.raise_if_failed()

    def _alive(self) -> Feeder | None:
        feeder = self._feeder
        return feeder if feeder is not None and feeder.alive else None

    def _with_workers(self, spec: Spec | None, count: int | None = None) -> Feeder:
        """The run that is on, or a new one: its workers begin the pass that follows the newest."""
        with self._lock:
            feeder = self._alive()
            if count not in (None, self.n_workers):
                self.n_workers = count
                if feeder is not None and feeder.pool.takes(count):
                    feeder.pool.factory.n_workers = count
                else:
                    feeder = None
            if feeder is None:
                if self._feeder is not None:
                    if self._feeder.owes_an_error:
                        self._feeder.raise_if_failed()
                    self._feeder.stop()
                self._options.choose_kind()
                with interrupts.held_back():
                    feeder = self._feeder = self._options.feeder(
                        self.n_workers, spec, self._place.newest + 1, self._place.resumed
                    )
                    if self._workers_end is not None:
                        self._workers_end.detach()
                    self._workers_end = weakref.finalize(self, feeder.abandon)
                    self._workers_end.atexit = False
            return feeder

    def _shape(self) -> Shape:
        """The queue's: by the given spec, or else by the first batch."""
        try:
            spec = self._options.spec or self._with_workers(None).spec()
            return Shape(*self._options.queue(spec))
        except BaseException:
            self.stop()
            raise

    def _listen(self) -> None:
        if self._ear_closes is None:
            interrupts.ear.open()
            self._ear_closes = weakref.finalize(self, interrupts.ear.close)
