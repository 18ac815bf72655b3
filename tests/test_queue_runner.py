"""QueueRunner with threads: every sample once, every error told, and an end to everything.

What holds in a graph (get_inputs, start) holds eagerly (dataset), so most tests run in both.
"""

import os
import re
import signal
import threading
import time
import types
import warnings
from collections import Counter
from functools import partial

import numpy as np
import pytest

import labkit
from labkit import Component, MnistDataGenerator, QueueRunner, WorkerError
from labkit.quiet import tf
from tests.consumers import IN_SECONDS, in_dataset, in_graph, wait_until
from tests.producers import taking_turns

v1 = tf.compat.v1
SMALL = {"capacity": 64, "min_after_dequeue": 10}


def numbers(total: int, chunk: int, pause: float = 0.0):
    """A factory of 0 to total - 1, shared out among the workers: (index, [index, -index])."""

    def factory(worker, n_workers):
        mine = np.arange(total, dtype=np.int64)[worker::n_workers]
        for at in range(0, len(mine), chunk):
            time.sleep(pause)
            part = mine[at : at + chunk]
            yield part, np.stack([part, -part], 1).astype(np.float32)

    return factory


def endless(pause: float = 0.0, chunk: int = 8):
    def factory():
        while True:
            time.sleep(pause)
            yield np.zeros(chunk, np.int64), np.ones((chunk, 2), np.float32)

    return factory


def fails_after(good: int, error: Exception, raised: list[float] | None = None):
    """Worker 1 (or the only one) delivers `good` batches and raises; the others go on slowly."""

    def faulty_producer(worker, n_workers):
        for _ in range(good):
            yield np.zeros(8, np.int64), np.ones((8, 2), np.float32)
        if worker == min(1, n_workers - 1):
            time.sleep(0.3)  # so that the consumer is waiting when it happens
            if raised is not None:
                raised.append(time.monotonic())
            raise error
        while True:
            time.sleep(0.05)
            yield np.zeros(1, np.int64), np.ones((1, 2), np.float32)

    return faulty_producer


def labkit_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("labkit")]


# -- every sample once ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "chunk", "batch", "capacity", "least", "n"),
    [
        (1000, 7, 32, 64, 10, 1),
        (1003, 32, 10, 77, 50, 3),
        (5, 3, 4, 2000, 1000, 1),  # all of it is below min_after_dequeue
        (300, 250, 16, 40, 20, 2),  # a chunk is more than the queue holds
        (64, 64, 64, 64, 0, 1),
        (10, 1, 64, 80, 0, 4),  # all of it is less than a batch
    ],
)
def test_each_sample_of_a_finite_iterator_comes_once(
    consume, total, chunk, batch, capacity, least, n
):
    runner = QueueRunner(numbers(total, chunk), batch, n, "thread", capacity, least)
    batches = consume(runner)
    index, pairs = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert sorted(index.tolist()) == list(range(total))
    # The parts of a sample stay together through the shuffling.
    assert np.array_equal(pairs, np.stack([index, -index], 1))
    sizes = [len(part) for part, _ in batches]
    assert sizes == [batch] * (total // batch) + [total % batch] * (total % batch > 0)


def test_mnists_own_epoch_comes_once_through_three_workers(numbered, index_of):
    data = MnistDataGenerator(32, data=numbered)
    batches = in_graph(QueueRunner(data.epoch_iterator, 50, 3, **SMALL))
    assert sorted(i for images, _ in batches for i in index_of(images)) == list(range(500))


@pytest.mark.parametrize(("built_for", "started"), [(1, 3), (4, 2), (3, 1)])
def test_start_with_another_count_shares_the_data_out_anew(numbered, index_of, built_for, started):
    data, workers = MnistDataGenerator(32, data=numbered), set()

    def factory(worker, n_workers):
        workers.add((worker, n_workers))
        return data.epoch_iterator(worker, n_workers)

    # Nothing of the constructor's partition, which begins in get_inputs, may be left over.
    batches = in_graph(QueueRunner(factory, 32, built_for, **SMALL), n_threads=started)
    assert sorted(i for images, _ in batches for i in index_of(images)) == list(range(500))
    assert {worker for worker, count in workers if count == started} == set(range(started))
    assert {count for _, count in workers} == {built_for, started}


def test_workers_begin_while_the_graph_is_being_built():
    begun = [threading.Event() for _ in range(3)]

    def factory(worker):
        begun[worker].set()
        yield from endless(0.01)()

    with tf.Graph().as_default(), QueueRunner(factory, 8, 3, **SMALL) as runner:
        runner.get_inputs()
        assert all(event.wait(2) for event in begun)


def test_start_with_fewer_workers_delivers_nothing_of_the_others():
    def factory(worker):
        for _ in range(5):
            yield (np.full(4, worker),)

    batches = in_graph(QueueRunner(factory, 4, 3, **SMALL), n_threads=1)
    assert sum(len(batch[0]) for batch in batches) == 20
    assert not any(batch[0].any() for batch in batches)


def test_start_with_another_count_runs_that_many_endless_workers():
    seen = set()

    def factory(worker):
        seen.add(worker)
        yield from endless(0.01)()

    in_graph(QueueRunner(factory, 8, 2, **SMALL), n_threads=5, steps=20)
    assert seen == set(range(5))


@pytest.mark.parametrize("given", [False, True])
def test_the_batch_that_the_spec_is_read_from_is_not_lost(consume, given):
    made = []

    def factory():
        made.append(1)
        for i in range(4):
            yield {"x": np.full((2, 3), i, np.int64)}

    spec = {"x": Component("x", (3,), np.dtype(np.int64))} if given else None
    batches = consume(QueueRunner(factory, 2, spec=spec, **SMALL))
    seen = Counter(int(v) for batch in batches for v in batch["x"][:, 0])
    assert seen == {0: 2, 1: 2, 2: 2, 3: 2}
    # One iterator served both the look at the first batch and the run.
    assert len(made) == 1


def test_with_a_given_spec_nothing_runs_before_the_start():
    made = []

    def factory():
        made.append(1)
        yield np.zeros(2, np.int64)

    spec = Component("x", (), np.dtype(np.int64))
    with tf.Graph().as_default():
        runner = QueueRunner(factory, 2, spec=spec, **SMALL)
        assert runner.get_inputs().dtype == tf.int64
    assert not made and not labkit_threads()


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("float32")])
def test_a_component_takes_its_dtype_as_numpy_does(dtype):
    # np.float32 is what one writes; np.dtype(np.float32) is what labkit keeps.
    spec = {"x": Component("x", (2,), dtype)}
    batches = in_dataset(
        QueueRunner(lambda: iter([{"x": np.ones((4, 2), np.float32)}]), 4, spec=spec, **SMALL)
    )
    assert batches[0]["x"].tolist() == [[1, 1]] * 4


