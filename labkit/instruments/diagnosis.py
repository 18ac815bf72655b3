"""Is it the input? Which workers? How many? Predicted from short measurements, then checked."""

import functools
import itertools
import time
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any, NamedTuple

import psutil
from tqdm.auto import tqdm

from labkit.checks import expect, is_integer
from labkit.engine import KINDS, TRIED
from labkit.engine.batches import Spec
from labkit.instruments import laws, measure
from labkit.instruments.laws import Demands
from labkit.instruments.measure import Alone, Iterators, Model, Watch, together
from labkit.instruments.report import Report, Row, best_of, expect_seconds
from labkit.machine import usable_cores
from labkit.sources import as_factory, whole

_SERIAL = next(iter(KINDS))  # one worker of this kind is the serial loop
_ROUNDS = 2
_STARTS = 4  # what starting the workers takes, in runs

Setting = tuple[str, int]  # kind and number of workers


def diagnose(
    iterator: Any,
    model: Any,
    seconds: float = 20.0,
    batch_size: int | None = None,
    progress: bool = True,
    workers: str | Iterable[str] = TRIED,
    restore: Callable[[], Any] | None = None,
) -> Report:
    """Finds out what bounds the training, and which workers would cure it.

    Measures the generator alone (one and two threads, one and two processes), the model alone on a
    repeated batch, how fast the machine copies a batch, and both together; predicts the rest. Then
    runs what it recommends with a batch that is ready: the headroom.

    A compiled Keras model gets its state back, also after an error or an interrupt: weights, the
    variables of its optimizers (with the count of iterations, which learning-rate schedules
    follow), metrics, seed generators, `stop_training` and `history`. One that is not built yet is
    built from the first batch, as its first `fit` would do it. Random states outside the model
    (Python's, NumPy's, TensorFlow's) move on.

    **A callable step is really taken**, hundreds or thousands of times, and trains whatever it
    trains; the report says how often. Only `restore` puts that back.

    Args:
        iterator: an iterator factory or a data set, as for `QueueRunner`.
        model: a compiled Keras model; or a callable that takes one training step, as `step(batch)`
            or `step(x, y)`; or the seconds that a step takes.
        seconds: rough total to spend. Default 20.
        batch_size: samples per step. Default: as many as the generator's batches have, and 32 of a
            data set that is read sample by sample.
        progress: show a bar.
        workers: the kinds to consider: "thread", "process", "ray", or several of them. Default:
            the first two. One thread is measured in any case, since that is the serial loop.
        restore: called without arguments when `diagnose` has used the step, and again when the
            report's `check()` has, also where they fail.

    Raises:
        TypeError: the model is none of these, is not compiled, or cannot be built without a step;
            or the iterator is no factory, or cannot be sent to a process where only those are
            considered.
        ValueError: another argument is not as above.
        WorkerError: the iterator failed; its traceback is in the message.
    """
    expect_seconds("diagnose", seconds)
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
    iterator = as_factory(iterator, batch_size or 32)
    began = time.monotonic()
    runs = Model.of(model, restore)
    with tqdm(total=20, disable=not progress, desc="first batch", leave=False) as bar:
        first, spec = measure.first_batch(iterator)
        size = int(batch_size or len(spec.flatten(first)[0]))
        repeated = measure.repeat(first, spec, size)
        runs.build(repeated)
        # Runs of the generator, 2 of the model, up to 8 settings of both, in rounds, and the last.
        slot = seconds / (7 + 8 * _ROUNDS + _STARTS)
        with runs.kept():
            measured = _measure(
                iterator, runs, repeated, spec, size, kinds, slot, began + seconds, bar
            )
            report = report_of(measured, size, 0.0, iterator, runs, repeated)
            best = report.best
            _say(bar, f"ready batches, {best.n} x {best.workers}")
            ready = functools.partial(itertools.repeat, spec.pack(spec.flatten(first)))
            report.ready_rate = together(ready, runs, best.workers, best.n, size, slot)
    report.seconds = time.monotonic() - began
    return report


def _kinds(workers: Any) -> list[str]:
    several = isinstance(workers, Iterable) and not isinstance(workers, (str, bytes))
    given = list(workers) if several else [workers]
    known = bool(given) and all(isinstance(kind, str) and kind in KINDS for kind in given)
    names = ", ".join(map(repr, KINDS))
    what = f"diagnose: workers must be {names} or a tuple of these, the kinds to consider"
    expect(known, what, workers)
    return [kind for kind in KINDS if kind in given]


class Measured(NamedTuple):
    """What `diagnose` measured: the generator alone; why a kind cannot be had; steps/s of both
    together; seconds and processor seconds per step of the model, at the start and at the end;
    bytes of a batch that each kind copies, bytes/s that the machine copies, bytes that are free."""

    alone: dict[Setting, Alone]
    problems: dict[str, str]
    together: dict[Setting, list[float]]
    steps: list[tuple[float, float]]
    moved: dict[str, int]
    bandwidth: float
    free: float


