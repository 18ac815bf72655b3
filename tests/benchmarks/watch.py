"""What `labkit.watch()` costs, and whether its share is true. Writes figures/benchmark_watch.json.

    python -m tests.benchmarks.watch [--rounds 15]

The speed of a machine may drift by a quarter within minutes, so only neighbours are compared: short
blocks in turn, of one process and one compiled model, and the median of what the pairs say.

Cost: one `fit` of many epochs of half a second, watched in every other one; the same batch in all.
What starting a `fit` with it takes once, compiling, is told apart. Truth: 1 - seconds with a cached
batch / seconds with the real data, of unwatched fits, beside what `watch` said in a fit between
them. Each model is sized so that a step takes 2 ms with a cached batch.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import labkit
from labkit.instruments.waiting import total
from labkit.quiet import tf
from labkit.workloads import busy_python
from tests.benchmarks.common import median, spread, write

_STEP, _WITHIN = 0.002, 0.2
_BLOCK = 0.5  # seconds
_LONG = 4  # times as long are blocks of several steps a call, of which it takes some 100 to tell
_WIDTH = 256

Batch = tuple[np.ndarray, np.ndarray]


class _Clock(tf.keras.callbacks.Callback):
    """Seconds of each epoch, from its first step to its last; `watch` sees those from number
    `first` on, or, with `every`, every other one."""

    def __init__(self, watch: Any = None, every: int = 1) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._watch, self._every, self._on = watch, every, False

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        if self._watch:
            self._watch.set_model(model)

    def set_params(self, params: Any) -> None:
        super().set_params(params)
        if self._watch:
            self._watch.set_params(params)

    def on_train_begin(self, logs: Any = None) -> None:
        if self._watch:
            self._watch.on_train_begin()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._on = self._watch is not None and epoch % self._every == 0
        self._began = time.perf_counter()
        if self._on:
            self._watch.on_epoch_begin(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._on:
            self._watch.on_train_batch_begin(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._on:
            self._watch.on_epoch_end(epoch, {})
        self.seconds.append(time.perf_counter() - self._began)


def _model(together: int) -> tf.keras.Model:
    tf.keras.utils.set_random_seed(0)
    layers = [tf.keras.layers.Dense(_WIDTH, "relu") for _ in range(3)]
    model = tf.keras.Sequential([tf.keras.Input((_WIDTH,)), *layers, tf.keras.layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=together)
    return model


def _batch(rows: int) -> Batch:
    x = np.random.default_rng(0).normal(size=(rows, _WIDTH)).astype(np.float32)
    return x, x[:, :1]


def _cached(batch: Batch) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensors(batch).repeat()


def _fit(model: Any, data: Any, epochs: int, steps: int, clock: _Clock) -> list[float]:
    model.fit(
        data, epochs=epochs, steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=[clock]
    )
    return clock.seconds


def _sized(together: int) -> tuple[Any, Batch, float]:
    """A model, a batch of so many rows that its step takes 2 ms, and what it does take."""
    rows, steps = 64, 160
    for _ in range(8):
        model, batch = _model(together), _batch(rows)
        step = median(_fit(model, _cached(batch), 4, steps, _Clock())[1:]) / steps
        if abs(step / _STEP - 1) <= _WITHIN / 2:
            break
        rows = max(1, round(rows * min(4, _STEP / step)))
    return model, batch, step


def cost(together: int, rounds: int) -> dict[str, Any]:
    model, batch, _ = _sized(together)
    data = _cached(batch)
    steps = round(_BLOCK / _STEP / together) * together
    watch = labkit.watch()
    seconds = _fit(model, data, 2 * rounds + 4, steps, _Clock(watch, every=2))[2:]
    plain = seconds[1::2]
    # Each watched one beside the mean of its neighbours.
    ratios = [2 * b / (a + c) for a, b, c in zip(plain, seconds[2::2], plain[1:], strict=False)]
    starts = []
    for _ in range(3):
        took = []
        for kept in (None, labkit.watch(), None):
            began = time.perf_counter()
            _fit(model, data, 1, together, _Clock(kept))
            took.append(time.perf_counter() - began)
        starts.append(took[1] - (took[0] + took[2]) / 2)
    return {
        "steps_per_execution": together,
        "milliseconds a step": 1000 * median(plain) / steps,
        "seconds with watch / without": _spread(ratios),
        "waiting share of a step that waits for nothing": _spread(
            [epoch.share for epoch in watch.epochs[1:]]
        ),
        "seconds once a fit": median(starts),
        "drift of the plain epochs": spread(plain),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4)
    error = 0.93 * (high - low) / len(values) ** 0.5  # of the median, of a normal distribution
    return {"median": middle, "quartiles": [low, high], "standard error": error}


def _made(work: Callable[[], Any]) -> Callable[[Batch], Iterator[Batch]]:
    def batches(batch: Batch) -> Iterator[Batch]:
        while True:
            work()
            yield batch

    return batches


def _computes(seconds: float) -> Callable[[Batch], Iterator[Batch]]:
    work, nothing = busy_python(seconds), np.empty(0)
    return _made(lambda: work(nothing, nothing))


def _sleeps(seconds: float) -> Callable[[Batch], Iterator[Batch]]:
    return _made(lambda: time.sleep(seconds))


def _dataset(batches: Callable[[Batch], Iterator[Batch]]) -> Callable[[Batch], Any]:
    def made(batch: Batch) -> tf.data.Dataset:
        spec = tuple(tf.TensorSpec((None, part.shape[1])) for part in batch)
        return tf.data.Dataset.from_generator(lambda: batches(batch), output_signature=spec)

    return made


# Keras prefetches from a generator, but not from a data set.
SOURCES: dict[str, tuple[int, Callable[[Batch], Any]]] = {
    "data set, sleeps 0.5 ms": (1, _dataset(_sleeps(0.0005))),
    "data set, sleeps 2 ms": (1, _dataset(_sleeps(0.002))),
    "generator, sleeps 5 ms": (1, _sleeps(0.005)),
    "generator, 1 ms of Python": (1, _computes(0.001)),
    "generator, 4 ms of Python": (1, _computes(0.004)),
    "data set, sleeps 2 ms, 8 steps a call": (8, _dataset(_sleeps(0.002))),
    "generator, 1 ms of Python, 8 steps a call": (8, _computes(0.001)),
}


def truth(name: str, model: Any, batch: Batch, rounds: int) -> dict[str, Any]:
    together, source = SOURCES[name]
    steps = round(_BLOCK * (1 if together == 1 else _LONG) / _STEP / together) * together

    def block(data: Any, watch: Any = None, epochs: int = 1) -> float:
        """Seconds an epoch, without the first, which compiles and finds buffers empty."""
        return statistics.fmean(_fit(model, data, 1 + epochs, steps, _Clock(watch))[1:])

    said, slowed, true, errors, alone, costs = [], [], [], [], [], []
    for _ in range(rounds):
        watch = labkit.watch()
        first, real = block(_cached(batch)), block(source(batch))
        watched, last = block(source(batch), watch, 3), block(_cached(batch))
        alone += [first, last]
        seen = total(watch.epochs[1:])
        said.append(seen.share)
        slowed.append(seen.slow * seen.calls / seen.measured)
        true.append(1 - (first + last) / 2 / real)
        errors.append(said[-1] - true[-1])
        costs.append(watched / real)
    return {
        "data": name,
        "share said": median(said),
        "of it, as slower steps": median(slowed),
        "true": median(true),
        "said - true": _spread(errors),
        "seconds with watch / without": _spread(costs),
        "drift of the cached blocks": spread(alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What labkit.watch() costs, and is it true?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["cost", "truth"])
    arguments = parser.parse_args()
    began = time.perf_counter()
    results: dict[str, Any] = {"cost": [], "truth": []}
    for together in (1, 8):
        if arguments.only != "truth":
            results["cost"].append(cost(together, 2 * arguments.rounds))
            print(results["cost"][-1], flush=True)
    for together, names in itertools.groupby(SOURCES, key=lambda name: SOURCES[name][0]):
        if arguments.only != "cost":
            model, batch, step = _sized(together)
            print(f"{together}: {1000 * step:.2f} ms a step", flush=True)
            for name in names:
                results["truth"].append(truth(name, model, batch, max(3, arguments.rounds // 3)))
                print(results["truth"][-1], flush=True)
    results["seconds in all"] = time.perf_counter() - began
    write("benchmark_watch", results)


if __name__ == "__main__":
    main()
