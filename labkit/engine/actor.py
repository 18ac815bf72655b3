"""The actor's side of workers="ray": the loop of produce.py, a call at a time. No TensorFlow."""

import pickle
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from labkit.engine.pickling import dump_error, dump_spec
from labkit.engine.produce import IteratorFactory, LeftOut, Made, produce
from labkit.engine.stage import listen
from labkit.engine.tracebacks import describe, own_frames_left_out

# A call has its price: it brings chunks until they are so many, of such a size, or took this long.
_TOGETHER, _BYTES, _SECONDS = 16, 2 << 20, 0.005


class Producer:
    """Makes the next chunks when it is asked to."""

    def __init__(self, packed: tuple[bytes, list[Any]], orders: tuple[Any, ...]) -> None:
        self._packed, self._orders = packed, orders
        self._factory: IteratorFactory | None = None
        self._batches: Iterator[Made | LeftOut] | None = None
        self._epoch, self._wanted = -1, 0
        self._thread = self._most = 0
        self._quick = False  # the last call made all of its chunks at once

    def next(self, epoch: int) -> list[tuple[Any, ...]]:
        """Chunks, or what happened in place of one; none if there is nothing more of the pass."""
        self._thread = threading.get_ident()
        told: list[tuple[Any, ...]] = []
        try:
            self._wanted = max(epoch, self._wanted)
            until, nbytes = time.monotonic() + _SECONDS, 0
            while epoch == self._wanted and (made := _made(self, epoch)):
                told.append(made)
                if made[0] != "chunk":
                    break
                nbytes += sum(array.nbytes for array in made[1])
                self._most = max(self._most, nbytes)
                quick, self._quick = self._quick, time.monotonic() < until
                if not (quick and self._quick) or len(told) == _TOGETHER or nbytes > _BYTES:
                    break
                # Those of the last chunk leave before the iterator can write into them again.
                told[-1] = made[0], [np.array(array) for array in made[1]], *made[2:]
        except BaseException as error:
            self._batches = None
            summary, text = describe(error)
            told.append(("failed", summary, text, dump_error(error)))
        return told

    def leave(self) -> None:
        """Ends the iterator, whose own clean-up runs."""
        close = getattr(self._batches, "close", None)
        self._batches = None
        if close is not None:
            close()

    # Aside of the calls above.

    def begin(self, epoch: int) -> None:
        self._wanted = epoch

    def nbytes(self) -> int:
        """The most that a call has brought."""
        return self._most

    def where(self) -> str:
        import ray

        context = ray.get_runtime_context()
        return f"{ray.util.get_node_ip_address()} (node {context.get_node_id()[:8]})"

    def doing(self) -> str:
        frame = sys._current_frames().get(self._thread)
        if frame is None:
            return "it has not begun\n"
        import ray

        rays = str(Path(ray.__file__).parent)
        stack = [f for f in traceback.extract_stack(frame) if not f.filename.startswith(rays)]
        lines = own_frames_left_out(traceback.StackSummary.from_list(stack)).format()
        return "".join(lines) or "it waits\n"


# No method: Ray puts a frame of its own around each of those.
def _made(producer: Producer, epoch: int) -> tuple[Any, ...] | None:
    its = producer
    worker, spec, stages, skip, first = its._orders
    if epoch != its._epoch:
        if its._factory is None:
            code, buffers = its._packed
            its._factory = pickle.loads(code, buffers=buffers)
            if stages:
                listen()
        first = first if its._epoch < 0 else 0
        its._batches = produce(its._factory, worker, epoch, spec, False, skip, first)
        its._epoch = epoch
    if its._batches is None:
        return None
    made = next(its._batches, None)
    if made is None:
        its._batches = None
        return ("ended",)
    if isinstance(made, LeftOut):
        summary, text = describe(made.error)
        return "skipped", summary, text, dump_error(made.error), made.number
    new = dump_spec(made.spec) if spec is None else None
    if spec is None:
        its._orders = worker, made.spec, stages, skip, first
    return "chunk", made.arrays, made.seconds, made.stages, made.number, new
