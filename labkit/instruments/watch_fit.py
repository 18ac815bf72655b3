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

_ON_A_GPU_EVERY = 10
_SEVERAL_EVERY = 16


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
        self._functions: dict[int, Callable[..., Any]] = {}
        self._slowing = Slowing()
        self._new_live, self._live, self._quiet = live, None, quiet

    def on_train_begin(self, logs: Any = None) -> None:
        self._end_live()
        self._live = self._new_live and self._new_live()
        self.epochs, self._line = [], ""
        self._on_gpu = bool(tf.config.list_logical_devices("GPU"))
        tap = self.model.train_function
        self._tap = Tap(self, tap.inner if isinstance(tap, Tap) else tap)
        self._functions, self._taker = {}, None
        several = self.model.steps_per_execution
        self._calls, self._slowing = _Calls(several), Slowing(several)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._print_line()
        self.epochs.append(Counted())
        if self._taker is not None:
            self._taker.begin_epoch()
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
        self._functions, self._taker = {}, None
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

    def _function(self, number: int, taker: Taker) -> Callable[..., Any]:
        """Keras's loop over `steps_per_execution` batches, as one call with `number` of them.

        With the shapes that the data set declares, as Keras compiles it: with those of each batch
        the losses would differ in their last bit, and a shorter batch would compile anew.
        """
        inner = self._tap.inner

        def steps(*batches: Any) -> Any:
            return inner(iter(batches))

        if self.model.run_eagerly:
            return steps
        return tf.function(steps, input_signature=(taker.spec,) * number, autograph=False)

    def step(self, iterator: Any, inner: Callable[..., Any]) -> Any:
        """Keras's train_function, with the batches taken, and timed, outside of it."""
        first = not self._calls.done
        taker = self._taker = self._taker or Taker(iterator, self.model)
        # An epoch that is held for as a whole would have no share.
        begun = self.epochs[-1].calls > 0
        ahead = self._slowing.calls_to_hold(self._calls.done, self._calls_left()) if begun else 0
        if ahead:
            taker.hold(iterator, ahead)
        held = bool(taker.held)
        alone, measured = self._turn(taker)
        if alone:
            result = inner(iterator)
            began, self._ended = self._ended, time.perf_counter()
            self._calls.note(taker.number, alone)
            self._add(taker.number, self._ended - began, None, False)
            return result
        self._sync(measured)
        # Before an epoch's first step Keras makes the iterator: that is waiting, too.
        asked = time.perf_counter() if self.epochs[-1].steps else self._ended
        batches = taker.next(iterator)
        took = time.perf_counter() - asked
        if not batches:
            # As Keras ends a pass of unknown length: it counts one more step for the optimizer.
            return inner(iterator)
        if len(batches) not in self._functions:
            self._functions[len(batches)] = self._function(len(batches), taker)
        result = self._functions[len(batches)](*batches)
        self._sync(measured)
        began, self._ended = self._ended, time.perf_counter()
        self._calls.note(len(batches), alone)
        if first:  # it compiles
            self._slowing.most = taker.most_to_hold(batches) if taker.one_device else 0
        else:
            waited = taker.waited(took) if measured and not held else None
            self._add(len(batches), self._ended - began, waited, held)
            if measured and len(batches) == taker.number:
                self._slowing.note(self._ended - asked - took, held)
        taker.take_what_is_ready(batches)
        self._ended = time.perf_counter()
        return result

    def _iterations(self) -> int:
        optimizer = getattr(self.model, "optimizer", None)
        return 0 if optimizer is None else int(tf.convert_to_tensor(optimizer.iterations))

    def _calls_left(self) -> float:
        steps = self.params.get("steps")
        return math.inf if steps is None else (steps - self._batch) / self.model.steps_per_execution

    def _turn(self, taker: Taker) -> tuple[bool, bool]:
        """Whether Keras takes the batches of this call itself, and whether it is measured.

        Of several steps a call, Keras takes the next batches while it trains, which is faster; so
        it is left alone for most calls. The one before a measured call is no such one, so that the
        producers find what they would find if all calls were measured.
        """
        calls = self._calls
        several = taker.number > 1 and taker.one_device and not self.model.run_eagerly
        every = _SEVERAL_EVERY if several else _ON_A_GPU_EVERY if self._on_gpu else 1
        place = calls.done % every
        compares = several and not self._on_gpu and self._slowing.compares(calls.done)
        alone = several and not compares and 0 < place < every - 1 and self._calls_left() >= 1
        if alone and calls.steps and not taker.is_ahead:
            return True, False
        after_another = compares and not calls.was_alone
        return False, bool(taker.held) or not (calls.steps and place) or after_another

    def _add(self, steps: int, seconds: float, waited: float | None, held: bool) -> None:
        """Counts a call; one that is measured stands for those since the last as well. Calls that
        had their batches before they asked stand for none."""
        since = self._calls.since
        if not held:
            since.append(seconds)
        if waited is None:
            self.epochs[-1].add(steps, seconds, None, 0.0)
        else:
            self.epochs[-1].add(steps, seconds, waited * len(since), sum(since), len(since))
            since.clear()
        self.epochs[-1].slow = self._slowing.seconds

    def _sync(self, measured: bool) -> None:
        if measured and self._on_gpu:
            tf.test.experimental.sync_devices()


class _Calls:
    """The calls of Keras's step that were, of `together` steps each.

    Attributes:
        done: in this fit.
        steps: in this epoch; the last call of Keras's own may have had less.
        since: seconds of each since the last that was measured.
        was_alone: whether Keras took the batches of the last one itself.
    """

    def __init__(self, together: int) -> None:
        self._together, self.done = together, 0
        self.begin_epoch(0)

    def begin_epoch(self, trained: int) -> None:
        """`trained`: steps that the optimizer has counted."""
        self._trained, self.steps, self.was_alone = trained, 0, False
        self.since: list[float] = []

    def note(self, steps: int, alone: bool) -> None:
        self.done += 1
        self.steps += steps
        self.was_alone = alone

    def steps_that_did_not_come(self, trained: int) -> int:
        """Of a pass of unknown length Keras does not say how many steps its last call had."""
        more = self.steps - (trained - self._trained)
        return more if 0 < more < self._together else 0
