"""`train(checkpoint=...)`: variables and the place in the data are saved; a run goes on there."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from labkit.checks import differences
from labkit.instruments.history import Epoch, History
from labkit.instruments.keep import write

_FORMAT = 1
_SAME = ("steps", "learning_rate", "iterator")


class CheckpointError(ValueError):
    """What lies in the folder is of another run, or damaged."""


class Checkpoint:
    """What lies in the folder `settings["checkpoint"]`; without one, nothing is done.

    TensorFlow's Saver writes the variables, and then a file that names them, with all else, is
    replaced as a whole: a run that is killed at any moment leaves a pair that fits.

    Attributes:
        step: of the epoch that was begun, how many were made.
        part: what was measured of that epoch, or None.

    Raises:
        CheckpointError: what lies there is of a run with other settings, or damaged.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.folder = settings["checkpoint"] and Path(settings["checkpoint"])
        self.every, self.settings = settings["save_every"], settings
        self.step = 0
        self.part: Epoch | None = None
        self._kept = _read(self.folder / "state.json", settings) if self.folder else None
        self._saver: Any = None

    def load(self, runner: Any) -> None:
        """The runner's place, before it makes its queue."""
        if self.folder:
            runner.state_dict()  # of any order, from the beginning
        if self._kept is not None:
            try:
                runner.load_state_dict(self._kept["runner"])
            except ValueError as error:
                raise _other_run(self.folder, str(error).partition(": ")[2]) from None

    def restore(self, sess: Any, history: History) -> None:
        """The variables of a graph that is complete, and the epochs that were measured."""
        if not self.folder:
            return
        from labkit.quiet import tf

        self._saver = tf.compat.v1.train.Saver(max_to_keep=2)
        if self._kept is not None:
            self._saver.restore(sess, str(self.folder / self._kept["variables"]))
            history.epochs += [Epoch(**row) for row in self._kept["epochs"]]
            self.step = self._kept["step"]
            self.part = self._kept["part"] and Epoch(**self._kept["part"])

    def after_step(self, run: Any, history: History, step: int, part: Any) -> None:
        """Saves if it is time. part: a function that tells the epoch so far."""
        if self._saver is not None and self.every and step % self.every == 0:
            self.save(run, history, part())

    def save(self, run: Any, history: History, part: Epoch | None = None) -> None:
        """Between two steps. part: what was measured of an epoch that is not in the history."""
        if self._saver is None:
            return
        state = run.runner.state_dict()
        # An interrupt may have cost the figures of a step, but not the step.
        step = state["batches"] - len(history.epochs) * self.settings["steps"]
        prefix = self._saver.save(run.sess, str(self.folder / "model"), state["batches"])
        kept = {
            "format": _FORMAT,
            "settings": {name: self.settings[name] for name in _SAME},
            "variables": Path(prefix).name,
            "runner": state,
            "epochs": [asdict(epoch) for epoch in history.epochs],
            "step": step,
            "part": part and asdict(part),
        }
        write("train", self.folder / "state.json", json.dumps(kept))

    def begin_epoch(self) -> tuple[int, Epoch | None]:
        """Steps that were made of it before, and what was measured."""
        begun, self.step, self.part = (self.step, self.part), 0, None
        return begun


def together(part: Epoch | None, rest: Epoch) -> Epoch:
    """Two parts of an epoch as one."""
    if part is None:
        return rest
    steps = part.steps + rest.steps
    means = (
        (part.steps * a + rest.steps * b) / steps
        for a, b in (
            (part.train_accuracy, rest.train_accuracy),
            (part.train_loss, rest.train_loss),
        )
    )
    seconds = part.seconds + rest.seconds
    times = part.waiting + rest.waiting, part.computing + rest.computing
    return Epoch(seconds, steps, *times, *means)


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text())
        form, was = kept["format"], kept["settings"]
    except (ValueError, KeyError, TypeError) as error:
        text = f"train: {path} is damaged, or none of labkit's: {error!r}."
        raise CheckpointError(text) from None
    if form != _FORMAT:
        raise _other_run(path.parent, f"its format is {form!r}, expected {_FORMAT}")
    wrong = differences(was, {name: settings[name] for name in _SAME})
    if wrong:
        raise _other_run(path.parent, "; ".join(wrong))
    return kept


def _other_run(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"train: checkpoint {folder} is of another run: {why.rstrip('.')}. Give the same settings, "
        "or another folder."
    )
