"""`labkit.watch`: what it measures is true, and Keras trains as it does without it."""

import math
import time

import numpy as np
import pytest

import labkit
from labkit import QueueRunner
from labkit.instruments.slowing import Slowing
from labkit.instruments.tap import Tap
from labkit.instruments.waiting import Waiting, total, verdict
from labkit.instruments.watch_fit import FitWatch
from labkit.quiet import tf

BATCHES, SIZE = 10, 8
X = np.random.default_rng(0).normal(size=(BATCHES * SIZE, 4)).astype(np.float32)
Y = X.sum(1, keepdims=True)


def new_model(**compiled):
    tf.keras.utils.set_random_seed(1)
    model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(1)])
    model.compile("adam", "mse", **compiled)  # which knows how many steps there were
    return model


def batches(pause=0.0):
    def factory():
        for first in range(0, len(X), SIZE):
            time.sleep(pause)
            yield X[first : first + SIZE], Y[first : first + SIZE]

    return factory


def dataset(pause=0.0):
    spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1)))
    return tf.data.Dataset.from_generator(batches(pause), output_signature=spec)


class Indexed(tf.keras.utils.PyDataset):
    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        return X[index * SIZE : (index + 1) * SIZE], Y[index * SIZE : (index + 1) * SIZE]


ALL_THAT_FIT_TAKES = {
    "arrays": lambda: {"x": X, "y": Y, "batch_size": SIZE},
    "dataset": lambda: {"x": dataset()},
    "batched dataset": lambda: {"x": tf.data.Dataset.from_tensor_slices((X, Y)).batch(SIZE)},
    "generator": lambda: {
        "x": (batch for _ in range(3) for batch in batches()()),
        "steps_per_epoch": BATCHES,
    },
    "PyDataset": lambda: {"x": Indexed()},
}


