"""Workers deliver in turn, or as they come, in a pass that may go on where another run left it.

The price of turns is that the slowest worker sets the pace: the others wait for theirs.
"""

import collections
from dataclasses import dataclass
from typing import Any

from labkit.engine.batches import joined
from labkit.engine.messages import Chunk, Ended, Lost, Message, Skipped, WorkerError
from labkit.engine.order import Reservoir
from labkit.engine.pool import Pool
from labkit.engine.produce import IteratorFactory
from labkit.engine.record import Key, Mixed, Part, Record, held, stretches


@dataclass(frozen=True)
class Resumed:
    """Where a pass goes on.

    Attributes:
        epoch: its number.
        batches, samples: those that were used.
        mixed: the chunks after which no more than these samples had come out of the reservoir.
        state: what all this was read from.
    """

    epoch: int
    batches: int
    samples: int
    mixed: Mixed
    state: dict[str, Any]

    @property
    def n_workers(self) -> int:
        """How many there have to be at the least, to make again what they made."""
        return max((who + 1 for who, begin in enumerate(self.mixed.begins) if begin), default=1)

    def begin(self, factory: IteratorFactory, size: int, seed: int) -> None:
        """Tells a factory which chunks are wanted, if it can make them without the others."""
        again = set(self.again(size, seed))
        factory.resumed = stretches(self.epoch, self.mixed, again)

    def again(self, size: int, seed: int) -> dict[Key, Part]:
        """The chunks before that have to be made again; see `held`. One of them at the least, which
        tells what batches look like."""
        found = held(self.mixed, size, seed, self.epoch)
        last = next((run for run in reversed(self.mixed.runs) if run.rows), None)
        if not found and last is not None:
            found[last.chunk(last.count - 1, len(self.mixed.begins))] = Part(last.rows)
        return found


@dataclass(frozen=True)
class Order:
    """How an order is made that the feeder knows.

    Attributes:
        mixed: samples that stay behind for mixing.
        seed: of that.
        ahead: the most samples that the queue, and who takes from it, may have and not have used.
        resumed: where a pass goes on.
        in_turn: workers deliver in turn; or else as they come.
    """

    mixed: int
    seed: int
    ahead: int
    resumed: Resumed | None = None
    in_turn: bool = True

    def used(self, epoch: int) -> int:
        """Samples of a pass that were used before it went on."""
        resumed = self.resumed
        return resumed.samples if resumed is not None and resumed.epoch == epoch else 0

    def turns(self, pool: Pool, over: set[int], epoch: int) -> "Turns":
        """The workers in turn, from the beginning of a pass or from where it goes on."""
        resumed = self.resumed
        if resumed is None or resumed.epoch != epoch or not resumed.mixed.begins:
            none = Mixed.none(pool.n_workers)
            reservoir = Reservoir(self.mixed, self.seed, epoch)
            record = Record(epoch, none, self.mixed, self.ahead)
            return Turns(pool, over, reservoir, record, 0 if self.in_turn else None)
        mixed = resumed.mixed
        used = resumed.samples - max(0, mixed.rows - self.mixed)
        reservoir = Reservoir(self.mixed, self.seed, epoch, mixed.chunks, used)
        record = Record(epoch, mixed, self.mixed, self.ahead)
        before = Remade(pool, reservoir, mixed, resumed.again(self.mixed, self.seed))
        return Turns(pool, over, reservoir, record, mixed.turn if self.in_turn else None, before)


