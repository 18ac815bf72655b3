"""What order="fixed" costs. Writes figures/benchmark_order.json.

    python -m tests.benchmarks.order [--rounds 7]

The same generator through four threads in any order and in a fixed one, in turn (A B A B), each
time all its batches; the median of the paired ratios of rates. Even work takes 20 ms a batch,
uneven work 5 to 50 ms at random, where a fixed order has to wait for whoever is slow.
"""

import argparse
import time
from typing import Any

import numpy as np

import labkit
from tests.benchmarks.common import median, spread, write

_BATCHES, _WORKERS = 200, 4
_WORK = {"even, 20 ms": (0.020, 0.020), "uneven, 5 to 50 ms": (0.005, 0.050)}


def _seconds(low: float, high: float, seed: int, **options: Any) -> float:
    pauses = np.random.default_rng(seed).uniform(low, high, _BATCHES)

    def factory(worker: int, n_workers: int) -> Any:
        for number in range(worker, _BATCHES, n_workers):
            time.sleep(pauses[number])
            yield np.full((32, 28, 28, 1), number, np.float32), np.full((32, 10), number)

    with labkit.QueueRunner(factory, 32, _WORKERS, **options) as runner:
        batches = runner.dataset()
        began = time.perf_counter()
        taken = sum(1 for _ in batches)
        assert taken == _BATCHES
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="What order='fixed' costs.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    results: dict[str, Any] = {"workers": _WORKERS, "batches": _BATCHES}
    for name, (low, high) in _WORK.items():
        any_order, fixed = [], []
        for seed in range(rounds):
            any_order.append(_seconds(low, high, seed))
            fixed.append(_seconds(low, high, seed, order="fixed"))
        ratios = [a / b for a, b in zip(any_order, fixed, strict=True)]
        results[name] = {
            "rate, fixed / any": median(ratios),
            "of the rounds": [round(ratio, 3) for ratio in sorted(ratios)],
            "drift of any order": spread(any_order),
        }
        print(name, results[name])
    write("benchmark_order", results)


if __name__ == "__main__":
    main()
