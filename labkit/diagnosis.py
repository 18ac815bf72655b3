"""Is it the input? Threads or processes? How many? Predicted from short measurements, then checked.

The prediction is the operational laws of queueing (P. J. Denning, J. P. Buzen, "The operational
analysis of queueing network models", 1978): no rate can exceed any of its asymptotic bounds. Where
workers and training step get into each other's way the laws are too hopeful, so each kind of
worker is also run together with the model, in a few numbers, and that corrects them.
"""

import base64
import html
import inspect
import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np

from labkit.auditing import Audit, audit, expect, is_count
from labkit.engine import KINDS, interrupts
from labkit.engine.batches import Spec
from labkit.engine.messages import Chunk, Ended, WorkerError
from labkit.engine.pool import Job
from labkit.engine.produce import IteratorFactory
from labkit.machine import usable_cores
from labkit.queue_runner import QueueRunner
from labkit.quiet import tf

__all__ = ["Audit", "Demands", "Report", "Row", "audit", "bounds", "diagnose"]

Kind = Literal["thread", "process"]
_KINDS: tuple[Kind, ...] = ("thread", "process")
_THREADS = (1, 2, 4, 8, 16, 32)
_ROUNDS = 2
_STARTS = 4  # what starting the workers takes, in runs
_PATIENCE = 3.0  # seconds to wait until every worker delivers
_NOISE = 0.06
_ABSENT = object()


@dataclass
class Demands:
    """What a batch and a step cost, in seconds: the whole input of the prediction.

    Attributes:
        wall: of the generator, per batch, alone in one worker.
        cpu: processor seconds of the generator per batch.
        lock: seconds per batch during which no second worker of this kind can go on: the inverse
            of the best rate that several reached. For threads that is chiefly Python's lock.
        step: of the model, per step, on a repeated batch.
        step_cpu: processor seconds of the model per step.
        cores: that this process may use.
    """

    wall: float
    cpu: float
    lock: float
    step: float
    step_cpu: float
    cores: int


def bounds(n: int, demands: Demands) -> dict[str, float]:
    """Steps/s that n workers cannot exceed, by what sets each bound; the least of them governs."""
    d = demands
    return {
        "the generator": n / d.wall,
        "Python's lock": 1 / d.lock if n > 1 and d.lock > 0 else np.inf,
        "the cores": d.cores / max(d.cpu + d.step_cpu, 1e-9),
        "the model": 1 / d.step,
    }


@dataclass
class Row:
    """One setting: its predicted steps/s with a range, and what was measured, if it was."""

    workers: Kind
    n: int
    predicted: float
    low: float
    high: float
    bound_by: str
    measured: float | None = None


