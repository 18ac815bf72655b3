"""What order="fixed" costs, and a state in any order. Writes figures/benchmark_order.json.

    python -m tests.benchmarks.order [--rounds 7]

The same generator through four threads in any order and in a fixed one, in turn (A B A B), each
time all its batches; the median of the paired ratios of rates. Even work takes 20 ms a batch,
uneven work 5 to 50 ms at random, where a fixed order has to wait for whoever is slow.

Then, in any order, mixed by TensorFlow's RandomShuffleQueue against the feeder, which knows what is
delivered: processor seconds of this process a batch, of work that takes no time, so that the number
is of the moving and mixing alone, the workers' copy and the consumer's loop included.
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


_SIZES = {"100 KB": ((32, 28, 28, 1), 2000, 1000), "19 MB": ((32, 224, 224, 3), 100, 200)}


def _processor_ms(kind: str, size: str, by_feeder: bool) -> float:
    shape, count, least = _SIZES[size]

    def factory(worker: int, n_workers: int) -> Any:
        batch = np.zeros(shape, np.float32)
        for number in range(worker, count, n_workers):
            yield batch, np.full((32, 10), number)

    sizes = {"min_after_dequeue": least, "capacity": 2 * least}
    with labkit.QueueRunner(factory, 32, _WORKERS, kind, **sizes) as runner:  # type: ignore[arg-type]
        if by_feeder:
            runner.state_dict()
        batches = iter(runner.dataset())
        began = time.process_time()
        assert sum(1 for _ in batches) == count
        return (time.process_time() - began) / count * 1e3


def _state(rounds: int) -> dict[str, Any]:
    found = {}
    for kind in ("thread", "process"):
        for size in _SIZES:
            queue, feeder = [], []
            for _ in range(rounds):
                queue.append(_processor_ms(kind, size, by_feeder=False))
                feeder.append(_processor_ms(kind, size, by_feeder=True))
            ratios = [b / a for a, b in zip(queue, feeder, strict=True)]
            found[f"{kind}, {size}"] = {
                "processor ms a batch, mixed by the queue": median(queue),
                "processor ms a batch, mixed by the feeder": median(feeder),
                "feeder / queue": median(ratios),
                "drift of the queue": spread(queue),
            }
            print(kind, size, found[f"{kind}, {size}"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What order='fixed' costs, and a state.")
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
    results["a state in any order"] = _state(rounds)
    write("benchmark_order", results)


if __name__ == "__main__":
    main()
