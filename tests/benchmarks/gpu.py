"""One model on a GPU, starved and fed: `python -m tests.benchmarks.gpu [--rounds 2]`.

Batches of JPEG files, decoded by Pillow, go into a CNN: by Keras from a plain generator, and
through labkit's threads and processes, half as many again as the step needs. Beside each fit what
NVML saw, what `labkit.watch` said, and the truth: 1 - seconds with a cached batch / seconds. The
fits take turns. Writes figures/gpu_use.json and, of the last round, gpu_use.png. 3 minutes;
with `--draw` only the picture, from the file. With `--race` the same files and model in a race of
labkit and what else is installed, into figures/gpu_race.json: 6 minutes.
"""

import argparse
import io
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import labkit
from labkit import QueueRunner, UsageMonitor, plots
from labkit.instruments.race.work import photographs
from labkit.instruments.usage_monitor import Gpu
from labkit.quiet import tf
from tests.benchmarks.common import FIGURES, median, spread, write

_CLASSES = 10
_RACED = ("labkit auto", "labkit processes", "Grain threads", "Grain processes", "DataLoader",
          "SPDL subprocesses", "own pool")  # fmt: skip


def decoded(paths: list[Path], batch_size: int, size: int) -> Callable[..., Iterator[Any]]:
    def batches(worker: int = 0, n_workers: int = 1) -> Iterator[Any]:
        from PIL import Image

        for number in itertools.count(worker, n_workers):
            images = np.empty((batch_size, size, size, 3), np.float32)
            labels = np.empty(batch_size, np.int32)
            for place in range(batch_size):
                index = (number * batch_size + place) % len(paths)
                with Image.open(io.BytesIO(paths[index].read_bytes())) as image:
                    images[place] = np.asarray(image.resize((size, size)))
                labels[place] = index % _CLASSES
            images /= 255
            yield images, labels

    return batches


def build(size: int, width: int, depth: int) -> tf.keras.Model:
    layers = tf.keras.layers
    model = tf.keras.Sequential([tf.keras.Input((size, size, 3))])
    model.add(layers.Conv2D(width, 3, 2, "same", activation="relu"))
    for _ in range(depth):
        model.add(layers.Conv2D(width, 3, 1, "same", activation="relu"))
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(_CLASSES, activation="softmax"))
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    return model


class _Clock(tf.keras.callbacks.Callback):
    """Begins once the first steps are over, which compile, and use up what was stored."""

    def __init__(self, settle: int) -> None:
        super().__init__()
        self.settle = settle
        self.usage = UsageMonitor(0.1)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == self.settle - 1:
            float(logs["loss"])  # the device has got so far, too
            self.usage.__enter__()
            self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self.began
        self.usage.__exit__()


def fit(model: Any, data: Any, steps: int, settle: int, watch: bool = False) -> dict[str, Any]:
    clock, watching = _Clock(settle), labkit.watch()
    callbacks = [watching, clock] if watch else [clock]
    model.fit(data, steps_per_epoch=settle + steps, verbose=0, callbacks=callbacks, shuffle=False)
    seen = clock.usage.summary()
    return {
        "steps/s": steps / clock.seconds,
        "GPU (%)": [gpu["utilisation"] for gpu in seen["gpus"]],
        "CPU (%)": seen["cpu"],
        "said": watching.epochs[-1].share if watch else None,
        "usage": clock.usage,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(chr(10))[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    parser.add_argument("--race", action="store_true", help="race over the same files and model")
    asked = parser.parse_args()
    if asked.draw:
        return draw()
    with tempfile.TemporaryDirectory() as folder:
        factory = decoded(photographs(Path(folder), 256), asked.batch_size, asked.size)
        if asked.race:
            model = build(asked.size, asked.width, asked.depth)
            print(labkit.race(factory, model, contestants=_RACED, rounds=asked.rounds, seconds=4,
                              json=FIGURES / "gpu_race.json"))  # fmt: skip
        else:
            measure(asked, factory)


def measure(asked: Any, factory: Callable[..., Iterator[Any]]) -> None:
    batches = factory()
    batch = next(batches)
    began = time.perf_counter()
    for _ in range(4):
        next(batches)
    price = (time.perf_counter() - began) / 4
    model = build(asked.size, asked.width, asked.depth)
    cached = tf.data.Dataset.from_tensors(batch).repeat()
    alone = fit(model, cached, 50, 10)["steps/s"]
    cores = labkit.machine.usable_cores()
    n = max(1, min(cores, math.ceil(1.5 * price * alone)))
    print(
        f"a batch takes {1000 * price:.0f} ms, a step {1000 / alone:.1f} ms: {n} workers",
        flush=True,
    )

    def few(steps: int) -> int:
        return max(20, min(steps, round(6 / price)))

    def plain(watch: bool) -> dict[str, Any]:
        return fit(model, factory(), few(asked.steps), 10, watch)

    def fed(workers: Any, watch: bool) -> dict[str, Any]:
        with QueueRunner(factory, asked.batch_size, n, workers, min_after_dequeue=0) as runner:
            return fit(model, runner.dataset(), asked.steps, 30, watch)

    ways: dict[str, Callable[[bool], dict[str, Any]]] = {
        "plain generator": plain,
        f"labkit, {n} threads": lambda watch: fed("thread", watch),
        f"labkit, {n} processes": lambda watch: fed("process", watch),
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    bounds = [fit(model, cached, 100, 10)]
    for number in range(asked.rounds):
        for name, way in ways.items():
            without, seen = way(False), way(True)
            bounds.append(fit(model, cached, 100, 10))
            bound = median([run["steps/s"] for run in bounds[-2:]])
            seen["true"] = 1 - without["steps/s"] / bound
            seen["of the bound"] = without["steps/s"] / bound
            seen["with watch / without"] = without["steps/s"] / seen["steps/s"]
            # What is drawn is the fit that nobody watched.
            seen |= {key: without[key] for key in ("GPU (%)", "CPU (%)", "usage")}
            rows[name].append(seen)
            print(number, name, {k: v for k, v in seen.items() if k != "usage"}, flush=True)
    kept = {
        name: [{**run, "usage": run["usage"].as_dict()} for run in r] for name, r in rows.items()
    }
    write("gpu_use", {
        "seconds a batch": price,
        "settings": {name: value for name, value in vars(asked).items() if name != "draw"},
        "n": n,
        "compute-only steps/s": [run["steps/s"] for run in bounds],
        "compute-only GPU (%)": [run["GPU (%)"] for run in bounds],
        "drift of compute-only": spread([run["steps/s"] for run in bounds]),
        "runs": kept,
    })  # fmt: skip
    draw()


def draw() -> None:
    """gpu_use.png from gpu_use.json: of each way its last round."""
    results = json.loads((FIGURES / "gpu_use.json").read_text())
    rows = results["runs"]
    shares = {name: median([run["of the bound"] for run in seen]) for name, seen in rows.items()}
    best = max(shares, key=lambda name: shares[name])
    usages = {}
    for name, seen in rows.items():
        usage = SimpleNamespace(**seen[-1]["usage"])
        usage.gpus = [Gpu(**gpu) for gpu in usage.gpus]
        usages[name] = usage
    figure = plots.usage(
        usages,
        f"Of the model's own rate a plain generator reaches"
        f" {shares['plain generator']:.0%}, {best} {shares[best]:.0%}",
        machine=results["machine"],
    )
    plots.save(figure, FIGURES / "gpu_use.png")


if __name__ == "__main__":
    main()
