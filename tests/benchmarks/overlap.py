"""Does a step of fit overlap with taking the next batch? `python -m tests.benchmarks.overlap`.

A step sleeps, as one on a GPU would; batches of 19 MB and 100 KB come from a generator that has
nothing to do. Beside labkit's, mixed and in order, a batch that is always ready.
"""

import time

import numpy as np

from labkit import QueueRunner
from labkit.quiet import tf
from tests.benchmarks.common import median, spread, write

ROWS, STEP, STEPS, ROUNDS = 64, 0.02, 120, 5
SIZES = {"19 MB": 19_000_000, "100 KB": 100_000}


class Sleeping(tf.keras.Model):
    def call(self, x):
        return x

    def train_step(self, batch):
        def wait(_):
            time.sleep(STEP)
            return np.float32(0)

        return {"loss": tf.ensure_shape(tf.numpy_function(wait, [batch[0][0, 0]], tf.float32), [])}


class Clock(tf.keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())


def step_of(data):
    """Median seconds of a step of `fit`, its first ones left out."""
    model, clock = Sleeping(), Clock()
    model.compile()
    model.fit(data, steps_per_epoch=STEPS, verbose=0, shuffle=False, callbacks=[clock])
    return median(np.diff(clock.ends)[20:].tolist())


def ours(batch, **options):
    def endless():
        while True:
            yield batch

    with QueueRunner(endless, ROWS, capacity=8 * ROWS, **options) as runner:
        return step_of(runner.dataset())


def main() -> None:
    results = {}
    for size, nbytes in SIZES.items():
        batch = np.ones((ROWS, nbytes // ROWS), np.uint8), np.zeros(ROWS, np.int32)
        runs = {
            "ready": lambda batch=batch: step_of(tf.data.Dataset.from_tensors(batch).repeat()),
            "mixed": lambda batch=batch: ours(batch, min_after_dequeue=4 * ROWS),
            "in order": lambda batch=batch: ours(batch, shuffle=False),
        }
        found = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                found[name].append(run())
        results[size] = {
            name: {
                "ms_a_step": 1e3 * median(its),
                "over_ready": median([a / b for a, b in zip(its, found["ready"], strict=True)]),
                "drift": spread(its),
            }
            for name, its in found.items()
        }
        print(size, results[size])
    write("benchmark_overlap", results)


if __name__ == "__main__":
    main()
