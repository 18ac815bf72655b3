"""Each iteration over dataset() is a fresh pass, whoever iterates: a loop, take, Keras."""

import itertools
import threading
import time
import warnings

import numpy as np
import pytest

from labkit import MnistDataGenerator, QueueRunner, WorkerError
from labkit.quiet import tf
from tests.consumers import in_graph, wait_until
from tests.programs import run_program

v1 = tf.compat.v1
SMALL = {"capacity": 64, "min_after_dequeue": 10}


@pytest.fixture(params=["thread", "process"])
def workers(request):
    return request.param


def batches_of(number, size=8):
    """`number` batches of `size` in all, shared out; each sample is 1000 x epoch + its index."""

    def factory(worker, n_workers, epoch):
        for batch in range(worker, number, n_workers):
            index = np.arange(batch * size, (batch + 1) * size)
            yield 1000 * epoch + index, np.stack([index, -index], 1).astype(np.float32)

    return factory


def samples_of(dataset):
    return sorted(int(i) for index, _ in dataset for i in index)


def whole(epoch, total):
    return [1000 * epoch + index for index in range(total)]


@pytest.mark.parametrize(("workers", "n"), [("thread", 3), ("process", 1)])
def test_a_pass_left_early_or_exactly_at_its_end_is_followed_by_a_fresh_one(workers, n):
    with QueueRunner(batches_of(20), 8, n, workers, **SMALL) as runner:
        data = runner.dataset()
        assert [len(list(data.take(20))) for _ in range(3)] == [20, 20, 20]
        assert [len(list(data.take(15))) for _ in range(3)] == [15, 15, 15]
        assert [len(list(data.prefetch(4).take(10))) for _ in range(2)] == [10, 10]
        # Nothing of the eight passes before is left in it.
        assert samples_of(data) == whole(8, 160)
        assert samples_of(runner.dataset()) == whole(9, 160)


