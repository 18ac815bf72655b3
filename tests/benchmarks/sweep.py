"""Are the predictions true, and the advice good? `python -m tests.benchmarks.sweep [case ...]`.

For each generator: `diagnose`, then every setting of its table is run for some seconds, and shown
beside its prediction, misses included. Then `n_workers="auto"` beside the best fixed setting.
"""

import argparse
import contextlib
import io
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import labkit
from labkit.data import MnistDataGenerator
from labkit.quiet import tf
from labkit.workloads import busy_python, distort, sleep
from tests.benchmarks.common import median, spread, write

SECONDS, ROUNDS = 2.0, 2


def cnn(extra: float = 0.0) -> Callable[..., Any]:
    """A training step of a small CNN; `extra` seconds more per step for a slow one."""
    model = tf.keras.Sequential(
        [
            tf.keras.layers.Input((28, 28, 1)),
            tf.keras.layers.Conv2D(8, 3, activation="relu"),
            tf.keras.layers.MaxPooling2D(),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(10),
        ]
    )
    loss = tf.keras.losses.CategoricalCrossentropy(from_logits=True)
    optimizer = tf.keras.optimizers.SGD(0.01)

    @tf.function
    def update(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(value, weights), weights, strict=True))
        return value

    def step(images: Any, labels: Any) -> None:
        update(images, labels).numpy()
        time.sleep(extra)

    return step


def cases() -> dict[str, tuple[Any, float]]:
    found: dict[str, tuple[Any, float]] = {}
    for ms in (5, 20, 50, 100):
        found[f"sleep {ms} ms"] = sleep(ms / 1e3), 0.0
    for ms in (2, 5, 20):
        found[f"pure Python {ms} ms"] = busy_python(ms / 1e3), 0.0
    found["NumPy augmentation"] = distort(), 0.0
    found["no work, slow model"] = None, 0.02
    return found


def alone(step: Callable[..., Any]) -> float:
    """steps/s of the model on one batch: the machine's own drift."""
    batch = next(MnistDataGenerator(32).train_iterator())
    step(*batch)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 1.0:
        step(*batch)
        count += 1
    return count / (time.monotonic() - began)


def one_case(work: Any, extra: float) -> dict[str, Any]:
    step = cnn(extra)
    computes = [alone(step)]
    report = labkit.diagnose(MnistDataGenerator(32, work).passes_iterator, step, progress=False)
    rates: dict[int, list[float]] = {index: [] for index in range(len(report.rows))}
    for _ in range(ROUNDS):
        computes.append(alone(step))
        for index, row in enumerate(report.rows):
            rates[index].append(report._measure(row, SECONDS))
    computes.append(alone(step))
    rows = []
    for index, row in enumerate(report.rows):
        measured = median(rates[index])
        rows.append(
            {
                "workers": row.workers,
                "n": row.n,
                "predicted": row.predicted,
                "measured": measured,
                "measured/predicted": measured / row.predicted,
                "recommended": row is report.best,
            }
        )
    best = max(row["measured"] for row in rows)
    chosen = next(row for row in rows if row["recommended"])
    return {
        "verdict": report.verdict,
        "nature": report.nature,
        "diagnose_seconds": report.seconds,
        "compute_only": computes,
        "compute_only_drift": spread(computes),
        "recommended_over_best": chosen["measured"] / best,
        "rows": rows,
    }


def auto(work: Any) -> dict[str, Any]:
    """steps/s of "auto" from its 10th second on, over fixed settings measured in turn with it."""
    factory, step = MnistDataGenerator(32, work).passes_iterator, cnn()

    def rate(n: Any, warm_up: float) -> float:
        with labkit.QueueRunner(factory, 32, n, capacity=128, min_after_dequeue=0) as runner:
            batches = iter(runner.dataset())
            end = time.monotonic() + warm_up
            while time.monotonic() < end:
                step(*next(batches))
            began = time.monotonic()
            for count in itertools.count(1):
                step(*next(batches))
                if time.monotonic() - began > SECONDS:
                    return count / (time.monotonic() - began)
        raise AssertionError

    said = io.StringIO()
    fixed: dict[int, list[float]] = {n: [] for n in (1, 2, 4, 8, 16, 32)}
    ours = []
    for _ in range(ROUNDS):
        for n, values in fixed.items():
            values.append(rate(n, 1.5))
        with contextlib.redirect_stdout(said):
            ours.append(rate("auto", 10.0))
    best = max(fixed, key=lambda n: median(fixed[n]))
    return {
        "auto": ours,
        "fixed": fixed,
        "best_fixed": best,
        "auto_over_best": median([a / b for a, b in zip(ours, fixed[best], strict=True)]),
        "decisions": said.getvalue().splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="names of cases (default: all)")
    only = parser.parse_args().only
    results: dict[str, Any] = {}
    for name, (work, extra) in cases().items():
        if only and name not in only:
            continue
        results[name] = one_case(work, extra)
        print(f"\n{name}: {results[name]['verdict']}")
        print(f"  compute-only drifted by {results[name]['compute_only_drift']:.0%}")
        for row in results[name]["rows"]:
            miss = "" if abs(row["measured/predicted"] - 1) <= 0.1 else "  MISS"
            mark = "  <- recommended" if row["recommended"] else ""
            print(
                f"  {row['n']:2d} {row['workers']:8s} predicted {row['predicted']:7.1f}"
                f"  measured {row['measured']:7.1f}  {row['measured/predicted']:.2f}{miss}{mark}",
                flush=True,
            )
        print(f"  recommended / best found: {results[name]['recommended_over_best']:.2f}")
    every = [row for case in results.values() for row in case["rows"]]
    chosen = [row for row in every if row["recommended"]]
    within = {
        "settings_within_10_percent": _share(every),
        "recommended_within_10_percent": _share(chosen),
        "recommendations_within_5_percent_of_best": float(
            np.mean([case["recommended_over_best"] >= 0.95 for case in results.values()])
        ),
    }
    print(within)
    scaled = {}
    for name in ("sleep 20 ms", "sleep 50 ms", "pure Python 5 ms"):
        if not only or name in only:
            scaled[name] = auto(cases()[name][0])
            print(f"auto, {name}: {scaled[name]['auto_over_best']:.2f} of the best fixed setting")
    if not only:
        write("benchmark_sweep", {**within, "cases": results, "auto": scaled})


def _share(rows: list[dict[str, Any]]) -> float:
    return float(np.mean([abs(row["measured/predicted"] - 1) <= 0.1 for row in rows]))


if __name__ == "__main__":
    main()
