"""Contestants: tf.data and Keras, set up as their documentation says.

tf.data: "Better performance with the tf.data API" (prefetch, parallel map, AUTOTUNE) and the
reference of `tf.data.ThreadingOptions`; Keras: the reference of `PyDataset`.
"""

from typing import Any

from labkit.instruments.race.entry import contestant


@contestant("tf.data from_generator", package="tensorflow", alone=True)
def from_generator(row: Any, n: int, lap: Any) -> None:
    """as a beginner writes it: from_generator, prefetch(AUTOTUNE)"""
    import tensorflow as tf

    signature = tuple(tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in row.make(0))
    data = tf.data.Dataset.from_generator(row.factory, output_signature=signature)
    for batch in data.prefetch(tf.data.AUTOTUNE):
        lap.step(*batch)


@contestant("tf.data map, AUTOTUNE", package="tensorflow", own_number=True)
def mapped(row: Any, n: int, lap: Any) -> None:
    """numpy_function, num_parallel_calls=AUTOTUNE, prefetch(AUTOTUNE)"""
    import tensorflow as tf

    first = row.make(0)

    def make(number: Any) -> Any:
        batch = tf.numpy_function(row.make, [number], [a.dtype for a in first])
        return [tf.ensure_shape(part, a.shape) for part, a in zip(batch, first, strict=True)]

    data = tf.data.Dataset.counter().map(make, num_parallel_calls=tf.data.AUTOTUNE)
    for batch in data.prefetch(tf.data.AUTOTUNE):
        lap.step(*batch)


@contestant("tf.data map, own pool", package="tensorflow")
def own_pool(row: Any, n: int, lap: Any) -> None:
    """numpy_function, num_parallel_calls=n, private_threadpool_size=n, not deterministic,
    prefetch(AUTOTUNE)"""
    import tensorflow as tf

    first = row.make(0)

    def make(number: Any) -> Any:
        batch = tf.numpy_function(row.make, [number], [a.dtype for a in first])
        return [tf.ensure_shape(part, a.shape) for part, a in zip(batch, first, strict=True)]

    options = tf.data.Options()
    options.threading.private_threadpool_size = n
    data = tf.data.Dataset.counter().map(make, num_parallel_calls=n, deterministic=False)
    for batch in data.prefetch(tf.data.AUTOTUNE).with_options(options):
        lap.step(*batch)


@contestant("Keras PyDataset threads", package="keras", in_fit=True)
def py_dataset(row: Any, n: int, lap: Any) -> None:
    """workers=n, max_queue_size=max(10, 2 n); model.fit takes the steps"""
    import keras

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return lap.most

        def __getitem__(self, number: int) -> Any:
            return row.make(number)

    data = Batches(workers=n, max_queue_size=max(10, 2 * n))
    lap.keras.fit(data, shuffle=False, callbacks=[lap.callback()])


@contestant("Keras PyDataset processes", package="keras", in_fit=True, processes=True)
def py_dataset_processes(row: Any, n: int, lap: Any) -> None:
    """workers=n, use_multiprocessing=True, max_queue_size=max(10, 2 n); model.fit takes the
    steps"""
    import keras

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return lap.most

        def __getitem__(self, number: int) -> Any:
            return row.make(number)

    data = Batches(workers=n, use_multiprocessing=True, max_queue_size=max(10, 2 * n))
    lap.keras.fit(data, shuffle=False, callbacks=[lap.callback()])


@contestant("Keras fed by Grain", package="grain", in_fit=True)
def keras_grain(row: Any, n: int, lap: Any) -> None:
    """MapDataset to_iter_dataset, num_threads=n, prefetch_buffer_size=max(16, 2 n); model.fit
    takes the steps"""
    import grain

    options = grain.ReadOptions(num_threads=n, prefetch_buffer_size=max(16, 2 * n))
    data = grain.MapDataset.range(lap.most).map(row.make).to_iter_dataset(options)
    lap.keras.fit(data, callbacks=[lap.callback()])
