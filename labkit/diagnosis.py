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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from labkit.queue_runner import QueueRunner
from labkit.quiet import tf
from labkit.scaling import usable_cores
from labkit.workers import Chunk, IteratorFactory, Pool, ProcessPool, Spec, ThreadPool, WorkerError

Kind = Literal["thread", "process"]
_THREADS = (1, 2, 4, 8, 16, 32)
_TRIED = (1, 2, 4, 8, 16)
_NOISE = 0.06
_MOST_SAMPLES = 5_000_000


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
            outside the GIL".
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
        """Runs the recommended setting and two others, and returns the rows with `measured` set."""
        others = sorted(
            (row for row in self.rows if row is not self.best),
            key=lambda row: (row.workers == self.best.workers, -abs(np.log(row.n / self.best.n))),
        )
        # One of the other kind and one of the same, each the nearest in number.
        picked = [self.best, *{row.workers: row for row in others}.values()]
        with self.model.weights_kept():
            for row in picked:
                row.measured = self._measure(row, seconds)
        return picked

    def _measure(self, row: Row, seconds: float) -> float:
        return _together(self.iterator, self.model, row.workers, row.n, self.batch_size, seconds)

    def plot(self) -> Any:
        """Predicted steps/s over the number of workers, with what was measured as points."""
        from labkit import plots
        from labkit.train import describe_machine

        return plots.diagnosis(self, describe_machine())

    def __str__(self) -> str:
        lines = [self.verdict, "", "workers   n   steps/s predicted      measured   bound by"]
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
        picture = io.BytesIO()
        self.plot().savefig(picture, format="png")
        image = base64.b64encode(picture.getvalue()).decode()
        return (
            f"<p><b>{html.escape(self.verdict)}</b></p><table><tr><th>workers</th><th>n</th>"
            "<th>steps/s predicted</th><th>range</th><th>measured</th><th>bound by</th></tr>"
            f'{cells}</table><img style="max-width:100%" src="data:image/png;base64,{image}">'
        )


