"""Queue and feed_dict against the bound: `python -m tests.benchmarks.pipelines`.

The bound is min(n / delay, compute-only). Every round measures compute-only before and
after; figures are medians over the rounds of the ratios within a round.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from labkit import Component
from labkit.data import MnistDataGenerator
from labkit.workloads import sleep
from tests.benchmarks.common import Steps, median, spread, write

DELAY = 0.05
# Steps in a round, and rounds. Where compute-only is the bound, its drift within seconds is the
# noise of the ratio, so the rounds are short and many.
ROUNDS = {1: (50, 7), 4: (200, 7), 16: (500, 7), 32: (100, 120)}
STARTS = 5
SPEC = (Component("images", (28, 28, 1), np.float32), Component("labels", (10,), np.float32))


def at_delay() -> dict:
    factory = MnistDataGenerator(32, sleep(DELAY)).passes_iterator
    with ExitStack() as stack:
        constant = stack.enter_context(Steps("constant"))
        serial = stack.enter_context(Steps("feed_dict", factory))
        computes: list[float] = []
        serials: list[float] = []
        rates: dict[int, list[float]] = {n: [] for n in ROUNDS}
        shares: dict[int, list[float]] = {n: [] for n in ROUNDS}
        gains: list[float] = []
        start: dict[int, float] = {}
        cold: dict[int, float] = {}
        constant.rate(100)
        for n, (steps, rounds) in ROUNDS.items():
            ideal = 1000 / 32 * DELAY / n
            started = [
                (started_in(factory, n), started_in(factory, n, SPEC)) for _ in range(STARTS)
            ]
            start[n], cold[n] = (median(times) / ideal for times in zip(*started, strict=True))
            # One queue at a time, as in a user's notebook.
            with Steps("queue", factory, n) as queue:
                for _ in range(rounds):
                    before = constant.rate(100)
                    if n / DELAY < before:
                        queue.drain(most=3000)
                    else:
                        queue.rate(20)  # the queue stays full; these are for the caches
                    rate = queue.rate(steps)
                    compute = (before + constant.rate(100)) / 2
                    computes.append(compute)
                    rates[n].append(rate)
                    shares[n].append(rate / min(n / DELAY, compute))
                    if n == 4:
                        serials.append(serial.rate(40))
                        gains.append(rate / serials[-1])
    return {
        "delay": DELAY,
        "compute_only": median(computes),
        "compute_only_drift": spread(computes),
        "feed_dict": median(serials),
        "rate": {n: median(v) for n, v in rates.items()},
        "share_of_bound": {n: median(v) for n, v in shares.items()},
        "share_of_bound_rounds": shares,
        "queue_4_over_feed_dict": median(gains),
        "start_over_ideal": start,
        "start_over_ideal_with_a_given_spec": cold,
    }


def started_in(factory: Callable[..., Any], n: int, spec: Any = None) -> float:
    """Seconds from start to the first batch of the queue, with n threads.

    The threads begin in get_inputs, so they have batches when the graph is built; with a given
    spec they begin in start.
    """
    with Steps("queue", factory, n, spec=spec) as queue:
        return queue.start_seconds


def free() -> dict:
    factory = MnistDataGenerator(32).passes_iterator
    with (
        Steps("queue", factory) as queue,
        Steps("feed_dict", factory) as serial,
        Steps("constant") as constant,
    ):
        ratios, computes = [], []
        for _ in range(9):
            computes.append(constant.rate(200))
            before = serial.rate(400)
            queue.drain()
            rate = queue.rate(400)
            ratios.append(rate / ((before + serial.rate(400)) / 2))
    return {"queue_over_feed_dict_delay_0": median(ratios), "rounds": ratios,
            "compute_only_drift": spread(computes)}  # fmt: skip


if __name__ == "__main__":
    results = {"sleep": at_delay(), "free": free()}
    for key, value in results["sleep"].items():
        print(key, value)
    print(results["free"])
    write("benchmark_pipelines", results)
