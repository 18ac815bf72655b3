"""The generator alone, the model alone, and both together, each for a short while.

What is measured leaves a Keras model as it was; a step of the user's only they can undo.
"""

import inspect
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import psutil

from labkit.checks import is_number
from labkit.engine import KINDS, interrupts
from labkit.engine.batches import Spec
from labkit.engine.messages import WorkerError
from labkit.engine.pool import Job, delivered
from labkit.engine.produce import IteratorFactory
from labkit.engine.stage import Times
from labkit.instruments.stages import Stage, stages_of
from labkit.machine import usable_cores
from labkit.passes import untuned
from labkit.queue_runner import QueueRunner
from labkit.quiet import tf
from labkit.sources import whole

_PATIENCE = 3.0  # seconds to wait until every worker delivers
_SETTLE = 0.8  # seconds to wait until what they had stored is used up
_TIMEOUT = 60.0  # seconds for a batch of the generator alone
_HELD = 4  # batches that a worker has at a time, those on their way included
_MOST_COPIED, _MOST_COPYING = 1 << 24, 8  # bytes, threads
_NOTHING = "diagnose: the iterator ended before its first batch, expected at least one."
_ABSENT = object()
_RAYS_OWN = re.compile(r"^ray::IDLE|/ray/(core|_private|dashboard)/")

Iterators = Callable[..., Iterable[Any]]


def first_batch(iterator: Iterators) -> tuple[Any, Spec]:
    try:
        batch = next(iter(IteratorFactory(iterator, 1)(0, 0)))
    except StopIteration:
        raise WorkerError(_NOTHING) from None
    return batch, Spec.of(batch)


def repeat(batch: Any, spec: Spec, size: int) -> tf.data.Dataset:
    """The batch, cut or repeated to `size` rows, for ever."""
    arrays = [np.resize(array, (size, *array.shape[1:])) for array in spec.flatten(batch)]
    return untuned(tf.data.Dataset.from_tensors(spec.pack(arrays)).repeat())


class Alone(NamedTuple):
    """The generator without a model: samples/s, processor seconds per sample, the seconds per
    sample that the iterator itself takes, without what handing the batches over takes, what of a
    batch its stages take, and bytes of memory that a worker takes."""

    rate: float
    cpu: float
    own: float
    stages: Sequence[Stage] = ()
    memory: float = 0.0


def alone(iterator: Iterators, kind: str, n: int, seconds: float) -> Alone:
    """Runs the generator in n workers of a kind, from when each has delivered."""
    n = 1 if whole(iterator) else n
    others = _workers()
    pool = KINDS[kind].pool(Job(IteratorFactory(iterator, n), timeout=_TIMEOUT, stages=True))
    times: list[Times] = []
    heard: set[int] = set()
    began, first, cpu, own, chunks, samples = time.monotonic(), 0.0, 0.0, 0.0, 0, 0
    try:
        for chunk in filter(None, delivered(pool, 1.0, "diagnose")):
            now = time.monotonic()
            heard.add(chunk.worker)
            if first:
                chunks, samples = chunks + 1, samples + len(chunk.arrays[0])
                own += chunk.seconds
                times += [] if chunk.stages is None else [chunk.stages]
                if now - first > seconds and chunks >= 3 * n:
                    break
            # In a second pass all have had their turn: who is not heard has no batch.
            elif len(heard) == n or chunk.epoch or now - began > _PATIENCE:
                first, cpu = now, time.process_time()
        else:
            raise WorkerError(_NOTHING)
        used = time.process_time() - cpu
        size = pool.spec.bytes_per_sample * samples / chunks if pool.spec else 0.0
        memory = _HELD * size + sum(map(_bytes_of, _workers() - others)) / n
    finally:
        pool.stop()
    rate, stages = samples / (now - first), stages_of(times, own)
    return Alone(rate, used / samples, own / samples, stages, memory)


def _workers() -> set[psutil.Process]:
    return set(filter(_is_worker, psutil.Process().children(recursive=True)))


def _is_worker(process: psutil.Process) -> bool:
    """And none of Ray's own servers, nor what it has ready, if it was started meanwhile."""
    try:
        return not _RAYS_OWN.search(" ".join(process.cmdline()))
    except psutil.Error:
        return False


