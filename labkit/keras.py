"""`Resume`: a Keras `fit` that was killed goes on at the same step, with the same next batch."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from labkit.checks import expect, is_integer
from labkit.engine.heard import steps_asked_for
from labkit.instruments.keep import write
from labkit.instruments.tap import Tap
from labkit.queue_runner import QueueRunner
from labkit.quiet import tf

_FORMAT = 1


class Resume(tf.keras.callbacks.Callback):
    """Keeps weights, optimizer, metrics and the runner's place in one file, and goes on from it.

        runner = labkit.QueueRunner(factory, 32, n_workers=4, order="fixed", seed=7)
        resume = labkit.keras.Resume(runner, "run.state", save_freq=100)
        with runner:
            model.fit(runner.dataset(), epochs=5, shuffle=False, callbacks=[..., resume])

    Run the same program again after it was killed: with the same data and number of threads, what
    is trained on and the weights are those of a run that nobody has disturbed. With order="any" it
    is each sample once an epoch, in some order; make `Resume` ahead of `dataset()`. In place of
    `BackupAndRestore`, which begins the epoch again. The epoch that was begun is shown from its
    first step: those steps that are done already pass at once, without data, so epochs and their
    lengths are the same. History has all epochs, and metrics are of whole epochs.

    A batch counts as delivered once a step was made with it: what a `.prefetch(4)`,
    `MirroredStrategy` or `steps_per_execution` has taken ahead is delivered again. A step is one
    batch of the runner's, so nothing in between may batch anew. Not kept: what other callbacks
    know, TensorFlow's global random numbers, and validation data's place.

    Args:
        runner: whose `dataset()` is fitted, as it is or with more behind it.
        path: the file. It is replaced as a whole, so that it is never half of one, and deleted at
            the end of the training.
        save_freq: "epoch", after each but the last; or also after so many steps.

    Put it last of the callbacks.

    Raises:
        ValueError: the runner's order is "any" and its queue is there already; or the file is of
            another model or runner.
    """

    def __init__(
        self, runner: QueueRunner, path: Any, save_freq: int | Literal["epoch"] = "epoch"
    ) -> None:
        super().__init__()
        fits = save_freq == "epoch" or is_integer(save_freq, 1)
        expect(fits, "Resume: save_freq must be 'epoch' or an integer >= 1", save_freq)
        runner._know_samples("labkit.keras.Resume")
        self.runner, self.path, self.save_freq = runner, Path(path), save_freq
        self._kept: dict[str, Any] | None = None  # what the file says, until it is restored
        self._arrays: list[np.ndarray] = []
        self._pass_over = 0  # calls of this epoch that were made before
        self._epoch = self._calls = self._steps = self._since = self._drop = 0
        self._length: int | None = None
        self._first: int | None = None

    # Keras calls these.

    def on_train_begin(self, logs: Any = None) -> None:
        self._kept, self._pass_over, self._since = None, 0, 0
        self._length = self.runner._batches()
        if self.path.exists():
            self._kept, self._arrays = _load(self.path)
            state = self._kept["runner"]
            # A data set that tells its length must have it.
            shorter = 0 < state["batches"] < (self._length or 0)
            self._drop = state["batches"] if shorter else 0
            self.runner._load(state, whole=self._drop > 0)
            self._pass_over = self._kept["calls"]
            self.model._initial_epoch = self._kept["epoch"]
        # With steps_per_epoch, one iterator serves all epochs.
        self._first = self.runner._place.newest + 1 if steps_asked_for() else None
        self._steps = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._kept is not None:
            history = self.model.history
            history.epoch[:] = self._kept["history"]["epoch"]
            history.history.update(self._kept["history"]["history"])
        elif epoch != self._epoch:
            self._epoch, self._calls = epoch, 0
            self._save(over=True)
        self._epoch, self._calls = epoch, 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._kept is not None or self._calls < self._pass_over:
            Tap(self, self.model.train_function).put()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._kept is not None:
            raise RuntimeError(
                "labkit.keras.Resume: expected to be the last of fit's callbacks, got one behind "
                "it that replaces the model's train_function. Put Resume at the end of the list."
            )
        self._calls += 1
        if self._calls <= self._pass_over:
            return
        steps = self.model.steps_per_execution
        self._steps += steps
        self._since += steps
        if self.save_freq != "epoch" and self._since >= self.save_freq:
            self._save(logs=logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._pass_over = 0

    def on_train_end(self, logs: Any = None) -> None:
        self.model._initial_epoch = None
        self.path.unlink(missing_ok=True)

    # Its own.

    def _place(self, over: bool) -> tuple[int, int]:
        """The runner's pass, and how many of its batches were trained on."""
        place = self.runner._place
        if self._first is not None:
            return place.after(self._first, self._steps, self._length)
        if over:
            return place.newest + 1, 0
        # The last call of an epoch may have had fewer batches.
        return place.newest, self._calls * self.model.steps_per_execution

    def _save(self, over: bool = False, logs: Any = None) -> None:
        self._since = 0
        history = self.model.history
        kept = {
            "format": _FORMAT,
            "runner": self.runner._state_at(*self._place(over)),
            "epoch": self._epoch,
            "calls": self._calls,
            "logs": _plain(logs or {}),
            "history": {"epoch": list(history.epoch), "history": _plain(history.history)},
        }
        _write(self.path, kept, [_array(variable) for variable in _variables(self.model)])

    def step(self, iterator: Any, inner: Callable[..., Any]) -> Any:
        kept, self._kept = self._kept, None
        if kept is not None:
            self._logs = kept["logs"]
            self._restore(iterator)
            for _ in range(self._drop):
                next(iterator)
        return self._logs if self._calls < self._pass_over else inner(iterator)

    def _restore(self, iterator: Any) -> None:
        """Into the variables, those of optimizer and metrics, too, which need not be there yet."""
        with self.model.distribute_strategy.scope():
            self.model._symbolic_build(data_batch=_specs(iterator.element_spec))
            variables = _variables(self.model)
            found = [(tuple(v.shape), v.name) for v in variables]
            if [shape for shape, _ in found] != [array.shape for array in self._arrays]:
                raise ValueError(
                    f"labkit.keras.Resume: {self.path} is of another model or optimizer: it has "
                    f"{len(self._arrays)} variables, expected {len(found)} of these shapes: "
                    f"{found}. Make the same model, or delete the file."
                )
            for variable, array in zip(variables, self._arrays, strict=True):
                variable.assign(array.view(_numpy_type(variable)))
        self._arrays = []


