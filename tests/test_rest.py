"""While `watch` trains on batches that it took ahead, threads make none; then they go on."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import labkit
from labkit import QueueRunner, WorkerError
from labkit.engine import auto
from labkit.engine import rest as engine_rest
from labkit.engine.rest import rest
from labkit.quiet import tf

SIZE, WORKERS, PATIENCE = 8, 3, 30.0


@pytest.fixture(autouse=True)
def over():
    yield
    rest.end()


class Begun:
    """Batches that workers have begun."""

    def __init__(self):
        self.count = 0

    def batches(self, worker, n_workers):
        while True:
            self.count += 1
            time.sleep(0.002)
            yield (np.zeros((SIZE, 4), np.float32),)

    def rises_beyond(self, count):
        ends = time.monotonic() + PATIENCE
        while self.count <= count and time.monotonic() < ends:
            time.sleep(0.01)
        return self.count > count


def runner_of(begun, **options):
    return QueueRunner(
        begun.batches, SIZE, WORKERS, capacity=200_000, min_after_dequeue=0, **options
    )


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "left alone"])
def test_each_thread_ends_its_batch_and_begins_another_when_the_rest_is_over(ended, monkeypatch):
    monkeypatch.setattr(engine_rest, "LONGEST", PATIENCE if ended else 1.0)
    begun = Begun()
    with runner_of(begun) as runner:
        next(iter(runner.dataset()))
        assert begun.rises_beyond(3 * WORKERS)
        rest.begin()
        before = begun.count
        time.sleep(0.3)
        assert begun.count <= before + WORKERS
        if ended:
            rest.end()
        assert begun.rises_beyond(before + 10 * WORKERS)


def test_who_rests_is_not_late():
    begun, ends = Begun(), time.monotonic() + 3.0
    with runner_of(begun, timeout=1.0) as runner:
        batches = iter(runner.dataset())
        next(batches)
        rest.begin()  # longer than the time-out
        while time.monotonic() < ends:
            next(batches)


def test_who_stalls_is_late_however_often_the_others_rest():
    over = threading.Event()

    def batches(worker, n_workers):
        while True:
            yield (np.zeros((SIZE, 4), np.float32),)
            over.wait(PATIENCE if worker == 0 else 0.002)

    ends = time.monotonic() + PATIENCE / 2
    with (
        pytest.raises(WorkerError, match=r"worker 0 has delivered nothing for 1 s"),
        QueueRunner(batches, SIZE, WORKERS, min_after_dequeue=0, timeout=1.0) as runner,
    ):
        try:
            for _ in runner.dataset():
                rest.begin()
                rest.end()
                if time.monotonic() > ends:
                    break
        finally:
            over.set()


def test_a_runner_stops_while_its_threads_rest(monkeypatch):
    monkeypatch.setattr(engine_rest, "LONGEST", PATIENCE)
    with runner_of(Begun()) as runner:
        next(iter(runner.dataset()))
        rest.begin()
        until = rest.until
        time.sleep(0.1)
    assert not [one for one in threading.enumerate() if one.name.startswith("labkit worker")]
    assert time.monotonic() < until


def test_a_moment_of_rest_says_nothing_of_how_many_workers_to_have(monkeypatch):
    monkeypatch.setattr(rest, "until", 0.0)
    now, scaler = [100.0], auto.Scaler(8)
    monkeypatch.setattr(auto, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def decides_within(seconds):
        for _ in range(20):
            now[0] += seconds / 20
            if scaler.note(0, 0, SIZE, 0.01):
                return True
        return False

    assert not decides_within(0.6) and decides_within(0.6)
    monkeypatch.setattr(rest, "until", now[0])
    assert not decides_within(0.6) and decides_within(0.6)


def test_watch_lets_them_rest_for_the_steps_it_took_batches_ahead_for():
    resting = {True: 0, False: 0}

    class Looks(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            resting[kept._taker.held > 0 and time.monotonic() < rest.until] += 1

    def batches(worker, n_workers):
        while True:
            time.sleep(0.002)
            yield np.zeros((SIZE, 4), np.float32), np.zeros((SIZE, 1), np.float32)

    model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    kept = labkit.watch()
    with QueueRunner(batches, SIZE, WORKERS, min_after_dequeue=0) as runner:
        data = runner.dataset()
        model.fit(data, steps_per_epoch=300, verbose=0, callbacks=[kept, Looks()])
        assert kept._slowing.known and 0 < resting[True] < resting[False]
        assert rest.until <= time.monotonic()
