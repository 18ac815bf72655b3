"""Runs iterators in threads or processes, hands their batches on, and carries errors back.

A pool has one interface, whatever its workers are: `set_active(k)` starts them, `get(timeout)`
returns the next message, `release(chunk)` gives a chunk's place back, `stop()` ends them all.
A worker has two or more places for chunks; with all of them taken, it waits. No TensorFlow here.
"""

import collections
import contextlib
import errno
import inspect
import io
import json
import linecache
import mmap
import os
import pickle
import queue
import re
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
_THREAD_PLACES = 2
_RING_BYTES = 8 << 20
_LARGE_SAMPLE, _LENT_BYTES = 1 << 18, 1 << 29
_PLACE, _NEXT_EPOCH = np.dtype("<u2"), (1 << 16) - 1
_CHUNK = struct.Struct("<cQd")  # b"C", rows, seconds; the places follow
_OUT_OF_BAND = 1 << 16


class WorkerError(RuntimeError):
    """What went wrong in a worker; `worker` is its number. The cause, if any, is `__cause__`."""

    worker: int | None = None


class BatchError(ValueError):
    """A batch that does not fit the spec; the message names what came and what was expected."""


@dataclass(frozen=True)
class Component:
    """One array of a batch, without its batch axis: name, shape per sample, dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @property
    def is_text(self) -> bool:
        return self.dtype.kind in "SUO"


@dataclass(frozen=True)
class Spec:
    """The structure of a batch (nested tuples and dicts) with a `Component` at each leaf."""

    structure: Any

    @classmethod
    def of(cls, batch: Any) -> "Spec":
        """Reads the spec off a batch. Raises BatchError if it is no batch at all."""

        def describe(name: str, leaf: Any) -> Component:
            array = np.asarray(leaf)
            if array.ndim == 0:
                raise BatchError(
                    f"delivered {name} = {_short(leaf)}, expected an array whose first axis is the "
                    "batch. Yield tuples or dicts of arrays, such as (images, labels)."
                )
            return Component(name, array.shape[1:], np.dtype(array.dtype))

        return cls(_walk(batch, describe))

    @property
    def components(self) -> list[Component]:
        found: list[Component] = []
        _walk(self.structure, lambda _, leaf: found.append(leaf))
        return found

    @property
    def bytes_per_sample(self) -> int:
        return sum(c.dtype.itemsize * int(np.prod(c.shape)) for c in self.components)

    @property
    def large(self) -> bool:
        """Whether samples are so large that copying them is what costs."""
        return self.bytes_per_sample >= _LARGE_SAMPLE

    def flatten(self, batch: Any) -> Arrays:
        """The batch's arrays in order. Raises BatchError where they do not fit this spec."""
        arrays: Arrays = []

        def take(want: Any, got: Any, name: str) -> None:
            if isinstance(want, dict):
                if not isinstance(got, dict) or set(got) != set(want):
                    shown = (
                        f"the keys {sorted(map(str, got))}"
                        if isinstance(got, dict)
                        else _short(got)
                    )
                    raise BatchError(
                        f"delivered {shown}, expected a dict with the keys "
                        f"{sorted(map(str, want))} as in the first batch. "
                        "Yield the same keys every time."
                    )
                for key, part in want.items():
                    take(part, got[key], _join(name, key))
            elif isinstance(want, tuple):
                if not isinstance(got, tuple) or len(got) != len(want):
                    shown = f"a tuple of {len(got)}" if isinstance(got, tuple) else _short(got)
                    raise BatchError(
                        f"delivered {shown}, expected a tuple of {len(want)} as in the first "
                        "batch. Yield the same structure every time."
                    )
                for index, part in enumerate(want):
                    take(part, got[index], _join(name, index))
            else:
                arrays.append(_check(want, got))

        take(self.structure, batch, "")
        sizes = {c.name: len(a) for c, a in zip(self.components, arrays, strict=True)}
        if len(set(sizes.values())) > 1:
            raise BatchError(
                f"delivered arrays of different length, {sizes}, expected one length for all. "
                "The first axis counts the samples of the batch."
            )
        return arrays

    def pack(self, parts: Iterable[Any]) -> Any:
        """Puts one thing per component back into the batch's structure."""
        rest = iter(parts)
        return _walk(self.structure, lambda _, __: next(rest))


