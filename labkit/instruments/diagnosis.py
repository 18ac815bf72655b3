"""Is it the input? Which workers? How many? Predicted from short measurements, then checked."""

import base64
import html
import io
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from labkit.checks import expect, is_integer, is_number
from labkit.engine import KINDS
from labkit.instruments import laws, measure
from labkit.instruments.laws import Demands
from labkit.instruments.measure import Alone, Iterators, Model, together
from labkit.machine import usable_cores
from labkit.queue_runner import QueueRunner

_SERIAL = next(iter(KINDS))  # one worker of this kind is the serial loop
_ROUNDS = 2
_STARTS = 4  # what starting the workers takes, in runs
_NOISE = 0.06

Setting = tuple[str, int]  # kind and number of workers


@dataclass
class Row:
    """One setting: its predicted steps/s with a range, and what was measured, if it was."""

    workers: str
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
    demands: dict[str, Demands]
    seconds: float
    iterator: Iterators = field(repr=False)
    model: Model = field(repr=False)
    batch_size: int = 0

    def runner(self, **options: Any) -> QueueRunner:
        """A `QueueRunner` as recommended; `options` go to its constructor and win."""
        chosen = {"batch_size": self.batch_size, "n_workers": self.best.n}
        return QueueRunner(self.iterator, **{**chosen, "workers": self.best.workers, **options})

    def check(self, seconds: float = 4.0) -> list[Row]:
        """Runs the recommended setting and the nearest number of each kind beside it, and returns
        the rows with `measured` set.

        The model gets its state back afterwards, or `restore` is called, as for `diagnose`.

        Raises:
            ValueError: seconds, for each setting, is not above 0.
            WorkerError: the iterator failed.
        """
        _expect_seconds("check", seconds)
        others = sorted(
            (row for row in self.rows if row is not self.best),
            key=lambda row: (row.workers == self.best.workers, -abs(math.log(row.n / self.best.n))),
        )
        # The last of each kind wins, which is the nearest in number.
        picked = [self.best, *{row.workers: row for row in others}.values()]
        with self.model.kept():
            for row in picked:
                row.measured = self._measure(row, seconds)
        return picked

    def _measure(self, row: Row, seconds: float) -> float:
        return together(self.iterator, self.model, row.workers, row.n, self.batch_size, seconds)

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
    iterator: Iterators,
    model: Any,
    seconds: float = 20.0,
    batch_size: int | None = None,
    progress: bool = True,
    workers: str | Iterable[str] = tuple(KINDS),
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
        batch_size is None or is_integer(batch_size, 1),
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
    runs = Model.of(model, restore)
    with tqdm(total=20, disable=not progress, desc="first batch", leave=False) as bar:
        first, spec = measure.first_batch(iterator)
        size = int(batch_size or len(spec.flatten(first)[0]))
        repeated = measure.repeat(first, spec, size)
        runs.build(repeated)
        # Runs of the generator, 2 of the model, and up to 8 settings of both, in rounds.
        slot = seconds / (6 + 8 * _ROUNDS + _STARTS)
        with runs.kept():
            measured = _measure(iterator, runs, repeated, size, kinds, slot, bar)
    return _report(measured, began, iterator, runs, size)


def _expect_seconds(who: str, seconds: Any) -> None:
    expect(is_number(seconds) and seconds > 0, f"{who}: seconds must be a number > 0", seconds)


def _kinds(workers: Any) -> list[str]:
    several = isinstance(workers, Iterable) and not isinstance(workers, (str, bytes))
    given = list(workers) if several else [workers]
    known = bool(given) and all(isinstance(kind, str) and kind in KINDS for kind in given)
    names = ", ".join(map(repr, KINDS))
    what = f"diagnose: workers must be {names} or a tuple of these, the kinds to consider"
    expect(known, what, workers)
    return [kind for kind in KINDS if kind in given]


def _named(kind: str, n: int) -> str:
    return f"{n} {KINDS[kind].plural if n > 1 else kind}"


