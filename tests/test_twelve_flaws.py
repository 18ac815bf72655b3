"""The article's flaws, one test each: what was wrong there holds no longer here.

Where it is cheap, the article's way is written out beside labkit's, to show that the check would
catch it.
"""

import os
import time

import numpy as np
import pytest

import labkit
from labkit import MnistDataGenerator, QueueRunner, WorkerError, busy_python, distort, sleep
from labkit.data import Mnist
from labkit.model import build_model, model_fn
from labkit.quiet import tf
from labkit.train import train
from tests.consumers import IN_SECONDS

v1 = tf.compat.v1
RNG = np.random.default_rng(0)
BATCH = RNG.random((8, 28, 28, 1), np.float32), np.eye(10, dtype=np.float32)[np.arange(8)]


def placeholders():
    return {
        "images": v1.placeholder(tf.float32, [None, 28, 28, 1]),
        "labels": v1.placeholder(tf.float32, [None, 10]),
    }


def feed(inputs, batch=BATCH):
    return {inputs["images"]: batch[0], inputs["labels"]: batch[1]}


def session():
    sess = v1.Session()
    sess.run(v1.global_variables_initializer())
    return sess


def test_flaw_01_validation_reads_the_test_set(monkeypatch):
    # Every training digit is labelled 0 and every test digit 1: a model that has learned the
    # training set is right about none of the test set. Validated on training data, it would be
    # right about all.
    images = RNG.integers(0, 256, (200, 28, 28), np.uint8)
    zeros, ones = np.zeros(200, np.uint8), np.ones(200, np.uint8)
    data = Mnist(images, zeros, images, ones)
    monkeypatch.setattr("labkit.data.load_mnist", lambda: data)
    (epoch,) = train(
        "feed_dict", epochs=1, steps=60, delay=0.0, learning_rate=0.01, progress=False
    ).epochs
    assert epoch.train_accuracy > 0.9
    assert epoch.valid_accuracy == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: MnistDataGenerator(0),
        lambda: MnistDataGenerator(32, work="heavy"),
        lambda: next(MnistDataGenerator(32).epoch_iterator(5, 4)),
        lambda: sleep(-1),
        lambda: busy_python(-1),
        lambda: distort(-1),
        lambda: QueueRunner(MnistDataGenerator(32).train_iterator, batch_size=0),
        lambda: build_model(tf.zeros((8, 784)), is_train=True),
        lambda: train(steps=0),
    ],
)
def test_flaw_02_errors_are_raised_and_not_only_made(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_flaw_03_a_confident_mistake_gives_a_finite_loss():
    with tf.Graph().as_default():
        inputs = placeholders()
        spec = model_fn(inputs)
        with session() as sess:
            # The last layer's bias makes the model certain of class 9, which no sample has.
            bias = next(v for v in v1.global_variables() if v.op.name == "model/dense2/bias")
            sess.run(bias.assign([0.0] * 9 + [1e4]))
            softmax, ours = sess.run((spec["softmax"], spec["loss"]), feed(inputs))
            # The article's loss, in NumPy, since TensorFlow's optimiser may rewrite the ops.
            with np.errstate(divide="ignore", invalid="ignore"):
                assert not np.isfinite(-(BATCH[1] * np.log(softmax)).sum())
            assert ours == pytest.approx(1e4, rel=0.1)
            sess.run(spec["train_op"], feed(inputs))
            weights = sess.run(v1.trainable_variables())
    assert all(np.isfinite(weight).all() for weight in weights)


def test_flaw_04_batch_normalisation_knows_training_from_validation():
    with tf.Graph().as_default():
        training, validation = placeholders(), placeholders()
        train_spec = model_fn(training)
        valid_spec = model_fn(validation, reuse=True, is_train=False)
        averages = [v for v in v1.global_variables("model") if "moving_" in v.name]
        with session() as sess:
            start = sess.run(averages)
            # The article's training used the initial averages: both modes gave the same logits.
            logits = [
                sess.run(spec["logits"], feed(inputs))
                for spec, inputs in ((train_spec, training), (valid_spec, validation))
            ]
            sess.run(train_spec["train_op"], feed(training))
            moved = sess.run(averages)
    assert not np.allclose(*logits, rtol=0.1)
    assert len(averages) == 8
    assert all(not np.array_equal(a, b) for a, b in zip(start, moved, strict=True))


def test_flaw_05_the_callers_dict_is_left_alone():
    with tf.Graph().as_default():
        inputs = placeholders()
        images, labels = inputs["images"], inputs["labels"]
        spec = model_fn(inputs)
    assert set(inputs) == {"images", "labels"} and spec is not inputs
    assert inputs["images"] is images and inputs["labels"] is labels


def test_flaw_06_validation_summaries_take_nothing_off_the_training_queue():
    def finite():
        yield np.zeros((96, 28, 28, 1), np.float32), np.zeros((96, 10), np.float32)

    with tf.Graph().as_default():
        runner = QueueRunner(finite, 32, capacity=200, min_after_dequeue=0)
        queued = dict(zip(("images", "labels"), runner.get_inputs(), strict=True))
        fed = placeholders()
        model_fn(queued)
        spec = model_fn(fed, reuse=True, is_train=False)
        articles = v1.summary.merge_all()
        with session() as sess, runner.start(sess):
            deadline = time.monotonic() + 10
            while runner.depth() < 96 and time.monotonic() < deadline:
                time.sleep(0.01)
            for _ in range(3):
                sess.run(spec["summary_op"], feed(fed))
            assert runner.depth() == 96
            sess.run(articles, feed(fed))
            assert runner.depth() == 64


def test_flaw_07_a_dying_producer_ends_training_with_its_error():
    # The article's loop would wait for ever here; conftest.py's limit would end it.
    def dies():
        yield np.zeros((32, 28, 28, 1), np.float32), np.zeros((32, 10), np.float32)
        raise OSError("the disk is gone")

    with tf.Graph().as_default():
        runner = QueueRunner(dies, 32, capacity=200, min_after_dequeue=0)
        inputs = runner.get_inputs()
        began = time.monotonic()
        with (
            pytest.raises(WorkerError, match="the disk is gone"),
            v1.Session() as sess,
            runner.start(sess),
        ):
            while True:
                sess.run(inputs)
        assert time.monotonic() - began < IN_SECONDS


def test_flaw_08_images_take_one_byte_a_pixel_in_memory_and_four_in_a_batch():
    data = MnistDataGenerator(32)
    assert data.data.x_train.nbytes == 60_000 * 28 * 28  # the article's float64: 376 MB
    images, labels = next(data.train_iterator())
    assert images.dtype == labels.dtype == np.float32


def test_flaw_09_there_are_processes_for_generators_that_hold_the_lock():
    def factory(worker):
        import os

        import numpy as np

        while True:
            yield np.full(4, worker), np.full(4, os.getpid())

    with tf.Graph().as_default():
        runner = QueueRunner(factory, 8, 2, "process", capacity=64, min_after_dequeue=0)
        inputs = runner.get_inputs()
        made_by = {}
        with v1.Session() as sess, runner.start(sess):
            deadline = time.monotonic() + 30
            while len(made_by) < 2 and time.monotonic() < deadline:
                made_by.update(zip(*(part.tolist() for part in sess.run(inputs)), strict=True))
    # A process of its own for each, and none of them this one: no lock is shared.
    assert set(made_by) == {0, 1}
    assert len({os.getpid(), *made_by.values()}) == 3


def test_flaw_10_an_epoch_has_every_sample_exactly_once(numbered, index_of):
    data = MnistDataGenerator(25, data=numbered)

    def seen(iterator):
        return [i for _ in range(20) for i in index_of(next(iterator)[0])]

    assert sorted(seen(data.passes_iterator())) == list(range(500))
    # The article's windows, of which an equal number misses about a third.
    assert len(set(seen(data.train_iterator()))) < 450


def test_flaw_11_the_model_builds_where_keras_3_took_the_layers_away():
    with pytest.raises(AttributeError):
        v1.layers.conv2d  # noqa: B018 - the article's code ends here
    with tf.Graph().as_default():
        inputs = placeholders()
        spec = model_fn(inputs)
        with session() as sess:
            _, loss = sess.run((spec["train_op"], spec["loss"]), feed(inputs))
    assert np.isfinite(loss)


def test_flaw_12_it_says_what_the_bottleneck_is_and_how_many_workers_cure_it():
    """tests/test_diagnosis.py has the other bottleneck, the model."""
    data = MnistDataGenerator(32, sleep(0.03))
    given = {"seconds": 5, "progress": False, "workers": "thread"}  # processes take long to start
    report = labkit.diagnose(data.passes_iterator, 0.002, **given)
    assert report.verdict.startswith("Input-bound")
    assert report.best.n >= 4 and report.speed_up > 2