class Turns:
    """A pool's messages of one pass, in turn: a whole batch of each worker that is not over.

    Args:
        over: the workers that deliver nothing any more.
        turn: the worker who comes first. None: there are no turns, it is whoever has something,
            but a batch that comes in parts still comes as a whole.
        before: takes what was delivered before, where the pass goes on. Nothing comes until it has
            all that it waits for.

    Attributes:
        reservoir: mixes them; of size 0 where they are to stay as they come.
        record: which they were.
    """

    def __init__(
        self,
        pool: Pool,
        over: set[int],
        reservoir: Reservoir,
        record: Record,
        turn: int | None = 0,
        before: "Remade | None" = None,
    ) -> None:
        self._pool, self._over = pool, over
        self.reservoir, self.record = reservoir, record
        self._early = [collections.deque[Message]() for _ in range(pool.n_workers)]
        self._in_turn, self._before = turn is not None, before
        self._turn = turn  # None: nobody's

    def get(self, seconds: float) -> Message | None:
        """The next message in turn, or None if nothing comes within `seconds`."""
        if self._before is not None and self._before.awaits:
            self._take_in(seconds)
            return None
        while not self._over.issuperset(range(len(self._early))):
            if self._turn is None:
                self._turn = next((who for who, its in enumerate(self._early) if its), None)
            early = self._early[self._turn] if self._turn is not None else None
            if early:
                message = early.popleft()
                if not isinstance(message, Chunk) or message.last:
                    self._next()
                if isinstance(message, Lost):
                    self.reservoir.break_off()
                    self.record.break_off()
                return message
            if early is not None and self._turn in self._over:
                self._next()
                continue
            if not self._take_in(seconds):
                return None
        return None

    def _take_in(self, seconds: float) -> bool:
        came = self._pool.get(seconds)
        if came is None:
            return False
        if self._before is not None and self._before.takes(came):
            if isinstance(came, Chunk | Skipped):
                self._pool.release(came)
            return False
        self._early[came.worker].append(came)
        return True

    def mixed(self, chunk: Chunk) -> list[Any]:
        """The samples that come out as this one goes in."""
        self.record.note(chunk)
        return self.reservoir.mix(chunk.arrays, chunk.last)

    def put_back(self, message: Message) -> None:
        """Makes `message` the next one that `get` returns."""
        self._early[message.worker].appendleft(message)
        self._turn = message.worker

    def give_up(self) -> None:
        """Ahead of another pass: batches go back unseen, losses stay to be heard."""
        for early in self._early:
            for message in early:
                if isinstance(message, Chunk | Skipped):
                    self._pool.release(message)
                elif isinstance(message, Lost):
                    self._pool.put_back(message)
            early.clear()

    def _next(self) -> None:
        if self._in_turn and self._turn is not None:
            self._turn = (self._turn + 1) % len(self._early)
        else:
            self._turn = None


class Remade:
    """Puts what is made again into the reservoir, and drops what comes beside.

    A factory that cannot begin later makes all chunks again.
    """

    def __init__(
        self, pool: Pool, reservoir: Reservoir, mixed: Mixed, again: dict[Key, Part]
    ) -> None:
        self._reservoir, self._begins, self._again = reservoir, mixed.begins, again
        self._parts: dict[int, list[Any]] = {}
        self._all = len(again) if pool.factory.can_resume else sum(mixed.begins)
        self._bar: Any = None

    @property
    def awaits(self) -> bool:
        return bool(self._again)

    def takes(self, message: Message) -> bool:
        if isinstance(message, Chunk | Skipped):
            old = message.number < self._begins[message.worker]
            if old and isinstance(message, Chunk):
                self._take(message)
            return old
        number = next((number for who, number in self._again if who == message.worker), None)
        if number is not None:
            raise _gone(message, number)
        return False

    def _take(self, chunk: Chunk) -> None:
        if chunk.last:
            self._show()
        part = self._again.get((chunk.worker, chunk.number))
        if part is None:
            return
        columns = self._reservoir.columns(chunk.arrays)
        parts = self._parts.setdefault(chunk.worker, [])
        # It is written over once it is released.
        parts.append(columns if chunk.last else [column.copy() for column in columns])
        if not chunk.last:
            return
        columns = joined(self._parts.pop(chunk.worker))
        if len(columns[0]) != part.size:
            raise WorkerError(
                f"labkit: chunk {chunk.number} of worker {chunk.worker} has {len(columns[0])} "
                f"samples, expected {part.size}, as when the state was taken. Let the factory "
                "make the same chunks again: let it draw from seed, epoch and the chunk's number."
            )
        if len(part.rows):
            self._reservoir.restore(columns, part.rows, part.places)
        del self._again[chunk.worker, chunk.number]

    def _show(self) -> None:
        """A line that grows, where that takes longer than a second."""
        if self._bar is None:
            from tqdm import tqdm

            what = "labkit: chunks made again"
            self._bar = tqdm(total=self._all, desc=what, unit="", delay=1.0, leave=False)
        self._bar.update()
        if self._bar.n >= self._all:
            self._bar.close()


def _gone(message: Ended | Lost, number: int) -> WorkerError:
    if isinstance(message, Lost):
        return message.as_error()
    error = WorkerError(
        f"labkit: worker {message.worker} ended before chunk {number}, expected that as when the "
        "state was taken. Are the data the same, and what the parameter start means: how many of "
        "the first chunks to leave out, of all workers if the factory takes n_workers?"
    )
    error.worker = message.worker
    return error
