"""What a run does, seen while it runs: a small picture in a notebook, a line in a terminal."""

import atexit
import base64
import contextlib
import math
import shutil
import statistics
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol, Self

from labkit.engine import feeder as feeders
from labkit.engine.feeder import Feeder
from labkit.instruments.fits import fits_watched
from labkit.instruments.usage_monitor import UsageMonitor
from labkit.instruments.waiting import RecentWaiting

_SHARE = 0.015  # of a core, for drawing: sampling, and sending what was drawn, take the rest of 3 %
_SOONEST, _LATEST = 1.0, 5.0  # seconds from one picture to the next
_TICK = 0.1
_SAMPLES_NOW = 4
_JOIN_SECONDS = 10.0


class Sight:
    """What there is to see of a run, sampled in the background while a `with` block runs.

    Waiting is that of all that measures it in this process: `labkit.watch`, `StepTimer`, and every
    Keras `fit` that begins inside of the block. The queue is `feeder`'s, by default that of the
    runner which began first of those that run.

    Attributes:
        usage: the `UsageMonitor`, with the probes "waiting", 0 to 1, and "queue", in samples.
        waiting: the share of waiting of the whole block.
        limits: the queue's min_after_dequeue and capacity, in samples; None while there is none.
    """

    def __init__(
        self, interval: float = 0.5, feeder: Callable[[], Feeder | None] = feeders.oldest
    ) -> None:
        self._feeder = feeder
        self._block = contextlib.ExitStack()
        self.waiting = RecentWaiting()
        self.limits: tuple[int, int] | None = None
        self.usage = UsageMonitor(interval, {"waiting": self.waiting, "queue": self._depth})

    def _depth(self) -> float:
        feeder = self._feeder()
        if feeder is None or not feeder.alive:
            return math.nan
        terms = feeder.terms
        mixed = terms.order.mixed if terms.order else 0  # outside the queue
        self.limits = terms.least - terms.batch_size + mixed, terms.capacity + mixed
        return feeder.depth()

    def __enter__(self) -> Self:
        self._block.enter_context(self.usage)
        self._block.enter_context(fits_watched())
        return self

    def __exit__(self, *error: object) -> None:
        self._block.close()
        self.waiting()  # what came after the last sample

    def text(self, last: int = 0) -> str:
        """One line: of the `last` samples, or of the whole run."""
        usage = self.usage
        parts = [f"{usage.seconds[-1] if usage.seconds else 0:.0f} s"]
        share = _mean(usage.probes["waiting"][-last:]) if last else self.waiting.share
        if not math.isnan(share):
            parts.append(f"{share:.0%} waiting for data")
        depth = _mean(usage.probes["queue"][-last:])
        if self.limits is not None and not math.isnan(depth):
            parts.append("queue {:.0f} ({} to {})".format(depth, *self.limits))
        gpus = {f"GPU {gpu.index}": [gpu.utilisation] for gpu in usage.gpus}
        if len(gpus) > 2:
            gpus = {f"{len(gpus)} GPUs": [row for (row,) in gpus.values()]}
        for name, series in {"CPU": [usage.cpu], **gpus}.items():
            percent = _mean([_mean(row[-last:]) for row in series])
            if not math.isnan(percent):
                parts.append(f"{name} {percent:.0f}%")
        return "labkit: " + ", ".join(parts)


def _mean(samples: Sequence[float]) -> float:
    present = [sample for sample in samples if not math.isnan(sample)]
    return statistics.fmean(present) if present else math.nan


class Screen(Protocol):
    """Where a run is shown, in one place."""

    def show(self, sight: Sight, ended: bool) -> None: ...


class Notebook:
    """A picture in the output of the cell that made it, which stays in the saved notebook."""

    def __init__(self) -> None:
        from labkit.instruments.picture import Picture

        self._picture = Picture()
        self._id = f"labkit-{id(self)}-{time.monotonic_ns()}"
        self._publish({"text/plain": "labkit: the picture comes within seconds"}, update=False)

    def show(self, sight: Sight, ended: bool) -> None:
        text = sight.text(0 if ended else _SAMPLES_NOW)
        picture = base64.b64encode(self._picture.png(sight, text, ended)).decode()
        self._publish({"image/png": picture, "text/plain": text}, update=True)

    def _publish(self, data: dict[str, str], update: bool) -> None:
        from IPython.display import display

        display(data, raw=True, display_id=self._id, update=update)


