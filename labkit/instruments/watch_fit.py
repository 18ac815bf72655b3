"""The callback behind `labkit.watch()`: a clock around each of Keras's steps, and one inside."""

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
_READ_EVERY = 0.02  # seconds, since to read the meter is a hundredth of a step of 2 ms
_WATCHING, _MOST_REST = 0.005, 20  # of the time, and calls that go unseen for each that is seen


class FitWatch(tf.keras.callbacks.Callback):
    """See `labkit.watch`.

    Keras takes the batch inside of its compiled step, where no callback can tell waiting from
    computing. So for each step the model gets another `train_function`, which hands Keras's own one
    a metered iterator. It gives the place back as the first thing it does: whatever fails,
    wherever, Keras's own one is there again.

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
        self._slowing = Slowing()
        self._new_live, self._live, self._quiet = live, None, quiet

    def on_train_begin(self, logs: Any = None) -> None:
        self._end_live()
        self._live = self._new_live and self._new_live()
        self.epochs, self._line = [], ""
        self._on_gpu = bool(tf.config.list_logical_devices("GPU"))
        self._in_turn = not self._on_gpu and self.model.steps_per_execution == 1
        tap = self.model.train_function
        self._tap = Tap(self, tap.inner if isinstance(tap, Tap) else tap)
        self._taker = None
        several = self.model.steps_per_execution
        self._calls, self._slowing = _Calls(several), Slowing(several)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._print_line()
        self.epochs.append(Counted())
        self._slowing.begin_epoch()
        self._calls.begin_epoch(self._iterations())
        self._ended = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._calls.resting:
            self._calls.resting -= 1
            return
        self._end_rest()
        self._calls.came = time.perf_counter()
        self._batch = batch
        self._tap.put()

    def on_test_begin(self, logs: Any = None) -> None:
        self._end_rest(ended=True)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._end_rest(ended=True)
        self._count_since()
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
        self._taker = None
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

    def step(self, iterator: Any, inner: Callable[..., Any]) -> Any:
        """Keras's train_function, and what there is to know of the call. Of several steps a call
        only whole calls are compared."""
        taker = self._taker = self._taker or Taker(iterator, self.model)
        self._hold(taker, iterator)
        held = taker.held > 0
        measured = held or self._is_measured()
        if measured and self._on_gpu:
            self._sync()
            taker.waited()  # while the device had something to do
        # Before an epoch's first step Keras makes the iterator: that is waiting, too.
        asked = time.perf_counter() if self._calls.steps else self._ended
        made = time.perf_counter() - asked
        result = taker.call(iterator, inner)
        if measured and self._on_gpu:
            self._sync()
        began, self._ended = self._ended, time.perf_counter()
        self._calls.note(1, made, max(0.0, asked - self._calls.came))
        self._note(self._ended - began, self._ended - asked, measured, held)
        self._calls.own += time.perf_counter() - self._ended
        return result

    def _hold(self, taker: Taker, iterator: Any) -> None:
        # An epoch that is held for as a whole would have no share.
        if taker.held or not taker.one_device or not (self.epochs[-1].calls or self._calls.since):
            return
        calls = self._slowing.calls_to_hold(self._calls_left())
        if calls:
            self._count_since()
            began = time.perf_counter()
            taker.hold(iterator, calls)
            self._slowing.hold(taker.held, time.perf_counter() - began)

    def _note(self, seconds: float, whole: float, measured: bool, held: bool) -> None:
        """Counts a call: seconds since the end of the last, and of the call as a whole. One that is
        measured stands for those since the last as well."""
        if self._calls.done == 1:  # it compiles
            self._waited()
            return
        self.epochs[-1].add(self._calls.together, seconds, None, 0.0)
        if held:
            own = self._calls.take_own()
            # With what Python does between two steps, which a lack of its lock slows as well; on a
            # GPU that is while the device is waited for.
            self._slowing.note_held(seconds - own if self._in_turn else whole)
        elif self._slowing.skips() or self._calls.cold:
            self._waited()
            self._calls.cold = False
        else:
            self._calls.since.append(seconds)
            if self._in_turn:
                if measured:
                    self._rest(self._count_since())
            elif measured or self._calls.together > 1:
                self._count(whole)

    def _count_since(self) -> float:
        """Of calls one after the other, all waiting since the last that was measured. Returns how
        many may come unseen for each that is seen, so that watching takes but little of all."""
        since = self._calls.since
        if not self._in_turn or not since:
            return 0
        waited, own = self._waited()
        whole, calls = sum(since), len(since)
        self._slowing.note((whole - waited - own) / calls, calls, waited)
        # Who waits would have waited longer without what watching took meanwhile.
        self._add(waited + min(own, max(0.0, waited - own)))
        self._calls.measured_at = time.perf_counter()
        return min(_MOST_REST, own / whole / _WATCHING - 1)

    def _rest(self, times: float) -> None:
        """So many times as many calls as were seen go unseen, ahead of those to be held. Not the
        last one of an epoch, after which seconds would count that are no training."""
        left, seen = self._calls_left(), self._slowing.in_a_row
        most = int(min(times * seen, left - 2))
        may = self._taker is not None and self._taker.one_device
        if may and most > 0 and not self._slowing.calls_to_hold(left):
            self._calls.rested = self._calls.resting = most

    def _end_rest(self, ended: bool = False) -> None:
        """Counts the calls that went unseen, up to now; of a pass that has ended the last one, if
        its length was not known, was none."""
        calls = self._calls.rested - self._calls.resting
        self._calls.rested = self._calls.resting = 0
        if not calls:
            return
        if ended and self.params.get("steps") is None and not self.model.stop_training:
            calls -= 1
        self._calls.note(calls)
        self._calls.cold = True
        began, self._ended = self._ended, time.perf_counter()
        self._calls.measured_at = self._ended
        self.epochs[-1].add(calls * self._calls.together, self._ended - began, None, 0.0)
        self._slowing.pass_by(self._ended - began)

    def _count(self, whole: float) -> None:
        """Of a call with the device waited for, and those that it stands for; or of several steps,
        whose waiting is in what the comparisons say."""
        waited, _ = self._waited()
        self._slowing.note(whole - waited, 1, waited)
        if self._calls.together == 1 or self._slowing.known:
            self._add(waited * len(self._calls.since))

    def _add(self, waited: float) -> None:
        since, epoch = self._calls.since, self.epochs[-1]
        epoch.slow = self._slowing.seconds
        epoch.add(0, 0.0, waited, sum(since), len(since))
        since.clear()

    def _waited(self) -> tuple[float, float]:
        """Seconds of waiting, and of what watching took, since this was asked last."""
        made, self._calls.made = self._calls.made, 0.0
        waited, metering = (0.0, 0.0) if self._taker is None else self._taker.waited()
        return made + waited, self._calls.take_own() + metering

    def _iterations(self) -> int:
        optimizer = getattr(self.model, "optimizer", None)
        return 0 if optimizer is None else int(tf.convert_to_tensor(optimizer.iterations))

    def _calls_left(self) -> float:
        steps = self.params.get("steps")
        return math.inf if steps is None else (steps - self._batch) / self.model.steps_per_execution

    def _is_measured(self) -> bool:
        if self._in_turn:
            lately = time.perf_counter() - self._calls.measured_at < _READ_EVERY
            return not lately or self._slowing.compares
        if not self._on_gpu or not self._calls.steps or not self._calls.done % _ON_A_GPU_EVERY:
            return True
        return time.perf_counter() - self._calls.measured_at >= _ON_A_GPU_SECONDS

    def _sync(self) -> None:
        tf.test.experimental.sync_devices()
        self._calls.measured_at = time.perf_counter()


class _Calls:
    """The calls of Keras's step that were, of `together` steps each.

    Attributes:
        done: in this fit.
        steps: in this epoch; the last call may have had less.
        since: seconds of each like any other since the last that was measured.
        made: seconds that making the iterator took since then.
        own: seconds that watching itself took since then, in Python.
        resting, rested: that are to go unseen from here on, and were to at first.
        cold: the next is the first that is seen again.
        came: when the newest began.
        measured_at: when the last one was.
    """

    def __init__(self, together: int) -> None:
        self.together, self.done = together, 0
        self.came = self.measured_at = 0.0
        self.begin_epoch(0)

    def begin_epoch(self, trained: int) -> None:
        """`trained`: steps that the optimizer has counted."""
        self._trained, self.steps = trained, 0
        self.since: list[float] = []
        self.made = self.own = 0.0
        self.resting = self.rested = 0
        self.cold = False

    def note(self, calls: int, made: float = 0.0, own: float = 0.0) -> None:
        self.made += made
        self.own += own
        self.done += calls
        self.steps += calls * self.together

    def take_own(self) -> float:
        own, self.own = self.own, 0.0
        return own

    def steps_that_did_not_come(self, trained: int) -> int:
        """Of a pass of unknown length Keras does not say how many steps its last call had."""
        more = self.steps - (trained - self._trained)
        return more if 0 < more < self.together else 0