def test_a_pass_that_is_left_while_a_worker_is_busy_begins_again_all_the_same(workers):
    def slow(epoch):
        for number in itertools.count():
            time.sleep(0.02)
            yield (np.full(8, 1000 * epoch + number),)

    with QueueRunner(slow, 8, 2, workers, capacity=16, min_after_dequeue=0) as runner:
        for epoch in range(4):
            for (batch,) in runner.dataset().take(3):
                assert (batch.numpy() // 1000 == epoch).all()


def test_endless_and_nested_batches_begin_again_too(workers):
    def endless(epoch):
        for number in itertools.count():
            yield {"x": (np.full((4, 2), epoch), {"y": np.full(4, number)})}

    with QueueRunner(endless, 4, 1, workers, **SMALL) as runner:
        for epoch in range(3):
            for batch in runner.dataset().take(5):
                assert (batch["x"][0].numpy() == epoch).all()
                assert (batch["x"][1]["y"].numpy() < 64).all()


def test_a_pass_left_within_text_or_large_samples_begins_again():
    def text(epoch):
        for _ in range(30):
            yield (np.array([f"{epoch}"] * 4),)

    def large(epoch):
        for _ in range(30):
            yield (np.full((4, 128, 256), epoch, np.float64),)

    for factory, of in ((text, str.encode), (large, float)):
        with QueueRunner(factory, 4, 2, "process", **SMALL) as runner:
            for epoch in range(3):
                for (batch,) in runner.dataset().take(4):
                    assert (batch.numpy() == of(str(epoch))).all()
            assert sum(len(batch) for (batch,) in runner.dataset()) == 2 * 30 * 4


def test_one_iterator_that_is_kept_goes_on():
    with QueueRunner(batches_of(20), 8, **SMALL) as runner:
        kept = iter(runner.dataset())
        first = samples_of(itertools.islice(kept, 12))
        rest = samples_of(kept)
    assert len(first) == 96 and sorted(first + rest) == whole(0, 160)


def test_repeat_makes_one_pass_after_the_other(workers):
    with QueueRunner(batches_of(6), 8, 2, workers, **SMALL) as runner:
        assert samples_of(runner.dataset().repeat(3)) == whole(0, 48) + whole(1, 48) + whole(2, 48)


@pytest.mark.parametrize("shuffle", [False, True])
def test_nobody_who_drops_an_iterator_waits_for_the_tuning_of_it(shuffle):
    """By TensorFlow's tuning each second one that is three seconds old takes two more to end."""
    with QueueRunner(batches_of(9), 8, 1, shuffle=shuffle) as runner:
        options = runner.dataset().map(lambda *batch: batch).options()
    assert options.autotune.enabled is False


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_iterator_goes_on_in_a_function_and_back_in_python(shuffle):
    options = SMALL if shuffle else {"capacity": 64, "shuffle": False, "order": "fixed"}
    with QueueRunner(batches_of(40), 8, 1, seed=0, **options) as runner:
        iterator = iter(runner.dataset())
        assert isinstance(iterator, tf.data.Iterator)

        @tf.function
        def two(some):
            return next(some)[0], some.get_next()[0]

        seen = [next(iterator)[0] for _ in range(3)]
        seen += two(iterator)
        seen += [next(iterator)[0], iterator.get_next()[0], *two(iterator)]
        if not shuffle:
            assert runner._place.taken() == 9
        seen += [index for index, _ in iterator]
        with pytest.raises(StopIteration):
            next(iterator)
        index = np.concatenate(seen).tolist()
        assert (sorted(index) if shuffle else index) == whole(0, 320)


def test_one_batch_is_taken_ahead_of_a_step_and_none_of_a_loop():
    """A step of `fit` overlaps with it; of an endless pass it would never come to a loop."""

    def watched(iterator):
        iterator.as_in_fit()
        return next(iterator)

    with QueueRunner(batches_of(9), 8, 1, capacity=128, min_after_dequeue=0) as runner:
        for take, ahead in ((next, 0), (tf.function(lambda some: next(some)), 1), (watched, 1)):
            iterator = iter(runner.dataset())
            taken = [take(iterator)]
            wait_until(lambda: runner.samples == 72)
            time.sleep(0.1)  # for one that should not be taken
            left = 64 - 8 * ahead
            wait_until(lambda left=left: runner.depth() <= left)
            assert runner.depth() == left
            taken += iterator
            assert len(samples_of(taken)) == 72


def test_an_error_behind_the_last_batch_that_a_step_took_is_not_lost():
    """It is not told to who reads ahead: the next pass has it, also without a `with` block."""

    all_taken = threading.Event()

    def late(epoch):
        yield from batches_of(5)(0, 1, epoch)
        if epoch == 0 and all_taken.wait(20):
            raise ValueError("behind all of them")

    runner = QueueRunner(late, 8, 1, capacity=128, min_after_dequeue=0)
    step = tf.function(lambda some: next(some))
    iterator = iter(runner.dataset())
    for _ in range(5):
        step(iterator)
    all_taken.set()
    wait_until(lambda: runner.error is not None)
    time.sleep(0.1)  # for one who reads ahead
    with pytest.raises((WorkerError, tf.errors.OpError), match="behind all of them"):
        list(runner.dataset())
    runner.stop()


def test_of_two_iterators_alive_the_older_one_is_told(workers):
    with QueueRunner(batches_of(20), 8, 2, workers, **SMALL) as runner:
        data = runner.dataset()
        older = iter(data)
        next(older)
        newer = iter(data)
        taken = [next(newer)]
        with pytest.raises(tf.errors.OpError, match=r"WorkerError.*another iteration.*one at a"):
            for _ in older:
                pass
        assert samples_of(itertools.chain(taken, newer)) == whole(1, 160)


def test_an_iterator_that_several_passes_have_overtaken_is_told_too():
    with QueueRunner(batches_of(20), 8, **SMALL) as runner:
        older = iter(runner.dataset())
        next(older)
        for _ in range(4):
            list(runner.dataset().take(2))
        with pytest.raises(tf.errors.OpError, match="another iteration"):
            list(older)


def test_an_iterator_that_was_waiting_when_another_began_is_told():
    told, older_was_told = [], threading.Event()

    def dries_up(epoch):
        yield (np.zeros(8),)
        if epoch == 0:
            older_was_told.wait(20)

    def waits(iterator):
        try:
            list(iterator)
        except tf.errors.OpError as error:
            told.append(str(error))
        older_was_told.set()

    with QueueRunner(dries_up, 8, capacity=64, min_after_dequeue=0) as runner:
        older, data = iter(runner.dataset()), runner.dataset()
        next(older)
        waiting = threading.Thread(target=waits, args=(older,))
        waiting.start()
        assert len(list(data)) == 1
        waiting.join(20)
    assert len(told) == 1 and "another iteration" in told[0]


def test_a_graphs_runner_begins_a_fresh_pass_at_each_start():
    with tf.Graph().as_default():
        runner = QueueRunner(batches_of(12), 8, 2, **SMALL)
        index, _ = runner.get_inputs()
        seen = []
        for steps in (3, 5, 1000):
            seen.append([])
            with v1.Session() as sess, runner.start(sess):
                try:
                    for _ in range(steps):
                        seen[-1] += sess.run(index).tolist()
                except tf.errors.OutOfRangeError:
                    pass
    assert [{i // 1000 for i in part} for part in seen] == [{0}, {1}, {2}]
    assert sorted(seen[-1]) == whole(2, 96)


def test_after_a_stop_the_passes_are_counted_on(workers):
    runner = QueueRunner(batches_of(4), 8, 1, workers, **SMALL)
    for epoch in range(3):
        with runner:
            assert samples_of(runner.dataset()) == whole(epoch, 32)


def test_what_a_worker_raises_in_a_pass_that_was_given_up_is_told(workers):
    def fails_late(epoch):
        yield (np.zeros(8),)
        time.sleep(0.2)
        if epoch == 0:
            raise OSError("no disk")
        yield (np.zeros(8),)

    runner = QueueRunner(fails_late, 8, 1, workers, capacity=64, min_after_dequeue=0)
    with pytest.raises(WorkerError, match="no disk"), runner:
        next(iter(runner.dataset()))
        list(runner.dataset())


# -- Keras ---------------------------------------------------------------------------------------


class Steps(tf.keras.callbacks.Callback):
    """Counts the steps of each epoch of training, and of each evaluation."""

    def __init__(self):
        super().__init__()
        self.train, self.test = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.train.append(0)

    def on_train_batch_end(self, batch, logs=None):
        self.train[-1] += 1

    def on_test_begin(self, logs=None):
        self.test.append(0)

    def on_test_batch_end(self, batch, logs=None):
        self.test[-1] += 1


def points(number, known=False):
    """`number` batches of 32 (x, y) pairs."""

    class Points:
        def __call__(self, worker, n_workers):
            for _ in range(worker, number, n_workers):
                yield np.ones((32, 1), np.float32), np.ones((32, 1), np.float32)

    class Sized(Points):
        def __len__(self):
            return number

    return (Sized if known else Points)()


@pytest.fixture
def line():
    model = tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)])
    model.compile(tf.keras.optimizers.SGD(0.0), loss="mse")
    return model


