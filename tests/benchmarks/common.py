"""What every benchmark needs: a graph to run steps in, paired ratios, and one form of JSON."""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from labkit.data import MnistDataGenerator
from labkit.machine import describe_machine
from labkit.model import model_fn
from labkit.queue_runner import QueueRunner
from labkit.quiet import tf

v1 = tf.compat.v1
FIGURES = Path(__file__).resolve().parents[2] / "figures"
Factory = Callable[..., Any]


class Steps:
    """One training graph, ready to take steps; `rate(n)` is the steps/s of the next n steps."""

    def __init__(
        self,
        pipeline: str,
        factory: Factory | None = None,
        n: int = 1,
        workers: str = "thread",
        pools: tuple[int, int] = (1, 1),
        min_after: int = 1000,
        spec: Any = None,
    ):
        self.stack = ExitStack()
        graph = tf.Graph()
        self.batches = iter(factory()) if pipeline == "feed_dict" and factory else None
        with graph.as_default():
            images = v1.placeholder(tf.float32, [None, 28, 28, 1])
            labels = v1.placeholder(tf.float32, [None, 10])
            self.places = images, labels
            runner = None
            if pipeline == "queue":
                assert factory is not None
                runner = QueueRunner(
                    factory,
                    32,
                    n,
                    workers,  # type: ignore[arg-type]
                    min_after_dequeue=min_after,
                    spec=spec,
                )
                images, labels = runner.get_inputs()
            elif pipeline == "constant":
                batch = next(MnistDataGenerator(32).train_iterator())
                images, labels = map(tf.constant, batch)
            self.train_op = model_fn({"images": images, "labels": labels})["train_op"]
            config = v1.ConfigProto(
                intra_op_parallelism_threads=pools[0], inter_op_parallelism_threads=pools[1]
            )
            self.sess = self.stack.enter_context(v1.Session(config=config, graph=graph))
            self.sess.run(v1.global_variables_initializer())
            began = time.perf_counter()
            if runner is not None:
                self.stack.enter_context(runner.start(self.sess))
                self.sess.run(labels)
            self.start_seconds = time.perf_counter() - began
            self.runner, self.least = runner, min_after + 32

    def step(self) -> None:
        feed = (
            None
            if self.batches is None
            else dict(zip(self.places, next(self.batches), strict=True))
        )
        self.sess.run(self.train_op, feed)

    def rate(self, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            self.step()
        return count / (time.perf_counter() - began)

    def drain(self, most: int = 600) -> None:
        """Uses up what was stored during a pause, so that the rate is the steady one."""
        for step in range(most):  # where the model is the slower, the queue stays full for ever
            if step >= 4 and (self.runner is None or self.runner.depth() < self.least):
                break
            self.step()

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()


def compute_only(steps: int = 300) -> float:
    with Steps("constant") as run:
        run.rate(30)
        return run.rate(steps)


def median(values: list[float]) -> float:
    return float(statistics.median(values))


def spread(values: list[float]) -> float:
    """Largest over smallest, minus 1: the drift of the machine when values should be equal."""
    return max(values) / min(values) - 1


def write(name: str, results: dict[str, Any]) -> None:
    """Prints the results and keeps them, with the command and the machine, in figures/."""
    results = {
        "command": shlex.join(
            ["python", "-m", "tests.benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]
        ),
        "machine": describe_machine(),
        **results,
    }
    (FIGURES / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: figures/{name}.json")
