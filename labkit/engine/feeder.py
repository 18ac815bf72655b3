"""The feeder: one thread that hears every worker and fills the queue, from first batch to last.

    for each pass's queue:  message ─► Chunk: put it;  Ended: who goes on?;  Lost: raise or go on

Producers only produce. One thread enqueues for all of them, so that a producer's cycle never waits
for the step that is running. A loop in Python could be handed each batch by its worker, without
this thread; where threads compute that makes 0.99 to 1.00 of the rate: 18 of 20 batches lie ready.
"""

import atexit
import copy
import queue as queues
import threading
import time
import warnings
import weakref
from dataclasses import dataclass

from labkit.engine.auto import Scaler
from labkit.engine.batches import Spec, joined
from labkit.engine.heard import Heard
from labkit.engine.interrupts import ear
from labkit.engine.messages import Chunk, Ended, Lost, Message, Skipped, WorkerError
from labkit.engine.pool import Pool
from labkit.engine.shares import EvenQueue, Queue, Share
from labkit.engine.turns import Order, Turns

_TICK = 0.1
_RUNNING: "weakref.WeakKeyDictionary[Feeder, None]" = weakref.WeakKeyDictionary()  # in this order
_SMALL_BYTES, _TOGETHER = 1 << 20, 8


@dataclass(frozen=True)
class Terms:
    """What the runner wants of a feeder.

    Attributes:
        on_error: "raise", "continue" with the other workers, or "skip" batches.
        batch_size: samples that the consumer takes at a time.
        least: samples below which the queue lets the consumer wait.
        capacity: samples that the queue holds.
        samples: of a pass, where they are known.
        scaler: of n_workers="auto".
        order: of one that is known; the feeder itself mixes.
        share: of several trainers.
        max_skipped: batches that may be left out of a pass; None: see `Skips`.
    """

    on_error: str
    batch_size: int
    least: int
    capacity: int
    samples: int | None = None
    scaler: Scaler | None = None
    order: Order | None = None
    share: Share | None = None
    max_skipped: int | None = None


