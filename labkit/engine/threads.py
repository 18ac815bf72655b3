"""Workers as threads of this process: cheap, and enough for iterators that wait."""

import queue
import sys
import threading
import time
import traceback

from labkit.engine.messages import Chunk, Ended, Lost, Message, Skipped
from labkit.engine.pool import Job, Pool
from labkit.engine.produce import LeftOut, Made, produce
from labkit.engine.rest import rest
from labkit.engine.stage import listen
from labkit.engine.tracebacks import describe, own_frames_left_out, readable

_SLOTS = 2
_HEAVY = 0.001  # seconds of a batch; beside more, a turn of Python's lock costs nothing


class _Seat:
    """What one thread may do: how many chunks it may still hand over, of which pass."""

    def __init__(self, epoch: int, life: int, begin: int) -> None:
        self.epoch: int | None = epoch  # None: it is to end
        self.life, self.first = life, begin
        self._free = _SLOTS
        self._changed = threading.Condition()

    def take_slot(self, epoch: int) -> bool:
        """Waits for a slot. False if the pass is not wanted any more."""
        with self._changed:
            while not self._free and self.epoch == epoch:
                self._changed.wait()
            if self.epoch != epoch:
                return False
            self._free -= 1
            return True

    def give_slot(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify()

    def begin(self, epoch: int | None) -> None:
        with self._changed:
            self.epoch = epoch
            self._changed.notify()

    def await_pass_after(self, epoch: int) -> None:
        with self._changed:
            while self.epoch == epoch:
                self._changed.wait()


class ThreadPool(Pool):
    """Each worker is a thread with two slots: one batch on its way, one being made ahead."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._seats: list[_Seat] = []
        self._threads: list[tuple[int, threading.Thread]] = []  # also those that were replaced

    def _start(self, worker: int, life: int, begin: int) -> None:
        seat = _Seat(self.epoch, life, begin)
        name = f"labkit worker {worker}"
        thread = threading.Thread(target=self._work, args=(worker, seat), name=name, daemon=True)
        for before in self._seats[worker : worker + 1]:
            before.begin(None)
        self._seats[worker : worker + 1] = [seat]
        thread.start()
        self._threads.append((worker, thread))

    def _work(self, worker: int, seat: _Seat) -> None:
        if self.job.stages:
            listen()
        job, life, first = self.job, seat.life, seat.first
        try:
            while (epoch := seat.epoch) is not None:
                how = job.copies, job.skip, first, job.aligned
                for made in produce(self.factory, worker, epoch, self.spec, *how):
                    if not isinstance(made, LeftOut):
                        self.spec = self.spec or made.spec
                    if not seat.take_slot(epoch):
                        break
                    self._messages.put(_message(worker, epoch, made, life))
                    heavy = isinstance(made, Made) and made.seconds > _HEAVY
                    del made
                    if heavy:  # or the feeder waits for Python's lock until 5 ms are over
                        time.sleep(0)
                    rest.wait()
                else:
                    self._messages.put(Ended(worker, epoch, life))
                    seat.await_pass_after(epoch)
                first = 0
        except BaseException as error:
            if not self._stopping:
                summary, text = describe(error)
                self._messages.put(Lost(worker, summary, readable(text), error, life=life))

    def _receive(self, seconds: float) -> list[Message]:
        came: list[Message] = []
        try:
            message = (
                self._messages.get(timeout=seconds) if seconds else self._messages.get_nowait()
            )
            while message is not None:
                came.append(message)
                message = self._messages.get_nowait()
        except queue.Empty:
            pass
        return came

    def _refill(self, worker: int, slots: tuple[int, ...]) -> None:
        self._seats[worker].give_slot()

    def _go_on(self, worker: int) -> None:
        self._seats[worker].begin(self.epoch)

    def _room(self, worker: int) -> int:
        return _SLOTS

    def wake(self) -> None:
        self._messages.put(None)

    def _doing(self, worker: int) -> str:
        newest = [thread for its, thread in self._threads if its == worker][-1]
        return _lines_of(newest)

    def _end(self, seconds: float) -> list[str]:
        rest.end()
        for seat in self._seats:
            seat.begin(None)
        deadline = time.monotonic() + seconds
        # The last one that had the runner may have been a worker's own thread.
        for _, thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        left = [(i, thread) for i, thread in self._threads if thread.is_alive()]
        return [f"worker {i} is still in your iterator:\n{_lines_of(one)}" for i, one in left]


def _lines_of(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return "it has ended\n"
    return readable("".join(own_frames_left_out(traceback.extract_stack(frame)).format()))


def _message(worker: int, epoch: int, made: Made | LeftOut, life: int) -> Message:
    if isinstance(made, LeftOut):
        summary, text = describe(made.error)
        failed = summary, readable(text), made.error
        return Skipped(worker, *failed, epoch, made.number, life=life)
    told = made.arrays, made.seconds, epoch, (), True, made.stages, made.number, life
    return Chunk(worker, *told)
