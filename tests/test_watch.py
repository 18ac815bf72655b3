"""`labkit.watch`: what it measures is true, and Keras trains as it does without it."""

import gc
import math
import statistics
import time
from types import SimpleNamespace

import numpy as np
import pytest

import labkit
from labkit import QueueRunner
from labkit.instruments import slowing, taking, watch_fit
from labkit.instruments.meter import Meter, of_a_ready_batch
from labkit.instruments.slowing import Slowing
from labkit.instruments.tap import Tap
from labkit.instruments.waiting import Waiting, total, verdict
from labkit.instruments.watch_fit import FitWatch
from labkit.passes import untuned
from labkit.quiet import tf
from tests.consumers import wait_until

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
    assert [line.startswith("labkit.watch: epoch") for line in lines[:3]] == [True, True, False]
    assert "\n".join(lines[2:]) == f"labkit.watch: {kept.verdict()}"


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


def test_many_short_fits_bring_no_warning_of_tensorflows(monkeypatch):
    said = []
    monkeypatch.setattr(tf.get_logger(), "warning", lambda text, *rest: said.append(text % rest))
    model = new_model()
    for _ in range(7):
        model.fit(X[: 2 * SIZE], Y[: 2 * SIZE], SIZE, verbose=0, callbacks=[labkit.watch()])
    assert said == []


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


BESIDE = Slowing()._neighbours
LONG = 6 * BESIDE + 20  # calls of which some train on batches taken ahead


def counted(n, fails_at=None):
    def factory():
        for number in range(n):
            if number == fails_at:
                raise ValueError("the generator's own")
            yield X[:SIZE] + number / n, Y[:SIZE]

    spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1)))
    return tf.data.Dataset.from_generator(factory, output_signature=spec)


@pytest.fixture
def at_once(monkeypatch):
    """Batches are taken ahead as soon as there are enough calls to compare with."""
    monkeypatch.setattr(watch_fit, "_READ_EVERY", 0.0)


@pytest.mark.parametrize(("together", "known"), [(1, True), (8, False)])
def test_batches_taken_ahead_are_trained_on_in_their_order(together, known, at_once):
    calls, losses, kept = LONG if together == 1 else 70, [], labkit.watch()
    steps = calls * together + (0 if known else 3)
    for callbacks in ([], [kept]):
        model = new_model(steps_per_execution=together)
        data = counted(steps).repeat(2 if known else 1)
        options = {"epochs": 2, "steps_per_epoch": steps if known else None, "verbose": 0}
        history = model.fit(data, callbacks=callbacks, shuffle=False, **options)
        losses.append(history.history["loss"])
    assert losses[0] == losses[1]
    assert kept._slowing.known  # some were held, and others came after them
    assert [epoch.steps for epoch in kept.epochs] == [steps - together, steps]
    assert 0 <= kept.epochs[0].share <= 1 and kept.epochs[0].measured < kept.epochs[0].seconds


@pytest.mark.parametrize(("cold", "times"), [(0.02, 1), (5.0, 0)])
def test_a_step_warms_up_where_batches_that_were_taken_ahead_let_it_rest(cold, times, monkeypatch):
    made, warmed_up = [], []
    monkeypatch.setattr(taking, "_COLD", cold)
    monkeypatch.setattr(taking, "_warm_up", lambda: warmed_up.append(len(made)))

    def late():
        for number in range(20):
            time.sleep(0.01)
            made.append(number)
            yield np.full((4, 4), number, np.float32)

    data = tf.data.Dataset.from_generator(late, output_signature=tf.TensorSpec((4, 4)))
    iterator = iter(untuned(data))
    taker = taking.Taker(iterator, new_model())
    taker.hold(iterator, 8)
    assert taker.held == 8 and len(warmed_up) == times
    assert all(number >= 8 for number in warmed_up)


def test_warming_up_computes_and_draws_no_random_number(monkeypatch):
    taking._computing.cache_clear()
    monkeypatch.setattr(taking, "_WARM_UP", 0.01)
    tf.keras.utils.set_random_seed(3)
    expected = tf.random.normal([4]).numpy()
    tf.keras.utils.set_random_seed(3)
    began = time.perf_counter()
    taking._warm_up()
    assert time.perf_counter() - began >= 0.01
    assert (tf.random.normal([4]).numpy() == expected).all()


def test_what_fails_while_batches_are_taken_ahead_fails_at_its_own_step(at_once):
    model, kept, at = new_model(), labkit.watch(), BESIDE + 10
    with pytest.raises(tf.errors.InvalidArgumentError, match="the generator's own"):
        model.fit(counted(LONG, fails_at=at), verbose=0, callbacks=[kept])
    assert int(model.optimizer.iterations) == at
    assert kept.epochs[0].steps - kept.epochs[0].calls == at - 1 - BESIDE  # were held


