"""How a callback takes the place of Keras's step, for one call: Keras gives it no other."""

import weakref
from collections.abc import Callable
from typing import Any


class Tap:
    """A model's train_function for one call of `callback.step(iterator, inner)`.

    It gives the place back to `inner` as the first thing it does. It keeps no callback, no model
    and no data alive; for a callback that is gone, `inner` is called.
    """

    def __init__(self, callback: Any, inner: Callable[[Any], Any]) -> None:
        self.inner = inner
        self._callback, self._model = weakref.ref(callback), weakref.ref(callback.model)

    def put(self) -> None:
        """Makes it the model's train_function."""
        self._set(self)

    def __call__(self, iterator: Any) -> Any:
        callback = self._callback()
        self._set(self.inner)
        return self.inner(iterator) if callback is None else callback.step(iterator, self.inner)

    def _set(self, function: Callable[[Any], Any]) -> None:
        model = self._model()
        if model is not None:
            # Past Keras's own __setattr__, which takes 20 times as long.
            object.__setattr__(model, "train_function", function)
