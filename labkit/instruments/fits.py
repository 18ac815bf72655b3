"""Every Keras `fit` of a block is watched, also where nobody gave it `labkit.watch()`."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_CALLBACKS = 5  # `fit`'s position for them, behind the model
_lock = threading.Lock()
_blocks = 0  # that run


@contextmanager
def fits_watched() -> Iterator[None]:
    """Each `fit` that begins inside of the block gets a `FitWatch` that prints nothing.

    For that `keras.Model` has a `fit` around its own one until the last such block has ended. Where
    TensorFlow is not imported yet, or Keras runs on another backend, nothing is done.
    """
    global _blocks
    keras = sys.modules.get("keras")
    if keras is None or "tensorflow" not in sys.modules or keras.backend.backend() != "tensorflow":
        yield
        return
    with _lock:  # blocks may end in any order, and in any thread
        _blocks += 1
        if not hasattr(keras.Model.fit, "labkit_unwatched"):
            keras.Model.fit = _watched(keras.Model.fit)
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            # Another's, who came between, is left as it is: ours in it does nothing any more.
            if not _blocks and hasattr(keras.Model.fit, "labkit_unwatched"):
                keras.Model.fit = keras.Model.fit.labkit_unwatched


def _watched(fit: Callable[..., Any]) -> Callable[..., Any]:
    from labkit.instruments.watch_fit import FitWatch

    @functools.wraps(fit)
    def watched_fit(model: Any, *args: Any, **options: Any) -> Any:
        given = options.get("callbacks")
        readable = len(args) <= _CALLBACKS and isinstance(given, list | tuple | None)
        if _blocks and readable and not any(isinstance(one, FitWatch) for one in given or ()):
            options["callbacks"] = [FitWatch(quiet=True), *(given or ())]
        return fit(model, *args, **options)

    watched_fit.labkit_unwatched = fit  # type: ignore[attr-defined]
    return watched_fit