@pytest.fixture
def seldom(monkeypatch, at_once):
    """Watching takes all that it may of the time at once, so most calls go unseen."""
    monkeypatch.setattr(watch_fit, "_WATCHING", 1e-9)
    seen = []
    step = FitWatch.step
    monkeypatch.setattr(FitWatch, "step", lambda *of: seen.append(1) or step(*of))
    return seen


@pytest.fixture
def not_ahead(monkeypatch):
    monkeypatch.setattr(Slowing, "calls_to_hold", lambda *_: 0)


@pytest.mark.parametrize("known", [True, False])
def test_of_short_steps_most_go_unseen_and_all_are_counted(known, seldom, monkeypatch):
    monkeypatch.setattr(slowing, "_OFTEN", math.inf)  # once
    steps, losses, kept = 400, [], labkit.watch()
    for callbacks in ([], [kept]):
        model = new_model()
        data = counted(steps).repeat(2 if known else 1)
        options = {"steps_per_epoch": steps if known else None, "verbose": 0, "shuffle": False}
        history = model.fit(data, epochs=2, callbacks=callbacks, **options)
        losses.append(history.history["loss"])
    assert losses[0] == losses[1]
    assert [epoch.steps for epoch in kept.epochs] == [steps - 1, steps]
    assert len(seldom) < steps and kept._slowing.known
    for epoch in kept.epochs:
        assert 0 < epoch.measured < epoch.seconds and 0 <= epoch.share <= 1


@pytest.mark.parametrize("known", [True, False])
def test_seconds_of_calls_that_go_unseen_are_those_of_training(known, seldom, not_ahead):
    slow = tf.data.Dataset.from_generator(
        lambda: (time.sleep(1.0) or (X, Y) for _ in range(2)),
        output_signature=(tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1))),
    )
    kept, began = labkit.watch(), time.perf_counter()
    options = {"steps_per_epoch": 200 if known else None, "shuffle": False, "verbose": 0}
    new_model().fit(counted(200), validation_data=slow, callbacks=[kept], **options)
    assert kept.epochs[0].steps == 199 and BESIDE < len(seldom) < 50
    assert kept.epochs[0].seconds < time.perf_counter() - began - 2.0


def test_what_fails_in_a_call_that_goes_unseen_leaves_nothing(seldom, not_ahead):
    model, kept = new_model(), labkit.watch()
    with pytest.raises(tf.errors.InvalidArgumentError, match="the generator's own"):
        model.fit(counted(200, fails_at=190), verbose=0, callbacks=[kept])
    assert kept._calls.resting and not isinstance(model.train_function, Tap)
    model.fit(counted(60), verbose=0, shuffle=False, callbacks=[kept])
    assert [epoch.steps for epoch in kept.epochs] == [59]


def noted(slowing, before, alone, after, spent=0.0):
    """What calls of so many seconds tell `slowing`, those `alone` with batches taken ahead."""
    for seconds in before:
        assert not slowing.calls_to_hold(math.inf) and not slowing.skips()
        slowing.note(seconds)
    held = slowing.calls_to_hold(math.inf)
    assert held > len(alone) and not slowing.calls_to_hold(3 * (BESIDE + slowing._least_warm))
    slowing.hold(held, spent)
    for number in range(held):
        slowing.note_held(1.0 if number < held - len(alone) else alone[0])
    for _ in range(2 * held):  # which have what was stored meanwhile
        assert slowing.skips() and not slowing.calls_to_hold(math.inf) and slowing.compares
    for seconds in after:
        assert not slowing.skips()
        slowing.note(seconds)
    return slowing


def compared(*times):
    before, alone, after = ([seconds] * 16 for seconds in times)
    return noted(Slowing(), before, alone, after).seconds


def test_a_step_that_is_slower_while_data_are_made_counts_as_lost():
    assert compared(0.005, 0.002, 0.005) == pytest.approx(0.003)
    assert compared(0.004, 0.002, 0.005) == pytest.approx(0.002)
    # A machine that gets slower, or faster, all the time.
    assert compared(0.001, 0.003, 0.005) == compared(0.005, 0.003, 0.001) == 0.0
    slowing = noted(Slowing(), [0.005] * 16, [0.002] * 16, [])
    assert slowing.seconds == 0.0 and not slowing.known
    # Of many comparisons chance has a say: the more they differ, the less of their median counts.
    for alone, least, most in (
        ([0.002, 0.0021, 0.002, 0.0019], 0.00299, 0.003),
        ([0.002, 0.004, 0.003, 0.002], 0.0021, 0.0025),
        ([0.002, 0.009] * 2, 0.0, 0.0),
    ):
        slowing = noted(Slowing(), [0.005] * 16, alone[:1] * 16, [0.005] * 15)
        for one in alone[1:]:
            slowing = noted(slowing, [0.005], [one] * 16, [0.005] * 15)
        slowing.note(0.005)
        assert least <= slowing.seconds <= most
    # What a comparison cost has to be earned again before the next.
    slowing = noted(Slowing(), [0.005] * 16, [0.002] * 16, [0.005] * 16, spent=0.5)
    assert not slowing.calls_to_hold(math.inf)
    slowing.note(1.0, calls=1)
    assert not slowing.calls_to_hold(math.inf)
    slowing.pass_by(1.0)  # in which nobody looked, so that what was seen before is no neighbour
    assert slowing.in_a_row == 0 and not slowing.calls_to_hold(math.inf)
    slowing.note(0.001, calls=BESIDE)
    assert slowing.in_a_row == BESIDE and slowing.calls_to_hold(math.inf)