def _measure(
    iterator: Iterators,
    model: Model,
    repeated: Any,
    spec: Spec,
    size: int,
    kinds: list[str],
    slot: float,
    until: float,
    bar: tqdm,
) -> Measured:
    _say(bar, "model alone")
    model.run(repeated, Watch(0.2))
    steps = [model.run(repeated, Watch(slot))]
    nbytes = size * spec.bytes_per_sample
    moved = {kind: nbytes * (KINDS[kind].copies - spec.large) for kind in kinds}
    bandwidth, free = measure.bandwidth(nbytes, slot / 4), psutil.virtual_memory().available
    single, problems = _alone_in_each(iterator, kinds, slot, bar)
    found = Measured(single, problems, {}, steps, moved, bandwidth, free)
    took: dict[Setting, float] = {}
    for again in range(_ROUNDS):
        # Anew in each round: what was measured may show that other settings are worth a try.
        needs = demands_of(found, size)
        numbers = {kind: _counts(iterator, kind, need) for kind, need in needs.items()}
        tries = [(k, n) for k, need in needs.items() for n in laws.to_try(numbers[k], need)]
        bar.total = bar.n + len(tries) * (_ROUNDS - again) + 2
        for kind, n in tries:
            began = time.monotonic()
            # Processes take long to start on few cores: then once is enough.
            if again and kind != _SERIAL and began + took.get((kind, n), slot) > until:
                continue
            _say(bar, f"both, {n} x {kind}")
            rate = together(iterator, model, kind, n, size, slot)
            found.together.setdefault((kind, n), []).append(rate)
            took[kind, n] = time.monotonic() - began
    _say(bar, "model alone again")
    steps.append(model.run(repeated, Watch(slot)))
    return found


def _alone_in_each(
    iterator: Iterators, kinds: list[str], seconds: float, bar: tqdm
) -> tuple[dict[Setting, Alone], dict[str, str]]:
    """The serial loop, one and two workers of each kind; and why a kind cannot be had, if so."""
    found: dict[Setting, Alone] = {}
    problems: dict[str, str] = {}
    for kind, n in dict.fromkeys([(_SERIAL, 1), *((kind, n) for kind in kinds for n in (1, 2))]):
        if kind in problems:
            continue
        _say(bar, f"generator in {n} x {kind}")
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


def _cores(kind: str) -> int:
    """That its workers have: those of a cluster are not this machine's."""
    here = usable_cores()
    return here if KINDS[kind].shares_lock else max(here, KINDS[kind].limit())


def _counts(iterator: Iterators, kind: str, need: Demands) -> list[int]:
    return [1] if whole(iterator) else laws.counts(KINDS[kind].limit(), need)


def demands_of(measured: Measured, size: int) -> dict[str, Demands]:
    """What each kind's batch of `size` and step cost, without what the runs of both contradict."""
    single = measured.alone
    cpu = size * single[_SERIAL, 1].cpu
    step, step_cpu = (fmean(values) for values in zip(*measured.steps, strict=True))
    found = {}
    for kind in [kind for kind, n in single if n == 2]:
        one, two = single[kind, 1], single[kind, 2].rate
        # Of one that costs next to nothing, two gain little since they are handed over in turn.
        gain = two / one.rate if size * one.own > laws.FREE else 2.0
        wall = size / one.rate
        lock, name = laws.turn(wall, cpu, gain, KINDS[kind].shares_lock)
        found[kind] = Demands(
            wall, cpu, lock, step, step_cpu, _cores(kind), name,
            measured.moved[kind], measured.bandwidth, single[kind, 2].memory, measured.free,
            max(0.0, wall - size * one.own),
        )  # fmt: skip
    return laws.corrected(found, {key: fmean(rates) for key, rates in measured.together.items()})


def report_of(
    measured: Measured, size: int, seconds: float, iterator: Iterators, model: Model, repeated: Any
) -> Report:
    """What the measurements say of batches of `size`."""
    single, both, demands = measured.alone, measured.together, demands_of(measured, size)
    runs = [[1 / step for step, _ in measured.steps]]
    calm, crowd = (
        laws.noise(
            runs + [r for (k, n), r in both.items() if laws.contended(n, demands[k]) == crowded]
        )
        for crowded in (False, True)
    )
    rows = []
    # The fastest seen: where other programs take the cores for a while, a batch that is computed
    # takes longer, and looks as if it waited.
    shortest = min(need.wall for need in demands.values())
    gains: dict[bool, float] = {}
    for kind, need in demands.items():
        rates = {n: seen for (k, n), seen in both.items() if k == kind}
        numbers = sorted({*_counts(iterator, kind, need), *rates})
        for n, rate, low, high in laws.predict(numbers, need, rates, calm, crowd):
            rows.append(Row(kind, n, rate, low, high, laws.limit(n, need, rate)))
        # Both together may show a gain that two alone, for a moment, did not.
        most = max([single[kind, 2].rate / size, *(fmean(r) for n, r in rates.items() if n > 1)])
        shares = KINDS[kind].shares_lock
        gains[shares] = max(most * shortest, 2.0 if shares and not need.lock else 0.0)
    one = single[_SERIAL, 1]
    busy = size * one.cpu / shortest
    nature = laws.nature(size * one.own, busy, gains.get(True), gains.get(False), usable_cores())
    nature = "cannot be split among workers" if whole(iterator) else nature
    step, best = min(need.step for need in demands.values()), best_of(rows)
    wall = min(size * one.own, size / one.rate)  # in a serial loop, where nothing is handed over
    model_rate, serial_rate = 1 / step, 1 / (wall + step)
    if laws.leaves(best.predicted, model_rate, serial_rate):
        best = rows[0]  # the cheapest, if it has to be one
    return Report(
        nature, rows, best, demands, model_rate, serial_rate, wall, seconds,
        iterator, model, repeated, size, measured.problems,
        stages=list(single[best.workers, 1].stages),
    )  # fmt: skip
