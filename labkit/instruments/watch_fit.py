"""The callback behind `labkit.watch()`: takes each batch, with a clock, ahead of Keras's step."""

import collections
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from labkit.instruments.taking import Taker
from labkit.instruments.tap import Tap
from labkit.instruments.waiting import NEXT_STEP, Counted, Waiting, total, verdict
from labkit.quiet import tf

_ON_A_GPU_EVERY = 10
_HELD, _RESTS_AFTER, _LEAST = 24, 8, 16  # calls
_AGAIN = 100  # times as many calls lie between


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
        self._batch = self._calls = 0
        self._ended = 0.0
        self._taker: Taker | None = None
        self._functions: dict[int, Callable[..., Any]] = {}
        self._slowing = _Slowing()
        self._new_live, self._live, self._quiet = live, None, quiet

    def on_train_begin(self, logs: Any = None) -> None:
        self._end_live()
        self._live = self._new_live and self._new_live()
        self.epochs, self._line, self._calls = [], "", 0
        self._every = _ON_A_GPU_EVERY if tf.config.list_logical_devices("GPU") else 1
        tap = self.model.train_function
        self._tap = Tap(self, tap.inner if isinstance(tap, Tap) else tap)
        self._functions, self._taker, self._slowing = {}, None, _Slowing()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._print_line()
        self.epochs.append(Counted())
        if self._taker is not None:
            self._taker.begin_epoch()
        self._ended = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._batch = batch
        self._tap.put()

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
        first = not self._calls
        taker = self._taker = self._taker or Taker(iterator, self.model)
        # An epoch that is held for as a whole would have no share.
        begun = self.epochs[-1].calls > 0
        ahead = self._slowing.calls_to_hold(self._calls, self._calls_left()) if begun else 0
        if ahead:
            taker.hold(iterator, ahead)
        held = bool(taker.held)
        measured = held or self._calls % self._every == 0
        self._calls += 1
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
        if first:  # it compiles
            self._slowing.most = taker.most_to_hold(batches) if taker.one_device else 0
        else:
            cycle = self._ended - (asked if self._every > 1 else began)
            waited = max(0.0, took - taker.ready_seconds)
            plain = measured and not held
            self.epochs[-1].add(len(batches), self._ended - began, waited if plain else None, cycle)
            if measured and len(batches) == taker.number:
                self._slowing.note(cycle - took, held, not taker.held)
            self.epochs[-1].slow = self._slowing.seconds
        taker.take_what_is_ready(batches)
        self._ended = time.perf_counter()
        return result

    def _calls_left(self) -> float:
        steps = self.params.get("steps")
        return math.inf if steps is None else (steps - self._batch) / self.model.steps_per_execution

    def _sync(self, measured: bool) -> None:
        if measured and self._every > 1:
            tf.test.experimental.sync_devices()


class _Slowing:
    """How much slower a call is while batches are made than while none are.

    Producers need cores, and Python's lock, which the step then lacks. So now and then some batches
    are taken ahead, and then trained on, in their order, while none is asked for: the producers
    have filled their buffers and rest.

    Attributes:
        seconds: more for a call that has its batches already; 0 while unknown.
        most: calls that may be held for.
    """

    def __init__(self) -> None:
        self.seconds, self.most = 0.0, 0
        self._usual: collections.deque[float] = collections.deque(maxlen=_HELD)
        self._held: list[float] = []
        self._next = 0

    def calls_to_hold(self, done: int, left: float) -> int:
        """0 for most calls: it costs what making and training at one time would have gained."""
        calls = min(_HELD + _RESTS_AFTER, self.most)
        if len(self._usual) < _HELD or done < self._next or calls < _LEAST or left < calls:
            return 0
        self._next, self._held = done + _AGAIN * calls, []
        return calls

    def note(self, seconds: float, held: bool, last: bool) -> None:
        """Of a call, without the time to take its batches; `last` of those that were held."""
        if not held:
            self._usual.append(seconds)
            return
        self._held.append(seconds)
        if last and len(self._held) >= _LEAST:
            alone = statistics.median(self._held[_RESTS_AFTER:])
            self.seconds = max(0.0, statistics.median(self._usual) - alone)
            self._usual.clear()