@dataclass
class Report:
    """The diagnosis. Show it in a notebook, or print it.

    Attributes:
        verdict: one sentence: what bounds the training, and by how much.
        nature: what the generator does: "waits", "holds the GIL", "uses all cores" or "computes
            outside the GIL"; "computes" where threads were not considered.
        rows: predicted steps/s for each kind and number of workers.
        best: the recommended row.
        speed_up: predicted rate of `best` over that of the plain serial loop.
        model_rate, serial_rate: steps/s of the model alone, and of generator and model in turn.
        seconds: what the diagnosis took.
    """

    verdict: str
    nature: str
    rows: list[Row]
    best: Row
    speed_up: float
    model_rate: float
    serial_rate: float
    demands: dict[Kind, Demands]
    seconds: float
    iterator: Callable[..., Iterable[Any]] = field(repr=False)
    model: "_Model" = field(repr=False)
    batch_size: int = 0

    def runner(self, **options: Any) -> QueueRunner:
        """A `QueueRunner` as recommended; `options` go to its constructor and win."""
        chosen = {"batch_size": self.batch_size, "n_workers": self.best.n}
        return QueueRunner(self.iterator, **{**chosen, "workers": self.best.workers, **options})

    def check(self, seconds: float = 4.0) -> list[Row]:
        """Runs the recommended setting and two others, and returns the rows with `measured` set.

        The model gets its state back afterwards, or `restore` is called, as for `diagnose`.

        Raises:
            ValueError: seconds, for each setting, is not above 0.
            WorkerError: the iterator failed.
        """
        _expect_seconds("check", seconds)
        others = sorted(
            (row for row in self.rows if row is not self.best),
            key=lambda row: (row.workers == self.best.workers, -abs(np.log(row.n / self.best.n))),
        )
        # One of the other kind and one of the same, each the nearest in number.
        picked = [self.best, *{row.workers: row for row in others}.values()]
        with self.model.kept():
            for row in picked:
                row.measured = self._measure(row, seconds)
        return picked

    def _measure(self, row: Row, seconds: float) -> float:
        return _together(self.iterator, self.model, row.workers, row.n, self.batch_size, seconds)

    def plot(self) -> Any:
        """Predicted steps/s over the number of workers, with what was measured as points."""
        from labkit.instruments import plots
        from labkit.machine import describe_machine

        return plots.diagnosis(self, describe_machine())

    @property
    def note(self) -> str:
        """That a callable step was really taken, and how often, if nothing puts that right."""
        if self.model.puts_back:
            return ""
        return (
            f"Your step was really taken, {self.model.taken:,} times, and has trained whatever it "
            "trains. Give diagnose(..., restore=) a function that puts that back."
        )

    def __str__(self) -> str:
        lines = [self.verdict, *([self.note] if self.note else []), ""]
        lines.append("workers   n   steps/s predicted      measured   bound by")
        for row in self.rows:
            mark = "<- recommended" if row is self.best else ""
            measured = f"{row.measured:8.1f}" if row.measured else " " * 8
            lines.append(
                f"{row.workers:8}{row.n:3}   {row.predicted:8.1f} ({row.low:.0f} to {row.high:.0f})"
                f"{'':3}{measured}   {row.bound_by} {mark}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        bold = " style='font-weight:bold'"
        cells = "".join(
            f"<tr{bold if row is self.best else ''}><td>{row.workers}</td>"
            f"<td>{row.n}</td><td>{row.predicted:.1f}</td><td>{row.low:.0f} to {row.high:.0f}</td>"
            f"<td>{'' if row.measured is None else f'{row.measured:.1f}'}</td>"
            f"<td>{row.bound_by}</td></tr>"
            for row in self.rows
        )
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        picture = io.BytesIO()
        self.plot().savefig(picture, format="png")
        image = base64.b64encode(picture.getvalue()).decode()
        return (
            f"<p><b>{html.escape(self.verdict)}</b></p>{note}<table><tr><th>workers</th><th>n</th>"
            "<th>steps/s predicted</th><th>range</th><th>measured</th><th>bound by</th></tr>"
            f'{cells}</table><img style="max-width:100%" src="data:image/png;base64,{image}">'
        )


def diagnose(
    iterator: Callable[..., Iterable[Any]],
    model: Any,
    seconds: float = 20.0,
    batch_size: int | None = None,
    progress: bool = True,
    workers: Kind | Iterable[Kind] = _KINDS,
    restore: Callable[[], Any] | None = None,
) -> Report:
    """Finds out what bounds the training, and which workers would cure it.

    Measures the generator alone (one and two threads, one and two processes), the model alone on a
    repeated batch, and both together; predicts the rest.

    A compiled Keras model gets its state back, also after an error or an interrupt: weights, the
    variables of its optimizers (with the count of iterations, which learning-rate schedules
    follow), metrics, seed generators, `stop_training` and `history`. One that is not built yet is
    built from the first batch, as its first `fit` would do it. Random states outside the model
    (Python's, NumPy's, TensorFlow's) move on.

    **A callable step is really taken**, hundreds or thousands of times, and trains whatever it
    trains; the report says how often. Only `restore` puts that back.

    Args:
        iterator: an iterator factory, as for `QueueRunner`.
        model: a compiled Keras model; or a callable that takes one training step, as `step(batch)`
            or `step(x, y)`; or the seconds that a step takes.
        seconds: rough total to spend. Default 20.
        batch_size: samples per step. Default: as many as the generator's batches have.
        progress: show a bar.
        workers: the kinds to consider: "thread", "process", or several of them. Default: both.
            One thread is measured in any case, since that is the serial loop.
        restore: called without arguments when `diagnose` has used the step, and again when the
            report's `check()` has, also where they fail.

    Raises:
        TypeError: the model is none of these, is not compiled, or cannot be built without a step;
            or the iterator is no factory, or cannot be sent to a process where only those are
            considered.
        ValueError: another argument is not as above.
        WorkerError: the iterator failed; its traceback is in the message.
    """
    _expect_seconds("diagnose", seconds)
    expect(
        batch_size is None or is_count(batch_size),
        "diagnose: batch_size must be None or an integer >= 1",
        batch_size,
    )
    expect(
        restore is None or callable(restore),
        "diagnose: restore must be None or callable as restore()",
        restore,
    )
    kinds = _kinds(workers)
    began = time.monotonic()
    runs = _Model.of(model, restore)
    with _Progress(progress) as bar:
        bar("first batch")
        first, spec = _first_batch(iterator)
        size = int(batch_size or len(np.asarray(spec.flatten(first)[0])))
        repeated = _repeat(first, spec, size)
        runs.build(repeated)
        # Runs of the generator, 2 of the model, and up to 8 settings of both, in rounds.
        slot = seconds / (6 + 8 * _ROUNDS + _STARTS)
        with runs.kept():
            measured = _measure(iterator, runs, repeated, size, kinds, slot, bar)
    return _report(measured, began, iterator, runs, size)


def _expect_seconds(who: str, seconds: Any) -> None:
    number = isinstance(seconds, (int, float, np.number)) and not isinstance(seconds, bool)
    fits = number and 0 < seconds < np.inf
    expect(fits, f"{who}: seconds must be a number > 0", seconds)


def _kinds(workers: Any) -> tuple[Kind, ...]:
    several = isinstance(workers, Iterable) and not isinstance(workers, (str, bytes))
    given = list(workers) if several else [workers]
    expect(
        bool(given) and all(isinstance(kind, str) and kind in _KINDS for kind in given),
        "diagnose: workers must be 'thread', 'process' or a tuple of these, the kinds to consider",
        workers,
    )
    return tuple(kind for kind in _KINDS if kind in given)


class _Measured(NamedTuple):
    """What `diagnose` measured: rates of the generator alone, samples/s; seconds per step of the
    model at the start and at the end; steps/s of both together."""

    alone: dict[tuple[Kind, int], "_Alone"]
    problems: dict[Kind, str]
    demands: dict[Kind, Demands]
    together: dict[tuple[Kind, int], list[float]]
    step: float
    again: float


def _measure(
    iterator: Callable[..., Iterable[Any]],
    runs: "_Model",
    repeated: tf.data.Dataset,
    size: int,
    kinds: tuple[Kind, ...],
    slot: float,
    bar: "_Progress",
) -> _Measured:
    bar("model alone")
    runs.run(repeated, 0.2)
    step, step_cpu = runs.run(repeated, slot)
    alone, problems = _alone_in_each(iterator, kinds, slot, bar)
    demands: dict[Kind, Demands] = {}
    cores = usable_cores()
    cpu = size * alone["thread", 1].cpu
    for kind in kinds:
        if kind not in problems:
            one, two = alone[kind, 1], alone[kind, 2]
            lock = size / two.rate if two.rate < 1.6 * one.rate else 0.0
            demands[kind] = Demands(size / one.rate, cpu, lock, step, step_cpu, cores)
    settings = [(kind, n) for kind, need in demands.items() for n in _to_try(kind, need)]
    together: dict[tuple[Kind, int], list[float]] = {setting: [] for setting in settings}
    bar.expect(len(settings) * _ROUNDS + 1)
    for _ in range(_ROUNDS):
        for kind, n in settings:
            bar(f"both, {n} {_workers(kind, n)}")
            together[kind, n].append(_together(iterator, runs, kind, n, size, slot))
    bar("model alone again")
    again, _ = runs.run(repeated, slot)
    return _Measured(alone, problems, demands, together, step, again)


def _report(
    measured: _Measured,
    began: float,
    iterator: Callable[..., Iterable[Any]],
    runs: "_Model",
    size: int,
) -> Report:
    alone, problems, demands, together, step, again = measured
    drift = abs(again / step - 1)
    rows = [
        row
        for kind, need in demands.items()
        for row in _predict(
            kind, need, {n: fmean(v) for (k, n), v in together.items() if k == kind}, _NOISE + drift
        )
    ]
    nature = _nature(alone)
    model_rate = 2 / (step + again)
    wall = size / alone["thread", 1].rate
    serial = 1 / (wall + 1 / model_rate)
    top = max(row.predicted for row in rows)
    # The cheapest of those that are as good: fewer workers, and threads before processes.
    good = [row for row in rows if row.predicted >= 0.97 * top]
    best = min(good, key=lambda row: (row.workers == "process", row.n))
    verdict = _verdict(nature, best, model_rate, serial, wall)
    if problems:
        verdict += " Processes could not be tried: " + problems["process"].split("\n")[0]
    return Report(
        verdict, nature, rows, best, best.predicted / serial, model_rate, serial, demands,
        time.monotonic() - began, iterator, runs, size,
    )  # fmt: skip


def _counts(kind: Kind, need: Demands) -> list[int]:
    if kind == "thread":
        return list(_THREADS)
    return sorted({n for n in _THREADS if n <= max(2, need.cores)} | {max(2, need.cores)})


def _contended(n: int, need: Demands) -> bool:
    """Whether more than the generator's own time may decide with n workers."""
    return n / need.wall > 0.7 * _ceiling(n, need)


def _ceiling(n: int, need: Demands) -> float:
    return min(value for name, value in bounds(n, need).items() if name != "the generator")


def _to_try(kind: Kind, need: Demands) -> list[int]:
    """The settings that are worth running together with the model: the first and the last in which
    workers only wait, and those in which they get into each other's way, up to four times as many
    as the law finds useful: more bring no news."""
    counts = _counts(kind, need)
    free = [n for n in counts if not _contended(n, need)]
    useful = next((n for n in counts if n / need.wall >= _ceiling(n, need)), counts[-1])
    most = 4 * max(2, useful)
    return sorted({1, *free[-1:], *(n for n in counts if n not in free and n <= most)})


def _predict(kind: Kind, need: Demands, measured: dict[int, float], margin: float) -> list[Row]:
    """The law for every number of workers, corrected by the rates that were measured together."""
    law = {n: min(bounds(n, need).values()) for n in _counts(kind, need)}
    factors = {n: rate / law[n] for n, rate in measured.items()}
    crowded = [n for n in factors if n > 1 and _contended(n, need)]
    free = [n for n in factors if n not in crowded]
    rows = []
    for n in law:
        known = crowded if n > 1 and _contended(n, need) else free
        factor = float(np.interp(np.log2(n), np.log2(known), [factors[k] for k in known]))
        by = min(bounds(n, need), key=lambda name: bounds(n, need)[name])
        if by == "the generator" and n > 1 and factor < 0.85 * factors[1]:
            by = "Python's lock" if kind == "thread" else "the cores"
        rate = law[n] * factor
        rows.append(Row(kind, n, rate, rate * max(0.0, 1 - margin), rate * (1 + margin), by))
    return rows


def _nature(alone: dict[tuple[Kind, int], "_Alone"]) -> str:
    def gain(kind: Kind, unknown: float) -> float:
        return alone[kind, 2].rate / alone[kind, 1].rate if (kind, 2) in alone else unknown

    one = alone["thread", 1]
    busy = one.cpu * one.rate
    if busy < 0.5 and gain("thread", 2.0) > 1.4:
        return "waits"
    if busy > 1.4 or (gain("thread", 1.0) < 1.4 and gain("process", 2.0) < 1.3):
        return "uses all cores"
    if ("thread", 2) not in alone:
        return "computes"
    return "holds the GIL" if gain("thread", 1.0) < 1.4 else "computes outside the GIL"


def _workers(kind: Kind, n: int) -> str:
    plural = "es" if kind == "process" else "s"
    return kind + (plural if n > 1 else "")


def _verdict(nature: str, best: Row, model_rate: float, serial: float, wall: float) -> str:
    setting = f"{best.n} {_workers(best.workers, best.n)}"
    gain = best.predicted / serial
    if serial > 0.95 * model_rate or gain < 1.05:
        return (
            f"Model-bound: the model takes {model_rate:.1f} steps/s, and the generator, which "
            f"{nature}, keeps up with {1 / wall:.0f} batches/s. Speed-up to be had: none, the "
            "model is the bottleneck."
        )
    left = ""
    if best.predicted < 0.9 * model_rate:
        share = best.predicted / model_rate
        limit = f"{best.bound_by} will be the limit, at {share:.0%} of the model's own rate."
        left = f" Then {limit}"
    return (
        f"Input-bound: the model could take {model_rate:.1f} steps/s, but with this generator, "
        f"which {nature}, a serial loop makes {serial:.1f} ({model_rate / serial:.1f}x less). "
        f"{setting}: about {best.predicted:.1f} steps/s, {gain:.1f}x faster.{left}"
    )


def _first_batch(iterator: Callable[..., Iterable[Any]]) -> tuple[Any, Spec]:
    try:
        batch = next(iter(IteratorFactory(iterator, 1)(0, 0)))
    except StopIteration:
        raise WorkerError(
            "diagnose: the iterator ended before its first batch, expected at least one."
        ) from None
    return batch, Spec.of(batch)


def _repeat(batch: Any, spec: Spec, size: int) -> tf.data.Dataset:
    arrays = [np.resize(array, (size, *array.shape[1:])) for array in spec.flatten(batch)]
    return tf.data.Dataset.from_tensors(spec.pack(arrays)).repeat()


class _Alone(NamedTuple):
    """The generator without a model: samples/s, and processor seconds per sample."""

    rate: float
    cpu: float


def _alone_in_each(
    iterator: Callable[..., Iterable[Any]],
    kinds: tuple[Kind, ...],
    seconds: float,
    bar: "_Progress",
) -> tuple[dict[tuple[Kind, int], _Alone], dict[Kind, str]]:
    """One thread, one and two workers of each kind; and why a kind cannot be had, if so."""
    alone: dict[tuple[Kind, int], _Alone] = {}
    problems: dict[Kind, str] = {}
    settings: list[tuple[Kind, int]] = [(kind, n) for kind in kinds for n in (1, 2)]
    for kind, n in dict.fromkeys([("thread", 1), *settings]):
        if kind in problems:
            continue
        bar(f"generator in {n} {_workers(kind, n)}")
        try:
            alone[kind, n] = _alone(iterator, kind, n, seconds)
        except (TypeError, OSError, MemoryError) as error:
            if kind == "thread" or len(kinds) == 1:
                raise
            problems[kind] = str(error)
    return alone, problems


def _alone(iterator: Callable[..., Iterable[Any]], kind: Kind, n: int, seconds: float) -> _Alone:
    pool = KINDS[kind].pool(Job(IteratorFactory(iterator, n)))
    heard: set[int] = set()
    ended: set[int] = set()
    began, first, cpu, chunks, samples = time.monotonic(), 0.0, 0.0, 0, 0
    try:
        pool.set_active(n)
        while True:
            message, now = pool.get(0.5), time.monotonic()
            if isinstance(message, Chunk):
                pool.release(message)
                heard.add(message.worker)
                if first:
                    chunks, samples = chunks + 1, samples + len(message.arrays[0])
                    if now - first > seconds and chunks >= 3 * n:
                        break
                elif len(heard) == n or now - began > _PATIENCE:
                    first, cpu = now, time.process_time()
            elif isinstance(message, Ended) and heard:
                ended.add(message.worker)
                if len(ended) == n:
                    ended.clear()
                    pool.next_epoch(pool.epoch + 1)
            elif message is not None:
                raise WorkerError(f"diagnose: {getattr(message, 'text', message)}")
            elif now - began > 60:
                raise WorkerError("diagnose: the generator delivered too little in 60 s.")
        used = time.process_time() - cpu
    finally:
        pool.stop()
    return _Alone(samples / (now - first), used / samples)


def _together(
    iterator: Callable[..., Iterable[Any]],
    model: "_Model",
    kind: Kind,
    n: int,
    size: int,
    seconds: float,
) -> float:
    """Steps/s of generator and model with n workers of a kind, once the queue is steady."""
    # A small queue, so that what was stored at the start does not count as speed.
    with QueueRunner(
        iterator, size, n, kind, capacity=4 * size, min_after_dequeue=0, timeout=120
    ) as runner:
        batches = runner.dataset().repeat()
        # A thread has two batches ready beside those in the queue; they say nothing of its speed.
        step, _ = model.run(batches, seconds, lambda: len(runner.delivering) == n, 2 * n + 4)
    return 1 / step


class _Model:
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
    def of(model: Any, restore: Callable[[], Any] | None) -> "_Model":
        if isinstance(model, (int, float)) and not isinstance(model, bool) and model > 0:
            return _Model(lambda batch: time.sleep(model), restore, puts_back=True)
        if isinstance(model, tf.keras.Model):
            if not model.compiled:
                raise TypeError("diagnose: expected a compiled Keras model; call model.compile().")
            return _KerasModel(model, restore)
        if callable(model):
            return _Model(_unpacking(model), restore)
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

    def run(
        self,
        dataset: tf.data.Dataset,
        seconds: float,
        ready: Callable[[], bool] = lambda: True,
        stored: int = 2,
    ) -> tuple[float, float]:
        watch = _Watch(seconds, ready, stored)
        self._walk(dataset, watch.enough)
        return watch.result()

    def _walk(self, dataset: tf.data.Dataset, enough: Callable[[], bool]) -> None:
        for batch in dataset:
            self.taken += 1
            self.take(batch)
            if enough():
                break


class _KerasModel(_Model):
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


class _Watch:
    """Decides when there were steps enough: counted from when all workers deliver and what they
    had `stored` is used up."""

    def __init__(self, seconds: float, ready: Callable[[], bool], stored: int) -> None:
        self.seconds, self.ready, self.stored = seconds, ready, stored
        self.began, self.steps = time.monotonic(), -stored
        self.first = self.last = (0.0, 0.0)

    def enough(self) -> bool:
        # Taken here, since the end of an iteration may have to wait for one more batch.
        self.last = now, _ = time.monotonic(), time.process_time()
        if self.steps == -self.stored and not self.ready() and now - self.began < _PATIENCE:
            return False
        self.steps += 1
        if self.steps == 0:
            self.first = self.last
        return self.steps >= max(8, self.stored / 2) and now - self.first[0] > self.seconds

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


class _Progress:
    def __init__(self, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=20, disable=not shown, desc="diagnose", leave=False)

    def expect(self, more: int) -> None:
        self.bar.total = self.bar.n + more

    def __enter__(self) -> "_Progress":
        return self

    def __call__(self, what: str) -> None:
        self.bar.set_description(what)
        self.bar.update()

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
