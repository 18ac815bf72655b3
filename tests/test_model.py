"""The CNN: built twice, one set of weights; batch normalisation as training and validation need."""

import numpy as np
import pytest

from labkit.model import build_model, model_fn
from labkit.quiet import tf

v1 = tf.compat.v1


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        v1.set_random_seed(0)
        yield graph


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    images = rng.random((16, 28, 28, 1), np.float32)
    return images, np.eye(10, dtype=np.float32)[rng.integers(10, size=16)]


def placeholders():
    return {
        "images": v1.placeholder(tf.float32, [None, 28, 28, 1]),
        "labels": v1.placeholder(tf.float32, [None, 10]),
    }


def session():
    sess = v1.Session()
    sess.run(v1.global_variables_initializer())
    return sess


def feed(inputs, batch):
    return {inputs["images"]: batch[0], inputs["labels"]: batch[1]}


def moving(sess):
    names = [v for v in v1.global_variables("model") if "moving_" in v.name]
    return {v.name: value for v, value in zip(names, sess.run(names), strict=True)}


def test_it_is_the_articles_network():
    model_fn(placeholders())
    shapes = {v.op.name: v.shape.as_list() for v in v1.trainable_variables()}
    kernels = {name: shape for name, shape in shapes.items() if name.endswith("kernel")}
    assert kernels == {
        "model/conv1/kernel": [3, 3, 1, 4],
        "model/conv2/kernel": [3, 3, 4, 8],
        "model/conv3/kernel": [3, 3, 8, 8],
        "model/conv4/kernel": [3, 3, 8, 8],
        # Three pools take 28 to 14, 7 and 4.
        "model/dense1/kernel": [4 * 4 * 8, 64],
        "model/dense2/kernel": [64, 10],
    }
    assert sum(name.endswith("gamma") for name in shapes) == 4
    assert not any("moving" in name for name in shapes)


def test_a_second_build_makes_no_variable(graph):
    training, validation = placeholders(), placeholders()
    model_fn(training)
    before = [v.name for v in v1.global_variables()]
    model_fn(validation, reuse=True, is_train=False)
    assert [v.name for v in v1.global_variables()] == before


def test_reuse_must_be_said():
    with pytest.raises(ValueError, match="model/conv1/kernel"):
        model_fn(placeholders(), reuse=True, is_train=False)
    model_fn(placeholders())
    with pytest.raises(ValueError, match="model/conv1/kernel"):
        model_fn(placeholders())


def test_both_graphs_give_the_same_logits_in_the_same_mode(batch):
    one, other = placeholders(), placeholders()
    first = model_fn(one, is_train=False)
    second = model_fn(other, reuse=True, is_train=False)
    with session() as sess:
        a = sess.run(first["logits"], feed(one, batch))
        b = sess.run(second["logits"], feed(other, batch))
    assert a.shape == (16, 10) and np.abs(a).max() > 0
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_training_step_changes_validation(batch):
    training, validation = placeholders(), placeholders()
    train = model_fn(training, learning_rate=0.01)
    valid = model_fn(validation, reuse=True, is_train=False)
    with session() as sess:
        before = sess.run(valid["logits"], feed(validation, batch))
        sess.run(train["train_op"], feed(training, batch))
        after = sess.run(valid["logits"], feed(validation, batch))
    assert np.abs(after - before).max() > 1e-3


def test_training_learns_the_batch(batch):
    inputs = placeholders()
    spec = model_fn(inputs, learning_rate=0.01)
    with session() as sess:
        wanted = (spec["train_op"], spec["loss"], spec["accuracy"])
        scores = [sess.run(wanted, feed(inputs, batch))[1:] for _ in range(80)]
    assert scores[-1][0] < scores[0][0] / 4 and scores[-1][1] > 0.9


