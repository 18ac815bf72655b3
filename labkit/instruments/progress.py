"""What a training run shows on the way: its plan, a bar, lines after each epoch, TensorBoard."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from labkit.instruments.history import History


class Progress:
    """Prints what a run is going to do, then what it has done, as far as it came.

    history: of the run, with its settings; nothing is shown where `progress` is False there.
    plural: what several workers are called.
    """

    def __init__(self, history: History, plural: str) -> None:
        self.history, self.settings = history, history.settings
        self.shown: bool = self.settings["progress"]
        self._print(plan(self.settings, plural))

    def _print(self, text: str) -> None:
        if self.shown:
            print(text, flush=True)

    @contextmanager
    def epoch(self) -> Iterator[Callable[[float, float], None]]:
        """Around an epoch. What it gives is called after each step with accuracy and loss."""
        done, steps = len(self.history.epochs), self.settings["steps"]
        name = f"epoch {done + 1}/{self.settings['epochs']}"
        forecast = None if done else Forecast(self.settings)
        try:
            with step_bar(steps, name, forecast, self.shown) as show:
                yield show
        finally:  # after Ctrl-C, too
            for epoch in self.history.epochs[done:]:
                part = "" if epoch.steps == steps else f", {epoch.steps} of {steps} steps"
                self._print(
                    f"{name}{part}: {epoch.seconds:.1f} s, {epoch.steps_per_second:.1f} steps/s, "
                    f"{epoch.waiting / epoch.seconds:.0%} of it waiting for data\n"
                    f"train/acc {epoch.train_accuracy:.4f}, train/loss {epoch.train_loss:.4f}"
                )

    def validated(self) -> None:
        """After the validation of the last epoch."""
        epoch = self.history.epochs[-1]
        self._print(f"valid/acc {epoch.valid_accuracy:.4f}, valid/loss {epoch.valid_loss:.4f}")


def plan(settings: dict[str, Any], plural: str) -> str:
    """One line: pipeline, workers, epochs and steps."""
    count = settings["n_workers"]
    if settings["pipeline"] != "queue":
        workers = "no workers"
    elif count == "auto":
        workers = f"as many {plural} as it takes"
    else:
        workers = f"{count} {settings['workers'] if count == 1 else plural}"
    epochs = "1 epoch" if settings["epochs"] == 1 else f"{settings['epochs']} epochs"
    return (
        f"pipeline {settings['pipeline']}, {workers}, {epochs} of {settings['steps']} steps of "
        f"{settings['batch_size']} samples"
    )


class Forecast:
    """The time that a run will take, told once the rate of its steps is known.

    The first step compiles, and what the workers had ready when it came is taken faster than they
    make it, so the rate is that of the steps behind. Where the number of workers changes ("auto"),
    or an epoch is too short to tell, nothing is said.
    """

    SECONDS = 2.0  # at least, to measure

    def __init__(self, settings: dict[str, Any]) -> None:
        size, count = settings["batch_size"], settings["n_workers"]
        # The queue above its minimum, and as much again in the hands of the workers.
        ready = 2 * (settings["capacity"] + size) - settings["min_after_dequeue"]
        self.first = 1 + (ready // size if settings["pipeline"] == "queue" else 0)
        # Workers of equal speed deliver in bursts: several of them.
        self.least = math.inf if count == "auto" else max(20, 4 * count)
        self.total = settings["epochs"] * settings["steps"]
        self.validates = settings["validate"]
        self.step, self.began = 0, math.inf

    def after_step(self, now: float) -> str | None:
        """The sentence, once, after the step at which it can be said. now: seconds."""
        self.step += 1
        if self.step == self.first:
            self.began = now
        steps, seconds = self.step - self.first, now - self.began
        if steps < self.least or seconds < self.SECONDS:
            return None
        self.least = math.inf
        rate = steps / seconds
        also = ", and the time of validation" if self.validates else ""
        return (
            f"expected: {_rounded((self.total - self.step) / rate)} more at {rate:.1f} steps/s "
            f"(as in steps {self.first + 1} to {self.step}){also}"
        )


def _rounded(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.2g} {unit}"
    return f"about {seconds:.0f} s"


def summary_writers(log_dir: str | None, stack: ExitStack) -> list[Any]:
    """TensorBoard's writers for training and validation; none without a folder."""
    from labkit.quiet import tf

    writers = []
    for name in ("train", "valid") if log_dir else ():
        writers.append(tf.compat.v1.summary.FileWriter(str(Path(str(log_dir)) / name)))
        stack.callback(writers[-1].close)
    return writers


def summary_of(values: dict[str, Any]) -> Any:
    """TensorBoard's record of numbers by tag."""
    from labkit.quiet import tf

    summary = tf.compat.v1.Summary
    return summary(value=[summary.Value(tag=k, simple_value=v) for k, v in values.items()])


@contextmanager
def step_bar(
    steps: int, label: str, forecast: Forecast | None, shown: bool
) -> Iterator[Callable[[float, float], None]]:
    """A progress bar; what it gives is called after each step with accuracy and loss."""
    if not shown:
        yield lambda accuracy, loss: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=steps, desc=label, unit="step", mininterval=0.2) as bar:
        drawn = 0.0

        def show(accuracy: float, loss: float) -> None:
            nonlocal drawn
            now = time.perf_counter()
            # Ten times a second is all an eye can read; each redraw costs a notebook a message.
            if now - drawn > 0.1:
                scores = {"train_acc": f"{accuracy:.3f}", "train_loss": f"{loss:.3f}"}
                bar.set_postfix(scores, refresh=False)
                drawn = now
            bar.update()
            if forecast is not None and (text := forecast.after_step(now)):
                bar.write(text)

        yield show
