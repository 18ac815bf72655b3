"""Imports TensorFlow with its start-up lines (CUDA, oneDNN) kept off the screen.

They are printed before any Python logging could filter them. Set TF_CPP_MIN_LOG_LEVEL=0 before
the import to see them.
"""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


@contextmanager
def stderr_held_back() -> Iterator[None]:
    """Swallows what native code writes to file descriptor 2; an exception brings it back."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") in ("0", "1"):
        yield
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(saved, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextmanager
def _garbage_left() -> Iterator[None]:
    """Looking for garbage among a million new objects takes a tenth of TensorFlow's import."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


with nullcontext() if "tensorflow" in sys.modules else stderr_held_back(), _garbage_left():
    import tensorflow as tf

    tf.config.list_physical_devices()  # the search for a GPU has lines of its own

__all__ = ["tf"]
