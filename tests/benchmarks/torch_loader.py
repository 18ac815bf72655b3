"""Beside PyTorch's DataLoader: `python -m tests.benchmarks.torch_loader`.

End to end: a worker process makes a batch of float32, the parent holds it as a tensor. Ours goes
worker -> shared memory -> RandomShuffleQueue -> dequeued tensor; theirs worker -> shared memory
-> tensor. A B A B, medians of the paired ratios. Needs tests/benchmarks/requirements.txt.
"""

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from tests.benchmarks.common import median, write

SHAPES = {"32x28x28x1": ((32, 28, 28, 1), 4000), "32x224x224x3": ((32, 224, 224, 3), 600)}
ROUNDS = 4


class Source:
    """Yields the same batch for ever: all that is left to measure is the way."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.batch = np.random.default_rng(0).random(shape, dtype=np.float32)

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            yield self.batch


def ours(shape: tuple[int, ...], count: int, workers: int) -> float:
    from labkit.queue_runner import QueueRunner
    from labkit.quiet import tf

    source = Source(shape)
    with tf.Graph().as_default():
        runner = QueueRunner(
            lambda: iter(source), shape[0], workers, "process",
            capacity=8 * shape[0], min_after_dequeue=2 * shape[0],
        )  # fmt: skip
        batch = runner.get_inputs()
        config = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=1, inter_op_parallelism_threads=1
        )
        with tf.compat.v1.Session(config=config) as sess, runner.start(sess):
            take = sess.make_callable(batch.op)
            warm_up = count // 10
            while warm_up > 0 or len(runner.delivering) < workers:
                take()
                warm_up -= 1
            began = time.perf_counter()
            for _ in range(count):
                take()
            return count / (time.perf_counter() - began)


def theirs(shape: tuple[int, ...], count: int, workers: int) -> float:
    import torch

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[torch.Tensor]:
            for batch in Source(shape):
                yield torch.from_numpy(batch)

    loader = torch.utils.data.DataLoader(
        Stream(), batch_size=None, num_workers=workers, multiprocessing_context="fork"
    )
    batches = iter(loader)
    for _ in range(count // 10):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    rate = count / (time.perf_counter() - began)
    del batches
    return rate


def main() -> None:
    # Each measurement in a fresh process: neither library then sees the other's threads.
    results = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for name, (shape, count) in SHAPES.items():
            for workers in (1, 2):
                pairs = [
                    [pool.submit(run, shape, count, workers).result() for run in (ours, theirs)]
                    for _ in range(ROUNDS)
                ]
                results[f"{name}, {workers} workers"] = {
                    "labkit": median([a for a, _ in pairs]),
                    "torch": median([b for _, b in pairs]),
                    "ratio": median([a / b for a, b in pairs]),
                    "rounds": pairs,
                }
                print(name, workers, results[f"{name}, {workers} workers"])
    write("benchmark_torch_loader", results)


if __name__ == "__main__":
    main()