def _walk(node: Any, visit: Callable[[str, Any], Any], name: str = "") -> Any:
    if isinstance(node, dict):
        return {key: _walk(part, visit, _join(name, key)) for key, part in node.items()}
    if isinstance(node, tuple):
        return tuple(_walk(part, visit, _join(name, i)) for i, part in enumerate(node))
    return visit(name or "0", node)


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def _check(want: Component, got: Any) -> np.ndarray:
    array = np.asarray(got)
    same_type = array.dtype == want.dtype or (want.is_text and array.dtype.kind in "SUO")
    if array.shape[1:] == want.shape and array.ndim > 0 and same_type:
        return array
    shape = "(" + ", ".join(["n", *map(str, want.shape)]) + ("," if not want.shape else "") + ")"
    if not same_type:
        raise BatchError(
            f"delivered component '{want.name}' with dtype {array.dtype}, expected {want.dtype} as "
            f"in the first batch or the given spec. Convert it with .astype('{want.dtype}')."
        )
    if array.ndim == len(want.shape) and want.shape[-1:] == (1,):
        cure = "Add the channel axis in your generator."
    else:
        cure = "Yield the same shape per sample every time, or pad to it."
    raise BatchError(
        f"delivered component '{want.name}' with shape {array.shape}, expected {shape} as in the "
        f"first batch or the given spec. {cure}"
    )


@dataclass
class Chunk:
    """Arrays that a worker delivered; give the place back with `pool.release(chunk)`.

    `arrays` has one array per component, `[rows, ...]`; or, of large samples from a process, one
    list of arrays, a sample each, which may be kept. `seconds` is the time that the iterator took.
    """

    worker: int
    arrays: list[Any]
    seconds: float
    place: int = 0


@dataclass
class Failed:
    """A worker's iterator raised; `text` is its traceback, `error` the exception if at hand."""

    worker: int
    summary: str
    text: str
    error: BaseException | None = None


@dataclass
class Died:
    """A worker process ended without a word; `how` names the signal or the exit status."""

    worker: int
    how: str


@dataclass
class Ended:
    """A worker's iterator is exhausted; it waits for the next epoch or for the stop."""

    worker: int


Message = Chunk | Failed | Died | Ended


class IteratorFactory:
    """The user's factory, called with those of worker, n_workers and epoch that it names."""

    def __init__(self, factory: Callable[..., Iterable[Any]], n_workers: int) -> None:
        if not callable(factory):
            raise TypeError(
                f"QueueRunner: iterator must be a function that returns a new iterator, "
                f"got {_short(factory)}. Pass the function itself, without calling it: "
                "QueueRunner(data.train_iterator), or lambda: iter(your_object)."
            )
        self.factory, self.n_workers = factory, n_workers
        try:
            names = set(inspect.signature(factory).parameters)
        except (TypeError, ValueError):
            names = set()
        self.names = names & {"worker", "n_workers", "epoch"}

    @property
    def shards(self) -> bool:
        return "n_workers" in self.names

    def __call__(self, worker: int, epoch: int) -> Iterator[Any]:
        known = {"worker": worker, "n_workers": self.n_workers, "epoch": epoch}
        made = self.factory(**{name: known[name] for name in self.names})
        try:
            return iter(made)
        except TypeError:
            raise TypeError(
                f"the iterator factory returned {_short(made)}, expected an iterator of batches."
            ) from None


@dataclass
class _Place:
    taken: int = 0
    since: float = field(default_factory=time.monotonic)
    held: list[int] = field(default_factory=list)
    ended: bool = False
    lost: bool = False


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until the block is done: a half-started process could not be ended."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda *call: held.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[-1])