def _variables(model: Any) -> list[Any]:
    every = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    return list({id(variable): variable for variable in every}.values())


def _array(variable: Any) -> np.ndarray:
    return np.asarray(variable.numpy())


def _numpy_type(variable: Any) -> np.dtype:
    return tf.as_dtype(variable.dtype).as_numpy_dtype


def _specs(spec: Any) -> Any:
    """What a batch looks like: of several replicas, the first one's part."""
    parts = getattr(spec, "_value_specs", None)
    if parts is not None:
        return _specs(parts[0])
    if isinstance(spec, dict):
        return {name: _specs(part) for name, part in spec.items()}
    return tuple(map(_specs, spec)) if isinstance(spec, (tuple, list)) else spec


def _plain(logs: Any) -> Any:
    if isinstance(logs, dict):
        return {name: _plain(value) for name, value in logs.items()}
    return [_plain(value) for value in logs] if isinstance(logs, list) else float(logs)


def _write(path: Path, kept: dict[str, Any], arrays: list[np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, np.frombuffer(json.dumps(kept).encode(), np.uint8), *arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write("labkit.keras.Resume", path, content.getvalue())


def _load(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            text, *arrays = [archive[f"arr_{number}"] for number in range(len(archive.files))]
        kept = json.loads(text.tobytes())
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"labkit.keras.Resume: {path} is no file of Resume's, or damaged: {error}. Delete it, "
            "or choose another path."
        ) from None
    form = kept.get("format")
    expect(form == _FORMAT, f"labkit.keras.Resume: the format of {path} must be {_FORMAT}", form)
    return kept, arrays
