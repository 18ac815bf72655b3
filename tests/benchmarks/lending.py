"""Is lending worth its lines? `python -m tests.benchmarks.lending`. A B A B, 4 minutes.

Samples of 256 KB and more of a worker process stay in shared memory, where the queue keeps them
until they are dequeued. Held against the way of small ones, which are copied into the queue batch
by batch, by size of sample, two workers, from worker to dequeued batch. And with order="fixed",
which mixes lent samples as they lie. Writes figures/benchmark_lending.json.
"""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from labkit.engine import batches
from labkit.queue_runner import QueueRunner
from tests.benchmarks.common import median, spread, write

ROWS, WORKERS, ROUNDS, SECONDS = 32, 2, 5, 2.0
SIDES = {"147 KB": 112, "256 KB": 148, "602 KB": 224, "2.4 MB": 448}  # of pictures in float32


def rate(side: int, order: str, lends: bool) -> float:
    """Batches/s that come out."""

    def factory() -> Iterator[np.ndarray]:
        batch = np.zeros((ROWS, side, side, 3), np.float32)
        yield from itertools.repeat(batch)

    queue = {"capacity": 6 * ROWS, "min_after_dequeue": 2 * ROWS, "order": order}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(batches, "_LARGE_SAMPLE", 0 if lends else math.inf))
        runner = QueueRunner(factory, ROWS, WORKERS, "process", **queue)  # type: ignore[arg-type]
        taken = iter(stack.enter_context(runner).dataset())
        for _ in range(20):
            next(taken)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            next(taken)
            count += 1
        return count / (time.perf_counter() - began)


def compared(measure: Callable[[bool], float]) -> dict[str, object]:
    pairs = [(measure(True), measure(False)) for _ in range(ROUNDS)]
    ratios = [lent / copied for lent, copied in pairs]
    return {
        "lent, batches/s": median([lent for lent, _ in pairs]),
        "copied, batches/s": median([copied for _, copied in pairs]),
        "lent over copied": median(ratios),
        "least and most": [min(ratios), max(ratios)],
        "spread of copied": spread([copied for _, copied in pairs]),
    }


def main() -> None:
    results = {}
    for order, (name, side) in itertools.product(("any", "fixed"), SIDES.items()):
        found = compared(functools.partial(rate, side, order))
        results[f"{name}, {order} order"] = found
        print(f"{name}, {order} order", found, flush=True)
    write("benchmark_lending", results)


if __name__ == "__main__":
    main()