class _Measured(NamedTuple):
    """What `diagnose` measured: the generator alone; why a kind cannot be had; seconds per step of
    the model at the start and at the end; steps/s of both together."""

    alone: dict[Setting, Alone]
    problems: dict[str, str]
    demands: dict[str, Demands]
    together: dict[Setting, list[float]]
    step: float
    again: float


def _measure(
    iterator: Iterators,
    model: Model,
    repeated: Any,
    size: int,
    kinds: list[str],
    slot: float,
    bar: tqdm,
) -> _Measured:
    _say(bar, "model alone")
    model.run(repeated, 0.2)
    step, step_cpu = model.run(repeated, slot)
    single, problems = _alone_in_each(iterator, kinds, slot, bar)
    demands: dict[str, Demands] = {}
    cpu = size * single[_SERIAL, 1].cpu
    for kind in kinds:
        if kind not in problems:
            one, two = single[kind, 1], single[kind, 2]
            lock = size / two.rate if two.rate < 1.6 * one.rate else 0.0
            demands[kind] = Demands(size / one.rate, cpu, lock, step, step_cpu, usable_cores())
    both: dict[Setting, list[float]] = {
        (kind, n): [] for kind, need in demands.items() for n in laws.to_try(_counts(kind), need)
    }
    bar.total = bar.n + len(both) * _ROUNDS + 1
    for _ in range(_ROUNDS):
        for (kind, n), rates in both.items():
            _say(bar, f"both, {_named(kind, n)}")
            rates.append(together(iterator, model, kind, n, size, slot))
    _say(bar, "model alone again")
    again, _ = model.run(repeated, slot)
    return _Measured(single, problems, demands, both, step, again)


def _alone_in_each(
    iterator: Iterators, kinds: list[str], seconds: float, bar: tqdm
) -> tuple[dict[Setting, Alone], dict[str, str]]:
    """The serial loop, one and two workers of each kind; and why a kind cannot be had, if so."""
    found: dict[Setting, Alone] = {}
    problems: dict[str, str] = {}
    for kind, n in dict.fromkeys([(_SERIAL, 1), *((kind, n) for kind in kinds for n in (1, 2))]):
        if kind in problems:
            continue
        _say(bar, f"generator in {_named(kind, n)}")
        try:
            found[kind, n] = measure.alone(iterator, kind, n, seconds)
        except (TypeError, OSError, MemoryError) as error:
            problems[kind] = str(error)
            if kind == _SERIAL or problems.keys() >= set(kinds):
                raise
    return found, problems


def _say(bar: tqdm, what: str) -> None:
    bar.set_description(what)
    bar.update()


def _counts(kind: str) -> list[int]:
    return laws.counts(KINDS[kind].limit())


def _report(
    measured: _Measured, began: float, iterator: Iterators, model: Model, size: int
) -> Report:
    single, problems, demands, both, step, again = measured
    margin = _NOISE + abs(again / step - 1)
    rows = []
    for kind, need in demands.items():
        rates = {n: fmean(seen) for (k, n), seen in both.items() if k == kind}
        made = laws.predict(_counts(kind), need, rates, margin, KINDS[kind].shares_lock)
        rows += [Row(kind, *numbers) for numbers in made]
    gains = {
        KINDS[kind].shares_lock: single[kind, 2].rate / single[kind, 1].rate for kind in demands
    }
    one = single[_SERIAL, 1]
    nature = laws.nature(one.cpu * one.rate, gains.get(True), gains.get(False))
    model_rate, wall = 2 / (step + again), size / one.rate
    serial = 1 / (wall + 1 / model_rate)
    # The cheapest of those that may well be as good as any: the kinds and numbers stand in order.
    top = max(row.predicted for row in rows)
    best = next(row for row in rows if row.high >= top)
    verdict = laws.verdict(
        nature, _named(best.workers, best.n), best.predicted, best.bound_by,
        model_rate, serial, wall,
    )  # fmt: skip
    for kind, why in problems.items():
        first_line = why.split("\n")[0]
        verdict += f" {KINDS[kind].plural.capitalize()} could not be tried: {first_line}"
    return Report(
        verdict, nature, rows, best, best.predicted / serial, model_rate, serial, demands,
        time.monotonic() - began, iterator, model, size,
    )  # fmt: skip