def _bytes_of(process: psutil.Process) -> int:
    """What it has for itself alone, which each further one takes again; or else all that it has."""
    try:
        return process.memory_full_info().uss
    except psutil.NoSuchProcess:
        return 0
    except (psutil.Error, AttributeError):
        return process.memory_info().rss


def bandwidth(nbytes: int, seconds: float) -> float:
    """Bytes/s that one thread copies, or one thread a core if those copy more: in arrays of
    `nbytes`, for `seconds` each."""
    size = int(np.clip(nbytes, 1, _MOST_COPIED))

    def copied(_: int) -> float:
        source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
        count, began = 0, time.perf_counter()
        while not count or time.perf_counter() - began < seconds:
            np.copyto(target, source)
            count += 1
        return count * size / (time.perf_counter() - began)

    found = []
    for n in (1, min(usable_cores(), _MOST_COPYING)):
        with ThreadPoolExecutor(n) as threads:
            found.append(sum(threads.map(copied, range(n))))
    return max(found)


def together(
    iterator: Iterators, model: "Model", kind: str, n: int, size: int, seconds: float
) -> float:
    """Steps/s of generator and model with n workers of a kind, once the queue is steady."""
    made = IteratorFactory(iterator, n)
    # A small queue, so that what was stored at the start does not count as speed.
    options: dict[str, Any] = {"workers": kind, "capacity": 4 * size, "min_after_dequeue": 0}
    # A factory that names n_workers is taken to share: each of these short runs would warn of one
    # that does not, and the first real one still does.
    with QueueRunner(
        lambda worker, n_workers, epoch: made(worker, epoch), size, n, **options, timeout=120
    ) as runner:
        batches = runner.dataset().repeat()
        # What they have ready, beside the 4 in the queue, says nothing of their speed.
        ready = n * KINDS[kind].ahead + 4
        watch = Watch(
            seconds, lambda: len(runner.delivering) == n or runner._place.newest > 0, ready, n + 2
        )
        step, _ = model.run(batches, watch)
    return 1 / step


class Model:
    """Something that takes steps; `run` returns seconds and processor seconds per step.

    `taken` counts the steps; `puts_back` tells whether they leave no trace after `kept()`.
    """

    def __init__(
        self,
        take: Callable[[Any], Any],
        restore: Callable[[], Any] | None = None,
        puts_back: bool = False,
    ) -> None:
        self.take, self.restore, self.puts_back = take, restore, puts_back or restore is not None
        self.taken = 0

    @staticmethod
    def of(model: Any, restore: Callable[[], Any] | None) -> "Model":
        if is_number(model) and model > 0:
            return Model(lambda batch: time.sleep(model), restore, puts_back=True)
        if isinstance(model, tf.keras.Model):
            if not model.compiled:
                raise TypeError("diagnose: expected a compiled Keras model; call model.compile().")
            return _KerasModel(model, restore)
        if callable(model):
            return Model(_unpacking(model), restore)
        raise TypeError(
            "diagnose: model must be a compiled Keras model, a callable train step or the seconds "
            f"per step (> 0), got {model!r}."
        )

    def build(self, batches: tf.data.Dataset) -> None:
        """Gives it all the state that the steps will change."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Puts back what the steps within change, as far as that is known."""
        try:
            yield
        finally:
            if self.restore is not None:
                self.restore()

    def run(self, dataset: Any, watch: "Watch") -> tuple[float, float]:
        self._walk(dataset, watch.enough)
        return watch.result()

    def _walk(self, dataset: tf.data.Dataset, enough: Callable[[], bool]) -> None:
        for batch in dataset:
            self.taken += 1
            self.take(batch)
            if enough():
                break


