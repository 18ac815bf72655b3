"""The factory on its way to another process: by cloudpickle, its large arrays in shared memory."""

import inspect
import io
import mmap
import os
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from labkit.engine.batches import Spec
from labkit.engine.produce import IteratorFactory
from labkit.engine.ring import shared_memory

_OUT_OF_BAND = 1 << 16


def pickle_factory(factory: IteratorFactory) -> tuple[bytes, int, list[int]]:
    """The pickled factory, a descriptor of the memory with its large arrays, and their sizes.

    Raises TypeError, with the name of what cannot be pickled.
    """
    code, buffers = pack_factory(factory, "process")
    sizes = [view.nbytes for view in buffers]
    memory = shared_memory(sum(sizes), "the arrays that the factory uses")
    with os.fdopen(os.dup(memory), "wb") as file:
        for view in buffers:
            file.write(view)
    return code, memory, sizes


def pack_factory(factory: IteratorFactory, workers: str) -> tuple[bytes, list[memoryview]]:
    """The pickled factory, for `workers` of this kind, and its large arrays as they lie.

    Raises TypeError, with the name of what cannot be pickled.
    """
    import cloudpickle

    # In a child of multiprocessing, the main script goes by this name, which workers cannot import.
    if "__mp_main__" in sys.modules:
        cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:
            return True
        if view.nbytes < _OUT_OF_BAND:
            return True
        buffers.append(view)
        return False

    try:
        code = _dump(factory, keep)
    except Exception as error:
        raise TypeError(
            f"labkit: workers='{workers}' must send the iterator factory to another process, and "
            f"{_unpicklable(factory.users)} cannot be pickled ({error}). Open or make it inside "
            "the factory instead, or use workers='thread'."
        ) from error
    return code, buffers


def _dump(thing: Any, keep: Callable[[pickle.PickleBuffer], bool] | None = None) -> bytes:
    import cloudpickle

    class Pickler(cloudpickle.CloudPickler):
        # cloudpickle drops the file names of code, and with them the lines of every traceback.
        def reducer_override(self, thing: Any) -> Any:
            if isinstance(thing, types.CodeType):
                make, parts = self.dispatch_table[types.CodeType](thing)
                return _code_of_file, (thing.co_filename, make, parts)
            if _is_tensorflows(thing):
                raise TypeError("it is TensorFlow's, and stays in its process")
            return super().reducer_override(thing)

    code = io.BytesIO()
    Pickler(code, protocol=5, buffer_callback=keep).dump(thing)
    return code.getvalue()


def _is_tensorflows(thing: Any) -> bool:
    """A dataset, model, layer or variable. Some can be pickled, and hold up each worker until it
    has imported TensorFlow and found a device, if it comes to that."""
    return any(
        kind.__name__ == "Trackable" and kind.__module__.startswith("tensorflow.")
        for kind in type(thing).__mro__
    )


def unpickle_factory(code: bytes, memory: int, sizes: list[int]) -> IteratorFactory:
    """The factory again; a worker that writes into one of its arrays changes only its own copy."""
    buffers = []
    if sizes:
        view = memoryview(mmap.mmap(memory, sum(sizes), access=mmap.ACCESS_COPY))
        ends = np.cumsum(sizes)
        buffers = [view[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return pickle.loads(code, buffers=buffers)


def _code_of_file(
    file_name: str, make: Callable[..., types.CodeType], parts: tuple[Any, ...]
) -> types.CodeType:
    return make(*parts).replace(co_filename=file_name)


def _unpicklable(thing: Any, name: str = "", depth: int = 0) -> str:
    """The path to the innermost attribute, closure or global that cannot be pickled."""
    name = name or getattr(thing, "__qualname__", type(thing).__name__)
    parts: dict[str, Any] = dict(getattr(thing, "__dict__", {}))
    function = getattr(thing, "__func__", thing)
    if inspect.isfunction(function):
        free = inspect.getclosurevars(function)
        parts.update(free.nonlocals)
        parts.update(free.globals)
    if hasattr(thing, "__self__"):
        parts["__self__"] = thing.__self__
    for key, part in parts.items() if depth < 4 and not _is_tensorflows(thing) else ():
        try:
            _dump(part)
        except Exception:
            inner = name if key == "__self__" else f"{name}.{key}"
            return _unpicklable(part, inner, depth + 1)
    return f"'{name}' ({type(thing).__name__})"


def dump_spec(spec: Spec) -> bytes:
    """The spec for another process; a namedtuple's class may be one that only this one has."""
    import cloudpickle

    return cloudpickle.dumps(spec)


def dump_error(error: BaseException) -> bytes | None:
    """The exception for another process, or None where it cannot be pickled there and back."""
    import cloudpickle

    try:
        code = cloudpickle.dumps(error)
        pickle.loads(code)
    except Exception:
        return None
    return code


def load_error(code: bytes | None, summary: str) -> BaseException:
    """What `dump_error` packed; else its type and text as a RuntimeError."""
    try:
        error = pickle.loads(code) if code is not None else None
    except Exception:  # its class may be one that only the worker can import
        error = None
    return error if isinstance(error, BaseException) else RuntimeError(summary)
