"""A clock around an iterator's batches, where Keras takes them: inside of its compiled step."""

import functools
import statistics
import weakref
from typing import Any

import numpy as np

from labkit.passes import untuned
from labkit.quiet import tf

from tensorflow.python.data.ops.map_op import _MapDataset  # isort: skip
from tensorflow.python.data.util import structure  # isort: skip

_TAKES = 50


class Meter:
    """Counts the seconds in which a batch is waited for, by whoever takes it.

    Args:
        spec: of a batch, as the iterators have it.
    """

    def __init__(self, spec: Any) -> None:
        self._spec, self._counted = spec, 0.0
        with tf.device("/CPU:0"):
            self._seconds = tf.Variable(0.0, trainable=False, dtype=tf.float64)
        total = self._seconds.handle
        # Traced once, since Keras may make an iterator an epoch.
        self._dataset = tf.function(
            lambda handle: tf.data.experimental.to_variant(_metered(handle, spec, total)),
            input_signature=(tf.TensorSpec((), tf.resource),),
            autograph=False,
        )
        # Each fit traces one; after some, TensorFlow would warn of a function made in a loop.
        self._dataset._omit_frequent_tracing_warning = True
        # Each as long as the iterator itself: it has that one's data.
        self._known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def over(self, iterator: Any) -> Any:
        """An iterator over the batches of this one, none of which is taken ahead."""
        known = self._known.get(iterator)
        if known is None:
            with tf.device("/CPU:0"):
                dataset = self._dataset(iterator._iterator_resource)
            known = iter(tf.data.experimental.from_variant(dataset, self._spec))
            self._known[iterator] = known
        return known

    def read(self) -> float:
        """Seconds since it was read last. Of a batch that is ready, `of_a_ready_batch()`."""
        before = self._counted
        handle = self._seconds.handle
        self._counted = float(tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.float64))
        return self._counted - before


@functools.cache
def of_a_ready_batch() -> float:
    """Seconds that taking one counts for, which are nobody's waiting."""
    iterator = iter(untuned(tf.data.Dataset.range(_TAKES)))
    meter = Meter(iterator.element_spec)
    metered = meter.over(iterator)
    took = []
    for _ in range(_TAKES):
        next(metered)
        took.append(meter.read())
    return statistics.median(took)


def _metered(handle: tf.Tensor, spec: Any, total: tf.Tensor) -> tf.data.Dataset:
    types = structure.get_flat_tensor_types(spec)
    shapes = structure.get_flat_tensor_shapes(spec)

    def take(_: tf.Tensor) -> Any:
        began = tf.timestamp()
        with tf.control_dependencies([began]):
            # In the thread that asks: a turn through TensorFlow's pool takes as long as a batch.
            parts = tf.raw_ops.IteratorGetNextSync(
                iterator=handle, output_types=types, output_shapes=shapes
            )
        with tf.control_dependencies(parts):
            took = tf.timestamp() - began
        tf.raw_ops.AssignAddVariableOp(resource=total, value=took)
        return structure.from_compatible_tensor_list(spec, parts)

    take = tf.autograph.experimental.do_not_convert(take)
    # It ends where the iterator does, for which the public `map` raises.
    endless = tf.data.Dataset.range(np.iinfo(np.int64).max)
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    made = _MapDataset(endless, take, use_inter_op_parallelism=False, preserve_cardinality=False)
    return untuned(made.with_options(options))