@pytest.mark.parametrize("alone", [[0.003], [0.003, 0.001, 0.004, 0.002], [0.006, 0.008]])
def test_where_calls_wait_the_comparisons_count_in_full(alone):
    told = {}
    for waited in (0.0, 0.01):  # seconds of all that is noted here, before and after
        slowing = Slowing()
        slowing.note(0.005, BESIDE, waited)
        slowing = noted(slowing, [], alone[:1] * 16, [0.005] * 15)
        for one in alone[1:]:
            slowing = noted(slowing, [0.005], [one] * 16, [0.005] * 15)
        slowing.note(0.005, 1, 10 * waited)
        told[waited] = slowing.seconds
    assert told[0.01] == pytest.approx(max(0.0, 0.005 - statistics.median(alone)))
    assert told[0.0] <= told[0.01]
    assert (told[0.0] < told[0.01]) == (len(alone) > 2)


def test_more_is_held_where_the_cores_rest_while_data_are_made():
    beside, warm = [0.005] * BESIDE, slowing._WARM_SECONDS
    cold = Slowing()
    cold.note(0.005, BESIDE)
    assert cold.calls_to_hold(math.inf) < 2 * BESIDE  # nothing is known of it yet
    slower = noted(Slowing(), beside, [0.002] * BESIDE, beside)
    assert slower.calls_to_hold(math.inf) == pytest.approx(BESIDE + warm / 0.002, abs=1)
    assert 0 < slower.calls_to_hold(300) < slower.calls_to_hold(math.inf)
    as_fast = noted(Slowing(), beside, [0.005] * BESIDE, beside)
    assert as_fast.calls_to_hold(math.inf) == cold.calls_to_hold(math.inf)
    waits = Slowing()
    waits.note(0.005, BESIDE, waited=0.004 * BESIDE)
    assert waits.calls_to_hold(math.inf) == pytest.approx(BESIDE + warm / 0.005, abs=1)


def test_lost_is_waiting_and_what_steps_are_slower():
    lost = Waiting(steps=100, seconds=1.0, waited=0.1, measured=1.0, calls=100, slow=0.003)
    assert lost.share == pytest.approx(0.4)
    assert "40% waiting for data (30% as steps that making them slows down)" in str(lost)
    assert total([lost, lost]).share == pytest.approx(0.4)
    assert total([lost, Waiting(100, 1.0, 0.1, 1.0, 100)]).share == pytest.approx(0.25)


def test_a_meter_counts_the_waiting_for_batches_and_takes_none_ahead():
    data = dataset(0.02)
    iterator, other = iter(data), iter(data)
    meter = Meter(data.element_spec)
    metered = meter.over(iterator)
    assert metered is meter.over(iterator) is not meter.over(other)
    assert metered.element_spec == data.element_spec
    took = []
    for number in range(BATCHES):
        x, _ = next(metered if number % 2 else iterator)
        assert np.array_equal(x, X[number * SIZE : (number + 1) * SIZE])
        took.append(meter.read())
    assert not any(took[0::2]) and all(one > 0.01 for one in took[1::2])
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(metered)
    assert 0 < of_a_ready_batch() < 0.01


@pytest.mark.parametrize(("waited", "counted"), [(0.4, 0.45), (0.07, 0.09), (0.01, 0.01)])
def test_what_watching_takes_is_told_apart_and_hides_no_waiting(waited, counted):
    """Who waits would have waited that much longer; who does not is not slower by it."""
    kept = FitWatch(quiet=True)
    kept.epochs, kept._in_turn = [Waiting()], True
    kept._calls.since, kept._calls.own = [0.5, 0.5], 0.03
    kept._taker = SimpleNamespace(waited=lambda: (waited, 0.02))
    kept._count_since()
    assert kept.epochs[0].waited == pytest.approx(counted)
    assert (kept.epochs[0].measured, kept.epochs[0].calls) == (1.0, 2)
    assert kept._slowing._usual.mean == pytest.approx((1.0 - waited - 0.05) / 2)
    assert kept._calls.own == 0.0 and not kept._calls.since


