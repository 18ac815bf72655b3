"""What the workers' chunks tell of the workers, beside the samples."""

import collections
import hashlib
import sys
import types
import warnings
from collections.abc import Sequence, Set
from typing import Any

from labkit.engine.messages import Chunk
from labkit.engine.pool import Pool
from labkit.engine.record import Record
from labkit.engine.skips import Skips

_RECORDS = 8


class Heard:
    """Who delivers how much, and whether two make the same.

    Attributes:
        workers: numbers of those that have delivered.
        counts: samples of each of them in this pass.
        samples: put into the queue in this pass.
        rows: of the chunk that the spec was read from; 0 where it was given.
        sizes: of the first whole chunks, all their parts, by worker and number. Of two, the larger
            one is not the pass's last, short one.
        lacking: something of this pass was left out, or lost.
        skips: batches that were left out.
        records: of the last passes, where the feeder mixes.
    """

    def __init__(self, pool: Pool, max_skipped: int | None = None) -> None:
        self.workers: set[int] = set()
        self.counts: collections.Counter[int] = collections.Counter()
        self.samples = self.rows = 0
        self.sizes: dict[tuple[int, int], int] = {}
        self.lacking = False
        self._parts: collections.Counter[tuple[int, int, int]] = collections.Counter()
        self.skips = Skips(max_skipped)
        self.records: collections.deque[Record] = collections.deque(maxlen=_RECORDS)
        self._pool, self._epoch = pool, pool.epoch
        self._digests: dict[int, bytes] = {}  # of each worker's first chunk
        self._told = False

    def note(self, chunk: Chunk) -> None:
        """Warns once if two workers begin with the same batch, though nothing tells them apart."""
        self.skips.delivered(chunk)
        key = chunk.worker, chunk.epoch, chunk.number
        self._parts[key] += len(chunk.arrays[0])
        if chunk.last:
            rows, place = self._parts.pop(key), (chunk.worker, chunk.number)
            self.sizes |= {place: rows} if len(self.sizes) < 2 else {}
        new = chunk.worker not in self.workers
        self.workers.add(chunk.worker)
        self.counts[chunk.worker] += len(chunk.arrays[0])
        if self._pool.factory.shards or not new or self._pool.n_workers == 1:
            return
        if chunk.epoch != self._epoch:  # of another pass, it would not be a worker's first
            return
        digest = _digest(chunk.arrays)
        twin = next((worker for worker, its in self._digests.items() if its == digest), None)
        self._digests[chunk.worker] = digest
        if twin is not None and not self._told:
            self._told = True
            warnings.warn(
                f"labkit: the first batches of workers {twin} and {chunk.worker} are equal to "
                "the last bit, so the workers seem to make the same samples. Give the factory a "
                "parameter rng and draw from that, which is another one in each worker; or the "
                "parameters (worker, n_workers), and let it yield its share.",
                RuntimeWarning,
                stacklevel=1,
            )

    def warn_of_whole_passes(self, workers: Set[int]) -> None:
        """Workers that do not share, and deliver as much as each other, may all deliver it all."""
        counts = {self.counts[worker] for worker in workers}
        if len(workers) < 2 or len(counts) > 1:
            return  # those that take turns at one iterator have unequal parts of it
        times = f"came {len(workers)} times"
        if self._digests.keys() >= workers and len(set(self._digests.values())) == 1:
            known, otherwise = f" and began with the same batch, so every sample {times}", ""
        else:
            known = f". If each of them read the whole data set, it {times}"
            otherwise = " If they take turns at one iterator, tell its size, samples=."
        warnings.warn(
            f"labkit: {len(workers)} workers delivered {counts.pop()} samples each{known}. "
            "Give the factory the parameters (worker, n_workers) and let it yield its share."
            f"{otherwise}",
            RuntimeWarning,
            stacklevel=1,
        )


def steps_asked_for() -> tuple[int, int] | None:
    """Of the `fit` that calls this: `steps_per_epoch` and epochs; None without one.

    Keras does not tell its data for whom they are, so the caller's own stack is looked at.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name in ("fit", "evaluate", "predict") and file.endswith("trainer.py"):
            given = frame.f_locals
            steps = given.get("steps_per_epoch")
            return (steps, given["epochs"] - given["initial_epoch"]) if steps else None
        frame = frame.f_back
    return None


def warn_of_left(left: list[str]) -> None:
    """Of the threads that a stop, which calls this, could not end."""
    if left:
        warnings.warn(
            f"QueueRunner.stop: {len(left)} thread(s) did not end within 2 s. A thread cannot "
            "be stopped from outside: let the iterator return, or use workers='process'.\n"
            + "\n".join(left),
            RuntimeWarning,
            stacklevel=3,
        )


def warned_of_too_few(batches: int, steps: int, epochs: int) -> bool:
    """Whether a pass of so many batches is too short for what `fit` was asked for; warns if so."""
    if steps * epochs <= batches:
        return False
    warnings.warn(
        f"QueueRunner: the data have {batches} batches, which fit(steps_per_epoch={steps}, "
        f"epochs={epochs}) uses up, so that an epoch is cut short or empty. Leave steps_per_epoch "
        "away: an epoch is then one pass over the data. Or tell their number: "
        "QueueRunner(samples=...).",
        RuntimeWarning,
        stacklevel=1,
    )
    return True


def _digest(arrays: Sequence[Any]) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    for component in arrays:
        for array in component if isinstance(component, tuple) else (component,):
            text = array.dtype.hasobject
            hashed.update(repr(array.tolist()).encode() if text else array.tobytes())
    return hashed.digest()
