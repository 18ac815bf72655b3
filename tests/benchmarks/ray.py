"""What Ray costs: `python -m tests.benchmarks.ray [--seconds S] [--rounds N]`. Interleaved.

Batches/s of one worker that only hands out an array: of 100 KB and of 19 MB, on the consumer's node
and on another. By labkit's actors and its processes (`dataset()`; and their pools alone), by Ray
Data's `iter_tf_batches` on the same generator (needs `tests/benchmarks/requirements.txt`), and by
bare `ray.get` of an actor's results, three calls ahead. Both nodes are this one machine: this is
overhead, not scale.
"""

import argparse
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil

from labkit import QueueRunner
from labkit.engine import KINDS, cluster
from labkit.engine.pool import Job, delivered
from labkit.engine.produce import IteratorFactory
from labkit.engine.ray import PLACES
from labkit.instruments.race import group
from tests.benchmarks.common import median, spread, write

ROWS = 32
SIZES = {"100 KB": 100_000, "19 MB": 19_000_000}
SETTLE = 20  # batches: more than lie ready; and as many seconds as are counted: memory is cold
STORE = 600 << 20  # bytes, of each node


def factory_of(nbytes: int) -> Callable[[], Iterator[Any]]:
    def batches() -> Iterator[Any]:
        batch = np.zeros((ROWS, nbytes // 4 // ROWS), np.float32)
        while True:
            yield (batch,)

    return batches


def through_runner(workers: Any, nbytes: int, there: dict[str, Any]) -> Iterator[Any]:
    settings: dict[str, Any] = {"capacity": 4 * ROWS, "shuffle": False}
    if workers == "ray":
        settings["worker_options"] = there
    with QueueRunner(factory_of(nbytes), ROWS, 1, workers, **settings) as runner:
        yield from runner.dataset()


def through_pool(workers: str, nbytes: int, there: dict[str, Any]) -> Iterator[Any]:
    options = there if workers == "ray" else None
    pool = KINDS[workers].pool(Job(IteratorFactory(factory_of(nbytes), 1), options=options))
    try:
        yield from (chunk for chunk in delivered(pool, 0.1) if chunk is not None and chunk.last)
    finally:
        pool.stop()


def through_ray_data(nbytes: int, there: dict[str, Any]) -> Iterator[Any]:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    make = factory_of(nbytes)

    def batches(_: Any) -> Iterator[Any]:
        return ({"x": x} for (x,) in itertools.islice(make(), 100_000))

    data = ray.data.range(1, override_num_blocks=1).map_batches(batches, batch_size=1, **there)
    yield from data.iter_tf_batches(batch_size=ROWS, prefetch_batches=2)


def by_hand(nbytes: int, there: dict[str, Any]) -> Iterator[Any]:
    ray = cluster.imported()

    class Hand:
        def __init__(self, make: Any) -> None:
            self.made = make()

        def next(self) -> Any:
            return next(self.made)

    hand = ray.remote(**there)(Hand).remote(factory_of(nbytes))
    ahead = [hand.next.remote() for _ in range(PLACES)]
    try:
        while True:
            yield ray.get(ahead.pop(0))
            ahead.append(hand.next.remote())
    finally:
        ray.kill(hand)


CONTESTANTS: dict[str, Callable[[int, dict[str, Any]], Iterator[Any]]] = {
    "labkit ray": functools.partial(through_runner, "ray"),
    "labkit processes": functools.partial(through_runner, "process"),
    "labkit ray, its pool": functools.partial(through_pool, "ray"),
    "labkit processes, their pool": functools.partial(through_pool, "process"),
    "Ray Data": through_ray_data,
    "bare ray.get": by_hand,
}


def rate(batches: Iterator[Any], seconds: float) -> float:
    with contextlib.closing(batches):  # type: ignore[type-var]
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds or count < SETTLE:
            next(batches)
            count += 1
        began, count = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < seconds:
            next(batches)
            count += 1
        return count / took


def await_quiet() -> None:
    """Until Ray has ended what the run before has left: it uses less than a tenth of a core."""
    for _ in range(20):
        theirs = psutil.Process().children(recursive=True)
        before = group.cpu_of(theirs)
        time.sleep(0.5)
        if group.cpu_of(theirs) - before < 0.05:
            return


def measure(there: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """By size, what each contestant comes to whose worker has these options of an actor."""
    results: dict[str, Any] = {}
    for size, nbytes in SIZES.items():
        rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for number in range(args.rounds):
            order = list(CONTESTANTS.items())
            shift = number * len(order) // args.rounds
            for name, batches in order[shift:] + order[:shift]:
                await_quiet()
                try:
                    rates[name].append(rate(batches(nbytes, there), args.seconds))
                except ImportError as error:
                    print(f"{name}: left away ({error})")
        bare, ours = rates["bare ray.get"], rates["labkit ray"]
        results[size] = {
            name: {
                "batches_per_second": median(its),
                "drift": spread(its),
                "over_bare": median([a / b for a, b in zip(its, bare, strict=True)]),
                "labkit_ray_over_it": median([a / b for a, b in zip(ours, its, strict=True)]),
            }
            for name, its in rates.items()
            if its
        }
        for name, its in results[size].items():
            per_second, of_bare = its["batches_per_second"], its["over_bare"]
            print(f"{size:7} {name:29} {per_second:7.1f} batches/s, {of_bare:.2f} of bare ray.get")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="counted, of each run")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with cluster.local_nodes(2, cores=2, store=STORE) as nodes:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for where, node in (
            ("the consumer's node", nodes.head_node),
            ("another node", *nodes.worker_nodes),
        ):
            print(f"The worker is on {where}:")
            affine = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            results[where] = measure({"num_cpus": 1, "scheduling_strategy": affine}, args)
    write("benchmark_ray", results)


if __name__ == "__main__":
    main()