def test_a_meter_has_the_data_no_longer_than_their_iterator():
    gone = []

    def factory():
        try:
            while True:
                yield X[:SIZE], Y[:SIZE]
        finally:
            gone.append(True)

    spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1)))
    iterator = iter(tf.data.Dataset.from_generator(factory, output_signature=spec))
    meter = Meter(iterator.element_spec)
    next(meter.over(iterator))
    del iterator
    gc.collect()
    wait_until(lambda: gone)
    assert not meter._known


def test_python_between_two_steps_counts_where_making_data_slows_it():
    class Slowed(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # Long beside a step, also where another program makes one of 16 wait for its turn.
            time.sleep(0.0 if kept._taker.held else 0.05)

    kept, model = labkit.watch(), new_model()
    callbacks = [kept, Slowed()]
    model.fit(counted(LONG + 2 * BESIDE), verbose=0, callbacks=callbacks)
    assert kept._slowing.known and kept.epochs[0].share > 0.4


@pytest.mark.parametrize("shapes", ["alike", "unlike"])
def test_large_batches_are_held_in_small_numbers_and_of_any_shape(shapes, monkeypatch):
    monkeypatch.setattr(taking, "_MOST_BYTES", 1 + 9 * X[:SIZE].nbytes)

    def factory():
        for number in range(160):
            size = SIZE - (shapes == "unlike" and number % 3)
            yield X[:size] + number / 100, Y[:size]

    losses, kept = [], labkit.watch()
    for callbacks in ([], [kept]):
        spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1)))
        data = tf.data.Dataset.from_generator(factory, output_signature=spec)
        model = new_model(steps_per_execution=8)
        losses.append(model.fit(data, verbose=0, callbacks=callbacks).history["loss"])
    assert losses[0] == losses[1] and kept.epochs[0].steps == 160 - 8
    assert kept._slowing._useless == (shapes == "alike")  # one call's, of which none is counted


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


def test_on_a_gpu_every_tenth_step_is_measured_or_one_in_a_while(monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
    synced = []
    monkeypatch.setattr(tf.test.experimental, "sync_devices", lambda: synced.append(1))
    cached = tf.data.Dataset.from_tensors((X[:SIZE], Y[:SIZE])).repeat()
    model = new_model()

    def epoch(seconds):
        monkeypatch.setattr(watch_fit, "_ON_A_GPU_SECONDS", seconds)
        synced.clear()
        kept = labkit.watch()
        model.fit(cached, steps_per_epoch=25, verbose=0, callbacks=[kept])
        assert kept.epochs[0].steps == 24
        return len(synced), kept.epochs[0]

    waits, tenth = epoch(math.inf)
    assert waits == 2 * 3  # for the device, before and after the steps 0, 10 and 20
    assert tenth.measured < tenth.seconds
    waits, each = epoch(0)  # no step is too short
    assert waits == 2 * 25
    assert each.calls == 24


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
    assert list(used_up) == [1] and "too few steps" in capsys.readouterr().out
    assert list(used_up) == [] and capsys.readouterr().out.startswith(nothing)
    assert "too few steps" in used_up.verdict()


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
        (0.05, "moderately input-bound (5% waiting, 5% to 20%).\nNext: cure it"),
        (0.20, "moderately input-bound (20% waiting, 5% to 20%).\nNext: cure it"),
        (0.21, "highly input-bound (21% waiting, over 20%).\nNext: cure it"),
        (math.nan, "no verdict: too few steps were seen, without the first, which compiles"),
    ],
)
def test_the_verdict_has_the_limits_of_tensorflows_profiler(share, says):
    assert verdict(share, "cure it") == says


def test_the_line_says_what_there_would_be_without_waiting():
    assert str(Waiting(100, 10.0, 5.0, 10.0)) == (
        "10.0 s, 10 steps/s, 50% waiting for data; 20 steps/s without waiting"
    )
    assert str(Waiting(100, 10.0, 0.1, 10.0)) == "10.0 s, 10 steps/s, 1% waiting for data"
    assert "too few steps to tell" in str(Waiting())


def test_the_end_of_a_fit_does_not_wait_for_what_measures_its_batches():
    """Of 20 with TensorFlow's autotuning, two or three take seconds each to go."""
    data = untuned(tf.data.Dataset.from_tensors(tf.zeros((2, 2))).repeat())
    meter, sources = Meter(data.element_spec), [iter(data) for _ in range(20)]
    for source in sources:
        next(meter.over(source))
    gc.collect()  # what the tests before have left may wait as long
    time.sleep(0.5)  # the older, the longer
    began = time.monotonic()
    sources.clear()
    del source
    assert not meter._known and time.monotonic() - began < 1.0
