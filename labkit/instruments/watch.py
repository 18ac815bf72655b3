"""`labkit.watch`: how much of a `fit`, or of a loop, is waiting for data, seen while it runs."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from labkit.instruments.live import of_fit, of_loop
from labkit.instruments.waiting import NEXT_STEP, Counted, Waiting, total, verdict

_NOTHING = (
    "no batch came, expected at least one; an iterator that is at its end has nothing for another "
    "loop, so pass what begins anew each time"
)


def watch(iterable: Iterable[Any] | None = None, live: bool = False) -> Any:
    """Tells how much of a training is waiting for data, while it runs.

        model.fit(anything, callbacks=[labkit.watch()])
        for batch in labkit.watch(batches): ...

    In `fit` a line after each epoch says seconds (of training, without validation), steps/s, the
    share of waiting, and the rate there would be without it; at the end comes a verdict. The two
    numbers are in the epoch's logs, too, as `waiting_share` (0 to 1) and `steps_per_second`, for
    History and for every callback that stands behind this one, so put it first. The first step of
    a `fit` or a loop compiles and is left out.

    Waiting is the time until the next batch is there; one that is ready takes none of it. Keras and
    tf.data prefetch, so data that take no longer than the step cost nothing. In `fit` the share
    holds another cost, too: whoever makes the data needs cores and Python's lock, which the step
    then lacks. To know it, 24 to 96 batches are taken ahead now and then, and trained on, in their
    order, while none is made; an epoch of less than some 100 calls has no time for that. Of several
    `steps_per_execution` Keras takes the next batches while it trains; so what its calls take
    longer than those with batches taken ahead is the share, which a `fit` of less than some 30
    calls does not tell. Steps so short that watching each would take over 0.5 % of the time are
    watched for a while, now and then. On a GPU, where a step goes on while Python has long gone
    ahead, every tenth step is measured, or one in 0.1 s, with the device waited for before and
    after it; in a loop of your own, wait for it yourself.

    Args:
        iterable: of batches, for a loop of your own; without it the result is a Keras callback.
        live: also show waiting, the queue of a `QueueRunner`, CPU, memory and GPUs while it runs:
            in a notebook a picture that stays, drawn anew every 1 to 5 seconds; in a terminal a
            line (with `fit(verbose=2)`, since Keras's bar takes the same place).

    Returns:
        a `keras.callbacks.Callback`, or an iterable over the same batches. Both have `epochs`, a
        list of `Waiting`, and a `verdict()`.

    Raises:
        TypeError: if `iterable` is none.
        RuntimeError: where Keras runs on another backend than TensorFlow.
    """
    if iterable is None:
        from labkit.instruments.watch_fit import FitWatch

        return FitWatch(of_fit if live else None)
    return LoopWatch(iterable, live)


class LoopWatch:
    """The batches of an iterable, with the waiting for them measured."""

    def __init__(self, iterable: Iterable[Any], live: bool = False) -> None:
        if not hasattr(iterable, "__iter__") and not hasattr(iterable, "__getitem__"):
            raise TypeError(
                f"labkit.watch: expected an iterable of batches, got {type(iterable).__name__}. "
                "For Keras: model.fit(..., callbacks=[labkit.watch()])."
            )
        self._iterable, self._live = iterable, live
        self.epochs: list[Waiting] = []
        self._came = False

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        waiting = Counted()
        self.epochs.append(waiting)
        iterator = iter(self._iterable)
        live = of_loop() if self._live else None
        first, nothing, ended = not self._came, True, time.perf_counter()
        try:
            while True:
                asked = time.perf_counter()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                waited = time.perf_counter() - asked
                self._came, nothing = True, False
                yield batch
                began, ended = ended, time.perf_counter()
                if not first:
                    waiting.add(1, ended - began, waited, ended - began)
                first = False
        finally:
            if live is not None:
                live.end()
            line = _NOTHING if nothing else waiting
            print(f"labkit.watch: {line}\nlabkit.watch: {self.verdict()}", flush=True)

    def verdict(self) -> str:
        """What the waiting of all passes so far means, in a line or two."""
        if not self._came:
            return "no verdict: no batch was seen"
        return verdict(total(self.epochs).share, NEXT_STEP)