@pytest.mark.parametrize("data", ALL_THAT_FIT_TAKES.values(), ids=ALL_THAT_FIT_TAKES)
def test_keras_trains_as_without_it_on_all_that_fit_takes(data, capsys):
    losses, kept = [], labkit.watch()
    for callbacks in ([], [kept]):
        model = new_model()
        history = model.fit(**data(), epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        losses.append(history.history["loss"])
    assert losses[0] == losses[1]
    assert [epoch.steps for epoch in kept.epochs] == [BATCHES - 1, BATCHES]
    assert history.history["waiting_share"] == [epoch.share for epoch in kept.epochs]
    assert len(history.history["steps_per_second"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("labkit.watch: epoch") for line in lines] == [True, True, False]
    assert lines[2] == f"labkit.watch: {kept.verdict()}"


def test_a_runners_dataset_is_watched():
    kept = labkit.watch()
    with QueueRunner(batches(), SIZE, capacity=64, min_after_dequeue=16) as runner:
        new_model().fit(runner.dataset(), epochs=2, verbose=0, callbacks=[kept])
    assert [epoch.steps for epoch in kept.epochs] == [BATCHES - 1, BATCHES]


@pytest.mark.parametrize(
    ("compiled", "together"), [({"jit_compile": True}, 4), ({"run_eagerly": True}, 1)]
)
def test_compiled_in_whatever_way_the_losses_are_the_same(compiled, together):
    losses, kept = [], labkit.watch()
    for callbacks in ([], [kept]):
        model = new_model(steps_per_execution=together, **compiled)
        history = model.fit(dataset(), epochs=2, verbose=0, callbacks=callbacks)
        losses.append(history.history["loss"])
    assert losses[0] == losses[1]
    # Ten batches by fours: the first call, which compiles, is left out.
    assert [epoch.steps for epoch in kept.epochs] == [BATCHES - together, BATCHES]


def test_a_train_step_of_ones_own_is_watched():
    class Model(tf.keras.Sequential):
        def train_step(self, data):
            return {**super().train_step(data), "seen": tf.constant(7.0)}

    model, kept = Model([tf.keras.Input((4,)), tf.keras.layers.Dense(1)]), labkit.watch()
    model.compile("sgd", "mse")
    history = model.fit(dataset(), verbose=0, callbacks=[kept]).history
    assert history["seen"] == [7.0] and kept.epochs[0].steps == BATCHES - 1


def test_slow_data_show_as_waiting_and_data_that_are_there_do_not():
    slow, fast = labkit.watch(), labkit.watch()
    new_model().fit(dataset(0.03), epochs=2, verbose=0, callbacks=[slow])
    cached = tf.data.Dataset.from_tensors((X[:SIZE], Y[:SIZE])).repeat()

    class SlowStep(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.03)

    kept = [fast, SlowStep()]
    new_model().fit(cached, epochs=2, steps_per_epoch=BATCHES, verbose=0, callbacks=kept)
    assert slow.epochs[1].share > 0.5 > fast.epochs[1].share
    assert "highly input-bound" in slow.verdict() and "labkit.diagnose" in slow.verdict()


class Raises(tf.keras.callbacks.Callback):
    def __init__(self, where, error):
        super().__init__()
        self.where, self.error = where, error

    def set_model(self, model):
        super().set_model(model)
        setattr(self, self.where, self.fail)

    def fail(self, *_, **__):
        raise self.error


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("on_train_batch_begin", KeyboardInterrupt()),
        ("on_train_batch_end", ValueError("mine")),
        ("on_test_batch_end", KeyboardInterrupt()),
        ("on_epoch_end", ValueError("mine")),
    ],
)
def test_after_a_failure_the_model_is_as_keras_made_it(where, error):
    model, kept = new_model(), labkit.watch()
    model.fit(X, Y, SIZE, verbose=0)
    own = model.train_function
    with pytest.raises(type(error)):
        callbacks = [kept, Raises(where, error)]
        model.fit(X, Y, SIZE, verbose=0, validation_data=(X, Y), callbacks=callbacks)
    assert model.train_function is own or where == "on_train_batch_begin"
    seen = [epoch.steps for epoch in kept.epochs]
    before = int(model.optimizer.iterations)
    model.fit(X, Y, SIZE, verbose=0)
    assert model.train_function is own
    assert int(model.optimizer.iterations) - before == BATCHES
    if where != "on_train_batch_begin":
        assert [epoch.steps for epoch in kept.epochs] == seen
    model.fit(X, Y, SIZE, verbose=0, callbacks=[kept])
    assert [epoch.steps for epoch in kept.epochs] == [BATCHES - 1]
    assert model.train_function is own


def test_a_failure_in_a_step_is_the_users_and_leaves_nothing():
    def fails():
        yield from batches()()
        raise ValueError("the generator's own")

    spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1)))
    data = tf.data.Dataset.from_generator(fails, output_signature=spec)
    model, kept = new_model(), labkit.watch()
    with pytest.raises(tf.errors.InvalidArgumentError, match="the generator's own"):
        model.fit(data, verbose=0, callbacks=[kept])
    assert not isinstance(model.train_function, Tap)


def held(together):
    """Calls of which the batches are taken ahead at a time."""
    slowing = Slowing(together)
    return slowing.number + slowing.rests_after


def long(together):
    """Calls of which some train on batches taken ahead."""
    return 1 + Slowing(together).number + held(together) + 3


HELD, LONG = held(1), long(1)


def counted(n, fails_at=None):
    def factory():
        for number in range(n):
            if number == fails_at:
                raise ValueError("the generator's own")
            yield X[:SIZE] + number / n, Y[:SIZE]

    spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1)))
    return tf.data.Dataset.from_generator(factory, output_signature=spec)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("known", [False, True])
def test_batches_taken_ahead_are_trained_on_in_their_order(together, known):
    calls, losses, kept = long(together), [], labkit.watch()
    steps = calls * together if known else None
    for callbacks in ([], [kept]):
        model = new_model(steps_per_execution=together)
        data = counted(calls * together + (not known)).repeat(2 if known else 1)
        options = {"epochs": 2, "steps_per_epoch": steps, "verbose": 0, "shuffle": False}
        history = model.fit(data, callbacks=callbacks, **options)
        losses.append(history.history["loss"])
    assert losses[0] == losses[1]
    assert kept.epochs[0].calls == calls - 1 - held(together) + (not known)  # some were held


