"""A contestant's own process: `python -m labkit.instruments.race.lane TASK RESULT`.

Times the loop of one contestant over one row, and writes what it found as JSON. Nothing heavy is
imported at the top: worker processes that a peer spawns import this file again.
"""

import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labkit.engine import cluster
from labkit.engine.tracebacks import describe
from labkit.instruments.race import group, ours, peers, tensorflows
from labkit.instruments.race.entry import CONTESTANTS
from labkit.instruments.race.work import Row
from labkit.machine import fast_cpu

assert ours and peers and tensorflows  # they fill the list
CONSTANT, ALONE = "constant", "generator alone"  # for the bound; they do not compete
_DRAIN = 0.7  # seconds in which what was stored during a look at the memory is used up


class Task(NamedTuple):
    """One run. `step` is None for the built-in model; `settle` and `seconds` are warm-up and
    counted time; `steps`, if given, is how many to take in place of that."""

    contestant: str
    row: Row
    n: int
    step: Any
    settle: float
    seconds: float
    steps: int | None = None


class Finished(Exception):  # noqa: N818 - how a race ends, and no error
    """Raised out of `Lap.step` where it is time to end."""


class Lap:
    """Takes the steps and times them.

    Attributes:
        train: a training step, called with the parts of a batch.
        model: builds the step's result from placeholders, for those with a graph of their own.
        keras: the model for those that let `fit` take the steps; with `callback()`.
        most: batches that nobody reaches, for those that have to name a length.
        samples: how many were in the batches so far.
    """

    most = 100_000

    def __init__(self, task: Task, train: Callable[..., Any], model: Any = None) -> None:
        self.task, self.train, self.model, self.keras = task, train, model, None
        self.samples = self.steps = 0
        self.began, self.since = time.perf_counter(), 0.0
        self.first = math.nan
        self.memory: list[int] = []
        self.result: dict[str, Any] = {}
        self._draining, self._members = False, group.own_members()
        self._start: tuple[float, int, float] | None = None

    def step(self, *batch: Any) -> None:
        if not self.steps:
            self.first = time.perf_counter() - self.began
        self.samples += len(batch[0])
        self.train(*batch)
        self.tick()

    def tick(self) -> None:
        """After each step."""
        now, self.steps = time.perf_counter(), self.steps + 1
        if self.task.steps is not None:
            if self.steps >= self.task.steps:
                raise Finished
        elif self._start is not None:
            if now - self._start[0] >= self.task.seconds:
                self._finish(now)
        elif self.steps == 1:
            self._look(now)
        elif now - self.since >= self._pause():
            if not self._draining:
                self._look(now)
                self._draining = True
            else:
                cpu = group.cpu_of(self._members)
                self._start = (time.perf_counter(), self.steps, cpu)

    def _pause(self) -> float:
        return min(_DRAIN, self.task.seconds) if self._draining else self.task.settle

    def _look(self, now: float) -> None:
        self._members = group.own_members()
        self.memory.append(group.memory_of(self._members))
        self.since = now if self.steps == 1 else time.perf_counter()

    def _finish(self, now: float) -> None:
        assert self._start is not None
        began, steps, cpu = self._start
        used, taken = group.cpu_of(self._members) - cpu, self.steps - steps
        self._look(now)
        self.result = {
            "steps_per_second": taken / (now - began),
            "cpu_seconds_per_step": used / taken,
            "memory": max(self.memory),
            "first_batch": None if math.isnan(self.first) else self.first,
            "processes": len(self._members),
            "steps": taken,
        }
        raise Finished

    def callback(self) -> Any:
        """Has Keras's fit call `tick`."""
        from labkit.quiet import tf

        class Tick(tf.keras.callbacks.Callback):
            def on_train_batch_end(_, batch: int, logs: Any = None) -> None:  # noqa: N805
                self.samples += int((logs or {}).get("samples", 0))
                self.tick()

        return Tick()


