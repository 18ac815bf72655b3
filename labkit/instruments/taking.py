"""Taking batches from Keras's iterator for `watch`: each in its time, or some ahead of theirs."""

import collections
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from labkit.quiet import tf

_TAKES = 30  # that are compared, of those that came last
_AT_ONCE, _READY_EVERY = 10, 30  # takes of one that is ready: 10 at the start, then one of 30
_AS_READY = 1.25  # times as long: the machine changes from one moment to the next by more
_MOST_BYTES = 1 << 28  # held at a time


class Taker:
    """Takes `steps_per_execution` batches at a time, as many as one call of Keras's step trains on.

    Attributes:
        held: batches taken ahead, in their order, that no step has had yet.
        spec: of a batch.
    """

    def __init__(self, iterator: Any, model: Any) -> None:
        self.number = model.steps_per_execution
        self.one_device = isinstance(iterator, tf.data.Iterator)
        self.spec = iterator.element_spec
        self.held: list[list[Any]] = []
        # One call for several costs less than one each.
        together = self.number > 1 and self.one_device and not model.run_eagerly
        if together and all(map(_has_zeros, tf.nest.flatten(self.spec))):
            self._take = _together(self.spec, self.number)
        else:
            self._take = _one_by_one(self.number)
        self._over = False
        self._error: Exception | None = None
        self._ready: Any = None
        self._ready_takes: collections.deque[float] = collections.deque(maxlen=_TAKES)
        self._takes: collections.deque[float] = collections.deque(maxlen=_TAKES)
        self._seen = 0

    @property
    def is_ahead(self) -> bool:
        """Whether the data, or their end, or their failure, were met before their turn."""
        return bool(self.held) or self._over or self._error is not None

    def waited(self, seconds: float) -> float:
        """Of the seconds that a take took, those above what taking one that is ready takes, which
        Keras does, too. Below 0 for some of those that are ready: their sum is 0."""
        self._takes.append(seconds)
        ready, takes = _usual(self._ready_takes), _usual(self._takes)
        return seconds - (takes if takes < _AS_READY * ready else ready)

    def next(self, iterator: Any) -> list[Any]:
        """The next batches; none at the end of the data."""
        if self.held:
            return self.held.pop(0)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return [] if self._over else self._take(iterator)

    def hold(self, iterator: Any, calls: int) -> None:
        """Takes the batches of the next calls. What fails there is raised when its turn comes."""
        try:
            while len(self.held) < calls and not self._over:
                batches = self._take(iterator)
                self._over = len(batches) < self.number
                self.held += [batches] if batches else []
        except Exception as error:
            self._error = error

    def begin_epoch(self) -> None:
        self._over = False

    def most_to_hold(self, batches: list[Any]) -> int:
        """How many calls' batches may be held, so that they take no more than 256 MB."""
        parts = tf.nest.flatten(batches[0], expand_composites=True)
        size = sum(part.shape.num_elements() * part.dtype.size for part in parts)
        return _MOST_BYTES // max(1, size * self.number)

    def take_what_is_ready(self, batches: list[Any]) -> None:
        """Measures it, now and then: after a step, where caches are as cold as they will be."""
        self._seen += 1
        if not self.one_device or (self._seen > _AT_ONCE and self._seen % _READY_EVERY):
            return
        if self._ready is None:
            cached = tf.data.Dataset.from_tensors(batches[0])
            self._ready = iter(cached.repeat())
            self._take(self._ready)  # it compiles
        began = time.perf_counter()
        self._take(self._ready)
        self._ready_takes.append(time.perf_counter() - began)


def _usual(seconds: collections.deque[float]) -> float:
    """Their mean without those far above the others, which waited for something."""
    if not seconds:
        return 0.0
    middle = statistics.median(seconds)
    return statistics.fmean(value for value in seconds if value <= 2 * middle)


def _one_by_one(number: int) -> Callable[[Any], list[Any]]:
    return lambda iterator: list(itertools.islice(iterator, number))


def _has_zeros(spec: Any) -> bool:
    return isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None


def _zeros(spec: tf.TensorSpec) -> tf.Tensor:
    return tf.zeros([size or 0 for size in spec.shape], spec.dtype)


def _together(spec: Any, number: int) -> Callable[[Any], list[Any]]:
    """Batches come as tensors, with zeros behind the last: a step that is given
    `tf.experimental.Optional`s takes half as long again."""
    flat = tf.nest.flatten(spec)

    def value(batch: Any) -> Any:
        def there() -> list[tf.Tensor]:
            return tf.nest.flatten(batch.get_value())

        parts = tf.cond(batch.has_value(), there, lambda: list(map(_zeros, flat)))
        for part, its in zip(parts, flat, strict=True):
            part.set_shape(its.shape)
        return tf.nest.pack_sequence_as(spec, parts)

    @tf.function(autograph=False)
    def get_next(iterator: Any) -> Any:
        batches = [iterator.get_next_as_optional() for _ in range(number)]
        return list(map(value, batches)), tf.stack([batch.has_value() for batch in batches])

    def take(iterator: Any) -> list[Any]:
        batches, there = get_next(iterator)
        return batches[: int(there.numpy().sum())]

    return take