@pytest.mark.parametrize("known", [False, True])
def test_of_several_steps_a_call_most_are_left_to_keras(known):
    together, calls, losses, kept, turns = 8, 100, [], labkit.watch(), []
    steps = calls * together if known else None

    def turn(taker, own=kept._turn):
        turns.append(own(taker))
        return turns[-1]

    kept._turn = turn
    for callbacks in ([], [kept]):
        model = new_model(steps_per_execution=together)
        data = counted(calls * together + (0 if known else 3)).repeat(2 if known else 1)
        options = {"epochs": 2, "steps_per_epoch": steps, "verbose": 0, "shuffle": False}
        losses.append(model.fit(data, callbacks=callbacks, **options).history["loss"])
    assert losses[0] == losses[1]
    assert calls < sum(alone for alone, _ in turns) < 2 * calls
    steps = calls * together + (0 if known else 3)
    assert [epoch.steps for epoch in kept.epochs] == [steps - together, steps]


def test_an_epoch_as_long_as_what_is_taken_ahead_has_a_share():
    kept = labkit.watch()
    new_model().fit(
        counted(HELD * 2).repeat(), epochs=2, steps_per_epoch=HELD, verbose=0, callbacks=[kept]
    )
    assert [0 <= epoch.share <= 1 for epoch in kept.epochs] == [True, True]


def test_what_fails_while_batches_are_taken_ahead_fails_at_its_own_step():
    model, kept = new_model(), labkit.watch()
    with pytest.raises(tf.errors.InvalidArgumentError, match="the generator's own"):
        model.fit(counted(LONG, fails_at=LONG - 10), verbose=0, callbacks=[kept])
    assert int(model.optimizer.iterations) == LONG - 10
    were_held = kept.epochs[0].steps - kept.epochs[0].calls
    assert were_held == LONG - 10 - 1 - Slowing().number


def compared(before, alone, after):
    """`Slowing` of what calls of so many seconds took."""
    slowing = Slowing()
    slowing.most = 1000
    for seconds in before:
        assert not slowing.calls_to_hold(10, math.inf)
        slowing.note(seconds, held=False)
    assert not slowing.calls_to_hold(30, HELD - 1)
    assert slowing.calls_to_hold(30, HELD) == HELD
    for number in range(HELD):
        rests = number >= slowing.rests_after  # before, the producers still fill their buffers
        slowing.note(alone if rests else 1.0, held=True)
    assert not slowing.calls_to_hold(31, math.inf)
    for seconds in after:
        slowing.note(seconds, held=False)
    return slowing