class Terminal:
    """A line that is written anew; in a pipe or a file, where nobody looks on, the last one."""

    def show(self, sight: Sight, ended: bool) -> None:
        out = sys.stdout
        columns = shutil.get_terminal_size().columns - 1
        if ended:
            print(f"{self._erase()}{sight.text()}", flush=True)
        elif out.isatty():
            # Back to its beginning, so that whatever is printed next takes its place.
            print(f"{self._erase()}{sight.text(_SAMPLES_NOW)[:columns]}", end="\r", flush=True)

    def _erase(self) -> str:
        return "\r\x1b[K" if sys.stdout.isatty() else ""


def screen() -> Screen:
    """A notebook's cell, or the terminal."""
    return Notebook() if hasattr(_shell(), "kernel") else Terminal()


def _shell() -> Any:
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def pause(cost: float) -> float:
    """Seconds until the next picture, after one that took `cost` seconds of a core."""
    return min(max(cost / _SHARE, _SOONEST), _LATEST)


class Live:
    """Shows a run while it runs. It ends with `end()`, a `with` block, the notebook's cell, the
    program, or when `over()` says so; the last picture, of the whole run, stays.

    One thread draws, as often as 1.5 % of a core allow, and from 1 to 5 seconds apart.

    Attributes:
        sight: what it has seen.
        seconds: of a core, that drawing has taken.
    """

    def __init__(self, sight: Sight, over: Callable[[], bool]) -> None:
        self.sight, self.seconds = sight, 0.0
        self._over: Callable[[], bool] | None = over
        self._screen = screen()
        self._stop = threading.Event()
        shell = _shell()
        self._events = shell.events if hasattr(shell, "events") else None
        self.sight.__enter__()
        self._thread = threading.Thread(target=self._run, name="labkit live", daemon=True)
        _running.add(self)
        if self._events is not None:
            self._events.register("post_run_cell", self.end)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def __repr__(self) -> str:
        return self.sight.text()

    def end(self, *_: Any) -> None:
        """Draws once more and ends the thread. May be called twice."""
        self._stop.set()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        try:
            due = time.monotonic() + _SOONEST
            while not (self._stop.wait(_TICK) or self._over is None or self._over()):
                if time.monotonic() >= due:
                    due = time.monotonic() + pause(self._draw(ended=False))
        finally:
            self._over = None
            self.sight.__exit__()
            self._draw(ended=True)
            _running.discard(self)
            if self._events is not None:
                self._events.unregister("post_run_cell", self.end)

    def _draw(self, ended: bool) -> float:
        """Seconds of a core that it took."""
        began = time.thread_time()
        try:
            self._screen.show(self.sight, ended)
        except Exception as error:  # the training must not suffer
            self._stop.set()
            warnings.warn(
                f"labkit: the live picture ended by {type(error).__name__}: {error}. The training "
                "goes on without it.",
                RuntimeWarning,
                stacklevel=1,
            )
        took = time.thread_time() - began
        self.seconds += took
        return took


_running: set[Live] = set()


def _end_all() -> None:
    for live in list(_running):
        live.end()


atexit.register(_end_all)


def until_returned(frame: FrameType | None, name: str) -> Callable[[], bool]:
    """Whether the function `name` above `frame` has returned: a `fit` that fails tells nobody."""
    thread = threading.get_ident()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back

    def gone() -> bool:
        now = sys._current_frames().get(thread)
        while now is not None and now is not frame:
            now = now.f_back
        return now is None

    # Twice, since that thread runs while its frames are walked.
    return lambda: frame is not None and gone() and gone()


def _until_stopped(feeder: Callable[[], Feeder | None]) -> Callable[[], bool]:
    """Whether what `feeder` gives has begun, and ended since."""
    began = False

    def over() -> bool:
        nonlocal began
        found = feeder()
        alive = found is not None and found.alive
        began |= alive
        return began and not alive

    return over


def of_fit() -> Live:
    """For the `fit` from whose callback it is called, until that returns or fails."""
    return Live(Sight(), until_returned(sys._getframe(1), "fit"))


def of_loop() -> Live:
    """Until its `end()`."""
    return Live(Sight(), lambda: False)


def of_run(runner: Any) -> Live:
    """A live picture of a `QueueRunner`, for `runner.watch()`.

        with runner:
            runner.watch()
            model.fit(runner.dataset(), epochs=5)

    Put it in the cell that trains: it ends with the runner, with that cell, or with its own `with`
    block.
    """
    known = weakref.ref(runner)

    def feeder() -> Feeder | None:
        found = known()
        return None if found is None else found._feeder

    return Live(Sight(feeder=feeder), _until_stopped(feeder))
