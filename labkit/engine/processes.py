"""Workers as fresh Python interpreters, for iterators that hold the lock (GIL)."""

import contextlib
import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from labkit.engine import wire
from labkit.engine.batches import Spec, aligned_copy
from labkit.engine.messages import Chunk, Ended, Lost, Message, Skipped
from labkit.engine.pickling import load_error, pickle_factory
from labkit.engine.pool import Job, Pool
from labkit.engine.ring import Layout, Ring, reserve_shared, ring_of, shared_memory
from labkit.engine.tracebacks import is_own, readable

_LAST_LINES = 30
_PROGRAM = (
    "import sys, json; a = json.loads(sys.argv[1]); sys.path[:] = a['path']; "
    "from labkit.engine.child import main; main(*a['handles'])"
)


class ProcessPool(Pool):
    """Each worker is a process of its own.

    The factory travels by cloudpickle, with arrays of 64 KB and more in one shared, copy-on-write
    memory; batches come back through a ring of shared memory per worker. Workers import neither
    TensorFlow nor the main script, unless the factory itself does.

    Raises:
        TypeError: the factory, or something that it refers to, cannot be pickled.
        OSError: this system has no Unix sockets, or too little shared memory.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if os.name != "posix":
            raise OSError("labkit: workers='process' needs Linux or macOS. Use threads here.")
        self._code, self._buffers, self._sizes = pickle_factory(job.factory)
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._workers: list[_Process] = []

    def _start(self, worker: int, life: int, begin: int) -> None:
        for before in self._workers[worker : worker + 1]:
            if not before.gone:
                self._forget(before)
            before.connection.close()
            before.end(0.0)
        # A quarter more, since a shuffling queue does not hold the same number of each worker's.
        kept = -(-5 * self.job.kept // (4 * self.n_workers))
        job = self.job
        given = (self._code, self._sizes, self.spec, worker, self.epoch, begin)
        process = _Process(worker, (*given, job.stages, job.skip), self._buffers, kept, life)
        self._workers[worker : worker + 1] = [process]
        self._selector.register(process.connection, selectors.EVENT_READ, process)
        if process.death is not None:
            self._selector.register(process.death, selectors.EVENT_READ, process)

    def _receive(self, seconds: float) -> list[Message]:
        deadline = time.monotonic() + seconds
        received: list[Message] = []
        while not received:
            left = deadline - time.monotonic()
            # All that are ready are read before any is asked again, so that none is passed over.
            for key, _ in self._selector.select(max(0.0, left)):
                process = key.data
                if process is None:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(64)
                    return received
                dead = key.fileobj == process.death
                if process.gone or (dead and process.connection.poll(0)):
                    continue  # what it said before it died comes first
                message = self._lost(process) if dead else self._read(process)
                if message is not None:
                    received.append(message)
            if left <= 0:
                break
        return received

    def _read(self, process: "_Process") -> Message | None:
        try:
            message = process.read()
        except (EOFError, OSError):
            return self._lost(process)
        if isinstance(message, Spec):
            self.spec = self.spec or message
            self._states[process.index].since = time.monotonic()
            return None
        if self.job.keeps and isinstance(message, Chunk) and message.slots:
            # What lies in the ring, and is not lent, is written over once its slots are given back.
            parts = message.arrays
            message.arrays = [p if isinstance(p, tuple) else aligned_copy(p) for p in parts]
        return message

    def _forget(self, process: "_Process") -> None:
        process.gone = True
        self._selector.unregister(process.connection)
        if process.death is not None:
            self._selector.unregister(process.death)

    def _lost(self, process: "_Process") -> Lost:
        self._forget(process)
        ending = process.ending()
        words = process.first_words()
        if words:
            return Lost(
                process.index,
                f"{ending} before it came to your iterator. If a file of yours is named like one "
                "of Python's modules (random.py), rename it.",
                f"What it wrote to stderr:\n{words}",
                life=process.life,
            )
        return Lost(
            process.index,
            f"{ending}. Its process left no traceback; look for a crash in native code, "
            "or for the system's killer of processes that use too much memory.",
            life=process.life,
        )

    def _refill(self, worker: int, slots: tuple[int, ...]) -> None:
        self._workers[worker].refill(slots)

    def _go_on(self, worker: int) -> None:
        self._workers[worker].send(wire.pack_epoch(self.epoch))

    def _room(self, worker: int) -> int:
        ring = self._workers[worker].ring
        return 1 if ring is None else ring.chunks

    def _doing(self, worker: int) -> str:
        return self._workers[worker].doing()

    def wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def _end(self, seconds: float) -> list[str]:
        for process in self._workers:
            process.connection.close()
        deadline = time.monotonic() + seconds / 2
        for process in self._workers:
            process.end(deadline)
        self._selector.close()
        self._wake.close()
        self._woken.close()
        os.close(self._buffers)
        return []


class _Process:
    """The parent's side of one worker process."""

    def __init__(
        self, index: int, orders: tuple[Any, ...], buffers: int, kept: int, life: int
    ) -> None:
        self.index, self._kept, self.life = index, kept, life
        self.ring: Ring | None = None
        self.gone = self._ended = False
        ours, theirs = socket.socketpair()
        self._memory = shared_memory(0, "")
        self._trace = shared_memory(0, "")
        self.connection = Connection(ours.detach())
        stderr = os.dup(2)
        handles = [theirs.fileno(), self._memory, self._trace, buffers, stderr]
        argument = json.dumps({"path": sys.path, "handles": handles})
        try:
            self._process = subprocess.Popen(
                # Unbuffered: what it prints appears when it is printed, and none is lost. And no
                # module from a folder that is not in this process's path.
                [sys.executable, "-u", "-P", "-c", _PROGRAM, argument],
                pass_fds=handles,
                stdin=subprocess.DEVNULL,
                # Kept until the worker has come to its own first line, which sets the real one.
                stderr=self._trace,
                # Ctrl-C in the terminal is the parent's to handle. A session would do that as well,
                # but Linux may share its cores out by session (sched_autogroup): then one worker
                # weighs as much as all threads of the step, and JPEG decoding cost 6 % more time.
                process_group=0,
                # One thread a worker: the workers are the parallelism.
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ},
            )
        except BaseException:
            self.connection.close()
            os.close(self._memory)
            os.close(self._trace)
            raise
        finally:
            theirs.close()
            os.close(stderr)
        self.death = _death_of(self._process.pid)
        self.send(pickle.dumps(orders))

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a dead worker is reported where it is read from
            self.connection.send_bytes(data)

    def read(self) -> Message | Spec | None:
        data = self.connection.recv_bytes()
        chunk = wire.unpack_chunk(data)
        if chunk is not None:
            assert self.ring is not None
            epoch, number, rows, seconds, slots, last, stages = chunk
            arrays = self.ring.read(slots, rows)
            told = seconds, epoch, slots, last, stages, number, self.life
            return Chunk(self.index, arrays, *told)
        kind, content = pickle.loads(data)
        if kind == "first":
            code, rows = content
            spec: Spec = pickle.loads(code)
            self._lay_out(spec, rows)
            return spec
        if kind == "chunk":
            arrays, seconds, epoch, stages, number = content
            told = seconds, epoch, (), True, stages, number, self.life
            return Chunk(self.index, arrays, *told)
        if kind == "ended":
            return Ended(self.index, content, self.life)
        summary, text, error, *at = content
        failed = summary, readable(text), load_error(error, summary), *at
        return (Lost if kind == "failed" else Skipped)(self.index, *failed, life=self.life)

    def _lay_out(self, spec: Spec, rows: int) -> None:
        layout = None
        if not any(component.is_text for component in spec.components):
            layout = Layout.of(spec, max(rows, 1), self._kept)
            reserve_shared(self._memory, layout.nbytes, f"worker {self.index}'s ring")
            self.ring = ring_of(self._memory, layout, spec)
        self.send(pickle.dumps(layout))

    def refill(self, slots: tuple[int, ...]) -> None:
        self.send(wire.pack_free(slots if self.ring is None else self.ring.give_back(slots)))

    def ending(self) -> str:
        """How the process ended, in words."""
        try:
            status = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its connection and went on running"
        if status < 0:
            return f"was killed by signal {-status} ({signal.Signals(-status).name})"
        return f"ended with exit status {status}"

    def first_words(self) -> str:
        """The last lines of what it wrote to stderr, if it died ahead of its own first line."""
        lines = os.pread(self._trace, 1 << 20, 0).decode(errors="replace").splitlines(True)
        return "".join(lines[-_LAST_LINES:])

    def doing(self) -> str:
        """The stack that the process shows on SIGUSR1, without labkit's own frames."""
        os.ftruncate(self._trace, 0)
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        while not os.fstat(self._trace).st_size and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.02)
        text = os.pread(self._trace, 1 << 16, 0).decode(errors="replace").lstrip("\0")
        lines = [line for line in text.splitlines(True) if not _is_own_frame(line)]
        return readable("".join(lines)) or "(it did not answer)\n"

    def end(self, deadline: float) -> None:
        """May come twice: by then its descriptors, and its number, may be another's."""
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.01, deadline - time.monotonic()))
        # What the iterator started and never ended is in its process group, and ends with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.ring = None
        os.close(self._memory)
        os.close(self._trace)
        if self.death is not None:
            os.close(self.death)


def _is_own_frame(line: str) -> bool:
    name = line.partition('File "')[2].partition('"')[0]
    return name == "<string>" or (bool(name) and is_own(name))


def _death_of(pid: int) -> int | None:
    """A descriptor that becomes readable when the process dies, where the system has those.

    The end of the connection says so later: not before the last of its own children is gone.
    """
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