class Feeder:
    """Owns a pool for its whole life, and knows what there is to know of the run.

    Attributes:
        error: what ended the run, or None.
        heard: what the workers' chunks told.
    """

    def __init__(self, pool: Pool, terms: Terms) -> None:
        self.pool, self.terms = pool, terms
        self.error: BaseException | None = None
        self.heard = Heard(pool, terms.max_skipped)
        self._turns: Turns | None = None
        self._ended: set[int] = set()
        self._lost: set[int] = set()
        self._spec_known = threading.Event()
        self._queues: queues.SimpleQueue[tuple[Queue, int, float] | None] = queues.SimpleQueue()
        self._queue: Queue | None = None  # the newest pass's
        self._stopping = threading.Event()
        self._over = self._told = False
        # By whoever waits, not by the thread: threads start twice as fast then.
        pool.set_active(self._wanted() if pool.job.spec is not None else 1)
        self._thread = threading.Thread(target=self._run, name="labkit feeder", daemon=True)
        _RUNNING[self] = None
        self._thread.start()

    # ---------------------------------------------------------------- for the runner

    def spec(self) -> Spec:
        """What batches look like: waits for the first one, which is not lost.

        Raises what went wrong before it came; WorkerError if the run was stopped.
        """
        self._spec_known.wait()
        if self.pool.spec is None or self.error is not None:
            self.raise_if_failed()
            raise WorkerError("labkit: stopped before the first batch.")
        return self.pool.spec

    def feed(self, queue: Queue, epoch: int, since: float) -> None:
        """Gives up the pass before; fills `queue` with the pass `epoch`, and then closes it. A
        Ctrl-C that came after `since`, as the ear counts, is one that the consumer has to learn of.
        """
        if self.terms.share is not None:
            given = self.terms.order.used(epoch) if self.terms.order else 0
            queue = EvenQueue(queue, self.terms.share, self.heard, given)
        before, self._queue = self._queue, queue
        if before is not None:
            before.close(cancel=True)
        self._queues.put((queue, epoch, since))
        self.pool.wake()
        if self._over:
            queue.close(cancel=True)

    def begin_stop(self) -> None:
        """Ahead of `stop`, from any thread: whoever waits for a first batch is told."""
        self._stopping.set()
        self._queues.put(None)
        self.pool.begin_stop()

    def stop(self) -> list[str]:
        """Ends everything; a line for each worker that would not end. May come twice."""
        self.begin_stop()
        if self._queue is not None:
            self._queue.close(cancel=True)
        # The feeder goes first: it must not meet a pool that is half gone.
        if self._thread is not threading.current_thread():
            self._thread.join(2.0)
        _RUNNING.pop(self, None)
        left = self.pool.stop()
        if self.error is None:
            self.heard.skips.report()
        return left

    def abandon(self) -> None:
        """Stops from a finalizer, whose thread may be in the midst of tracing: by another one."""
        threading.Thread(target=self.stop, name="labkit end", daemon=True).start()

    def depth(self) -> int:
        """Samples in the queue now, and those that wait to be mixed; 0 when it is not running."""
        queue, turns = self._queue, self._turns
        mixing = 0 if turns is None else turns.reservoir.count
        return 0 if queue is None or not self.alive else queue.size() + mixing

    @property
    def samples(self) -> int:
        """Put into the queue in this pass."""
        return self.heard.samples

    @property
    def alive(self) -> bool:
        return not self._stopping.is_set() and self.error is None

    @property
    def owes_an_error(self) -> bool:
        """Something went wrong that the consumer has not learned of, and it did not end the run."""
        return self.error is not None and not self._told and not self._stopping.is_set()

    def raise_if_failed(self) -> None:
        if self.error is not None:
            self._told = True
            # A copy, since an exception keeps the frames that it passes through, and with them the
            # caller's iterator over dataset(): this run must not hold on to those.
            raise copy.copy(self.error) from self.error.__cause__

    # ---------------------------------------------------------------- its thread

    def _run(self) -> None:
        try:
            if self.pool.job.spec is None:
                self._await_first_chunk()
            self._spec_known.set()
            while (ordered := self._queues.get()) is not None:
                self._feed(*ordered)
        except BaseException as error:
            if not self._stopping.is_set():
                # Without its frames: they hold the batches of that moment.
                self.error = error.with_traceback(None)
        finally:
            self._over = True
            self._spec_known.set()
            if self._queue is not None:
                self._queue.close(cancel=True)

    def _await_first_chunk(self) -> None:
        """Starts workers one by one until one delivers; then as many as are wanted."""
        skipped: list[Skipped] = []
        while not self._stopping.is_set():
            message = self.pool.get(_TICK)
            if isinstance(message, Chunk):
                self.heard.rows = len(message.arrays[0])
                self.pool.put_back(message)
                for first in reversed(skipped):  # each has its turn
                    self.pool.put_back(first)
                self.pool.set_active(self._wanted())
                return
            if isinstance(message, Skipped):
                self._leave_out(message)
                skipped.append(message)
            elif message is not None:
                self._note_end(message)
                if self.pool.active == self.pool.n_workers:
                    raise self._nothing_came(message.worker)
                self.pool.set_active(self.pool.active + 1)

    def _feed(self, queue: Queue, epoch: int, since: float) -> None:
        if queue is not self._queue:
            return  # given up before it began
        if epoch != self.pool.epoch:
            self.pool.next_epoch(epoch)
            self._ended = set(self._lost)
            self.heard.skips.report()  # of one that was given up
        self.heard.samples, self.heard.lacking = 0, bool(self._lost)
        self.heard.counts.clear()
        self._take_turns(epoch)
        self.pool.set_active(self._wanted())
        interrupt = _LostInterrupt(queue, self.terms, since)
        while not self._stopping.is_set() and queue is self._queue:
            if self._all_done():
                self._finish(queue)
                queue.close(cancel=False)
                return
            self._hear((self._turns or self.pool).get(_TICK), queue)
            interrupt.check(self.samples)

    def _hear(self, message: Message | None, queue: Queue) -> None:
        """Not in the loop, where a variable would keep a batch until the next one has come."""
        if isinstance(message, Chunk):
            self._put(queue, message)
        elif isinstance(message, Skipped):
            self._leave_out(message)
        elif message is not None:
            self._note_end(message)
            self.pool.set_active(self._wanted())

    def _take_turns(self, epoch: int) -> None:
        if self._turns is not None:
            self._turns.give_up()
        if self.terms.order is not None:
            self._turns = self.terms.order.turns(self.pool, self._ended, epoch)
            self.heard.records.append(self._turns.record)
            self.heard.samples = self.terms.order.used(epoch)

    def _put(self, queue: Queue, first: Chunk) -> None:
        chunks = self._ready_together(first)
        try:
            for chunk in chunks:  # while its arrays are what they were
                self.heard.note(chunk)
            turns = self._turns
            arrays = joined([c.arrays if turns is None else turns.mixed(c) for c in chunks])
            if len(arrays[0]) and not queue.enqueue(arrays):
                return
        finally:
            for chunk in chunks:
                self.pool.release(chunk)
        self.heard.samples += len(arrays[0])
        if self.terms.scaler is not None:
            self._scale(self.terms.scaler, chunks, queue)

    def _scale(self, scaler: Scaler, chunks: list[Chunk], queue: Queue) -> None:
        newest = self.pool.active - 1
        notes = [scaler.note(c.worker, newest, len(c.arrays[0]), c.seconds) for c in chunks]
        if any(notes):
            scaler.decide(full=queue.size() > (self.terms.least + self.terms.capacity) / 2)
            self.pool.set_active(self._wanted())

    def _ready_together(self, first: Chunk) -> list[Chunk]:
        """`first`, and what else is ready now if chunks are small: one enqueue serves several,
        where samples are queued one by one."""
        chunks = [first]
        small = sum(getattr(part, "nbytes", _SMALL_BYTES) for part in first.arrays) < _SMALL_BYTES
        small &= not self.pool.job.keeps and self._turns is None
        source = self._turns or self.pool
        while small and len(chunks) < _TOGETHER:
            message = source.get(0)
            if not isinstance(message, Chunk):
                if message is not None:
                    source.put_back(message)
                break
            chunks.append(message)
        return chunks

    def _leave_out(self, message: Skipped) -> None:
        if self._turns is not None:
            self._turns.record.left_out(message)
        self.heard.lacking = True
        if not message.released:
            self.heard.skips.note(message)
            self.pool.release(message)

    def _note_end(self, message: Ended | Lost) -> None:
        """Notes who ended or was lost; raises if the run cannot go on without it."""
        self._ended.add(message.worker)
        if isinstance(message, Lost):
            first = not self._lost
            self._lost.add(message.worker)
            self.heard.lacking = True
            error = message.as_error()
            if self.terms.on_error != "continue" or len(self._lost) == self.pool.n_workers:
                raise error
            if first:
                text = f"{error}\nGoing on with the other workers."
                warnings.warn(text, RuntimeWarning, stacklevel=1)

    def _all_done(self) -> bool:
        """True once no worker has anything left to deliver in this pass."""
        while self._ended.issuperset(range(self.pool.active)):
            if self.pool.active == self.pool.n_workers or not self.pool.factory.shards:
                return True
            self.pool.set_active(self.pool.active + 1)  # the next share takes its turn
        return False

    def _wanted(self) -> int:
        """How many workers are to be active: the next one takes the turn of one that is gone."""
        if self.terms.scaler is None:
            return self.pool.n_workers
        # Where they do not share, one that has delivered its all has left nothing to the others.
        shares = self.pool.factory.shards
        gone = self._ended if shares else self._lost | (self._ended - self.heard.workers)
        return min(self.pool.n_workers, self.terms.scaler.count + len(gone))

    def _finish(self, queue: Queue) -> None:
        pool = self.pool
        if self._turns is not None and self._turns.reservoir.count:
            arrays = self._turns.reservoir.rest()
            if not queue.enqueue(arrays):
                return
            self.heard.samples += len(arrays[0])
        if not self.samples and not self._lost:
            raise self._nothing_came(0)
        if not pool.factory.shards and self.terms.samples != self.samples:
            self.heard.warn_of_whole_passes(set(range(pool.active)) - self._lost)
        fewer = self.heard.skips.here and self.samples < (self.terms.samples or 0)
        self.heard.skips.report()
        if self.terms.samples not in (None, self.samples) and not (self._lost or fewer):
            raise WorkerError(
                f"labkit: a pass delivered {self.samples} samples, expected "
                f"{self.terms.samples} as given by samples=. Correct the number, or find out what "
                "the iterator leaves out or repeats."
            )

    def _nothing_came(self, worker: int) -> WorkerError:
        if self.heard.skips.here:
            return self.heard.skips.error(", and none is left")
        error = WorkerError(
            "labkit: the iterator ended before its first batch, expected at least one. Check "
            "that the factory returns a new iterator at each call, and that its data are found."
            + self.pool.factory.told(worker, self.pool.epoch)
        )
        error.worker = worker
        return error