@pytest.mark.parametrize(("workers", "how"), [("thread", "samples"), ("process", "len")])
def test_fit_by_steps_makes_them_in_each_epoch_where_the_length_is_known(line, workers, how):
    steps = Steps()
    given = {"samples": 640} if how == "samples" else {}
    training = QueueRunner(points(20, how == "len"), 32, 2, workers, 200, 64, **given)
    held_out = QueueRunner(points(20), 32, 1, workers, 200, 64)
    with training, held_out, warnings.catch_warnings():
        warnings.simplefilter("error")  # Keras's "ran out of data" among them
        data = training.dataset()
        assert int(data.cardinality()) == 20
        given = {"steps_per_epoch": 20, "verbose": 0, "shuffle": False, "callbacks": [steps]}
        line.fit(data, epochs=4, validation_data=held_out.dataset(), validation_steps=10, **given)
        line.fit(data, **given)
    assert steps.train == [20] * 5
    assert steps.test == [10] * 4


def test_a_dataset_of_known_length_needs_no_steps_and_keras_says_nothing(line):
    steps = Steps()
    runner = QueueRunner(points(7), 32, capacity=200, min_after_dequeue=64, samples=224)
    with runner, warnings.catch_warnings():
        warnings.simplefilter("error")
        line.fit(runner.dataset(), epochs=3, shuffle=False, verbose=0, callbacks=[steps])
    assert steps.train == [7, 7, 7]


def test_fit_by_steps_over_data_of_unknown_length_is_told_the_cure(line):
    """It trains [20, 0, 20, 0] steps, as over any dataset of tf.data."""
    steps = Steps()
    runner = QueueRunner(points(20), 32, capacity=200, min_after_dequeue=64)
    with runner, pytest.warns(RuntimeWarning, match="Leave steps_per_epoch away") as said:
        line.fit(runner.dataset(), epochs=4, steps_per_epoch=20, verbose=0, callbacks=[steps])
    assert steps.train == [20, 0, 20, 0]
    assert len([w for w in said if "QueueRunner" in str(w.message)]) == 1


def test_nothing_is_said_of_steps_where_none_were_given(line):
    training, held_out = (
        QueueRunner(points(n), 32, capacity=200, min_after_dequeue=64) for n in (5, 3)
    )
    steps = Steps()
    with training, held_out, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        held_out_data = held_out.dataset()
        line.fit(
            training.dataset(), epochs=3, validation_data=held_out_data, verbose=0,
            callbacks=[steps],
        )  # fmt: skip
        # Validation reaches its end inside of a fit by steps; that is no fault of the steps.
        line.fit(
            training.dataset(), steps_per_epoch=5, validation_data=held_out_data, verbose=0,
            callbacks=[steps],
        )  # fmt: skip
    assert steps.train == [5, 5, 5, 5] and steps.test == [3, 3, 3, 3]
    assert [str(w.message) for w in said if "QueueRunner" in str(w.message)] == []


