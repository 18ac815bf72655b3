"""Memory for copies: aligned, and warm where arrays are large."""

import collections
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

_LARGE = 1 << 20  # bytes from which fresh pages, zeroed one by one, cost as much as the copy
_ALIGNED = 64  # what TensorFlow takes as it lies; all else it copies


class _Warm:
    """Memory of one size that was used before; no more of it is spare than is lent.

    Without a lock, since the last reference to an array may go in the midst of a call.
    """

    def __init__(self) -> None:
        self._spare: collections.deque[np.ndarray] = collections.deque()
        self._lent: dict[int, weakref.ref[np.ndarray]] = {}

    def take(self, nbytes: int) -> np.ndarray:
        try:
            raw = self._spare.popleft()
        except IndexError:
            raw = np.empty(nbytes + _ALIGNED, np.uint8)
        start = _start(raw)
        # Over its buffer: views refer to that one, where views of an array's view refer to `raw`.
        lent = np.frombuffer(raw.data[start : start + nbytes], np.uint8)

        def take_back(_: Any) -> None:
            del self._lent[id(raw)]
            if len(self._spare) < len(self._lent):
                self._spare.append(raw)
            elif not self._lent:
                _warm.pop(nbytes, None)

        self._lent[id(raw)] = weakref.ref(lent, take_back)
        return lent


_warm: dict[int, _Warm] = {}  # by size


def _start(raw: np.ndarray) -> int:
    """Bytes to its first aligned one."""
    return -int(raw.__array_interface__["data"][0]) % _ALIGNED


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array, not filled, that TensorFlow takes as it lies. Nobody else has its memory until it
    and all views of it are gone."""
    nbytes = dtype.itemsize * math.prod(shape)
    if nbytes < _LARGE:
        raw = np.empty(nbytes + _ALIGNED, np.uint8)
        start = _start(raw)
        return raw[start : start + nbytes].view(dtype).reshape(shape)
    return _warm.setdefault(nbytes, _Warm()).take(nbytes).view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A copy that TensorFlow takes as it lies: it would copy once more what is not aligned."""
    if array.dtype.hasobject:
        return array.copy()
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def aligned_joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Some arrays as one, along their first axis, that TensorFlow takes as it lies."""
    first = pieces[0]
    if any(piece.dtype != first.dtype or piece.dtype.hasobject for piece in pieces):
        return np.concatenate(pieces)
    shape = (sum(map(len, pieces)), *first.shape[1:])
    return np.concatenate(pieces, out=aligned_empty(shape, first.dtype))


def lies_well(array: np.ndarray) -> bool:
    """Whether TensorFlow takes it as it lies, or it is small."""
    if array.nbytes < _LARGE or array.dtype.hasobject:
        return True
    return array.flags.c_contiguous and not _start(array)