def diagnose(
    iterator: Callable[..., Iterable[Any]],
    model: Any,
    seconds: float = 20.0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Report:
    """Finds out what bounds the training, and which workers would cure it.

    Measures the generator alone (one and two threads, one and two processes), the model alone on a
    repeated batch, and both together; predicts the rest. A compiled Keras model gets its weights
    and its optimizer's state back.

    Args:
        iterator: an iterator factory, as for `QueueRunner`.
        model: a compiled Keras model; or a callable that takes one training step, as `step(batch)`
            or `step(x, y)`; or the seconds that a step takes.
        seconds: rough total to spend. Default 20.
        batch_size: samples per step. Default: as many as the generator's batches have.
        progress: show a bar.

    Raises:
        TypeError: the model is none of these, or the iterator no factory.
        WorkerError: the iterator failed; its traceback is in the message.
    """
    began, slot = time.monotonic(), seconds / 17
    kinds: tuple[Kind, ...] = ("thread", "process")
    with _Progress(14, progress) as bar:
        bar("first batch")
        first, spec = _first_batch(iterator)
        size = batch_size or len(np.asarray(spec.flatten(first)[0]))
        runs = _Model.of(model)
        with runs.weights_kept():
            bar("model alone")
            repeated = _repeat(first, spec, size)
            runs.run(repeated, 0.2)
            step, step_cpu = runs.run(repeated, 1.5 * slot)
            demands: dict[Kind, Demands] = {}
            problems: dict[str, str] = {}
            cores = usable_cores()
            alone: dict[tuple[str, int], tuple[float, float, float]] = {}
            for kind in kinds:
                try:
                    for n in (1, 2):
                        bar(f"generator in {n} {kind}{'es' if kind == 'process' else 's'}"[:30])
                        alone[kind, n] = _alone(iterator, kind, n, slot)
                except (TypeError, OSError, MemoryError) as error:
                    problems[kind] = str(error)
                    continue
                one, two = alone[kind, 1], alone[kind, 2]
                scale = size / one[2]
                lock = scale / two[0] if two[0] < 1.6 * one[0] else 0.0
                cpu = alone["thread", 1][1] if kind == "process" else one[1]
                demands[kind] = Demands(scale / one[0], scale * cpu, lock, step, step_cpu, cores)
            rows: list[Row] = []
            for kind in kinds:
                if kind in demands:
                    need = demands[kind]
                    rows += _predict_kind(kind, need, iterator, runs, size, slot, bar)
            bar("model alone again")
            again, _ = runs.run(repeated, slot)
    drift = abs(again / step - 1)
    for row in rows:
        margin = _NOISE + drift
        row.low, row.high = row.predicted * (1 - margin), row.predicted * (1 + margin)
    nature = _nature(alone)
    model_rate = 2 / (step + again)
    serial = 1 / (demands["thread"].wall + 1 / model_rate)
    top = max(row.predicted for row in rows)
    # The cheapest of those that are as good: fewer workers, and threads before processes.
    good = [row for row in rows if row.predicted >= 0.97 * top]
    best = min(good, key=lambda row: (row.workers == "process", row.n))
    verdict = _verdict(nature, best, model_rate, serial, demands["thread"].wall)
    if problems:
        verdict += " Processes could not be tried: " + problems["process"].split("\n")[0]
    return Report(
        verdict, nature, rows, best, best.predicted / serial, model_rate, serial, demands,
        time.monotonic() - began, iterator, runs, size,
    )  # fmt: skip


def _predict_kind(
    kind: Kind,
    need: Demands,
    iterator: Callable[..., Iterable[Any]],
    model: "_Model",
    size: int,
    slot: float,
    bar: "_Progress",
) -> list[Row]:
    counts = [n for n in _THREADS if kind == "thread" or n <= max(2, need.cores)]
    if kind == "process" and need.cores not in counts and need.cores > 1:
        counts.append(need.cores)
    law = {n: min(bounds(n, need).values()) for n in counts}
    tried = [n for n in counts if n in _TRIED or n == counts[-1] < _THREADS[-1]]
    factors = []
    for n in tried:
        bar(f"both, {n} {kind}{'es' if kind == 'process' else 's'}"[:30])
        factors.append(_together(iterator, model, kind, n, size, 1.5 * slot) / law[n])
    rows = []
    for n in counts:
        factor = float(np.interp(np.log2(n), np.log2(tried), factors))
        by = min(bounds(n, need), key=lambda name: bounds(n, need)[name])
        if by == "the generator" and n > 1 and factor < 0.85 * factors[0]:
            by = "Python's lock" if kind == "thread" else "the cores"
        rows.append(Row(kind, n, law[n] * factor, 0.0, 0.0, by))
    return rows


def _nature(alone: dict[tuple[str, int], tuple[float, float, float]]) -> str:
    rate, cpu, _ = alone["thread", 1]
    busy = cpu * rate
    threads = alone["thread", 2][0] / rate
    processes = alone["process", 2][0] / alone["process", 1][0] if ("process", 2) in alone else 2.0
    if busy < 0.5 and threads > 1.4:
        return "waits"
    if busy > 1.4 or (threads < 1.4 and processes < 1.3):
        return "uses all cores"
    return "holds the GIL" if threads < 1.4 else "computes outside the GIL"


def _verdict(nature: str, best: Row, model_rate: float, serial: float, wall: float) -> str:
    plural = "es" if best.workers == "process" else "s"
    setting = f"{best.n} {best.workers}{plural if best.n > 1 else ''}"
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


def _alone(
    iterator: Callable[..., Iterable[Any]], kind: Kind, n: int, seconds: float
) -> tuple[float, float, float]:
    """Batches/s of n workers without a model, processor seconds and samples per batch."""
    make: type[Pool] = ThreadPool if kind == "thread" else ProcessPool
    pool = make(IteratorFactory(iterator, n))
    stamps: list[float] = []
    rows = 0
    try:
        pool.set_active(n)
        began, cpu, cpu_from = time.monotonic(), 0.0, 0
        while len(stamps) < 3 * n or stamps[-1] - stamps[n] < seconds:
            message = pool.get(0.5)
            if isinstance(message, Chunk):
                stamps.append(time.monotonic())
                if len(stamps) == n:
                    cpu, cpu_from = time.process_time(), len(stamps)
                rows += len(message.arrays[0])
                pool.release(message)
            elif message is not None:
                if type(message).__name__ == "Ended":
                    if len(stamps) <= n:
                        break
                    pool.next_epoch()
                    continue
                raise WorkerError(f"diagnose: {getattr(message, 'text', message)}")
            elif time.monotonic() - began > 60:
                raise WorkerError("diagnose: the generator delivered too little in 60 s.")
        used = time.process_time() - cpu
    finally:
        pool.stop()
    batches = len(stamps) - cpu_from
    return batches / (stamps[-1] - stamps[cpu_from - 1]), used / batches, rows / len(stamps)


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
        step, _ = model.run(runner.dataset().repeat(), seconds)
    return 1 / step


class _Model:
    """Something that takes steps; `run` returns seconds and processor seconds per step."""

    def __init__(self, take: Callable[[Any], Any]) -> None:
        self.take = take

    @staticmethod
    def of(model: Any) -> "_Model":
        if isinstance(model, (int, float)) and not isinstance(model, bool) and model > 0:
            return _Model(lambda batch: time.sleep(model))
        if isinstance(model, tf.keras.Model):
            if not model.compiled:
                raise TypeError("diagnose: expected a compiled Keras model; call model.compile().")
            return _KerasModel(model)
        if callable(model):
            return _Model(_unpacking(model))
        raise TypeError(
            "diagnose: model must be a compiled Keras model, a callable train step or the seconds "
            f"per step (> 0), got {model!r}."
        )

    def weights_kept(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def run(self, dataset: tf.data.Dataset, seconds: float) -> tuple[float, float]:
        watch = _Watch(seconds)
        for batch in dataset:
            self.take(batch)
            if watch.enough():
                break
        return watch.result()


class _KerasModel(_Model):
    def __init__(self, model: Any) -> None:
        self.model = model

    def weights_kept(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def keep() -> Any:
            if not self.model.built:
                yield
                return
            self.model.optimizer.build(self.model.trainable_variables)
            variables = [*self.model.variables, *self.model.optimizer.variables]
            before = [variable.numpy() for variable in variables]
            try:
                yield
            finally:
                for variable, value in zip(variables, before, strict=True):
                    variable.assign(value)

        return keep()

    def run(self, dataset: tf.data.Dataset, seconds: float) -> tuple[float, float]:
        watch = _Watch(seconds)
        model = self.model

        class Stop(tf.keras.callbacks.Callback):
            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                if watch.enough():
                    model.stop_training = True

        model.fit(dataset, steps_per_epoch=1_000_000, verbose=0, shuffle=False, callbacks=[Stop()])
        return watch.result()


class _Watch:
    """Decides when there were steps enough; the first quarter of the time is warm-up."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.monotonic()
        self.stamps: list[float] = []
        self.cpu: list[float] = []

    def enough(self) -> bool:
        self.stamps.append(time.monotonic())
        self.cpu.append(time.process_time())
        return len(self.stamps) >= 8 and self.stamps[-1] - self.stamps[0] > self.seconds

    def result(self) -> tuple[float, float]:
        if len(self.stamps) < 3:
            raise WorkerError("diagnose: the data ended before three steps were made.")
        start = int(np.searchsorted(self.stamps, self.stamps[0] + self.seconds / 4))
        start = min(start, len(self.stamps) // 2)
        steps = len(self.stamps) - 1 - start
        wall = (self.stamps[-1] - self.stamps[start]) / steps
        return wall, (self.cpu[-1] - self.cpu[start]) / steps


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
    def __init__(self, total: int, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=total, disable=not shown, desc="diagnose", leave=False)

    def __enter__(self) -> "_Progress":
        return self

    def __call__(self, what: str) -> None:
        self.bar.set_description(what)
        self.bar.update()

    def __exit__(self, *_: Any) -> None:
        self.bar.close()


@dataclass
class Audit:
    """What an audit saw, in samples over all epochs.

    Attributes:
        expected: size of the data set times epochs; None if it is not known.
        delivered: samples that came out of the queue.
        repeated: deliveries of a sample beyond its first in an epoch.
        missed: samples of the data set that an epoch did not deliver; None if unknown.
        mixing: spread of a batch's positions in the data set over that of a perfectly mixed
            batch: 1 is perfect, 0 is all neighbours; None if positions are unknown.
    """

    expected: int | None
    delivered: int
    repeated: int
    missed: int | None
    mixing: float | None

    def __str__(self) -> str:
        of = "" if self.expected is None else f" of {self.expected:,} expected"
        missed = "unknown (give samples=)" if self.missed is None else f"{self.missed:,}"
        mixing = "unknown" if self.mixing is None else f"{self.mixing:.2f} of a perfect mix"
        return (
            f"{self.delivered:,} samples delivered{of}: {self.repeated:,} repeated, "
            f"{missed} missed; batches mixed to {mixing}."
        )


def audit(
    iterator: Callable[..., Iterable[Any]],
    epochs: int = 1,
    workers: int = 4,
    samples: int | None = None,
    batch_size: int = 32,
    tag: Callable[[Any], Any] | None = None,
) -> Audit:
    """Counts which samples of an epoch come twice and which not at all, through a `QueueRunner`.

    Args:
        iterator: an iterator factory. Methods of `MnistDataGenerator` run on tagged copies of its
            data, so their samples are told apart exactly.
        epochs: how many to watch. An epoch of an endless iterator is `samples` samples.
        workers: threads.
        samples: size of the data set; needed for endless iterators and to count misses.
        batch_size: samples per batch.
        tag: takes a batch, returns an integer for each sample, its position in the data set.
            Default: samples are told apart by their content.

    Raises:
        ValueError: the iterator is endless and samples is not given.
    """
    from labkit.data import Mnist, MnistDataGenerator

    owner = getattr(iterator, "__self__", None)
    if isinstance(owner, MnistDataGenerator) and tag is None:
        samples = len(owner.data.x_train) if samples is None else samples
        numbers = np.arange(len(owner.data.x_train), dtype=np.uint32)
        pixels = np.zeros((len(numbers), 4), np.uint8)
        pixels[:] = numbers.view(np.uint8).reshape(-1, 4)
        tagged = Mnist(pixels.reshape(-1, 2, 2), owner.data.y_train, *owner.data[2:])
        copy = MnistDataGenerator(owner.batch_size, None, owner.seed, tagged)
        iterator = getattr(copy, iterator.__name__)

        def tag(batch: Any) -> Any:
            bytes_ = np.rint(batch[0].numpy() * 255).astype(np.uint8).reshape(-1, 4)
            return np.ascontiguousarray(bytes_).view(np.uint32).ravel()

    delivered = repeated = missed = 0
    spreads: list[float] = []
    limit = _MOST_SAMPLES if samples is None else samples
    with QueueRunner(iterator, batch_size, workers) as runner:
        dataset = runner.dataset()
        for _ in range(epochs):
            seen: dict[Any, int] = {}
            count = 0
            for batch in dataset:
                if count >= limit:  # one batch late, so that a finite iterator reaches its end
                    break
                tags = _content(batch) if tag is None else np.asarray(tag(batch))
                tags = tags[: limit - count]
                for one in tags.tolist():
                    seen[one] = seen.get(one, 0) + 1
                count += len(tags)
                if tag is not None and len(tags) == batch_size:
                    spreads.append(float(np.std(tags)))
            if samples is None and count >= limit:
                raise ValueError("audit: the iterator has no end; give samples=, the epoch's size.")
            delivered += count
            repeated += count - len(seen)
            missed += 0 if samples is None else samples - len(seen)
    perfect = None if samples is None else samples / np.sqrt(12) * np.sqrt(1 - 1 / batch_size)
    return Audit(
        None if samples is None else samples * epochs,
        delivered,
        repeated,
        None if samples is None else missed,
        float(np.mean(spreads) / perfect) if spreads and perfect else None,
    )


def _content(batch: Any) -> np.ndarray:
    rows = [np.asarray(part) for part in tf.nest.flatten(batch)]
    return np.array([hash(tuple(row[i].tobytes() for row in rows)) for i in range(len(rows[0]))])
