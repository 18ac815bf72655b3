"""What goes over the socket between a worker process and the parent.

worker ─► parent    ("first", (spec, rows))     its first batch, before the memory is laid out
                    C epoch number rows seconds last slots  a chunk that lies in these slots of the
                                                ring; then what its stages took, if wanted
                    ("chunk", (arrays, ...))    a chunk of text, which no ring can hold
                    ("skipped", (...))          a batch that is left out
                    ("ended", epoch)            its pass is over
                    ("failed", (...))           its iterator raised
parent ─► worker    (code, sizes, spec, ...)    what to run
                    layout | None               the ring, in answer to "first"
                    F slots                     to be filled again; none: "chunk" or "skipped" is
                                                released, and another one may come
                    E epoch                     begin this pass
hang-up             the parent is gone: the worker ends; the worker is gone: it died
"""

import pickle
import struct

import numpy as np

from labkit.engine.stage import Times

_CHUNK = struct.Struct("<cqqQd?I")
_EPOCH = struct.Struct("<cq")
_SLOT = np.dtype("<u2")


def pack_chunk(
    epoch: int,
    number: int,
    rows: int,
    seconds: float,
    last: bool,
    slots: list[int],
    stages: Times | None,
) -> bytes:
    head = _CHUNK.pack(b"C", epoch, number, rows, seconds, last, len(slots))
    head += np.array(slots, _SLOT).tobytes()
    return head if stages is None else head + pickle.dumps(stages, protocol=5)


def unpack_chunk(
    data: bytes,
) -> tuple[int, int, int, float, tuple[int, ...], bool, Times | None] | None:
    """Epoch, number, rows, seconds, slots, last and stages; None if it is no chunk in a ring."""
    if data[:1] != b"C":
        return None
    _, epoch, number, rows, seconds, last, count = _CHUNK.unpack_from(data)
    slots = np.frombuffer(data, _SLOT, count, _CHUNK.size)
    rest = data[_CHUNK.size + slots.nbytes :]
    stages = pickle.loads(rest) if rest else None
    return epoch, number, rows, seconds, tuple(slots.tolist()), last, stages


def pack_free(slots: tuple[int, ...]) -> bytes:
    return b"F" + np.array(slots, _SLOT).tobytes()


def pack_epoch(epoch: int) -> bytes:
    return _EPOCH.pack(b"E", epoch)


def unpack_order(data: bytes) -> tuple[int | None, list[int]]:
    """The pass to begin, or the slots that are free again."""
    if data[:1] == b"E":
        return _EPOCH.unpack(data)[1], []
    return None, np.frombuffer(data, _SLOT, offset=1).tolist()