class _LostInterrupt:
    """Ends the run if a second after a Ctrl-C the consumer still waits, or takes, in this pass."""

    def __init__(self, queue: Queue, terms: Terms, since: float) -> None:
        self.queue, self.terms, self.began = queue, terms, since
        self.look_again = time.monotonic()
        self.taken: int | None = None  # by the consumer, at the first look after the Ctrl-C

    def check(self, put: int) -> None:
        now = time.monotonic()
        if now < self.look_again:  # to look is a seventh of what it takes to put a small batch in
            return
        self.look_again = now + _TICK
        ago = ear.came_since(self.began)
        if ago is None or ago < 1.0:
            return
        size = self.queue.size()
        taken = put - size
        self.taken = taken if self.taken is None else min(taken, self.taken)
        if size < self.terms.least or taken > self.taken + 2 * self.terms.batch_size:
            raise WorkerError(
                "labkit: ended by an interrupt from which the consumer did not learn, "
                "since it waited for data, or TensorFlow dropped the KeyboardInterrupt."
            )


def oldest() -> Feeder | None:
    """Of those that run in this process, the one that began first."""
    return next((feeder for feeder in list(_RUNNING) if feeder.alive), None)


def _stop_all() -> None:
    for feeder in list(_RUNNING):
        feeder.stop()


atexit.register(_stop_all)