def test_the_loss_is_the_mean_cross_entropy_of_the_samples(batch):
    inputs = placeholders()
    spec = model_fn(inputs, is_train=False)
    with session() as sess:
        got = sess.run(
            {k: spec[k] for k in ("logits", "softmax", "loss", "accuracy")}, feed(inputs, batch)
        )
        twice = sess.run(spec["loss"], feed(inputs, [np.repeat(part, 2, 0) for part in batch]))
    softmax = np.exp(got["logits"]) / np.exp(got["logits"]).sum(1, keepdims=True)
    np.testing.assert_allclose(got["softmax"], softmax, rtol=1e-4)
    assert got["loss"] == pytest.approx(-np.log((softmax * batch[1]).sum(1)).mean(), rel=1e-4)
    assert got["accuracy"] == np.mean(softmax.argmax(1) == batch[1].argmax(1))
    # The article's sum over the batch would double.
    assert twice == pytest.approx(got["loss"], rel=1e-4)


def test_batch_normalisation_uses_the_batch_in_training_and_the_averages_in_validation(batch):
    training, validation = placeholders(), placeholders()
    train = model_fn(training)
    valid = model_fn(validation, reuse=True, is_train=False)
    scaled = batch[0] * 5 + 1, batch[1]
    with session() as sess:

        def change(spec, inputs):
            a, b = (sess.run(spec["logits"], feed(inputs, x)) for x in (batch, scaled))
            return np.abs(a - b).max() / np.abs(a).max()

        # Batch moments take scale and shift out (all but the epsilon, and the images' borders,
        # whose padding stays 0); the averages, still 0 and 1, leave them in.
        assert change(train, training) < 0.6
        assert change(valid, validation) > 2.0


def test_a_sample_depends_on_its_batch_in_training_only(batch):
    training, validation = placeholders(), placeholders()
    train = model_fn(training)
    valid = model_fn(validation, reuse=True, is_train=False)
    other = np.concatenate([batch[0][:1], np.zeros_like(batch[0][1:])]), batch[1]
    with session() as sess:

        def moved(spec, inputs):
            a, b = (sess.run(spec["logits"], feed(inputs, x))[0] for x in (batch, other))
            return np.abs(a - b).max()

        assert moved(train, training) > 1e-2
        assert moved(valid, validation) < 1e-5


def test_moving_averages_move_in_training_and_not_in_validation(batch):
    training, validation = placeholders(), placeholders()
    train = model_fn(training, learning_rate=0.0)
    valid = model_fn(validation, reuse=True, is_train=False)
    with session() as sess:
        start = moving(sess)
        assert len(start) == 8
        wanted = [valid[key] for key in ("loss", "accuracy", "summary_op", "logits")]
        sess.run(wanted, feed(validation, batch))
        kept = moving(sess)
        assert all(np.array_equal(kept[name], start[name]) for name in start)
        sess.run(train["train_op"], feed(training, batch))
        moved = moving(sess)
        assert all(not np.array_equal(moved[name], start[name]) for name in start)
        # With the weights standing still they settle on the batch's moments, where both modes
        # agree (fused_batch_norm averages the unbiased variance: hence the tolerance).
        for _ in range(100):
            sess.run(train["train_op"], feed(training, batch))
        a = sess.run(train["logits"], feed(training, batch))
        b = sess.run(valid["logits"], feed(validation, batch))
    np.testing.assert_allclose(a, b, atol=0.05 * np.abs(a).max())


def test_the_callers_dict_stays_as_it_is():
    inputs = placeholders()
    before = dict(inputs)
    spec = model_fn(inputs)
    assert inputs == before and spec is not inputs
    assert {"logits", "softmax", "loss", "accuracy", "summary_op", "train_op"} <= set(spec)


def test_validation_has_no_training_op():
    model_fn(placeholders())
    assert "train_op" not in model_fn(placeholders(), reuse=True, is_train=False)


@pytest.mark.parametrize("missing", ["images", "labels"])
def test_missing_inputs_are_named(missing):
    inputs = placeholders()
    del inputs[missing]
    with pytest.raises(KeyError, match=f"missing.*{missing}"):
        model_fn(inputs)


@pytest.mark.parametrize("shape", [[None, 28, 28], [None, 784]])
def test_images_of_another_rank_are_named(shape):
    with pytest.raises(ValueError, match=r"expected images \[batch, height, width, channels\]"):
        build_model(v1.placeholder(tf.float32, shape), is_train=True)


def test_other_image_sizes_and_channels_build():
    images = v1.placeholder(tf.float32, [None, 20, 33, 3])
    assert build_model(images, is_train=True).shape.as_list() == [None, 10]