class Pool:
    """What thread and process workers share: who is active, who is waiting, who is late."""

    def __init__(self, factory: IteratorFactory, spec: Spec | None = None) -> None:
        self.factory, self.spec = factory, spec
        self.n_workers = factory.n_workers
        self.kept = 0  # samples that whoever takes the chunks will hold at a time
        self.active = 0
        self._states: list[_Place] = []
        self._woken_up = False

    def set_active(self, count: int) -> None:
        """Lets workers 0 to count - 1 produce, starting those not yet started; others pause."""
        self.active = count
        while len(self._states) < count and not self._woken_up:
            with interrupts_held_back():
                self._start(len(self._states))
                self._states.append(_Place())
        for worker, state in enumerate(self._states[:count]):
            while state.held:
                self._free(worker, state.held.pop())

    def get(self, timeout: float) -> Message | None:
        """The next message of any worker, or None after `timeout` seconds."""
        message = self._receive(timeout)
        if message is not None:
            state = self._states[message.worker]
            state.since = time.monotonic()
            state.taken += isinstance(message, Chunk)
            state.ended = not isinstance(message, Chunk)
            state.lost |= isinstance(message, Failed | Died)
        return message

    def release(self, chunk: Chunk) -> None:
        state = self._states[chunk.worker]
        state.taken -= 1
        state.since = time.monotonic()
        if chunk.worker < self.active:
            self._free(chunk.worker, chunk.place)
        else:
            state.held.append(chunk.place)

    def late(self, timeout: float) -> int | None:
        """A worker that has been inside its iterator for more than `timeout` seconds, if any.

        It counts as lost from then on, so that it is named once.
        """
        for worker, state in enumerate(self._states[: self.active]):
            idle = state.ended or state.lost or state.taken >= self._places(worker)
            if not idle and time.monotonic() - state.since > timeout:
                state.lost = True
                return worker
        return None

    def next_epoch(self) -> None:
        for worker, state in enumerate(self._states):
            state.ended, state.since = state.lost, time.monotonic()
            self._go(worker)

    def where(self, worker: int) -> str:
        """The lines of the user's code that a worker is in now."""
        raise NotImplementedError

    def wake(self) -> None:
        """Lets `set_active` and `get` of another thread return at once, ahead of `stop`."""
        self._woken_up = True

    def stop(self, timeout: float = 2.0) -> list[str]:
        """Ends every worker; returns a line for each that is still running after `timeout` s."""
        raise NotImplementedError

    def _start(self, worker: int) -> None:
        raise NotImplementedError

    def _receive(self, timeout: float) -> Message | None:
        raise NotImplementedError

    def _free(self, worker: int, place: int) -> None:
        raise NotImplementedError

    def _go(self, worker: int) -> None:
        raise NotImplementedError

    def _places(self, worker: int) -> int:
        raise NotImplementedError