def test_a_step_that_is_slower_while_data_are_made_counts_as_lost():
    steady = [0.005] * Slowing().number
    assert compared(steady, 0.002, []).seconds == 0.0  # not known yet
    assert compared(steady, 0.002, steady).seconds == pytest.approx(0.003)
    # A machine that gets slower, or faster, all the time.
    faster = [0.001] * Slowing().number
    assert compared(faster, 0.003, steady).seconds == 0.0
    assert compared(steady, 0.003, faster).seconds == 0.0
    # Chance.
    uneven = [0.001, 0.005] * (Slowing().number // 2)
    assert compared(uneven, 0.0028, uneven).seconds == 0.0
    lost = Waiting(steps=100, seconds=1.0, waited=0.1, measured=1.0, calls=100, slow=0.003)
    assert lost.share == pytest.approx(0.4)
    assert "40% waiting for data (30% as steps that making them slows down)" in str(lost)
    assert total([lost, lost]).share == pytest.approx(0.4)
    assert total([lost, Waiting(100, 1.0, 0.1, 1.0, 100)]).share == pytest.approx(0.25)


def test_large_batches_are_held_in_small_numbers_or_not_at_all():
    slowing = Slowing()
    for _ in range(slowing.number):
        slowing.note(0.005, held=False)
    assert not slowing.calls_to_hold(30, math.inf)
    slowing.most = HELD // 2
    assert slowing.calls_to_hold(30, math.inf) == HELD // 2


def test_a_callback_that_is_gone_lets_the_step_pass():
    model = new_model()
    model.fit(dataset(), verbose=0)
    own = model.train_function
    model.train_function = Tap(_of(model), own)
    model.fit(dataset(), verbose=0)
    assert model.train_function is own


def _of(model):
    watch = FitWatch()
    watch.set_model(model)
    return watch


def test_on_a_gpu_every_tenth_step_is_measured_with_the_device_waited_for(monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
    synced = []
    monkeypatch.setattr(tf.test.experimental, "sync_devices", lambda: synced.append(1))
    kept = labkit.watch()
    cached = tf.data.Dataset.from_tensors((X[:SIZE], Y[:SIZE])).repeat()
    new_model().fit(cached, steps_per_epoch=25, verbose=0, callbacks=[kept])
    assert len(synced) == 2 * 3  # before and after the steps 0, 10 and 20
    assert kept.epochs[0].steps == 24
    assert kept.epochs[0].measured < kept.epochs[0].seconds


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(tf.keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="expected Keras on TensorFlow, got the backend 'jax'"):
        labkit.watch()


# -- a loop of one's own -------------------------------------------------------------------------


def test_a_loop_is_watched_and_its_batches_are_the_same(capsys):
    items = [object() for _ in range(5)]
    watched = labkit.watch(items)
    assert len(watched) == 5
    assert list(watched) == items and list(watched) == items
    assert [epoch.steps for epoch in watched.epochs] == [4, 5]
    assert capsys.readouterr().out.count(f"labkit.watch: {watched.verdict()}") >= 1


def test_a_loop_without_a_batch_says_so(capsys):
    empty, used_up = labkit.watch([]), labkit.watch(iter([1]))
    assert list(empty) == list(empty) == []
    nothing = "labkit.watch: no batch came, expected at least one"
    *lines, _ = capsys.readouterr().out.split("labkit.watch: no verdict: no batch was seen\n")
    assert len(lines) == 2 and all(line.startswith(nothing) for line in lines)
    assert list(used_up) == [1] and "only the first step" in capsys.readouterr().out
    assert list(used_up) == [] and capsys.readouterr().out.startswith(nothing)
    assert "only the first step" in used_up.verdict()


def test_a_loop_that_waits_and_one_that_works_are_told_apart():
    waits = labkit.watch(batches(0.02)())
    for _ in waits:
        pass
    works = labkit.watch(batches()())
    for _ in works:
        time.sleep(0.02)
    assert waits.epochs[0].share > 0.5 > works.epochs[0].share


def test_a_loop_that_is_left_says_what_it_saw(capsys):
    for _, _ in zip(range(3), labkit.watch(iter(int, 1)), strict=False):
        pass
    assert capsys.readouterr().out.startswith("labkit.watch: ")


def test_what_cannot_be_looped_over_is_refused():
    with pytest.raises(TypeError, match=r"expected an iterable of batches, got int.*callbacks="):
        labkit.watch(3)


# -- words and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "says"),
    [
        (0.049, "not input-bound (5% waiting, under 5%): the data keep up"),
        (0.05, "moderately input-bound (5% waiting, 5% to 20%). Next: cure it"),
        (0.20, "moderately input-bound (20% waiting, 5% to 20%). Next: cure it"),
        (0.21, "highly input-bound (21% waiting, over 20%). Next: cure it"),
        (math.nan, "no verdict: only the first step, which compiles, was seen"),
    ],
)
def test_the_verdict_has_the_limits_of_tensorflows_profiler(share, says):
    assert verdict(share, "cure it") == says


def test_the_line_says_what_there_would_be_without_waiting():
    assert str(Waiting(100, 10.0, 5.0, 10.0)) == (
        "10.0 s, 10 steps/s, 50% waiting for data; 20 steps/s without waiting"
    )
    assert str(Waiting(100, 10.0, 0.1, 10.0)) == "10.0 s, 10 steps/s, 1% waiting for data"
    assert "too few to tell" in str(Waiting())