def test_evaluate_and_predict_by_steps_see_as_many_each_time(line, workers):
    steps = Steps()
    with QueueRunner(points(9), 32, 1, workers, 200, 64) as runner:
        data = runner.dataset()
        for _ in range(4):
            line.evaluate(data, steps=7, verbose=0, callbacks=[steps])
        assert [len(line.predict(data, steps=4, verbose=0)) for _ in range(2)] == [128, 128]
    assert steps.test == [7, 7, 7, 7]


def test_a_second_fit_sees_other_batches_of_an_endless_iterator(small_mnist):
    data = MnistDataGenerator(16, data=small_mnist)
    for factory in (data.train_iterator, data.passes_iterator):
        with QueueRunner(factory, 16, capacity=64, min_after_dequeue=0) as runner:
            first, second = (
                [images.numpy() for images, _ in runner.dataset().take(4)] for _ in range(2)
            )
        assert not any(np.array_equal(a, b) for a in first for b in second)


def test_a_pass_of_another_length_than_was_told_is_an_error(workers):
    for told in (600, 700):
        runner = QueueRunner(points(20), 32, 1, workers, 200, 64, samples=told)
        kinds = (tf.errors.OpError, WorkerError)
        with pytest.raises(kinds, match=r"640|more than the 19 batches"), runner:
            list(runner.dataset())


def test_a_length_in_batches_serves_where_it_tells_the_length_in_samples():
    def lengths(batch_size, **given):
        with QueueRunner(points(20, True), batch_size, 1, "thread", 200, 64, **given) as runner:
            return int(runner.dataset().cardinality())

    assert lengths(32) == 20 and lengths(64, samples=None) == 10
    assert lengths(48) == lengths(16) == tf.data.UNKNOWN_CARDINALITY
    # Who goes on without a lost worker cannot promise how much will come.
    assert lengths(32, on_error="continue") == tf.data.UNKNOWN_CARDINALITY


STRATEGY = """
import labkit
import numpy as np
from labkit.quiet import tf

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)

def factory(worker, n_workers):
    for number in range(worker, 20, n_workers):
        part = np.arange(32 * number, 32 * number + 32, dtype=np.float32)[:, None] / 640
        yield part, part

class Steps(tf.keras.callbacks.Callback):
    counts = []
    def on_epoch_begin(self, epoch, logs=None):
        self.counts.append(0)
    def on_train_batch_end(self, batch, logs=None):
        self.counts[-1] += 1

losses, kept = [], labkit.watch()
options = {"capacity": 200, "min_after_dequeue": 64, "order": "fixed"}
for callbacks, lengths in (([Steps()], [{}]), ([Steps(), kept], [{}, {"samples": 640}])):
    tf.keras.utils.set_random_seed(1)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    for known in lengths:
        with labkit.QueueRunner(factory, 32, 2, **options, **known) as runner:
            given = {"epochs": 2, "verbose": 0, "shuffle": False, "callbacks": callbacks}
            losses.append(model.fit(runner.dataset(), **given).history["loss"])
print(Steps.counts, losses[0] == losses[1], [epoch.steps for epoch in kept.epochs])
"""


@pytest.mark.slow  # a program that compiles four training steps
def test_under_a_mirrored_strategy_each_epoch_is_whole_and_watch_changes_no_loss(tmp_path):
    done = run_program(STRATEGY, tmp_path)
    expected = f"{[20] * 6} True [19, 20]"
    assert done.stdout.splitlines()[-1:] == [expected], done.stdout + done.stderr


def test_a_session_that_had_the_queue_before_is_refused(workers):
    """Its queue is closed for good: it would end at once, without a sample."""
    with tf.Graph().as_default():
        runner = QueueRunner(batches_of(6), 8, 2, workers, **SMALL)
        runner.get_inputs()
        with v1.Session() as sess:
            with runner.start(sess):
                pass
            with pytest.raises(RuntimeError, match="a new session of the same graph"):
                runner.start(sess)


@pytest.mark.parametrize("steps", [10, 20])
def test_where_the_length_is_known_no_steps_are_warned_of(line, steps):
    counted = Steps()
    runner = QueueRunner(points(20), 32, capacity=200, min_after_dequeue=64, samples=640)
    with runner, warnings.catch_warnings():
        warnings.simplefilter("error")
        line.fit(
            runner.dataset(), epochs=3, steps_per_epoch=steps, shuffle=False, verbose=0,
            callbacks=[counted],
        )  # fmt: skip
    assert counted.train == ([10, 10, 10] if steps == 10 else [20, 20, 20])


def test_in_graph_mode_one_start_is_one_pass():
    assert sorted(
        i for index, _ in in_graph(QueueRunner(batches_of(6), 8, 2, **SMALL)) for i in index
    ) == whole(0, 48)