class ThreadPool(Pool):
    """Workers as threads of this process: cheap, and enough for iterators that wait."""

    def __init__(self, factory: IteratorFactory, spec: Spec | None = None) -> None:
        super().__init__(factory, spec)
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._free_places: list[threading.Semaphore] = []
        self._epochs: list[threading.Semaphore] = []
        self._threads: list[threading.Thread] = []
        self._stopping = False

    def _start(self, worker: int) -> None:
        self._free_places.append(threading.Semaphore(_THREAD_PLACES))
        self._epochs.append(threading.Semaphore(0))
        thread = threading.Thread(
            target=self._work, args=(worker,), name=f"labkit worker {worker}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _work(self, worker: int) -> None:
        epoch = 0
        try:
            while not self._stopping:
                iterator = self.factory(worker, epoch)
                began = time.perf_counter()
                for batch in iterator:
                    if self.spec is None:
                        self.spec = Spec.of(batch)
                    arrays = _fitted(self.spec, batch, iterator)
                    took = time.perf_counter() - began
                    self._free_places[worker].acquire()
                    if self._stopping:
                        return
                    self._messages.put(Chunk(worker, arrays, took))
                    began = time.perf_counter()
                self._messages.put(Ended(worker))
                self._epochs[worker].acquire()
                epoch += 1
        except BaseException as error:
            if not self._stopping:
                summary, text = _describe(error)
                self._messages.put(Failed(worker, summary, _readable(text), error))

    def _receive(self, timeout: float) -> Message | None:
        try:
            return self._messages.get(timeout=timeout)
        except queue.Empty:
            return None

    def _free(self, worker: int, place: int) -> None:
        self._free_places[worker].release()

    def _go(self, worker: int) -> None:
        self._epochs[worker].release()

    def _places(self, worker: int) -> int:
        return _THREAD_PLACES

    def where(self, worker: int) -> str:
        frame = sys._current_frames().get(self._threads[worker].ident or 0)
        if frame is None:
            return "it has ended\n"
        return _readable("".join(_own_frames_left_out(traceback.extract_stack(frame)).format()))

    def wake(self) -> None:
        super().wake()
        self._messages.put(None)

    def stop(self, timeout: float = 2.0) -> list[str]:
        self._stopping = True
        for semaphore in self._free_places + self._epochs:
            semaphore.release()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = [i for i, thread in enumerate(self._threads) if thread.is_alive()]
        return [f"worker {i} is still in your iterator:\n{self.where(i)}" for i in left]


def _describe(error: BaseException) -> tuple[str, str]:
    """One line that names the error, and its traceback without labkit's own frames."""
    if isinstance(error, BatchError):
        return str(error), "".join(getattr(error, "__notes__", ()))
    summary = f"raised {type(error).__name__}: {error}"
    stack = traceback.TracebackException.from_exception(error)
    stack.stack = _own_frames_left_out(stack.stack)
    return summary, "".join(stack.format())


def _readable(text: str) -> str:
    """Adds the source lines of notebook cells, which worker processes lack, and names the cells."""

    def complete(found: re.Match[str]) -> str:
        line = linecache.getline(found[1], int(found[2])).strip()
        return f"{found[0]}    {line}\n" if line else found[0]

    text = re.sub(r'  File "(.+)", line (\d+).*\n(?!    )', complete, text)
    return re.sub(r'File ".*ipykernel_\d+/\d+\.py"', 'File "<notebook cell>"', text)


def _fitted(spec: Spec, batch: Any, iterator: Iterator[Any]) -> Arrays:
    """The batch's arrays; a misfit names the line of the generator that yielded it."""
    try:
        return spec.flatten(batch)
    except BatchError as error:
        frame = getattr(iterator, "gi_frame", None)
        if frame is not None:
            where = traceback.format_list(traceback.extract_stack(frame, limit=1))
            error.add_note("It was yielded here:\n" + "".join(where))
        raise


def _own_frames_left_out(stack: traceback.StackSummary) -> traceback.StackSummary:
    own = {__file__, threading.__file__}
    kept = [frame for frame in stack if frame.filename not in own]
    return traceback.StackSummary.from_list(kept or list(stack))


class ProcessPool(Pool):
    """Workers as fresh Python interpreters, for iterators that hold the lock (GIL).

    The factory travels by cloudpickle, with arrays of 64 KB and more in one shared, copy-on-write
    memory; batches come back through a ring of shared memory per worker. Workers import neither
    TensorFlow nor the main script, unless the factory itself does.

    Raises:
        TypeError: the factory, or something that it refers to, cannot be pickled.
        OSError: this system has no Unix sockets, or too little shared memory.
    """

    def __init__(self, factory: IteratorFactory, spec: Spec | None = None) -> None:
        super().__init__(factory, spec)
        if os.name != "posix":
            raise OSError("QueueRunner: workers='process' needs Linux or macOS. Use threads here.")
        self._code, self._buffers, self._sizes = _pickle_factory(factory)
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._workers: list[_Process] = []
        self._received: collections.deque[Message] = collections.deque()

    def _start(self, worker: int) -> None:
        # A quarter more, since a shuffling queue does not hold the same number of each worker's.
        kept = -(-5 * self.kept // (4 * self.n_workers))
        process = _Process(worker, self._code, self._buffers, self._sizes, self.spec, kept)
        self._workers.append(process)
        self._selector.register(process.connection, selectors.EVENT_READ, process)

    def _receive(self, timeout: float) -> Message | None:
        deadline = time.monotonic() + timeout
        while not self._received:
            left = deadline - time.monotonic()
            # All that are ready are read before any is asked again, so that none is passed over.
            for key, _ in self._selector.select(max(0.0, left)):
                if key.data is None:
                    return None
                message = self._read(key.data)
                if message is not None:
                    self._received.append(message)
            if left <= 0:
                break
        return self._received.popleft() if self._received else None

    def _read(self, process: "_Process") -> Message | None:
        try:
            message = process.read()
        except (EOFError, OSError):
            self._selector.unregister(process.connection)
            return Died(process.index, process.ending())
        if isinstance(message, Spec):
            self.spec = self.spec or message
            self._states[process.index].since = time.monotonic()
            return None
        return message

    def _free(self, worker: int, place: int) -> None:
        self._workers[worker].free(place)

    def _go(self, worker: int) -> None:
        self._workers[worker].send(_words([_NEXT_EPOCH]))

    def _places(self, worker: int) -> int:
        return self._workers[worker].chunks

    def where(self, worker: int) -> str:
        return self._workers[worker].where()

    def wake(self) -> None:
        super().wake()
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def stop(self, timeout: float = 2.0) -> list[str]:
        for process in self._workers:
            process.connection.close()
        deadline = time.monotonic() + timeout / 2
        for process in self._workers:
            process.end(deadline)
        self._selector.close()
        self._wake.close()
        self._woken.close()
        os.close(self._buffers)
        return []


def _pickle_factory(factory: IteratorFactory) -> tuple[bytes, int, list[int]]:
    import cloudpickle

    # In a child of multiprocessing, the main script goes by this name, which workers cannot import.
    if "__mp_main__" in sys.modules:
        cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        with contextlib.suppress(BufferError):
            view = buffer.raw()
            if view.nbytes >= _OUT_OF_BAND:
                buffers.append(view)
                return False
        return True

    class Pickler(cloudpickle.CloudPickler):
        # cloudpickle drops the file names of code, and with them the lines of every traceback.
        def reducer_override(self, thing: Any) -> Any:
            if isinstance(thing, types.CodeType):
                make, parts = self.dispatch_table[types.CodeType](thing)
                return _code_of_file, (thing.co_filename, make, parts)
            return super().reducer_override(thing)

    code = io.BytesIO()
    try:
        Pickler(code, protocol=5, buffer_callback=keep).dump(factory)
    except Exception as error:
        raise TypeError(
            "QueueRunner: workers='process' must send the iterator factory to another process, and "
            f"{_unpicklable(factory.factory)} cannot be pickled ({error}). Open it inside the "
            "factory instead, or use workers='thread'."
        ) from error
    memory = shared_memory(sum(view.nbytes for view in buffers), "the arrays that the factory uses")
    with os.fdopen(os.dup(memory), "wb") as file:
        for view in buffers:
            file.write(view)
    return code.getvalue(), memory, [view.nbytes for view in buffers]


def _code_of_file(
    file_name: str, make: Callable[..., types.CodeType], parts: tuple[Any, ...]
) -> types.CodeType:
    return make(*parts).replace(co_filename=file_name)


def _unpicklable(thing: Any, name: str = "", depth: int = 0) -> str:
    """The path to the innermost attribute, closure or global that cloudpickle refuses."""
    import cloudpickle

    name = name or getattr(thing, "__qualname__", type(thing).__name__)
    parts: dict[str, Any] = dict(getattr(thing, "__dict__", {}))
    function = getattr(thing, "__func__", thing)
    if inspect.isfunction(function):
        free = inspect.getclosurevars(function)
        parts.update(free.nonlocals)
        parts.update(free.globals)
    if hasattr(thing, "__self__"):
        parts["__self__"] = thing.__self__
    for key, part in parts.items() if depth < 4 else ():
        try:
            cloudpickle.dumps(part)
        except Exception:
            inner = name if key == "__self__" else f"{name}.{key}"
            return _unpicklable(part, inner, depth + 1)
    return f"'{name}' ({type(thing).__name__})"


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
            f"QueueRunner: expected {nbytes / 1e6:.1f} MB of shared memory for {purpose}, "
            f"{free / 1e6:.1f} MB are free ({error.strerror}). Enlarge it (docker run "
            "--shm-size), lower capacity, deliver smaller chunks, use fewer workers, or use "
            "workers='thread'."
        ) from error


@dataclass(frozen=True)
class _Layout:
    """Where each component of a chunk lies in a place of the ring; places of equal size.

    Large samples have a place each, and a queue may keep them where they lie: see `_Process`.
    """

    rows: int
    places: int
    granted: int  # places that the worker has at the start; it gets as many back as it fills
    lent: int
    place_bytes: int
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, spec: Spec, rows: int, kept: int) -> "_Layout":
        end, offsets = 0, []
        for component in spec.components:
            offsets.append(end)
            size = component.dtype.itemsize * int(np.prod(component.shape))
            size *= 1 if spec.large else rows
            end += -(-size // 64) * 64  # TensorFlow takes 64-byte-aligned arrays without a copy
        if spec.large:
            granted = 2 * rows
            lent = min(kept, _LENT_BYTES // end, _NEXT_EPOCH - 2 * granted)
            return cls(1, max(lent, 0) + 2 * granted, granted, lent, end, tuple(offsets))
        places = int(np.clip(_RING_BYTES // max(end, 1), 3, 16))
        return cls(rows, places, places, 0, end, tuple(offsets))

    @property
    def by_sample(self) -> bool:
        return self.places > self.granted

    @property
    def nbytes(self) -> int:
        return max(self.places * self.place_bytes, 1)

    def views(self, ring: mmap.mmap, spec: Spec, place: int) -> Arrays:
        """The arrays of one place, `rows` long, as views of the ring; all have one base."""
        block = np.ndarray((self.place_bytes,), np.uint8, ring, place * self.place_bytes)
        return [
            np.ndarray((self.rows, *component.shape), component.dtype, block, offset)
            for component, offset in zip(spec.components, self.offsets, strict=True)
        ]


def _words(numbers: list[int]) -> bytes:
    return np.array(numbers, _PLACE).tobytes()


class _Process:
    """The parent's side of one worker process.

    Large samples are lent: a place is free again once the last array that lies in it is gone, so
    that a queue holds them without copying. Of more than `layout.lent` at a time, copies are made,
    so that a worker never waits for a place that only its own further work would free.
    """

    def __init__(
        self, index: int, code: bytes, buffers: int, sizes: list[int], spec: Spec | None, kept: int
    ) -> None:
        self.index, self.spec, self.kept = index, spec, kept
        self.chunks = 1  # that the worker can have under way
        self._layout: _Layout | None = None
        self._ring: mmap.mmap | None = None
        self._views: list[Arrays] = []
        self._lent: dict[int, weakref.ref[np.ndarray]] = {}
        self._spare: collections.deque[int] = collections.deque()
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        self.ring = shared_memory(0, "")
        self.trace = shared_memory(0, "")
        self.connection = Connection(ours.detach())
        handles = [theirs.fileno(), self.ring, self.trace, buffers]
        program = (
            "import sys, json; a = json.loads(sys.argv[1]); sys.path[:] = a['path']; "
            "from labkit.workers import worker_main; worker_main(*a['handles'])"
        )
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, json.dumps({"path": sys.path, "handles": handles})],
                pass_fds=handles,
                stdin=subprocess.DEVNULL,
                # A session of its own: Ctrl-C in the terminal is the parent's to handle.
                start_new_session=True,
                # One thread a worker: the workers are the parallelism.
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ},
            )
        except BaseException:
            self.connection.close()
            os.close(self.ring)
            os.close(self.trace)
            raise
        finally:
            theirs.close()
        self.send(pickle.dumps((code, sizes, spec, index)))

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a dead worker is reported where it is read from
            self.connection.send_bytes(data)

    def read(self) -> Message | Spec | None:
        data = self.connection.recv_bytes()
        if data[:1] == b"C":
            _, rows, seconds = _CHUNK.unpack_from(data)
            places = np.frombuffer(data, _PLACE, offset=_CHUNK.size).tolist()
            if self._by_sample():
                samples = [self._sample(place) for place in places]
                return Chunk(self.index, list(zip(*samples, strict=True)), seconds, len(places))
            views = self._views[places[0]]
            whole = rows == len(views[0])
            arrays = views if whole else [view[:rows] for view in views]
            return Chunk(self.index, arrays, seconds, places[0])
        kind, content = pickle.loads(data)
        if kind == "first":
            self.spec, rows = content
            self._lay_out(rows)
            return self.spec
        if kind == "chunk":
            return Chunk(self.index, *content)
        if kind == "failed":
            summary, text = content
            return Failed(self.index, summary, _readable(text))
        return Ended(self.index)

    def _lay_out(self, rows: int) -> None:
        assert self.spec is not None
        layout = None
        if not any(component.is_text for component in self.spec.components):
            layout = _Layout.of(self.spec, max(rows, 1), self.kept)
            reserve_shared(self.ring, layout.nbytes, f"worker {self.index}'s ring")
            self._ring, self._layout = mmap.mmap(self.ring, layout.nbytes), layout
            every = range(layout.places)
            if layout.by_sample:
                self.chunks = 2
                self._spare.extend(every[layout.granted :])
            else:
                self.chunks = layout.places
                self._views = [layout.views(self._ring, self.spec, place) for place in every]
        self.send(pickle.dumps(layout))

    def _sample(self, place: int) -> Arrays:
        """The arrays of one large sample, without a batch axis: views of its place, or copies."""
        assert self._layout is not None and self._ring is not None and self.spec is not None
        views = self._layout.views(self._ring, self.spec, place)
        arrays = [view.reshape(view.shape[1:]) for view in views]
        if len(self._lent) < self._layout.lent:

            def take_back(_: Any) -> None:
                del self._lent[place]
                self._spare.append(place)

            self._lent[place] = weakref.ref(_base(arrays[0]), take_back)
            return arrays
        self._spare.append(place)
        return [_aligned_copy(array) for array in arrays]

    def _by_sample(self) -> bool:
        return self._layout is not None and self._layout.by_sample

    def free(self, place: int) -> None:
        """Lets the worker fill a place again; of large samples, `place` is how many."""
        places = [self._spare.pop() for _ in range(place)] if self._by_sample() else [place]
        self.send(_words(places))

    def ending(self) -> str:
        """How the process ended, in words."""
        try:
            status = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its connection and went on running"
        if status < 0:
            return f"was killed by signal {-status} ({signal.Signals(-status).name})"
        return f"ended with exit status {status}"

    def where(self) -> str:
        os.ftruncate(self.trace, 0)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        while not os.fstat(self.trace).st_size and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.02)
        text = os.pread(self.trace, 1 << 16, 0).decode(errors="replace").lstrip("\0")
        own = (f'  File "{__file__}"', '  File "<string>"')
        lines = [line for line in text.splitlines(True) if not line.startswith(own)]
        return _readable("".join(lines)) or "(it did not answer)\n"

    def end(self, deadline: float) -> None:
        try:
            self.process.wait(max(0.01, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._views, self._ring = [], None
        os.close(self.ring)
        os.close(self.trace)


def _base(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def worker_main(connection_fd: int, ring: int, trace: int, buffers: int) -> None:
    """What a worker process runs: the iterator, and nothing that decides."""
    import faulthandler

    faulthandler.register(signal.SIGUSR1, trace, all_threads=False)
    threading.Thread(target=_leave_with_parent, args=(connection_fd,), daemon=True).start()
    worker = _Child(Connection(connection_fd), ring)
    try:
        try:
            code, sizes, spec, index = pickle.loads(worker.hear())
            worker.run(code, _private_views(buffers, sizes), spec, index)
        except Exception as error:
            worker.tell("failed", _describe(error))
            while True:
                worker.hear()
    except _ParentGone:
        pass


class _ParentGone(BaseException):
    """The parent hung up: the worker's only reason to end without a word."""


def _leave_with_parent(descriptor: int) -> None:
    import select

    hung_up = select.poll()
    hung_up.register(descriptor, 0)
    hung_up.poll()
    time.sleep(0.5)  # for the iterator's own clean-up
    os._exit(0)


class _Child:
    """The worker's side: fills places of the ring and says so."""

    def __init__(self, connection: Connection, ring: int) -> None:
        self.connection, self.ring = connection, ring
        self.spec: Spec | None = None
        self.layout: _Layout | None = None
        self.laid_out = False
        self.views: list[Arrays] = []
        self.free: list[int] = []
        self.epochs = 0

    def tell(self, kind: str, content: Any = None) -> None:
        self.say(pickle.dumps((kind, content), protocol=5))

    def say(self, data: bytes) -> None:
        try:
            self.connection.send_bytes(data)
        except OSError:
            raise _ParentGone from None

    def hear(self) -> bytes:
        try:
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            raise _ParentGone from None

    def run(self, code: bytes, buffers: list[memoryview], spec: Spec | None, index: int) -> None:
        self.spec = spec
        factory = pickle.loads(code, buffers=buffers)
        for epoch in range(sys.maxsize):
            iterator = factory(index, epoch)
            began = time.perf_counter()
            for batch in iterator:
                self.spec = self.spec or Spec.of(batch)
                arrays = _fitted(self.spec, batch, iterator)
                self.deliver(self.spec, arrays, time.perf_counter() - began)
                began = time.perf_counter()
            self.tell("ended")
            while self.epochs <= epoch:
                self.listen()

    def deliver(self, spec: Spec, arrays: Arrays, seconds: float) -> None:
        rows = len(arrays[0])
        if not self.laid_out:
            self.lay_out(spec, rows)
        if self.layout is None:
            while not self.free:
                self.listen()
            self.tell("chunk", (arrays, seconds))
            self.free.pop()
            return
        start = 0
        while start < rows:
            while not self.free:
                self.listen()
            wanted = rows - start if self.layout.by_sample else 1
            places, self.free = self.free[:wanted], self.free[wanted:]
            begin = start
            for place in places:
                end = min(start + self.layout.rows, rows)
                for view, array in zip(self.views[place], arrays, strict=True):
                    view[: end - start] = array[start:end]
                start = end
            share = seconds * (start - begin) / rows
            self.say(_CHUNK.pack(b"C", start - begin, share) + _words(places))

    def lay_out(self, spec: Spec, rows: int) -> None:
        self.tell("first", (spec, rows))
        self.layout = pickle.loads(self.hear())
        self.laid_out = True
        self.free = [0]
        if self.layout is not None:
            memory = mmap.mmap(self.ring, self.layout.nbytes)
            self.free = list(range(self.layout.granted))
            every = range(self.layout.places)
            self.views = [self.layout.views(memory, spec, place) for place in every]

    def listen(self) -> None:
        words = np.frombuffer(self.hear(), _PLACE).tolist()
        if words == [_NEXT_EPOCH]:
            self.epochs += 1
        else:
            self.free += words


def _private_views(descriptor: int, sizes: list[int]) -> list[memoryview]:
    """The shared arrays, copy-on-write: a worker that writes into one changes only its own copy."""
    if not sizes:
        return []
    memory = memoryview(mmap.mmap(descriptor, sum(sizes), access=mmap.ACCESS_COPY))
    ends = np.cumsum(sizes)
    return [memory[end - size : end] for size, end in zip(sizes, ends, strict=True)]
