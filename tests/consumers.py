"""The two ways to take a runner's batches: a TensorFlow 1 loop, and a for loop over dataset().

And how to wait for what a run comes to."""

import time

from labkit.quiet import tf

v1 = tf.compat.v1
# For what takes a second or two on an idle machine, and 60 s or for ever if it hangs.
IN_SECONDS = 20.0


def in_graph(runner, n_threads=None, steps=None, seen=None):
    """Every batch until the end, or `steps` of them; `seen` is the list that gets them."""
    batches = [] if seen is None else seen
    with tf.Graph().as_default():
        inputs = runner.get_inputs()
        with v1.Session() as sess, runner.start(sess, n_threads):
            try:
                while steps is None or len(batches) < steps:
                    batches.append(sess.run(inputs))
            except tf.errors.OutOfRangeError:
                pass
    return batches


def in_dataset(runner, steps=None, seen=None):
    """The same from dataset()."""
    batches = [] if seen is None else seen
    with runner:
        dataset = runner.dataset()
        for batch in dataset if steps is None else dataset.take(steps):
            batches.append(tf.nest.map_structure(lambda part: part.numpy(), batch))
    return batches


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)
