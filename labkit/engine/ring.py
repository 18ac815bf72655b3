"""How batches cross from a worker process: slots of shared memory, written there and read here.

    worker:  take free slots ─► write rows into them ─► say which
    parent:  read(slots, rows) ─► arrays in place ─► give_back(slots) ─► slots to fill again

A `Ring` has a few slots of a chunk each, used again once the chunk is in the queue. Where samples
are so large that copying them is what costs, a `LendingRing` has a slot a sample, which the queue
may keep as it lies; the worker gets other slots back for those.
"""

import collections
import errno
import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.engine.batches import Arrays, Spec, aligned_copy

MOST_CHUNKS = 16  # in a ring
_RING_BYTES = 8 << 20
_LENT_BYTES = 1 << 29
_MOST_SLOTS = 1 << 16  # a slot's number goes over the wire as two bytes


@dataclass(frozen=True)
class Layout:
    """Where each component of a chunk lies in a slot.

    Attributes:
        rows: samples in a slot.
        slots: of the whole ring.
        granted: slots that the worker has at the start; it gets as many back as it fills.
        lent: slots that the queue may keep at a time.
        slot_bytes: of one slot.
        offsets: of each component in a slot, in bytes.
    """

    rows: int
    slots: int
    granted: int
    lent: int
    slot_bytes: int
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, spec: Spec, rows: int, kept: int) -> "Layout":
        """For chunks of `rows` samples, of which the queue holds `kept` at a time."""
        end, offsets = 0, []
        for component in spec.components:
            offsets.append(end)
            size = component.nbytes * (1 if spec.large else rows)
            end += -(-size // 64) * 64  # TensorFlow takes 64-byte-aligned arrays without a copy
        if spec.large:
            granted = 2 * rows
            lent = max(0, min(kept, _LENT_BYTES // end, _MOST_SLOTS - 2 * granted))
            return cls(1, lent + 2 * granted, granted, lent, end, tuple(offsets))
        slots = int(np.clip(_RING_BYTES // max(end, 1), 3, MOST_CHUNKS))
        return cls(rows, slots, slots, 0, end, tuple(offsets))

    @property
    def lends(self) -> bool:
        return self.slots > self.granted

    @property
    def nbytes(self) -> int:
        return max(self.slots * self.slot_bytes, 1)

    def views(self, memory: mmap.mmap, spec: Spec, slot: int) -> Arrays:
        """The arrays of one slot, `rows` long, as views of the ring; all have one base."""
        block = np.ndarray((self.slot_bytes,), np.uint8, memory, slot * self.slot_bytes)
        return [
            np.ndarray((self.rows, *component.shape), component.dtype, block, offset)
            for component, offset in zip(spec.components, self.offsets, strict=True)
        ]


class Writer:
    """The worker's end."""

    def __init__(self, memory: int, layout: Layout, spec: Spec) -> None:
        self.layout = layout
        self.free = list(range(layout.granted))
        ring = mmap.mmap(memory, layout.nbytes)
        self._views = [layout.views(ring, spec, slot) for slot in range(layout.slots)]

    def write(self, arrays: Arrays, start: int) -> tuple[list[int], int]:
        """Writes samples from `start` on into free slots: one, or of a lending ring all it can.

        Returns the slots, and the number of the sample that follows.
        """
        wanted = len(arrays[0]) - start if self.layout.lends else 1
        slots, self.free = self.free[:wanted], self.free[wanted:]
        for slot in slots:
            end = min(start + self.layout.rows, len(arrays[0]))
            for view, array in zip(self._views[slot], arrays, strict=True):
                view[: end - start] = array[start:end]
            start = end
        return slots, start


class Ring:
    """The parent's end: a slot is free again when its chunk is given back."""

    def __init__(self, memory: int, layout: Layout, spec: Spec) -> None:
        self.layout, self._spec = layout, spec
        self._memory = mmap.mmap(memory, layout.nbytes)
        self._views: list[Arrays] = []
        if not layout.lends:
            every = range(layout.slots)
            self._views = [layout.views(self._memory, spec, slot) for slot in every]

    @property
    def chunks(self) -> int:
        """That the worker can have under way."""
        return self.layout.slots

    def read(self, slots: tuple[int, ...], rows: int) -> list[Any]:
        """One array per component, `[rows, ...]`, in place."""
        views = self._views[slots[0]]
        return views if rows == self.layout.rows else [view[:rows] for view in views]

    def give_back(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        """The slots that the worker may fill for these."""
        return slots


class LendingRing(Ring):
    """Large samples are lent: a slot is free again once the last array that lies in it is gone.

    Of more than `layout.lent` at a time, copies are made, so that a worker never waits for a slot
    that only its own further work would free.
    """

    def __init__(self, memory: int, layout: Layout, spec: Spec) -> None:
        super().__init__(memory, layout, spec)
        parts = zip(spec.components, layout.offsets, strict=True)
        self._parts = [(part.shape, part.dtype, offset) for part, offset in parts]
        self._lent: dict[int, tuple[weakref.ref[np.ndarray], int]] = {}
        self._spare = collections.deque(range(layout.granted, layout.slots))

    @property
    def chunks(self) -> int:
        return 2

    def read(self, slots: tuple[int, ...], rows: int) -> list[Any]:
        """One tuple per component, of `rows` arrays that may be kept."""
        return list(zip(*(self._sample(slot) for slot in slots), strict=True))

    def give_back(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self._spare.pop() for _ in slots)

    def _sample(self, slot: int) -> Arrays:
        size = self.layout.slot_bytes
        block = np.ndarray((size,), np.uint8, self._memory, slot * size)
        arrays = [np.ndarray(shape, dtype, block, start) for shape, dtype, start in self._parts]
        if len(self._lent) < self.layout.lent:
            # All arrays have the block as their base, and nobody else has it.
            alive = weakref.ref(block, self._take_back)
            self._lent[id(alive)] = alive, slot
            return arrays
        self._spare.append(slot)
        return [aligned_copy(array) for array in arrays]

    def _take_back(self, gone: "weakref.ref[np.ndarray]") -> None:
        _, slot = self._lent.pop(id(gone))
        self._spare.append(slot)


def ring_of(memory: int, layout: Layout, spec: Spec) -> Ring:
    return (LendingRing if layout.lends else Ring)(memory, layout, spec)


def shared_memory(nbytes: int, purpose: str) -> int:
    """A file descriptor of `nbytes` of nameless shared memory: gone when its last user is.

    Raises MemoryError, with the numbers, if the system has too little.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("labkit")
    else:
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        descriptor, path = tempfile.mkstemp(prefix="labkit", dir=folder)
        os.unlink(path)
    try:
        if nbytes:
            reserve_shared(descriptor, nbytes, purpose)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def reserve_shared(descriptor: int, nbytes: int, purpose: str) -> None:
    """Reserves the bytes now, because a page missing later would kill the process by SIGBUS."""
    import psutil

    room = os.fstatvfs(descriptor)
    # A memfd's file system has no size of its own; past the machine's memory, the system would
    # not refuse but kill.
    free = room.f_bavail * room.f_frsize if room.f_blocks else psutil.virtual_memory().available
    try:
        if nbytes > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            os.ftruncate(descriptor, nbytes)
    except OSError as error:
        raise MemoryError(
            f"labkit: expected {nbytes / 1e6:.1f} MB of shared memory for {purpose}, "
            f"{free / 1e6:.1f} MB are free ({error.strerror}). Enlarge it (docker run "
            "--shm-size), lower capacity, deliver smaller chunks, use fewer workers, or use "
            "workers='thread'."
        ) from error
