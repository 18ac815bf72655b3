"""The callback behind `labkit.watch()`: takes each batch, with a clock, ahead of Keras's step."""

import math
import time
from collections.abc import Callable
from typing import Any

from labkit.instruments.slowing import Slowing
from labkit.instruments.taking import Taker
from labkit.instruments.tap import Tap
from labkit.instruments.waiting import NEXT_STEP, Counted, Waiting, total, verdict
from labkit.quiet import tf

# On a GPU waiting for the device costs what Python would have done ahead, a millisecond or two.
_ON_A_GPU_EVERY, _ON_A_GPU_SECONDS = 10, 0.1


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
        self._batch, self._ended = 0, 0.0
        self._calls = _Calls(1)
        self._taker: Taker | None = None
        self._own: Callable[..., Any] | None = None
        self._measured_at = 0.0
        self._slowing = Slowing()
        self._new_live, self._live, self._quiet = live, None, quiet

    def on_train_begin(self, logs: Any = None) -> None:
        self._end_live()
        self._live = self._new_live and self._new_live()
        self.epochs, self._line = [], ""
        self._on_gpu = bool(tf.config.list_logical_devices("GPU"))
        tap = self.model.train_function
        self._tap = Tap(self, tap.inner if isinstance(tap, Tap) else tap)
        self._own = self._taker = None
        several = self.model.steps_per_execution
        self._calls, self._slowing = _Calls(several), Slowing(several)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._print_line()
        self.epochs.append(Counted())
        if self._taker is not None:
            self._taker.begin_epoch()
        self._slowing.begin_epoch()
        self._calls.begin_epoch(self._iterations())
        self._ended = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._batch = batch
        self._tap.put()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        waiting = self.epochs[-1]
        if self.params.get("steps") is None:
            waiting.steps -= self._calls.steps_that_did_not_come(self._iterations())
        if self._quiet:
            return
        if logs is not None:
            logs["waiting_share"] = waiting.share
            logs["steps_per_second"] = waiting.steps_per_second
        # Printed when Keras has ended the line of its bar.
        self._line = f"labkit.watch: epoch {epoch + 1}: {waiting}"

    def on_train_end(self, logs: Any = None) -> None:
        self._print_line()
        self._own = self._taker = None
        self._end_live()
        if not self._quiet:
            print(f"labkit.watch: {self.verdict()}", flush=True)

    def _end_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.end()

    def verdict(self) -> str:
        """What the waiting of the last `fit` means, in a line or two."""
        return verdict(total(self.epochs).share, NEXT_STEP)

    def _print_line(self) -> None:
        if self._line:
            print(self._line, flush=True)
        self._line = ""

    def _function(self, taker: Taker) -> Callable[..., Any]:
        """Keras's step as a call with a batch.

        With the shapes that the data set declares, as Keras compiles it: with those of each batch
        the losses would differ in their last bit, and a shorter batch would compile anew.
        """
        inner = self._tap.inner

        def step(batch: Any) -> Any:
            return inner(iter((batch,)))

        if self.model.run_eagerly:
            return step
        own = tf.function(step, input_signature=(taker.spec,), autograph=False)
        # Each fit traces one; after some, TensorFlow would warn of a function made in a loop.
        own._omit_frequent_tracing_warning = True
        return own

    def step(self, iterator: Any, inner: Callable[..., Any]) -> Any:
        """Keras's train_function, with the batch taken, and timed, outside of it. Of several steps
        a call Keras takes the next batch while it trains, so there it takes them itself, and only
        whole calls are compared."""
        taker = self._taker = self._taker or Taker(iterator, self.model)
        self._hold(taker, iterator)
        held = taker.held > 0
        measured = held or self._is_measured()
        self._sync(measured)
        # Before an epoch's first step Keras makes the iterator: that is waiting, too.
        asked = time.perf_counter() if self._calls.steps else self._ended
        took, waited, batch = 0.0, 0.0, None
        if taker.number > 1:
            result = inner(taker.source(iterator))
        else:
            try:
                batch = taker.next(iterator)
            except StopIteration:
                # As Keras ends a pass of unknown length: it counts one more step for the optimizer.
                return inner(iterator)
            took = time.perf_counter() - asked
            waited, asked = taker.waited(took), asked + took
            self._own = self._own or self._function(taker)
            result = self._own(batch)
        self._sync(measured)
        self._note(asked, took, waited, measured, held)
        if taker.number == 1:
            taker.take_one_that_is_ready(batch)
            self._ended = time.perf_counter()
        return result

    def _hold(self, taker: Taker, iterator: Any) -> None:
        # An epoch that is held for as a whole would have no share.
        if taker.held or not taker.one_device or not (self.epochs[-1].calls or self._calls.since):
            return
        calls = self._slowing.calls_to_hold(self._calls_left())
        if calls:
            began = time.perf_counter()
            taker.hold(iterator, calls)
            self._slowing.hold(taker.held, time.perf_counter() - began)

    def _note(self, asked: float, took: float, waited: float, measured: bool, held: bool) -> None:
        """Counts a call; one that is measured stands for those since the last as well."""
        began, self._ended = self._ended, time.perf_counter()
        steps, seconds = self._calls.together, self._ended - began
        first, epoch = not self._calls.done, self.epochs[-1]
        self._calls.note()
        if first:  # it compiles
            return
        # With what Python does between two steps, which a lack of its lock slows as well; on a GPU
        # that is while the device is waited for.
        own = self._ended - asked if self._on_gpu or steps > 1 else seconds - took
        usual = self._slowing.note(own if measured or steps > 1 else None, held)
        epoch.slow = self._slowing.seconds
        since = self._calls.since
        since += [seconds] if usual else []
        # Of several steps a call, the waiting is in what the comparisons say.
        if usual and (self._slowing.known if steps > 1 else measured):
            epoch.add(steps, seconds, waited * len(since), sum(since), len(since))
            since.clear()
        else:
            epoch.add(steps, seconds, None, 0.0)

    def _iterations(self) -> int:
        optimizer = getattr(self.model, "optimizer", None)
        return 0 if optimizer is None else int(tf.convert_to_tensor(optimizer.iterations))

    def _calls_left(self) -> float:
        steps = self.params.get("steps")
        return math.inf if steps is None else (steps - self._batch) / self.model.steps_per_execution

    def _is_measured(self) -> bool:
        if not self._on_gpu or not self._calls.steps or not self._calls.done % _ON_A_GPU_EVERY:
            return True
        return time.perf_counter() - self._measured_at >= _ON_A_GPU_SECONDS

    def _sync(self, measured: bool) -> None:
        if measured and self._on_gpu:
            tf.test.experimental.sync_devices()
            self._measured_at = time.perf_counter()


class _Calls:
    """The calls of Keras's step that were, of `together` steps each.

    Attributes:
        done: in this fit.
        steps: in this epoch; the last call may have had less.
        since: seconds of each like any other since the last that was measured.
    """

    def __init__(self, together: int) -> None:
        self.together, self.done = together, 0
        self.begin_epoch(0)

    def begin_epoch(self, trained: int) -> None:
        """`trained`: steps that the optimizer has counted."""
        self._trained, self.steps = trained, 0
        self.since: list[float] = []

    def note(self) -> None:
        self.done += 1
        self.steps += self.together

    def steps_that_did_not_come(self, trained: int) -> int:
        """Of a pass of unknown length Keras does not say how many steps its last call had."""
        more = self.steps - (trained - self._trained)
        return more if 0 < more < self.together else 0