STRUCTURES = {
    "one array": np.arange(4),
    "tuple": (np.arange(4), np.ones((4, 2), np.float32)),
    "dict": {"b": np.arange(4), "a": np.ones((4, 2), np.float32)},
    "nested": {"x": (np.arange(4), {"y": np.zeros((4, 1, 2))}), "z": np.ones(4, np.uint8)},
    "tuple of one": (np.arange(4),),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_batches_keep_their_structure(consume, name):
    batch = STRUCTURES[name]
    (out,) = consume(QueueRunner(lambda: iter([batch]), 4, **SMALL))
    tf.nest.assert_same_structure(batch, out)
    for given, got in zip(tf.nest.flatten(batch), tf.nest.flatten(out), strict=True):
        assert given.dtype == got.dtype
        assert np.array_equal(np.sort(given, 0), np.sort(got, 0))


def test_any_dtype_goes_through(consume):
    rows = 5
    batch = {
        "uint8": np.arange(rows, dtype=np.uint8),
        "int64": 2**40 + np.arange(rows),
        "bool": np.arange(rows) % 2 == 0,
        "float64": 1 / (3 + np.arange(rows, dtype=np.float64)),
        "float16": np.arange(rows, dtype=np.float16),
        "str": np.array(["α", "bb", "ccc", "dddd", ""]),
        "bytes": np.array([b"a", b"bb", b"ccc", b"dddd", b""]),
        "object": np.array(["e", "ff", "ggg", "hhhh", ""], object),
    }
    (out,) = consume(QueueRunner(lambda: iter([batch]), rows, **SMALL))
    order = np.argsort(out["uint8"])
    for name, given in batch.items():
        got = out[name][order].tolist()
        if name in ("str", "object"):
            got = [text.decode() for text in got]
        assert got == given.tolist(), name
        assert given.dtype.kind in "USO" or out[name].dtype == given.dtype


def test_shuffling_mixes_what_comes_in_order(consume):
    runner = QueueRunner(numbers(2000, 10), 20, capacity=400, min_after_dequeue=300)
    order = np.concatenate([index for index, _ in consume(runner)])
    # A sample leaves about 300 places from where it came in; a queue that does not shuffle: 0.
    assert np.abs(order - np.arange(2000)).mean() > 75
    # Also within a batch, whose samples would be neighbours otherwise.
    assert np.abs(np.diff(order)).mean() > 75


def test_training_starts_above_min_after_dequeue_and_never_dips_below():
    depths = []
    with tf.Graph().as_default():
        runner = QueueRunner(endless(0.005), 8, capacity=200, min_after_dequeue=100)
        inputs = runner.get_inputs()
        with v1.Session() as sess, runner.start(sess):
            for _ in range(20):
                sess.run(inputs)
                depths.append(runner.depth())
    assert min(depths) >= 100


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
def test_a_producers_exception_reaches_the_training_loop(consume, n):
    raised, error = [], KeyError("file 17 is gone")
    runner = QueueRunner(fails_after(3, error, raised), 8, n, capacity=64, min_after_dequeue=0)
    with pytest.raises((WorkerError, tf.errors.OpError)) as caught:
        consume(runner)
    assert time.monotonic() - raised[0] < IN_SECONDS
    assert caught.type is WorkerError
    assert caught.value.worker == n - 1
    assert caught.value.__cause__ is error
    text = str(caught.value)
    assert f"worker {n - 1}" in text and "KeyError" in text and "file 17 is gone" in text
    # The producer's own frames, and none of labkit's.
    assert "in faulty_producer" in text and "raise error" in text
    assert "labkit/engine" not in text and "threading.py" not in text


def test_raise_if_failed_serves_loops_without_with(consume):
    del consume  # graph mode only; eager loops get the error from the dataset itself
    runner = QueueRunner(fails_after(1, OSError("no disk")), 8, capacity=64, min_after_dequeue=0)
    with tf.Graph().as_default():
        inputs = runner.get_inputs()
        with v1.Session() as sess:
            runner.start(sess)
            runner.raise_if_failed()
            with pytest.raises(tf.errors.OutOfRangeError):
                for _ in range(1000):
                    sess.run(inputs)
            with pytest.raises(WorkerError, match="no disk"):
                runner.raise_if_failed()
            runner.stop()


def test_a_for_loop_over_the_dataset_gets_the_workers_text():
    runner = QueueRunner(fails_after(2, OSError("no disk")), 8, capacity=64, min_after_dequeue=0)
    with pytest.raises(tf.errors.OpError, match=r"(?s)WorkerError.*worker 0.*no disk"):
        for _ in runner.dataset():
            pass
    runner.stop()


def test_an_exception_before_the_first_batch_is_told_at_once(consume):
    error = FileNotFoundError("data.bin")

    def factory():
        raise error
        yield

    with pytest.raises(
        WorkerError, match=r"worker 0 raised FileNotFoundError: data\.bin"
    ) as caught:
        consume(QueueRunner(factory, 8, **SMALL))
    assert caught.value.__cause__ is error


def test_an_error_ends_training_even_with_data_left_in_the_queue():
    # Otherwise thousands of steps could pass before anybody learns of it.
    def factory():
        yield np.zeros(60, np.int64)
        raise OSError("no disk")

    runner = QueueRunner(factory, 2, capacity=64, min_after_dequeue=0)
    with tf.Graph().as_default():
        inputs = runner.get_inputs()
        with pytest.raises(WorkerError), v1.Session() as sess, runner.start(sess):
            wait_until(lambda: runner.error is not None)
            time.sleep(0.2)
            sess.run(inputs)


GOOD = {"x": np.zeros((4, 3, 1), np.float32), "y": np.zeros(4, np.int64)}
MISFITS = {
    "shape": ({**GOOD, "x": np.zeros((4, 3), np.float32)}, r"'x'.*\(4, 3\).*\(n, 3, 1\)"),
    "width": ({**GOOD, "x": np.zeros((4, 5, 1), np.float32)}, r"'x'.*\(4, 5, 1\).*\(n, 3, 1\)"),
    "dtype": ({**GOOD, "x": np.zeros((4, 3, 1))}, r"'x'.*float64.*float32"),
    "keys": ({"x": GOOD["x"], "z": GOOD["y"]}, r"\['x', 'z'\].*\['x', 'y'\]"),
    "a tuple": ((GOOD["x"], GOOD["y"]), r"tuple.*\['x', 'y'\]"),
    "lengths": ({**GOOD, "y": np.zeros(3, np.int64)}, r"different length.*4.*3"),
    "nothing": (None, r"NoneType.*\['x', 'y'\]"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_batch_that_does_not_fit_is_named_with_what_was_expected(consume, name):
    bad, pattern = MISFITS[name]
    with pytest.raises(WorkerError, match=f"(?s)worker 0 delivered .*{pattern}"):
        consume(QueueRunner(lambda: iter([GOOD, GOOD, bad]), 4, **SMALL))


def test_a_batch_that_does_not_fit_the_given_spec_is_named(consume):
    spec = {"x": Component("x", (2,), np.dtype(np.float32))}
    runner = QueueRunner(lambda: iter([{"x": np.zeros((4, 3), np.float32)}]), 4, spec=spec, **SMALL)
    with pytest.raises(WorkerError, match=r"'x' with shape \(4, 3\), expected \(n, 2\)"):
        consume(runner)


def test_a_tuple_of_another_length_is_named(consume):
    batches = [(GOOD["x"], GOOD["y"]), (GOOD["x"],)]
    with pytest.raises(WorkerError, match=r"a tuple of 1, expected a tuple of 2"):
        consume(QueueRunner(lambda: iter(batches), 4, **SMALL))


def test_samples_instead_of_batches_are_named(consume):
    with pytest.raises(WorkerError, match=r"delivered .*3.*expected an array whose first axis"):
        consume(QueueRunner(lambda: iter([(3, np.zeros(4))]), 4, **SMALL))


@pytest.mark.parametrize("spec", [None, Component("x", (), np.dtype(np.int64))])
def test_an_iterator_that_ends_at_once_is_an_error(consume, spec):
    with pytest.raises(WorkerError, match="ended before its first batch"):
        consume(QueueRunner(lambda: iter(()), 4, spec=spec, **SMALL))


def repeated(epoch=3, n_workers=4):
    for _ in range(epoch):
        yield (np.zeros(8),)


def test_an_end_at_once_tells_which_parameters_labkit_has_filled_in(consume):
    with pytest.raises(WorkerError, match=r"n_workers=2 \(default 4\), epoch=0 \(default 3\): if"):
        consume(QueueRunner(repeated, 8, 2, **SMALL))
    with pytest.raises(WorkerError, match="called it with epoch=0: if a name means something else"):
        consume(QueueRunner(lambda epoch: iter(range(epoch)), 8, 2, **SMALL))
    with pytest.raises(WorkerError) as caught:
        labkit.audit(lambda epoch=2: iter(range(epoch)))
    assert "called it with epoch=0 (default 2): if" in str(caught.value)
    with pytest.raises(WorkerError) as caught:
        consume(QueueRunner(lambda: iter(()), 8, **SMALL))
    assert "called it with" not in str(caught.value)


def test_a_parameter_that_the_user_has_bound_is_left_to_them(consume):
    assert len(consume(QueueRunner(partial(repeated, epoch=2), 8, **SMALL))) == 2


def test_one_exhausted_iterator_is_taken_for_what_it_is(consume):
    # The classic mistake: a factory that hands out the same iterator again.
    spent = iter(())
    with pytest.raises(WorkerError, match="returns a new iterator at each call"):
        consume(QueueRunner(lambda: spent, 4, **SMALL))


def test_a_factory_that_returns_no_iterator_is_named(consume):
    with pytest.raises(WorkerError, match="expected an iterator of batches"):
        consume(QueueRunner(lambda: 7, 4, **SMALL))


def test_a_share_may_be_empty_for_one_worker(consume):
    # Worker 0 has nothing to do, the others have it all: still each sample once.
    def factory(worker, n_workers):
        if worker:
            yield from numbers(40, 4)(worker - 1, n_workers - 1)

    batches = consume(QueueRunner(factory, 8, 3, **SMALL))
    assert sorted(i for index, _ in batches for i in index.tolist()) == list(range(40))


def test_on_error_continue_goes_on_and_warns_once(consume):
    def factory(worker, n_workers):
        if worker == 1:
            raise OSError("no disk")
        yield from numbers(40, 4)(0, 1)

    with pytest.warns(RuntimeWarning, match=r"(?s)worker 1 .*no disk.*other workers") as record:
        batches = consume(QueueRunner(factory, 8, 2, on_error="continue", **SMALL))
    assert sorted(i for index, _ in batches for i in index.tolist()) == list(range(40))
    assert len(record) == 1


def test_with_on_error_continue_a_lost_worker_is_not_reported_again_in_the_next_epoch():
    def factory(worker, n_workers, epoch):
        if worker == 1:
            raise OSError("no disk")
        yield from numbers(16, 4, pause=0.2)(0, 1)

    runner = QueueRunner(factory, 8, 2, on_error="continue", timeout=0.5, **SMALL)
    with warnings.catch_warnings(record=True) as record, runner:
        warnings.simplefilter("always")
        data = runner.dataset()
        for _ in range(2):
            assert sorted(int(i) for index, _ in data for i in index) == list(range(16))
    assert len(record) == 1


def test_with_on_error_continue_the_last_workers_error_is_raised(consume):
    runner = QueueRunner(
        fails_after(1, OSError("no disk")), 8, capacity=64, min_after_dequeue=0, on_error="continue"
    )
    with pytest.raises(WorkerError, match="no disk"):
        consume(runner)


def test_a_worker_that_stalls_is_shown_with_what_it_was_doing(consume):
    release = threading.Event()

    def waits_for_a_lock():
        yield np.zeros(8, np.int64)
        release.wait()

    runner = QueueRunner(waits_for_a_lock, 8, timeout=0.3, capacity=64, min_after_dequeue=0)
    threading.Timer(1.5, release.set).start()
    with pytest.raises(WorkerError, match=r"(?s)worker 0 .*0\.3 s.*in waits_for_a_lock"):
        consume(runner)


def test_several_workers_on_one_finite_iterator_are_warned_about(consume):
    def factory():
        yield from numbers(40, 4)(0, 1)

    with pytest.warns(RuntimeWarning, match="every sample came 3 times"):
        batches = consume(QueueRunner(factory, 8, 3, **SMALL))
    counts = Counter(i for index, _ in batches for i in index.tolist())
    assert counts == dict.fromkeys(range(40), 3)


@pytest.mark.parametrize("samples", [None, 40])
def test_workers_that_take_turns_at_one_iterator_are_not_blamed(consume, samples):
    # An odd number of batches, so that their parts cannot be equal; or a size that is told.
    index = np.arange(40).reshape(4 if samples else 5, -1)
    runner = QueueRunner(taking_turns((part,) for part in index), 8, 2, samples=samples, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = consume(runner)
    assert sorted(i for (part,) in batches for i in part.tolist()) == list(range(40))


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_of_equal_parts_only_what_is_known_is_said(workers):
    def shuffled(worker):  # all of it in each worker, but in an order of its own
        for index in np.random.default_rng(worker).permutation(40):
            yield (np.array([index]),)

    said = r"workers delivered 40 samples each\. If each of them read the whole data set, it came 2"
    with pytest.warns(RuntimeWarning, match=said) as record:
        in_dataset(QueueRunner(shuffled, 8, 2, workers, **SMALL))
    assert len(record) == 1 and "every sample" not in str(record[0].message)


def test_a_share_for_each_worker_is_no_reason_to_warn(consume):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        consume(QueueRunner(numbers(40, 4), 8, 3, **SMALL))


# -- stopping ------------------------------------------------------------------------------------


def _timed_stop(runner):
    began = time.monotonic()
    runner.stop()
    assert time.monotonic() - began < IN_SECONDS
    assert not labkit_threads()


@pytest.mark.parametrize("n", [1, 4])
def test_stop_ends_workers_that_are_blocked_on_a_full_queue(n):
    runner = QueueRunner(endless(), 8, n, **SMALL)
    with tf.Graph().as_default():
        runner.get_inputs()
        with v1.Session() as sess:
            runner.start(sess)
            wait_until(lambda: runner.depth() == 64)
            time.sleep(0.1)
            _timed_stop(runner)
            assert runner.depth() == 0


def test_stop_ends_a_dataset_whose_queue_is_full():
    runner = QueueRunner(endless(), 8, 2, **SMALL)
    next(iter(runner.dataset()))
    wait_until(lambda: runner.depth() == 64)
    _timed_stop(runner)


def test_stop_frees_a_consumer_that_is_blocked_on_an_empty_queue():
    runner = QueueRunner(endless(0.1), 8, capacity=2000, min_after_dequeue=1000)
    ends = []
    with tf.Graph().as_default():
        inputs = runner.get_inputs()
        with v1.Session() as sess:
            runner.start(sess)

            def consumer():
                try:
                    while True:
                        sess.run(inputs)
                except tf.errors.OpError as error:
                    ends.append(type(error))

            thread = threading.Thread(target=consumer)
            thread.start()
            time.sleep(0.5)
            assert thread.is_alive() and not ends
            began = time.monotonic()
            _timed_stop(runner)
            thread.join(10)
            assert time.monotonic() - began < IN_SECONDS
    assert ends and issubclass(ends[0], (tf.errors.OutOfRangeError, tf.errors.CancelledError))


def test_stop_frees_a_for_loop_that_is_blocked_on_an_empty_queue():
    runner = QueueRunner(endless(0.1), 8, capacity=2000, min_after_dequeue=1000)
    data = runner.dataset()
    thread = threading.Thread(target=lambda: list(data))
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    began = time.monotonic()
    _timed_stop(runner)
    thread.join(10)
    assert time.monotonic() - began < IN_SECONDS


def test_stop_names_a_thread_that_will_not_return():
    release = threading.Event()

    def sits_in_native_code():
        yield np.zeros(8, np.int64)
        release.wait()

    runner = QueueRunner(sits_in_native_code, 8, capacity=64, min_after_dequeue=0)
    with tf.Graph().as_default():
        inputs = runner.get_inputs()
        with v1.Session() as sess:
            runner.start(sess)
            sess.run(inputs)
            with pytest.warns(RuntimeWarning, match="sits_in_native_code"):
                runner.stop()
    release.set()
    wait_until(lambda: not labkit_threads())


def test_stop_may_come_twice_early_or_never_have_been_needed():
    runner = QueueRunner(endless(), 8, **SMALL)
    runner.stop()
    runner.stop()
    next(iter(runner.dataset()))
    runner.stop()
    runner.stop()
    # A dataset that nobody iterates has a worker all the same: it looked at the first batch.
    unused = QueueRunner(endless(), 8, **SMALL)
    unused.dataset()
    unused.stop()
    assert not labkit_threads()


def test_leaving_the_with_block_stops_everything():
    runner = QueueRunner(endless(), 8, 3, **SMALL)
    with tf.Graph().as_default():
        inputs = runner.get_inputs()
        with v1.Session() as sess:
            with runner.start(sess):
                sess.run(inputs)
                assert len(labkit_threads()) == 4  # three workers and the feeder
            assert not labkit_threads()


def test_an_error_of_the_loops_own_passes_through_the_with_block(consume):
    runner = QueueRunner(endless(), 8, **SMALL)
    if consume is in_dataset:
        with pytest.raises(ZeroDivisionError), runner:
            for _ in runner.dataset():
                raise ZeroDivisionError
    else:
        with tf.Graph().as_default():
            runner.get_inputs()
            with pytest.raises(ZeroDivisionError), v1.Session() as sess, runner.start(sess):
                raise ZeroDivisionError


def test_the_same_graph_runs_again_after_a_stop():
    runner = QueueRunner(numbers(100, 7), 8, 2, **SMALL)
    with tf.Graph().as_default():
        inputs = runner.get_inputs()
        for steps in (3, 3, 1000):
            seen = []
            with v1.Session() as sess, runner.start(sess):
                try:
                    for _ in range(steps):
                        seen += sess.run(inputs)[0].tolist()
                except tf.errors.OutOfRangeError:
                    pass
        # The last time it ran to the end, and nothing of the first two times was left in it.
        assert sorted(seen) == list(range(100))


def test_the_same_dataset_runs_again_after_a_stop():
    runner = QueueRunner(numbers(100, 7), 8, 2, **SMALL)
    data = runner.dataset()
    for _ in data.take(3):
        pass
    runner.stop()
    assert sorted(int(i) for index, _ in data for i in index) == list(range(100))
    runner.stop()


def test_a_pipeline_that_reads_ahead_does_not_start_the_workers_again():
    runner = QueueRunner(numbers(100, 7), 8, 2, **SMALL)
    with runner:
        reading_ahead = iter(runner.dataset().repeat().prefetch(4))
        next(reading_ahead)
    time.sleep(0.3)
    assert not labkit_threads()
    with pytest.raises(tf.errors.OpError, match="block has ended"):
        for _ in reading_ahead:
            pass


def test_a_runner_whose_producer_failed_runs_again():
    broken = [True]

    def factory(worker, n_workers):
        yield from numbers(40, 4)(worker, n_workers)
        if broken:
            raise OSError("no disk")

    runner = QueueRunner(factory, 8, **SMALL)
    with pytest.raises(WorkerError):
        in_dataset(runner)
    broken.clear()
    batches = in_dataset(runner)
    assert sorted(i for index, _ in batches for i in index.tolist()) == list(range(40))


def test_after_an_interrupt_the_same_code_runs_again(consume):
    def cell(interrupted):
        def factory(worker, n_workers):
            yield from numbers(40, 4)(worker, n_workers)

        runner = QueueRunner(factory, 8, 2, **SMALL)
        if not interrupted:
            return consume(runner)
        if consume is in_dataset:
            with runner:
                for _ in runner.dataset():
                    raise KeyboardInterrupt
        with tf.Graph().as_default():
            inputs = runner.get_inputs()
            with v1.Session() as sess, runner.start(sess):
                sess.run(inputs)
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cell(interrupted=True)
    assert not labkit_threads()
    batches = cell(interrupted=False)
    assert sorted(i for index, _ in batches for i in index.tolist()) == list(range(40))


@pytest.fixture
def python_handles_sigint():
    # A shell's background job starts with the signal ignored; a test that sends it must not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_sigint")
def test_ctrl_c_ends_a_loop_that_sits_inside_tensorflow(consume):
    # The signal comes while sess.run waits for data, where Python's handler cannot run.
    runner = QueueRunner(endless(0.05, chunk=1), 8, capacity=2000, min_after_dequeue=1000)
    sent = []

    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(0.7, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        consume(runner)
    # One second for the handler to have its chance, and the two that a stop may take.
    assert time.monotonic() - sent[0] < IN_SECONDS
    assert not labkit_threads()
    assert signal.set_wakeup_fd(-1) == -1, "the interrupt watch must give its descriptor back"
    assert len(consume(QueueRunner(numbers(40, 4), 8, **SMALL))) == 5


# -- memory and arguments ------------------------------------------------------------------------


def test_a_queue_of_more_than_half_the_free_memory_is_refused(consume, monkeypatch):
    # A sample is 16 bytes (one int64, two float32), half of the free memory 500,000.
    free = types.SimpleNamespace(available=1_000_000)
    monkeypatch.setattr("labkit.engine.options.psutil.virtual_memory", lambda: free)
    with pytest.raises(MemoryError) as caught:
        consume(QueueRunner(numbers(100, 10), 8, capacity=31_251, min_after_dequeue=10))
    text = str(caught.value)
    assert "capacity=31251" in text and "16 bytes" in text and "GB" in text
    fits = int(re.search(r"Set capacity to (\d+) or less", text)[1])
    assert fits == 31_250
    assert not labkit_threads()
    # What the message says to set is accepted.
    assert len(consume(QueueRunner(numbers(80, 10), 8, capacity=fits, min_after_dequeue=10))) == 10


def test_a_queue_of_petabytes_is_refused_for_real(consume):
    with pytest.raises(MemoryError, match=r"capacity=\d+ samples of 16 bytes"):
        consume(QueueRunner(numbers(100, 10), 8, capacity=10**14))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch_size": 0}, "batch_size.*0"),
        ({"batch_size": 1.5}, r"batch_size.*1\.5"),
        ({"batch_size": True}, "batch_size.*True"),
        ({"n_workers": 0}, "n_workers.*0"),
        ({"n_workers": "many"}, "n_workers.*'many'"),
        ({"workers": "actor"}, "workers.*'thread' or 'process'.*'actor'"),
        ({"capacity": 1000}, r"capacity.*1000 \+ 32.*1000"),
        ({"capacity": 2000.5}, "capacity"),
        ({"min_after_dequeue": -1}, "min_after_dequeue"),
        ({"min_after_dequeue": 1990, "capacity": 2000}, r"1990 \+ 32"),
        ({"on_error": "ignore"}, "on_error.*'ignore'"),
        ({"timeout": 0}, "timeout.*0"),
        ({"timeout": "1"}, "timeout.*'1'"),
        ({"max_workers": 0}, "max_workers.*0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=f"QueueRunner: .*{named}"):
        QueueRunner(endless(), **wrong)


@pytest.mark.parametrize(
    ("iterator", "cure"),
    [
        (None, "data.train_iterator, or lambda: iter(your_object)."),
        (iter([]), "your_function, or lambda: iter(data), of the data that it goes through."),
        (repeated(2), "repeated, or functools.partial(repeated, ...) where it takes arguments."),
        ((x for x in ()), "your_function, or functools.partial(your_function, ...) where"),
    ],
)
def test_an_iterator_in_place_of_a_factory_is_refused_with_the_cure(iterator, cure):
    with pytest.raises(TypeError, match=r"must be a function.*without calling it") as caught:
        QueueRunner(iterator)
    assert cure in str(caught.value)
    # It would give what is left of it once, and nothing in the next pass.
    assert ("It ends after one pass" in str(caught.value)) == (iterator is not None)


def test_a_spec_without_components_is_refused():
    with pytest.raises(TypeError, match=r"labkit\.Component"):
        QueueRunner(endless(), spec=(np.float32, (28, 28)))


def test_calls_in_the_wrong_order_say_what_to_do():
    runner = QueueRunner(endless(), 8, **SMALL)
    with pytest.raises(RuntimeError, match=r"tf\.Graph\(\)\.as_default.*dataset"):
        runner.get_inputs()
    with tf.Graph().as_default(), v1.Session() as sess:
        with pytest.raises(RuntimeError, match=r"get_inputs\(\)"):
            runner.start(sess)
        runner.get_inputs()
        with pytest.raises(RuntimeError, match="has a queue already"):
            runner.get_inputs()
        with pytest.raises(RuntimeError, match="serves a graph already"):
            runner.dataset()
        with pytest.raises(ValueError, match=r"n_threads.*0"):
            runner.start(sess, n_threads=0)
        with runner.start(sess), pytest.raises(RuntimeError, match="running already"):
            runner.start(sess)


@pytest.mark.parametrize("kind", ["MonitoredSession", "SingularMonitoredSession"])
def test_a_monitored_session_is_taken_for_the_session_that_it_wraps(kind):
    with tf.Graph().as_default():
        runner = QueueRunner(numbers(40, 4), 8, 2, **SMALL)
        index, _ = runner.get_inputs()
        seen = []
        with getattr(v1.train, kind)() as sess, runner.start(sess):
            while not sess.should_stop():  # it takes the end of the data for its own
                seen += sess.run(index).tolist()
    assert sorted(seen) == list(range(40))


def test_what_is_no_session_is_refused_with_what_is_one():
    with tf.Graph().as_default():
        runner = QueueRunner(endless(), 8, **SMALL)
        runner.get_inputs()
        with pytest.raises(TypeError, match=r"sess must be an open session, got int 3.*Monitored"):
            runner.start(3)
        closed = v1.train.SingularMonitoredSession()
        closed.close()
        with pytest.raises(TypeError, match="sess must be an open session, got NoneType"):
            runner.start(closed)


def test_a_dataset_works_in_the_debug_mode_of_tf_data():
    from tensorflow.python.data.ops import debug_mode

    tf.data.experimental.enable_debug_mode()
    try:
        with QueueRunner(numbers(40, 4), 8, 2, **SMALL) as runner:
            data = runner.dataset().map(lambda index, pairs: index)
            for _ in range(2):
                assert sorted(int(i) for index in data for i in index) == list(range(40))
    finally:
        debug_mode.toggle_debug_mode(False)


# -- dataset(): epochs and Keras -----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_each_epoch_of_a_dataset_has_every_sample_once_from_the_same_threads(n):
    visits = []

    def factory(worker, n_workers, epoch):
        visits.append((epoch, worker, threading.get_ident()))
        yield from numbers(100, 7)(worker, n_workers)

    with QueueRunner(factory, 8, n, **SMALL) as runner:
        data = runner.dataset()
        for _ in range(3):
            assert sorted(int(i) for index, _ in data for i in index) == list(range(100))
    assert sorted(visit[:2] for visit in visits) == [(e, w) for e in range(3) for w in range(n)]
    assert len({ident for *_, ident in visits}) == n


def test_a_dataset_knows_its_shapes_and_types():
    with QueueRunner(numbers(100, 7), 10, **SMALL) as runner:
        index, pairs = runner.dataset().element_spec
    assert (index.shape.as_list(), index.dtype) == ([None], tf.int64)
    assert (pairs.shape.as_list(), pairs.dtype) == ([None, 2], tf.float32)


class Steps(tf.keras.callbacks.Callback):
    """Counts the training steps of each epoch."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def on_epoch_begin(self, epoch, logs=None):
        self.counts.append(0)

    def on_train_batch_end(self, batch, logs=None):
        self.counts[-1] += 1


def points(total: int, chunk: int):
    """(x, y) pairs for Keras, finite, shared out."""

    def factory(worker, n_workers):
        for index, _ in numbers(total, chunk)(worker, n_workers):
            x = index[:, None].astype(np.float32) / total
            yield x, 3 * x + 1

    return factory


@pytest.fixture
def line():
    """y = w x, compiled so that its weight never moves, and the loss tells which data it saw."""
    model = tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)])
    model.compile(tf.keras.optimizers.SGD(0.0), loss="mse")
    return model


def _loss(model, total):
    x = np.arange(total, dtype=np.float32)[:, None] / total
    return float(np.mean((model(x).numpy() - (3 * x + 1)) ** 2))


def test_fit_takes_an_endless_dataset_by_steps(line):
    def factory():
        while True:
            yield np.ones((8, 1), np.float32), np.ones((8, 1), np.float32)

    steps = Steps()
    with QueueRunner(factory, 8, 2, **SMALL) as runner:
        line.fit(runner.dataset(), steps_per_epoch=5, epochs=3, verbose=0, callbacks=[steps])
    assert steps.counts == [5, 5, 5]


def test_fit_and_evaluate_take_finite_datasets_epoch_by_epoch(line):
    steps = Steps()
    training = QueueRunner(points(100, 7), 16, 2, **SMALL)
    held_out = QueueRunner(points(30, 4), 8, **SMALL)
    with training, held_out:
        history = line.fit(
            training.dataset(),
            validation_data=held_out.dataset(),
            epochs=3,
            verbose=0,
            callbacks=[steps],
        ).history
        evaluated = line.evaluate(held_out.dataset(), verbose=0)
    assert steps.counts == [7, 7, 7]
    # Means over exactly these samples; one missing or doubled would shift them.
    assert history["loss"] == pytest.approx([_loss(line, 100)] * 3, rel=1e-4)
    assert history["val_loss"] == pytest.approx([_loss(line, 30)] * 3, rel=1e-4)
    assert evaluated == pytest.approx(_loss(line, 30), rel=1e-4)


@pytest.mark.parametrize("steps", [None, 50])
def test_a_producers_error_surfaces_from_fit(line, steps):
    def factory():
        yield from points(40, 8)(0, 1)
        raise OSError("no disk")

    runner = QueueRunner(factory, 8, capacity=64, min_after_dequeue=0)
    with pytest.raises(WorkerError, match="no disk"), runner:
        line.fit(runner.dataset(), steps_per_epoch=steps, verbose=0)
    with pytest.raises(tf.errors.OpError, match="no disk"):
        line.fit(runner.dataset(), steps_per_epoch=steps, verbose=0)
    runner.stop()
