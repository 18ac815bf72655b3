"""train(): the article's training loop on either pipeline; `python -m labkit.train` runs it."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from labkit import callable_module, workloads
from labkit.checkpoint import Checkpoint, together
from labkit.data import MnistDataGenerator
from labkit.engine import KINDS, interrupts
from labkit.instruments.history import Epoch, History
from labkit.instruments.progress import Progress, summary_of, summary_writers
from labkit.instruments.step_timer import StepTimer
from labkit.machine import describe_machine, fast_cpu
from labkit.settings import check_settings, plain

_SUMMARY_EVERY = 50
_VALID_BATCH = 500


def train(
    pipeline: str = "queue",
    n_workers: int | Literal["auto"] = 1,
    epochs: int = 10,
    steps: int = 1875,
    batch_size: int = 32,
    delay: float = 0.05,
    iterator: Callable[..., Iterable[Any]] | None = None,
    workers: Literal["thread", "process", "ray"] = "thread",
    learning_rate: float = 1e-4,
    capacity: int | None = None,
    min_after_dequeue: int | None = None,
    seed: int = 0,
    log_dir: str | Path | None = None,
    validate: bool = True,
    progress: bool = True,
    pools: tuple[int, int] = (1, 1),
    on_start: Callable[[Any, Any], None] | None = None,
    n_threads: int | None = None,
    order: Literal["any", "fixed"] | None = None,
    checkpoint: str | Path | None = None,
    save_every: int | None = None,
) -> History:
    """Trains the CNN on MNIST and measures where the time goes.

    Args:
        pipeline: "feed_dict", the serial loop; "queue", through a `QueueRunner`; or "constant",
            one batch over and over: the compute-only rate, which no pipeline can beat.
        n_workers: workers of the queue, of the kind `workers`, or "auto".
        epochs, steps: of `steps` steps each. Defaults 10 and 1875 (60,000 samples of 32).
        batch_size: samples per step. Default 32.
        delay: seconds that the default iterator sleeps per batch, for heavy work. Default 0.05.
        iterator: a factory of batches `(images, labels)`, in place of the default, which passes
            over the training set again and again, every sample once a pass.
        workers: "thread", "process" or "ray".
        learning_rate: of Adam. Default 1e-4.
        capacity, min_after_dequeue: of the queue, in samples. Defaults 2000 and 1000, more for
            batches of more than 250.
        seed: of the initial weights, the order of samples and the queue's shuffling.
        log_dir: write TensorBoard summaries there, in `train` and `valid`.
        validate: run the real test set after each epoch.
        progress: show what is going to run, a bar, and after each epoch its time, its share of
            waiting, and the lines `train/acc …` and `valid/acc …`.
        pools: sizes of the session's intra-op and inter-op thread pools; 0 lets TensorFlow choose.
        on_start: called once the workers run, with the QueueRunner (None without one) and the
            StepTimer, to watch them.
        n_threads: the old name of n_workers.
        order: of the queue's batches, see `QueueRunner`. "fixed", the default of a checkpoint, on a
            CPU and with `pools` of 1 and 1 gives the same losses, step by step, in each run; on a
            GPU only after `tf.config.experimental.enable_op_determinism()`.
        checkpoint: a folder to save in after each epoch, each `save_every` steps, and on Ctrl-C;
            the same settings go on from there, batch for batch, or, of "any", each sample once.

    Returns:
        A `History`.

    Raises:
        ValueError: an argument is out of range, or the checkpoint is of another run.
        WorkerError: a worker failed; see `QueueRunner`. This and a KeyboardInterrupt have what was
            measured until then as their attribute `history`.
    """
    n_workers = n_workers if n_threads is None else n_threads
    left_out = ("iterator", "on_start", "n_threads")
    settings = {k: plain(v) for k, v in locals().items() if k not in left_out}
    check_settings(settings)
    data = MnistDataGenerator(batch_size, workloads.sleep(delay) if delay else None, seed)
    factory = iterator or data.passes_iterator
    settings["iterator"] = getattr(factory, "__qualname__", repr(factory))
    history = History(settings, describe_machine(), complete=False)
    shown = Progress(history, KINDS[workers].plural)
    try:
        fast_cpu()
        with interrupts.held_back():  # TensorFlow half imported fails by other names, for ever
            from labkit.quiet import tf

        with tf.Graph().as_default(), ExitStack() as stack:
            tf.compat.v1.set_random_seed(seed)
            run = _Run(settings, factory, stack)
            run.kept.restore(run.sess, history)
            run.start(on_start, stack)
            for done in range(len(history.epochs), epochs):
                with shown.epoch() as show:
                    run.train_epoch(history, show)
                if len(history.epochs) == done:
                    break  # the data had ended before
                if validate:
                    run.validate(data, history.epochs[-1])
                    shown.validated()
                run.kept.save(run, history)
    except BaseException as error:
        error.history = history  # type: ignore[attr-defined]
        raise
    history.complete = True
    return history


class _Run:
    """Both graphs on one set of weights, their session, and what feeds the training graph."""

    def __init__(
        self, settings: dict[str, Any], factory: Callable[..., Iterable[Any]], stack: ExitStack
    ) -> None:
        from labkit.model import model_fn
        from labkit.quiet import stderr_held_back, tf

        v1 = tf.compat.v1
        self.pipeline, self.factory, self.timer = settings["pipeline"], factory, StepTimer()
        self.runner: Any = None
        self.kept = Checkpoint(settings)
        self.batches: Iterator[Any] | None = None
        self.steps_taken, self.start_seconds = 0, 0.0
        self.fed = {
            "images": v1.placeholder(tf.float32, [None, 28, 28, 1], "images"),
            "labels": v1.placeholder(tf.float32, [None, 10], "labels"),
        }
        inputs = self._inputs(settings, stack)
        self.training = model_fn(inputs, learning_rate=settings["learning_rate"])
        self.validation = model_fn(self.fed, reuse=True, is_train=False)
        # One thread in each pool: the operations are too small to split, and more fight the workers
        # for cores. 540 steps/s for 320 on one machine, the same on another (benchmarks/pools.py).
        intra, inter = settings["pools"]
        config = v1.ConfigProto(
            intra_op_parallelism_threads=intra, inter_op_parallelism_threads=inter
        )
        self.sess = stack.enter_context(v1.Session(config=config))
        with stderr_held_back():  # TensorFlow 2.20 has start-up lines for its first run, too
            self.sess.run(v1.global_variables_initializer())
        self.writers = summary_writers(settings["log_dir"], stack)

    def _inputs(self, settings: dict[str, Any], stack: ExitStack) -> dict[str, Any]:
        """What the training graph reads: the queue, one constant batch, or the placeholders."""
        from labkit.queue_runner import QueueRunner
        from labkit.quiet import tf

        batch_size, seed = settings["batch_size"], settings["seed"]
        if self.pipeline == "queue":
            names = ("n_workers", "workers", "capacity", "min_after_dequeue", "seed", "order")
            chosen = {name: settings[name] for name in names}
            self.runner = QueueRunner(self.factory, batch_size, **chosen)
            self.kept.load(self.runner)
            stack.callback(self.runner.stop)
            parts = self.timer.around(self.runner.get_inputs)
        elif self.pipeline == "constant":
            batch = next(MnistDataGenerator(batch_size, seed=seed).train_iterator())
            parts = [tf.constant(part) for part in batch]
        else:
            return self.fed
        return dict(zip(("images", "labels"), parts, strict=True))

    def start(self, on_start: Callable[[Any, Any], None] | None, stack: ExitStack) -> None:
        """Lets the workers fill the queue, or the serial loop begin its iterator."""
        self.began = time.perf_counter()
        if self.runner is not None:
            stack.enter_context(self.runner.start(self.sess))
        if on_start is not None:
            on_start(self.runner, self.timer)
        if self.pipeline == "feed_dict":
            self.batches = iter(self.factory())

    def train_epoch(self, history: History, show: Callable[[float, float], None]) -> None:
        """As many steps as the data allow, up to a whole epoch, which it adds to the history."""
        self.timer.waits.clear()
        self.timer.computes.clear()
        scores: list[tuple[float, float]] = []
        began = ended = time.perf_counter()
        first, part = self.kept.begin_epoch()

        def so_far() -> Epoch:
            pairs = zip(self.timer.waits, self.timer.computes, strict=False)
            history.steps = list(islice(pairs, len(scores)))
            accuracy, loss = (float(mean) for mean in np.mean(scores, axis=0))
            waiting, computing = (sum(part) for part in zip(*history.steps, strict=True))
            row = (ended - began, len(scores), waiting, computing, accuracy, loss)
            return together(part, Epoch(*row))

        try:
            for step in range(first, history.settings["steps"]):
                got = self._step(with_summary=bool(self.writers) and step % _SUMMARY_EVERY == 0)
                if got is None:
                    break
                scores.append((float(got["accuracy"]), float(got["loss"])))
                ended = time.perf_counter()
                show(*scores[-1])
                self.kept.after_step(self, history, step + 1, so_far)
        except KeyboardInterrupt:
            self.kept.save(self, history, so_far() if scores else part)
            raise
        finally:  # what was measured before Ctrl-C or a failure is kept
            history.start_seconds = self.start_seconds
            if begun := so_far() if scores else part:
                history.epochs.append(begun)

    def _step(self, with_summary: bool) -> dict[str, Any] | None:
        from labkit.quiet import tf

        names = ["train_op", "accuracy", "loss", *["summary_op"] * with_summary]
        feed = None
        try:
            if self.batches is not None:
                with self.timer.waiting():
                    feed = dict(zip(self.fed.values(), next(self.batches), strict=True))
            got = self.timer.run(self.sess, {name: self.training[name] for name in names}, feed)
        except (StopIteration, tf.errors.OutOfRangeError):
            if self.runner is not None:
                self.runner.raise_if_failed()
            return None
        self.start_seconds = self.start_seconds or time.perf_counter() - self.began
        if with_summary:
            self.writers[0].add_summary(got["summary_op"], self.steps_taken)
        self.steps_taken += 1
        return got

    def validate(self, data: MnistDataGenerator, epoch: Epoch) -> None:
        """Puts the accuracy and the loss over the whole test set into `epoch`."""
        total = np.zeros(3)
        held_out = MnistDataGenerator(min(_VALID_BATCH, len(data.data.x_train)), data=data.data)
        wanted = (self.validation["accuracy"], self.validation["loss"])
        for batch in held_out.test_iterator():
            scores = self.sess.run(wanted, dict(zip(self.fed.values(), batch, strict=True)))
            total += np.array([*scores, 1.0]) * len(batch[0])
        epoch.valid_accuracy, epoch.valid_loss = (float(x) for x in total[:2] / total[2])
        if self.writers:
            values = {"model/accuracy": epoch.valid_accuracy, "model/loss": epoch.valid_loss}
            self.writers[1].add_summary(summary_of(values), self.steps_taken)


callable_module(train)

if __name__ == "__main__":
    from labkit.cli import main

    sys.exit(main())