def drive(task: Task) -> Lap:
    """Runs the contestant to its end, in this process."""
    contestant = CONTESTANTS.get(task.contestant)
    if task.contestant == ALONE:
        lap = Lap(task, lambda *batch: None)
    else:
        lap = _prepared(task, graph=contestant is not None and contestant.graph)
        if contestant is not None and contestant.in_fit and lap.keras is None:
            lap.keras = _in_keras(lap)
    if contestant is not None and contestant.package:
        import_module(contestant.package)
    ready = None if task.contestant != CONSTANT else task.row.make(0)
    if ready is not None and not isinstance(task.step, int | float):
        ready = _tensors(ready)
    lap.began = time.perf_counter()
    try:
        if ready is not None:
            while True:
                lap.step(*ready)
        elif contestant is None:
            for batch in task.row.factory():
                lap.step(*batch)
        else:
            with cluster.patience() if contestant.package == "ray" else nullcontext():
                contestant.run(task.row, task.n, lap)
    except Finished:
        return lap
    raise RuntimeError(f"race: {task.contestant} ended after {lap.steps} steps.")


def _tensors(batch: Any) -> Any:
    from labkit.quiet import tf

    return [tf.constant(part) for part in batch]


def _prepared(task: Task, graph: bool) -> Lap:
    """A lap with the step, which has been taken once, so that tracing it counts for nobody."""
    batch = task.row.make(0)
    if task.step is not None:
        return _with_step(task, batch, task.step)
    from labkit.quiet import tf

    def model(images: Any, *others: Any) -> Any:
        if not task.row.trains:
            return tf.cast(images[0, 0, 0, 0] + images[-1, -1, -1, -1], tf.float32)
        from labkit.model import model_fn

        scaled = images if images.dtype == tf.float32 else tf.cast(images, tf.float32) / 255
        made = model_fn({"images": scaled, "labels": others[0]})
        # What somebody reads, not a constant: for that TensorFlow would leave out all before it.
        with tf.control_dependencies([made["train_op"]]):
            return tf.identity(made["loss"])

    if graph:
        return Lap(task, lambda *parts: None, model)
    specs = [tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in batch]
    taken = tf.compat.v1.wrap_function(model, specs)
    taken(*_tensors(batch))

    def train(images: Any, labels: Any) -> Any:
        return taken(images, labels)

    return Lap(task, train, model)


def _with_step(task: Task, batch: Any, step: Any) -> Lap:
    """With a step of the user's: seconds, a compiled Keras model, or a function."""
    if isinstance(step, (int, float)):
        return Lap(task, lambda *parts: time.sleep(step))
    if hasattr(step, "train_on_batch"):
        step.train_on_batch(*batch)
        lap = Lap(task, step.train_on_batch)
        lap.keras = step
        return lap
    from labkit.instruments.measure import _unpacking

    unpacked = _unpacking(step)
    lap = Lap(task, lambda *parts: unpacked(parts))
    lap.train(*batch)
    return lap


def _in_keras(lap: Lap) -> Any:
    """The lap's step as a Keras model that `fit` can train."""
    from labkit.quiet import tf

    train = lap.train

    class Stepping(tf.keras.Model):
        def train_step(self, data: Any) -> Any:
            return {"loss": train(*data), "samples": tf.shape(data[0])[0]}

    model = Stepping()
    model.compile(jit_compile=False)
    return model


def main(task_file: str, result_file: str) -> None:
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # as by absl's own start: Grain reads one where JAX is installed
    task: Task = pickle.loads(Path(task_file).read_bytes())
    np.random.seed(0)
    fast_cpu()  # for all alike
    try:
        lap = drive(task)
        found = {**lap.result, "samples": lap.samples}
    except Exception as error:
        summary, traceback = describe(error)
        print(traceback, file=sys.stderr)
        found = {"error": summary.splitlines()[0][:300]}
    Path(result_file + ".part").write_text(json.dumps(found))
    os.replace(result_file + ".part", result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
