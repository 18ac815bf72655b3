"""The callback behind `labkit.watch()`: takes each batch, with a clock, ahead of Keras's step."""

import itertools
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

from labkit.instruments.waiting import NEXT_STEP, Counted, Waiting, total, verdict
from labkit.quiet import tf

_ON_A_GPU_EVERY = 10
_TAKES = 30  # some 10 ms


class FitWatch(tf.keras.callbacks.Callback):
    """See `labkit.watch`.

    Keras takes the batch inside of its compiled step, where no callback can tell waiting from
    computing. So for each step the model gets another `train_function`, which gives the place back
    as the first thing it does: whatever fails, wherever, Keras's own one is there again.

    Attributes:
        epochs: a `Waiting` for each epoch of the last `fit`.

    Args:
        live: shows the picture of a `fit`, until its `end()`; called at the beginning of each.
        quiet: print nothing, and leave Keras's logs as they are.
    """

    def __init__(self, live: Callable[[], Any] | None = None, quiet: bool = False) -> None:
        super().__init__()
        if tf.keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                "labkit.watch: expected Keras on TensorFlow, got the backend "
                f"{tf.keras.backend.backend()!r}. Watch a loop of your own: "
                "for batch in labkit.watch(batches)."
            )
        self.epochs: list[Waiting] = []
        self._line = ""
        self._calls = 0
        self._ended = 0.0
        self._take = 0.0
        self._functions: dict[int, Callable[..., Any]] = {}
        self._new_live, self._live, self._quiet = live, None, quiet

    def on_train_begin(self, logs: Any = None) -> None:
        self._end_live()
        self._live = self._new_live and self._new_live()
        self.epochs, self._line, self._calls = [], "", 0
        self._every = _ON_A_GPU_EVERY if tf.config.list_logical_devices("GPU") else 1
        tap = self.model.train_function
        self._tap = _Tap(self, tap.inner if isinstance(tap, _Tap) else tap)
        self._functions = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._print_line()
        self.epochs.append(Counted())
        self._ended = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Past Keras's own __setattr__, which takes 20 times as long.
        object.__setattr__(self.model, "train_function", self._tap)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        waiting = self.epochs[-1]
        if self._quiet:
            return
        if logs is not None:
            logs["waiting_share"] = waiting.share
            logs["steps_per_second"] = waiting.steps_per_second
        # Printed when Keras has ended the line of its bar.
        self._line = f"labkit.watch: epoch {epoch + 1}: {waiting}"

    def on_train_end(self, logs: Any = None) -> None:
        self._print_line()
        self._functions = {}
        self._end_live()
        if not self._quiet:
            print(f"labkit.watch: {self.verdict()}", flush=True)

    def _end_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.end()

    def verdict(self) -> str:
        """What the waiting of the last `fit` means, in a sentence."""
        return verdict(total(self.epochs).share, NEXT_STEP)

    def _print_line(self) -> None:
        if self._line:
            print(self._line, flush=True)
        self._line = ""

    def _function(self, number: int, spec: Any) -> Callable[..., Any]:
        """Keras's loop over `steps_per_execution` batches, as one call with `number` of them.

        With the shapes that the data set declares, as Keras compiles it: with those of each batch
        the losses would differ in their last bit, and a shorter batch would compile anew.
        """
        inner = self._tap.inner

        def steps(*batches: Any) -> Any:
            return inner(iter(batches))

        if self.model.run_eagerly:
            return steps
        return tf.function(steps, input_signature=(spec,) * number, autograph=False)

    def _step(self, iterator: Any) -> Any:
        """Keras's train_function, with the batches taken, and timed, outside of it."""
        first, measured = not self._calls, self._calls % self._every == 0
        self._calls += 1
        if measured and self._every > 1:
            tf.test.experimental.sync_devices()
        # Before an epoch's first step Keras makes the iterator: that is waiting, too.
        asked = time.perf_counter() if self.epochs[-1].steps else self._ended
        batches = list(itertools.islice(iterator, self.model.steps_per_execution))
        waited = time.perf_counter() - asked
        if not batches:
            raise StopIteration
        if first:
            self._take = _seconds_to_take(batches[0], iterator)
        waited = max(0.0, waited - len(batches) * self._take)
        if len(batches) not in self._functions:
            self._functions[len(batches)] = self._function(len(batches), iterator.element_spec)
        result = self._functions[len(batches)](*batches)
        if measured and self._every > 1:
            tf.test.experimental.sync_devices()
        began, self._ended = self._ended, time.perf_counter()
        if not first:  # it compiles
            took = self._ended - (asked if self._every > 1 else began)
            self.epochs[-1].add(
                len(batches), self._ended - began, waited if measured else None, took
            )
        return result


def _seconds_to_take(batch: Any, iterator: Any) -> float:
    """What it takes to get a batch that is ready. That is no waiting: Keras does it, too."""
    if not isinstance(iterator, tf.data.Iterator):
        return 0.0  # a strategy's, whose batches lie on several devices
    ready = iter(tf.data.Dataset.from_tensors(batch).repeat())
    seconds = []
    for _ in range(_TAKES):
        began = time.perf_counter()
        next(ready)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


class _Tap:
    """A model's train_function for one step. It keeps no callback, no model and no data alive."""

    def __init__(self, watch: FitWatch, inner: Callable[[Any], Any]) -> None:
        self.inner = inner
        self._watch, self._model = weakref.ref(watch), weakref.ref(watch.model)

    def __call__(self, iterator: Any) -> Any:
        watch, model = self._watch(), self._model()
        if model is not None:
            object.__setattr__(model, "train_function", self.inner)
        return self.inner(iterator) if watch is None else watch._step(iterator)
