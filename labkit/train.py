"""train(): the article's training loop on either pipeline; `python -m labkit.train` runs it."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from labkit import workloads
from labkit.data import MnistDataGenerator
from labkit.machine import describe_machine

PIPELINES = ("feed_dict", "queue", "constant")
_SUMMARY_EVERY = 50
_VALID_BATCH = 500


@dataclass
class Epoch:
    """One epoch. Times are seconds, losses nats per sample, accuracies 0..1."""

    seconds: float
    steps: int
    waiting: float
    computing: float
    train_accuracy: float
    train_loss: float
    valid_accuracy: float | None = None
    valid_loss: float | None = None

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds


@dataclass
class History:
    """What a run did: its settings, the machine, and an `Epoch` for each epoch.

    Attributes:
        settings: the arguments of `train`.
        machine: processor, cores, versions.
        epochs: list of `Epoch`.
        start_seconds: from the start of the workers to the end of the first step, compiling
            included.
        steps: (waiting, computing) seconds of each step of the last epoch, for timelines.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    epochs: list[Epoch] = field(default_factory=list)
    start_seconds: float = 0.0
    steps: list[tuple[float, float]] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        data = asdict(self)
        for row, epoch in zip(data["epochs"], self.epochs, strict=True):
            row["steps_per_second"] = epoch.steps_per_second
        Path(path).write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Reads what `save` wrote. Raises ValueError if the file is something else."""
        try:
            data = json.loads(Path(path).read_text())
            for row in data["epochs"]:
                row.pop("steps_per_second")
            data["epochs"] = [Epoch(**row) for row in data["epochs"]]
            data["steps"] = [(wait, compute) for wait, compute in data["steps"]]
            return cls(**data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"History.load: expected a file written by History.save, got {path} "
                f"({type(error).__name__}: {error})."
            ) from error


def train(
    pipeline: str = "queue",
    n_threads: int = 1,
    epochs: int = 10,
    steps: int = 1875,
    batch_size: int = 32,
    delay: float = 0.05,
    iterator: Callable[..., Iterable[Any]] | None = None,
    workers: Literal["thread", "process"] = "thread",
    learning_rate: float = 1e-4,
    capacity: int = 2000,
    min_after_dequeue: int = 1000,
    seed: int = 0,
    log_dir: str | Path | None = None,
    validate: bool = True,
    progress: bool = True,
    pools: tuple[int, int] = (1, 1),
    on_start: Callable[[Any, Any], None] | None = None,
) -> History:
    """Trains the CNN on MNIST and measures where the time goes.

    Args:
        pipeline: "feed_dict", the serial loop; "queue", through a `QueueRunner`; or "constant",
            one batch over and over: the compute-only rate, which no pipeline can beat.
        n_threads: workers of the queue (threads, or processes if workers="process").
        epochs, steps: of `steps` steps each. Defaults 10 and 1875 (60,000 samples of 32).
        batch_size: samples per step. Default 32.
        delay: seconds that the default iterator sleeps per batch, for heavy work. Default 0.05.
        iterator: a factory of batches `(images, labels)`, in place of the default, which passes
            over the training set again and again, every sample once a pass.
        workers: "thread" or "process".
        learning_rate: of Adam. Default 1e-4.
        capacity, min_after_dequeue: of the queue, in samples. Defaults 2000 and 1000.
        seed: of the initial weights, the order of samples and the queue's shuffling.
        log_dir: write TensorBoard summaries there, in `train` and `valid`.
        validate: run the real test set after each epoch.
        progress: show a bar and the lines `train/acc …` and `valid/acc …`.
        pools: sizes of the session's intra-op and inter-op thread pools; 0 lets TensorFlow choose.
        on_start: called once the workers run, with the QueueRunner (None without one) and the
            StepTimer, to watch them.

    Returns:
        A `History`.

    Raises:
        ValueError: an argument is out of range.
        WorkerError: a worker failed; see `QueueRunner`.
    """
    settings = {k: _plain(v) for k, v in locals().items() if k not in ("iterator", "on_start")}
    _check_settings(settings)
    from labkit.instruments.step_timer import StepTimer
    from labkit.model import model_fn
    from labkit.queue_runner import QueueRunner
    from labkit.quiet import tf

    v1 = tf.compat.v1
    data = MnistDataGenerator(batch_size, workloads.sleep(delay) if delay else None, seed)
    factory = iterator or data.passes_iterator
    settings["iterator"] = getattr(factory, "__qualname__", repr(factory))
    history = History(settings, describe_machine())
    timer, runner = StepTimer(), None

    with tf.Graph().as_default(), ExitStack() as stack:
        v1.set_random_seed(seed)
        images = v1.placeholder(tf.float32, [None, 28, 28, 1], "images")
        labels = v1.placeholder(tf.float32, [None, 10], "labels")
        fed = {"images": images, "labels": labels}
        if pipeline == "queue":
            runner = QueueRunner(
                factory,
                batch_size,
                n_threads,
                workers,
                capacity,
                min_after_dequeue,
                seed=seed,
            )
            stack.callback(runner.stop)
            inputs = dict(zip(("images", "labels"), timer.around(runner.get_inputs), strict=True))
        elif pipeline == "constant":
            batch = next(MnistDataGenerator(batch_size, seed=seed).train_iterator())
            inputs = dict(zip(("images", "labels"), map(tf.constant, batch), strict=True))
        else:
            inputs = fed
        training = model_fn(inputs, is_train=True, learning_rate=learning_rate)
        validation = model_fn(fed, reuse=True, is_train=False)
        # One thread in each pool: the operations are too small to be worth splitting, and larger
        # pools fight the producers for cores. 1 and 1 took one 2-core machine from 320 to 540
        # steps/s; on another it is within 5 % of TensorFlow's own (tests/benchmarks/pools.py).
        config = v1.ConfigProto(
            intra_op_parallelism_threads=pools[0], inter_op_parallelism_threads=pools[1]
        )
        sess = stack.enter_context(v1.Session(config=config))
        sess.run(v1.global_variables_initializer())
        writers = _writers(stack, log_dir)
        fetches = {key: training[key] for key in ("train_op", "accuracy", "loss")}
        began = time.perf_counter()
        if runner is not None:
            stack.enter_context(runner.start(sess))
        if on_start is not None:
            on_start(runner, timer)
        batches = iter(factory()) if pipeline == "feed_dict" else None
        for index in range(epochs):
            timer.waits.clear()
            timer.computes.clear()
            scores: list[tuple[float, float]] = []
            start = time.perf_counter()
            with _bar(steps, f"epoch {index + 1}/{epochs}", progress) as bar:
                for step in range(steps):
                    want = dict(fetches)
                    if writers and step % _SUMMARY_EVERY == 0:
                        want["summary_op"] = training["summary_op"]
                    feed = None
                    try:
                        if batches is not None:
                            with timer.waiting():
                                feed = dict(zip((images, labels), next(batches), strict=True))
                        got = timer.run(sess, want, feed)
                    except (StopIteration, tf.errors.OutOfRangeError):
                        if runner is not None:
                            runner.raise_if_failed()
                        break
                    history.start_seconds = history.start_seconds or time.perf_counter() - began
                    scores.append((float(got["accuracy"]), float(got["loss"])))
                    if "summary_op" in got:
                        writers[0].add_summary(got["summary_op"], index * steps + step)
                    bar.update(train_acc=scores[-1][0], train_loss=scores[-1][1])
            if not scores:
                break
            seconds = time.perf_counter() - start
            accuracy, loss = np.mean(scores, axis=0)
            epoch = Epoch(
                seconds,
                len(scores),
                sum(timer.waits),
                sum(timer.computes),
                float(accuracy),
                float(loss),
            )
            history.epochs.append(epoch)
            history.steps = list(zip(timer.waits, timer.computes, strict=True))
            if validate:
                _validate(sess, validation, (images, labels), data, epoch)
                _summarise(writers, epoch, (index + 1) * steps)
            if progress:
                _print_epoch(epoch)
    return history


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _check_settings(settings: dict[str, Any]) -> None:
    for name, least in (("n_threads", 1), ("epochs", 1), ("steps", 1), ("batch_size", 1)):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"train: {name} must be an integer >= {least}, got {value!r}.")
    if settings["pipeline"] not in PIPELINES:
        raise ValueError(
            f"train: pipeline must be one of {PIPELINES}, got {settings['pipeline']!r}."
        )
    if settings["workers"] not in ("thread", "process"):
        raise ValueError(
            f"train: workers must be 'thread' or 'process', got {settings['workers']!r}."
        )
    seed = settings["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ValueError(f"train: seed must be an integer from 0 to 2**31 - 1, got {seed!r}.")
    for name in ("delay", "learning_rate"):
        value = settings[name]
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"train: {name} must be a number >= 0, got {value!r}.")
    least = settings["min_after_dequeue"] + settings["batch_size"]
    if settings["min_after_dequeue"] < 0 or settings["capacity"] < least:
        raise ValueError(
            f"train: capacity must be at least min_after_dequeue + batch_size = {least}, "
            f"got {settings['capacity']}."
        )


def _validate(
    sess: Any,
    spec: dict[str, Any],
    placeholders: tuple[Any, Any],
    data: MnistDataGenerator,
    epoch: Epoch,
) -> None:
    total = np.zeros(3)
    held_out = MnistDataGenerator(min(_VALID_BATCH, len(data.data.x_train)), data=data.data)
    for batch in held_out.test_iterator():
        scores = sess.run(
            (spec["accuracy"], spec["loss"]), dict(zip(placeholders, batch, strict=True))
        )
        total += np.array([*scores, 1.0]) * len(batch[0])
    epoch.valid_accuracy, epoch.valid_loss = (float(x) for x in total[:2] / total[2])


def _print_epoch(epoch: Epoch) -> None:
    print(f"train/acc {epoch.train_accuracy:.4f}, train/loss {epoch.train_loss:.4f}")
    if epoch.valid_accuracy is not None:
        print(
            f"valid/acc {epoch.valid_accuracy:.4f}, valid/loss {epoch.valid_loss:.4f}", flush=True
        )


def _writers(stack: ExitStack, log_dir: str | Path | None) -> list[Any]:
    from labkit.quiet import tf

    writers = []
    for name in ("train", "valid") if log_dir else ():
        writer = tf.compat.v1.summary.FileWriter(str(Path(str(log_dir)) / name))
        stack.callback(writer.close)
        writers.append(writer)
    return writers


def _summarise(writers: list[Any], epoch: Epoch, step: int) -> None:
    from labkit.quiet import tf

    summary = tf.compat.v1.Summary
    if writers:
        values = {"model/accuracy": epoch.valid_accuracy, "model/loss": epoch.valid_loss}
        rows = [summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        writers[1].add_summary(summary(value=rows), step)


class _Bar:
    def __init__(self, bar: Any) -> None:
        self.bar, self.shown = bar, 0.0

    def update(self, **scores: float) -> None:
        if self.bar is None:
            return
        # Ten times a second is all an eye can read; each redraw costs a notebook a message.
        if time.perf_counter() - self.shown > 0.1:
            self.bar.set_postfix({k: f"{v:.3f}" for k, v in scores.items()}, refresh=False)
            self.shown = time.perf_counter()
        self.bar.update()


@contextmanager
def _bar(steps: int, label: str, progress: bool) -> Iterator[_Bar]:
    if not progress:
        yield _Bar(None)
        return
    from tqdm.auto import tqdm

    with tqdm(total=steps, desc=label, unit="step", mininterval=0.2) as bar:
        yield _Bar(bar)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m labkit.train",
        description="Train the CNN on MNIST, by queue or feed_dict, and see where time goes.",
        epilog="Set TF_CPP_MIN_LOG_LEVEL=0 to see TensorFlow's own start-up lines.",
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(
            prog, max_help_position=32, width=120
        ),
    )
    add = parser.add_argument
    add("--n_thread", type=int, default=1, help="workers that make batches, a count")
    add(
        "--pipeline",
        choices=PIPELINES,
        default="queue",
        help="how batches reach the model; constant: one batch over and over, compute-only",
    )
    add(
        "--workers",
        choices=("thread", "process"),
        default="thread",
        help="kind of worker; process for generators that hold Python's lock",
    )
    add("--epochs", type=int, default=10, help="epochs, a count")
    add("--steps", type=int, default=1875, help="steps per epoch, a count")
    add("--batch_size", type=int, default=32, help="samples per step, a count")
    add(
        "--delay",
        type=float,
        default=0.05,
        help="seconds that the generator sleeps per batch, standing for heavy work",
    )
    add("--learning_rate", type=float, default=1e-4, help="Adam's step size, no unit")
    add("--capacity", type=int, default=2000, help="what the queue holds, samples")
    add(
        "--min_after_dequeue",
        type=int,
        default=1000,
        help="what stays in the queue for mixing, samples",
    )
    add("--seed", type=int, default=0, help="of weights, order and shuffling, an integer")
    add(
        "--log_dir",
        metavar="DIR",
        help="write TensorBoard summaries to DIR/train and DIR/valid, a path",
    )
    add("--json", metavar="FILE", help="write every epoch's figures to FILE, a path")
    add(
        "--plot",
        metavar="FILE",
        help="draw each epoch's waiting and computing time to FILE, a path ending in .png or .pdf",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0; wrong values exit with 2, a failed worker returns 1."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    json_file, plot_file = options.pop("json"), options.pop("plot")
    options["n_threads"] = options.pop("n_thread")
    for flag, path in (("--json", json_file), ("--plot", plot_file)):
        if path and not Path(path).resolve().parent.is_dir():
            parser.error(f"{flag}: the folder of {path} does not exist; make it first")
        if path and Path(path).is_dir():
            parser.error(f"{flag}: expected a file, got the folder {path}")
    if plot_file and Path(plot_file).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot: expected a file ending in .png, .pdf or .svg, got {plot_file}")
    try:
        _check_settings(options)
        MnistDataGenerator(options["batch_size"])
    except ValueError as error:
        # The flag of n_threads has the article's name.
        text = str(error).split(": ", 1)[1].replace("n_threads", "n_thread")
        parser.error(text.rstrip("."))
    if options["log_dir"] and Path(options["log_dir"]).is_file():
        parser.error(f"--log_dir: expected a folder, got the file {options['log_dir']}")
    from labkit.workers import WorkerError

    try:
        history = train(**options)
    except MemoryError as error:
        parser.error(str(error))
    except WorkerError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; the workers are stopped.", file=sys.stderr)
        return 130
    history.settings["command"] = " ".join(
        ["python -m labkit.train", *(sys.argv[1:] if arguments is None else arguments)]
    )
    if json_file:
        history.save(json_file)
    if plot_file:
        from labkit.instruments import plots

        plots.save(plots.epochs(history), plot_file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
