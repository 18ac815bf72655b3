"""What a worker process runs: the iterator, and nothing that decides. No TensorFlow."""

import contextlib
import faulthandler
import os
import pickle
import select
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from labkit.engine import wire
from labkit.engine.batches import Spec
from labkit.engine.pickling import dump_error, dump_spec, unpickle_factory
from labkit.engine.produce import LeftOut, Made, produce
from labkit.engine.ring import Layout, Writer
from labkit.engine.stage import listen
from labkit.engine.tracebacks import describe


class _ParentGone(BaseException):
    """The parent hung up: the worker's only reason to end without a word."""


def main(connection: int, ring: int, trace: int, buffers: int, stderr: int) -> None:
    """Runs one worker until the parent hangs up; the arguments are file descriptors."""
    for terminal in (signal.SIGTTIN, signal.SIGTTOU):  # would stop it for ever, without a word
        signal.signal(terminal, signal.SIG_IGN)
    _set_stderr(stderr, trace)
    faulthandler.register(signal.SIGUSR1, trace, all_threads=False)
    threading.Thread(target=_leave_with_parent, args=(connection,), daemon=True).start()
    worker = _Child(Connection(connection), ring)
    try:
        try:
            worker.run(buffers)
        except _ParentGone:
            raise
        except BaseException as error:
            worker.tell("failed", (*describe(error), dump_error(error)))
            while True:
                worker.hear()
    except _ParentGone:
        pass


def _set_stderr(stderr: int, kept: int) -> None:
    """From now on the real one, which also gets what was kept so far."""
    text = os.pread(kept, 1 << 20, 0)
    os.dup2(stderr, 2)
    os.close(stderr)
    os.ftruncate(kept, 0)
    os.lseek(kept, 0, os.SEEK_SET)
    with contextlib.suppress(OSError):
        os.write(2, text)


def _leave_with_parent(descriptor: int) -> None:
    hung_up = select.poll()
    hung_up.register(descriptor, 0)
    hung_up.poll()
    time.sleep(0.5)  # for the iterator's own clean-up
    os._exit(0)


class _Child:
    """The worker's side: fills slots of the ring and says so."""

    def __init__(self, connection: Connection, memory: int) -> None:
        self._connection, self._memory = connection, memory
        self._orders = select.poll()  # ten times as fast as asking the connection
        self._orders.register(connection.fileno(), select.POLLIN)
        self._writer: Writer | None = None
        self._laid_out = False
        self._may_send = 1  # of what has no slots: chunks of text, and batches left out
        self._epoch = 0

    def tell(self, kind: str, content: Any) -> None:
        self._say(pickle.dumps((kind, content), protocol=5))

    def hear(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            raise _ParentGone from None

    def run(self, buffers: int) -> None:
        code, sizes, spec, index, self._epoch, first, stages, skip = pickle.loads(self.hear())
        factory = unpickle_factory(code, buffers, sizes)
        if stages:
            listen()
        while True:
            epoch = self._epoch
            for made in produce(factory, index, epoch, spec, False, skip, first):
                if isinstance(made, LeftOut):
                    failed = (*describe(made.error), dump_error(made.error), epoch, made.number)
                    wanted = self._tell_in_time("skipped", failed, epoch)
                else:
                    spec = made.spec
                    wanted = self._deliver(made, epoch)
                if not wanted:
                    break
            else:
                self.tell("ended", epoch)
                while self._epoch == epoch:
                    self._listen()
            first = 0

    def _deliver(self, made: Made, epoch: int) -> bool:
        """False if the pass is not wanted any more."""
        if not self._laid_out:
            self._lay_out(made.spec, len(made.arrays[0]))
        while self._orders.poll(0):
            self._listen()
        if self._writer is None:
            chunk = (made.arrays, made.seconds, epoch, made.stages, made.number)
            return self._tell_in_time("chunk", chunk, epoch)
        start, rows, stages = 0, len(made.arrays[0]), made.stages
        while start < rows and self._epoch == epoch:
            if not self._writer.free:
                self._listen()
                continue
            begin = start
            slots, start = self._writer.write(made.arrays, start)
            share = made.seconds * (start - begin) / rows
            last = start == rows
            done = start - begin
            self._say(wire.pack_chunk(epoch, made.number, done, share, last, slots, stages))
            stages = None
        return self._epoch == epoch

    def _tell_in_time(self, kind: str, content: Any, epoch: int) -> bool:
        """Tells it once the last that has no slots is released; False if the pass is given up."""
        while not self._may_send and self._epoch == epoch:
            self._listen()
        if self._epoch == epoch:
            self.tell(kind, content)
            self._may_send -= 1
        return self._epoch == epoch

    def _lay_out(self, spec: Spec, rows: int) -> None:
        self.tell("first", (dump_spec(spec), rows))
        while not self._laid_out:
            answer = self.hear()
            if answer[:1] in (b"E", b"F"):
                self._heed(answer)
                continue
            layout: Layout | None = pickle.loads(answer)
            self._writer = None if layout is None else Writer(self._memory, layout, spec)
            self._laid_out = True

    def _listen(self) -> None:
        self._heed(self.hear())

    def _heed(self, order: bytes) -> None:
        epoch, slots = wire.unpack_order(order)
        if epoch is not None:
            self._epoch = epoch
        elif self._writer is None or not slots:
            self._may_send += 1
        else:
            self._writer.free += slots

    def _say(self, data: bytes) -> None:
        try:
            self._connection.send_bytes(data)
        except OSError:
            raise _ParentGone from None
