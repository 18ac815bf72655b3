"""diagnose leaves the model as it was: Keras's in any form, a callable, a number."""

import sys
import time

import cloudpickle
import numpy as np
import pytest

import labkit
from labkit import WorkerError
from labkit.instruments.measure import Watch
from labkit.quiet import tf
from labkit.workloads import sleep
from tests.producers import heavy, light

NO_TIME = {"seconds": 0.01, "progress": False, "workers": "thread"}
VERY_QUICK = {"seconds": 0.8, "progress": False}
QUICK = {"seconds": 3.0, "progress": False}
# By value: a worker process that imported this file would import TensorFlow with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


# -- the model -----------------------------------------------------------------------------------


def test_a_keras_model_keeps_its_weights_and_its_optimizers_state(few_settings):
    model = tf.keras.Sequential([tf.keras.layers.Input((4,)), tf.keras.layers.Dense(1)])
    model.compile("adam", "mse")
    rng = np.random.default_rng(0)
    data = rng.normal(size=(64, 4)), rng.normal(size=(64, 1))
    model.fit(*data, verbose=0)
    before = [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
    report = labkit.diagnose(heavy(sleep(0.005)), model, **VERY_QUICK)
    report.check(0.3)
    after = [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert report.model_rate > report.serial_rate


@pytest.mark.parametrize("takes", ["one batch", "x and y"])
def test_a_callable_step_gets_the_batch_in_its_own_form(takes, few_settings):
    seen = []

    def whole(batch):
        seen.append(tuple(part.shape for part in batch))
        time.sleep(0.001)

    def apart(x, y):
        whole((x, y))

    labkit.diagnose(light, whole if takes == "one batch" else apart, **NO_TIME)
    assert set(seen) == {((8, 4), (8, 1))}


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_callable_step_changes_is_restored_each_time(fails, few_settings):
    weights, restored = {"value": 0}, []

    def step(batch):
        weights["value"] += 1
        if fails and weights["value"] == 20:
            raise ArithmeticError("the loss is not finite")

    def restore():
        restored.append(weights["value"])
        weights["value"] = 0

    if fails:
        with pytest.raises(ArithmeticError, match="not finite"):
            labkit.diagnose(light, step, restore=restore, **NO_TIME)
        assert restored == [20] and weights["value"] == 0
        return
    report = labkit.diagnose(light, step, restore=restore, **NO_TIME)
    assert len(restored) == 1 and restored[0] > 0 and weights["value"] == 0
    report.check(0.01)
    assert len(restored) == 2 and restored[1] > 0 and weights["value"] == 0
    assert "really taken" not in str(report)


def test_without_restore_the_report_says_how_often_a_callable_step_was_really_taken(few_settings):
    taken = []
    report = labkit.diagnose(light, lambda batch: taken.append(1), **NO_TIME)
    for _ in range(2):
        says = f"really taken, {len(taken):,} times"
        assert says in str(report) and says in report._repr_html_()
        assert "restore=" in str(report)
        report.check(0.01)
    assert "really taken" not in str(labkit.diagnose(light, 0.0001, **NO_TIME))


@pytest.mark.parametrize("model", [None, "resnet", -1, 0, True])
def test_a_wrong_model_is_named(model):
    with pytest.raises(TypeError, match="compiled Keras model, a callable train step or the sec"):
        labkit.diagnose(light, model, **QUICK)


def test_a_model_that_is_not_compiled_is_named():
    with pytest.raises(TypeError, match="compile"):
        labkit.diagnose(light, tf.keras.Sequential([tf.keras.layers.Dense(1)]), **QUICK)


def test_the_generators_own_error_arrives():
    def broken(worker=0):
        yield np.zeros((8, 4)), np.zeros((8, 1))
        raise OSError("no disk")

    with pytest.raises(WorkerError, match=r"(?s)raise OSError.*no disk"):
        labkit.diagnose(broken, 0.01, **QUICK)


# -- a Keras model is left as it was ---------------------------------------------------------------


def dense_model(**first):
    layers = tf.keras.layers
    return [layers.Dense(8, **first), layers.BatchNormalization(), layers.Dropout(0.5)]


def compiled(model):
    rate = tf.keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    model.compile(tf.keras.optimizers.Adam(rate), "mse", metrics=["mae"], jit_compile=False)
    return model


def sequential():
    return compiled(tf.keras.Sequential([*dense_model(), tf.keras.layers.Dense(1)]))


def functional_of_a_dict():
    inputs = {name: tf.keras.Input((4,), name=name) for name in "ab"}
    x = tf.keras.layers.Concatenate()(list(inputs.values()))
    for layer in [*dense_model(), tf.keras.layers.Dense(1)]:
        x = layer(x)
    return compiled(tf.keras.Model(inputs, x))


def subclass_of_a_pair():
    class Pair(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.body, self.head = dense_model(), tf.keras.layers.Dense(1)

        def call(self, pair, training=False):
            x = pair[0] + pair[1]
            for layer in self.body:
                x = layer(x, training=training) if layer is not self.body[0] else layer(x)
            return self.head(x)

    return compiled(Pair())


def own_loss():
    class Code(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.net = tf.keras.Sequential([*dense_model(), tf.keras.layers.Dense(4)])

        def call(self, x, training=False):
            made = self.net(x, training=training)
            self.add_loss(tf.reduce_mean(tf.square(made - x)))
            return made

    model = Code()
    model.compile("adam", jit_compile=False)
    return model


def two_optimizers():
    class Two(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.nets = [tf.keras.layers.Dense(4), tf.keras.layers.Dense(4)]
            self.second = tf.keras.optimizers.Adam(0.1)
            self.loss_seen = tf.keras.metrics.Mean("loss_seen")

        def train_step(self, x):
            for net, optimizer in zip(self.nets, (self.optimizer, self.second), strict=True):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(net(x) - x))
                weights = net.trainable_variables
                optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
                self.loss_seen.update_state(loss)
            return {"loss_seen": self.loss_seen.result()}

    model = Two()
    model.compile("adam", jit_compile=False)
    return model


def drawn(form):
    """An iterator factory of batches of 8 in a form that `fit` takes."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)).astype("f4"), rng.normal(size=(8, 1)).astype("f4")
    batch = {
        "x": (x,),
        "x y": (x, y),
        "dict": ({"a": x, "b": x + 1}, y),
        "pair y weights": ((x, x + 1), y, np.arange(8, dtype="f4")),
        "array": x,
    }[form]

    def batches():
        while True:
            yield batch

    return batches, tf.data.Dataset.from_tensors(batch).repeat()


def state_of(model):
    optimizers = [model.optimizer, *([model.second] if hasattr(model, "second") else [])]
    variables = [*model.variables, *model.metrics_variables]
    variables += [variable for optimizer in optimizers for variable in optimizer.variables]
    return [variable.numpy() for variable in variables]


def same(before, after):
    return len(before) == len(after) and all(map(np.array_equal, before, after))


@pytest.mark.parametrize(
    ("make", "form"),
    [
        pytest.param(sequential, "x y", marks=pytest.mark.slow),
        (functional_of_a_dict, "dict"),
        pytest.param(subclass_of_a_pair, "pair y weights", marks=pytest.mark.slow),
        pytest.param(own_loss, "x", marks=pytest.mark.slow),
        pytest.param(two_optimizers, "array", marks=pytest.mark.slow),
    ],
)
def test_an_unbuilt_model_is_as_good_as_new_afterwards(make, form, few_settings):
    """Its first fit makes of it what it makes of a twin that was not diagnosed."""
    batches, dataset = drawn(form)
    twins = []
    for _ in range(2):
        tf.keras.utils.set_random_seed(1)
        twins.append(make())
    for turn, model in enumerate(twins):
        if turn:
            report = labkit.diagnose(batches, model, **NO_TIME)
            diagnosed = state_of(model)
            assert int(model.optimizer.iterations.numpy()) == 0
            report.check(0.01)
            assert same(diagnosed, state_of(model))
            assert not hasattr(model, "history") and model.stop_training is False
        model.fit(dataset, steps_per_epoch=5, verbose=0, shuffle=False)
    for one, other in zip(*map(state_of, twins), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    assert int(twins[1].optimizer.iterations.numpy()) == 5


def broken_at_the_fourth():
    batches, _ = drawn("x y")
    for turn, batch in enumerate(batches()):
        if turn == 3:
            raise OSError("no disk")
        yield batch


@pytest.mark.parametrize("ending", ["normal", "error", "interrupt"])
def test_a_model_in_training_is_left_as_it_was(ending, monkeypatch, few_settings):
    model, (batches, dataset) = sequential(), drawn("x y")
    history = model.fit(dataset, steps_per_epoch=5, verbose=0, shuffle=False)
    model.stop_training = "as the user left it"
    before = state_of(model)
    if ending == "normal":
        labkit.diagnose(batches, model, **NO_TIME).check(0.01)
    elif ending == "error":
        with pytest.raises(WorkerError, match="no disk"):
            labkit.diagnose(broken_at_the_fourth, model, **NO_TIME)
    else:
        monkeypatch.setattr(Watch, "enough", interrupted_after(30))
        with pytest.raises(KeyboardInterrupt):
            labkit.diagnose(batches, model, **NO_TIME)
    assert same(before, state_of(model)), "weights, optimizer, seeds or metrics have changed"
    assert int(model.optimizer.iterations.numpy()) == 5
    assert model.history is history and model.stop_training == "as the user left it"


def interrupted_after(steps):
    taken = []

    def enough(self):
        taken.append(1)
        if len(taken) == steps:
            raise KeyboardInterrupt
        return False

    return enough


def test_a_model_that_no_batch_can_build_is_told_to_be_built_first():
    class Picky(tf.keras.Model):
        def call(self, x):
            return tf.keras.layers.Dense(1)(float(x.numpy()[0]))

    model = Picky()
    model.compile("adam", "mse")
    with pytest.raises(TypeError, match=r"(?s)Picky.*AttributeError.*build it first"):
        labkit.diagnose(light, model, **NO_TIME)
    assert int(model.optimizer.iterations.numpy()) == 0
