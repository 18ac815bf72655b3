"""What `labkit.watch()` costs, and whether its share is true. Writes figures/benchmark_watch.json.

    python -m tests.benchmarks.watch [--rounds 9]

Cost: epochs of one `fit` with and without it in turn (A B A B), over one cached batch, so that all
that differs is the watching; the median of the paired ratios of seconds. Truth: 1 - seconds with a
cached batch / seconds with the slow data, of one model, beside what `watch` said of the latter.
"""

import argparse
import time
from typing import Any

import numpy as np

import labkit
from labkit.quiet import tf
from tests.benchmarks.common import median, spread, write

_STEP = 0.002
_PAUSES = (0.0005, 0.002, 0.01)


class _Clock(tf.keras.callbacks.Callback):
    """Seconds from the first step of an epoch to its last."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self.began


def _model(width: int, together: int) -> tf.keras.Model:
    tf.keras.utils.set_random_seed(0)
    layers = [tf.keras.Input((width,)), tf.keras.layers.Dense(width), tf.keras.layers.Dense(1)]
    model = tf.keras.Sequential(layers)
    model.compile("sgd", "mse", steps_per_execution=together)
    return model


def _batch(width: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(32, width)).astype(np.float32)
    return x, x[:, :1]


def _epoch(model: Any, data: Any, steps: int, watched: bool) -> tuple[float, Any]:
    clock, kept = _Clock(), labkit.watch() if watched else None
    callbacks = [kept, clock] if watched else [clock]
    model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=callbacks, shuffle=False)
    return clock.seconds, kept


def _width() -> int:
    """Of a model whose step takes about 2 ms on this machine."""
    for width in (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072):
        data = tf.data.Dataset.from_tensors(_batch(width)).repeat()
        model = _model(width, 1)
        _epoch(model, data, 20, False)
        if _epoch(model, data, 100, False)[0] / 100 > _STEP:
            break
    return width


def cost(width: int, together: int, rounds: int, steps: int = 1600) -> dict[str, Any]:
    data = tf.data.Dataset.from_tensors(_batch(width)).repeat()
    plain, watched = _model(width, together), _model(width, together)
    _epoch(plain, data, 3 * together, False), _epoch(watched, data, 3 * together, True)
    # The first call of each fit with it compiles, so both are counted from one long fit's seconds
    # less those of a short one.
    ratios, shares, plain_seconds = [], [], []
    for _ in range(rounds):
        a = _epoch(plain, data, steps, False)[0] - _epoch(plain, data, together, False)[0]
        long, kept = _epoch(watched, data, steps, True)
        b = long - _epoch(watched, data, together, True)[0]
        ratios.append(b / a)
        shares.append(kept.epochs[0].share)
        plain_seconds.append(a)
    return {
        "steps_per_execution": together,
        "milliseconds a step": 1000 * median(plain_seconds) / (steps - together),
        "seconds with watch / without": median(ratios),
        "of the rounds": [round(ratio, 3) for ratio in sorted(ratios)],
        "waiting share of a step that waits for nothing": median(shares),
        "drift of the plain fits": spread(plain_seconds),
    }


def truth(width: int, pause: float, rounds: int, steps: int = 400) -> dict[str, Any]:
    x, y = _batch(width)
    spec = (tf.TensorSpec((None, width)), tf.TensorSpec((None, 1)))

    def slow() -> Any:
        while True:
            time.sleep(pause)
            yield x, y

    data = tf.data.Dataset.from_generator(slow, output_signature=spec)
    cached = tf.data.Dataset.from_tensors((x, y)).repeat()
    model = _model(width, 1)
    seconds: dict[str, list[float]] = {"cached": [], "slow": [], "watched": []}
    errors, said, true = [], [], []
    for _ in range(rounds):
        for name, source in (("cached", cached), ("slow", data), ("watched", data)):
            # The first call of each fit compiles, or begins the generator.
            few = _epoch(model, source, 2, name == "watched")[0]
            more, kept = _epoch(model, source, steps, name == "watched")
            seconds[name].append(more - few)
        true.append(1 - seconds["cached"][-1] / seconds["slow"][-1])
        said.append(kept.epochs[0].share)
        errors.append(said[-1] - true[-1])
    pairs = zip(seconds["watched"], seconds["slow"], strict=True)
    return {
        "pause": pause,
        "share said": median(said),
        "true": median(true),
        "said - true, median": median(errors),
        "said - true, of the rounds": [round(error, 3) for error in sorted(errors)],
        "seconds with watch / without": median([a / b for a, b in pairs]),
        "drift of the cached fits": spread(seconds["cached"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What labkit.watch() costs, and is it true?")
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    width = _width()
    results: dict[str, Any] = {"width of the model": width, "cost": [], "truth": []}
    for together in (1, 8):
        results["cost"].append(cost(width, together, rounds))
        print(results["cost"][-1])
    for pause in _PAUSES:
        results["truth"].append(truth(width, pause, rounds))
        print(results["truth"][-1])
    write("benchmark_watch", results)


if __name__ == "__main__":
    main()