class _KerasModel(Model):
    def __init__(self, model: Any, restore: Callable[[], Any] | None) -> None:
        super().__init__(model, restore, puts_back=True)
        self.model = model

    def _optimizers(self) -> list[Any]:
        """Its own, and those that a `train_step` of the user's keeps in other attributes."""
        kind = tf.keras.optimizers.Optimizer
        found = [self.model.optimizer]
        for value in vars(self.model).values():
            value = list(value.values()) if isinstance(value, dict) else value
            found += value if isinstance(value, (list, tuple)) else [value]
        return list({id(thing): thing for thing in found if isinstance(thing, kind)}.values())

    def build(self, batches: tf.data.Dataset) -> None:
        model, main = self.model, self.model.optimizer
        parts = model._flatten_layers()
        others = [optimizer for optimizer in self._optimizers() if optimizer is not main]
        if all(part.built for part in [*parts, *others]):
            return
        # Any number of rows: a Sequential model would insist on the first batch's for ever.
        batch = tf.nest.map_structure(
            lambda part: tf.TensorSpec([None, *part.shape[1:]], part.dtype), batches.element_spec
        )

        def step(data: Any) -> Any:
            return model.distribute_strategy.run(model.train_step, args=(data,))

        try:
            # Traced, not run: variables come into being as in the first fit, and stay as they are.
            tf.function(step, autograph=False).get_concrete_function(batch)
        except Exception as error:
            first_line = (str(error).strip() or "no message").split("\n")[0]
            raise TypeError(
                f"diagnose: expected a Keras model that is built, or that the first batch can "
                f"build without a training step; {type(model).__name__} is not, and building it "
                f"raised {type(error).__name__}: {first_line}\nCheck that the batch fits the "
                "model, and build it first: call it once on a batch, model(x)."
            ) from error

    @contextmanager
    def kept(self) -> Iterator[None]:
        with super().kept():
            model = self.model
            if model.optimizer is not None and not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
            variables = [*model.variables, *model.metrics_variables]
            for optimizer in self._optimizers():
                variables += optimizer.variables
            before = [variable.numpy() for variable in variables]
            names = ("stop_training", "history")
            attributes = {name: getattr(model, name, _ABSENT) for name in names}
            try:
                yield
            finally:
                with interrupts.held_back():
                    # Those that came into being with the first step were fresh before it.
                    model.reset_metrics()
                    for variable, value in zip(variables, before, strict=True):
                        variable.assign(value)
                    for name, attribute in attributes.items():
                        if attribute is not _ABSENT:
                            setattr(model, name, attribute)
                        elif hasattr(model, name):
                            delattr(model, name)

    def _walk(self, dataset: tf.data.Dataset, enough: Callable[[], bool]) -> None:
        model = self.model

        class Stop(tf.keras.callbacks.Callback):
            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                if enough():
                    model.stop_training = True

        model.fit(dataset, steps_per_epoch=1_000_000, verbose=0, shuffle=False, callbacks=[Stop()])


class Watch:
    """Decides when there were steps enough, and `least` of them: counted from when all workers
    deliver and what they had `stored` is used up."""

    def __init__(
        self,
        seconds: float,
        ready: Callable[[], bool] = lambda: True,
        stored: int = 2,
        least: int = 8,
    ) -> None:
        self.seconds, self.ready, self.least = seconds, ready, max(8, least)
        self.began, self.left, self.steps = time.monotonic(), stored, 0
        self.since = 0.0  # all deliver
        self.first = self.last = (0.0, 0.0)

    def enough(self) -> bool:
        # Taken here, since the end of an iteration may have to wait for one more batch.
        self.last = now, _ = time.monotonic(), time.process_time()
        if not self.since:
            if not self.ready() and now - self.began < _PATIENCE:
                return False
            self.since = now
        if self.left:
            # Where the model is slow it never uses up what is stored, and that does no harm.
            self.left = self.left - 1 if now - self.since < _SETTLE else 0
            if not self.left:
                self.first = self.last
            return False
        self.steps += 1
        return self.steps >= self.least and now - self.first[0] > self.seconds

    def result(self) -> tuple[float, float]:
        if self.steps < 1:
            raise WorkerError("diagnose: the data ended before three steps were made.")
        wall, cpu = (end - start for start, end in zip(self.first, self.last, strict=True))
        return wall / self.steps, cpu / self.steps


def _unpacking(step: Callable[..., Any]) -> Callable[[Any], Any]:
    try:
        needed = [
            p for p in inspect.signature(step).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]  # fmt: skip
    except (TypeError, ValueError):
        return step
    return (lambda batch: step(*batch)) if len(needed) > 1 else step
