"""Batches that a loop in Python gets past TensorFlow's queue: the same ones, in the same order."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from labkit import Component, QueueRunner, WorkerError, passes
from labkit.engine.handover import Handover
from labkit.quiet import tf
from tests.consumers import IN_SECONDS, wait_until

BATCHES = 60
ORDERED = {"batch_size": 4, "shuffle": False, "order": "fixed", "seed": 0}


def numbered(worker, n_workers, epoch):
    """Batches whose 4 samples are numbered through, with a text and the number of the pass."""
    for number in range(worker, BATCHES, n_workers):
        numbers = np.arange(4 * number, 4 * number + 4)
        yield {"number": numbers, "text": numbers.astype(str), "epoch": np.full(4, epoch)}


def numbers(batches):
    return [int(number) for batch in batches for number in batch["number"]]


@pytest.mark.parametrize("workers", ["thread", "process"])
@pytest.mark.parametrize("capacity", [4, 8, 40, 4 * BATCHES])
def test_every_batch_comes_once_and_in_order_pass_after_pass(workers, capacity):
    options = {"workers": workers, "capacity": capacity, **ORDERED}
    with QueueRunner(numbered, n_workers=2, **options) as runner:
        for epoch in range(3):
            came = list(runner.dataset())
            assert numbers(came) == list(range(4 * BATCHES))
            assert {int(n) for batch in came for n in batch["epoch"]} == {epoch}
            assert [text.decode() for text in came[7]["text"].numpy()] == ["28", "29", "30", "31"]


@pytest.mark.parametrize("captured", [True, False])
def test_a_loop_and_a_function_may_take_turns_at_one_iterator(captured):
    with QueueRunner(numbered, n_workers=2, capacity=24, **ORDERED) as runner:
        iterator = iter(runner.dataset())

        @tf.function
        def two(its):
            return next(its), next(its)

        @tf.function
        def two_captured():
            return next(iterator), next(iterator)

        came = []
        for length in (1, 5, 0, 3, 0, 0, 9):
            came += [next(iterator) for _ in range(length)]
            came += two_captured() if captured else two(iterator)
        assert numbers(came + list(iterator)) == list(range(4 * BATCHES))


@pytest.mark.parametrize("begun", [True, False])
def test_two_threads_may_take_from_one_iterator(begun):
    with QueueRunner(numbered, n_workers=2, capacity=16, **ORDERED) as runner:
        iterator, came = iter(runner.dataset()), []
        if begun:
            came.append(next(iterator))
        threads = [threading.Thread(target=lambda: came.extend(iterator)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(IN_SECONDS)
        assert sorted(numbers(came)) == list(range(4 * BATCHES))


def test_a_function_that_comes_while_a_thread_waits_for_the_first_batch_gets_its_own():
    begin, got = threading.Event(), []

    def slow():
        begin.wait(IN_SECONDS)
        for _ in range(40):
            yield np.zeros(4)

    @tf.function
    def ten(its):
        return [next(its) for _ in range(10)]

    spec = Component("x", (), np.float64)
    with QueueRunner(slow, 4, capacity=32, shuffle=False, spec=spec) as runner:
        iterator = iter(runner.dataset())
        loop = threading.Thread(target=lambda: got.extend(next(iterator) for _ in range(30)))
        loop.start()
        wait_until(lambda: iterator._inside)
        function = threading.Thread(target=lambda: got.extend(ten(iterator)))
        function.start()
        wait_until(lambda: iterator._in_function)
        begin.set()
        loop.join(IN_SECONDS)
        function.join(IN_SECONDS)
        assert len(got) == 40


@pytest.mark.parametrize("number", range(1, 8))
def test_an_interrupt_ahead_of_the_op_that_takes_out_loses_nothing(monkeypatch, number):
    real, calls, came = passes.EagerQueue._dequeue, [], []

    def interrupted(queue):
        calls.append(1)
        if len(calls) == number:
            time.sleep(0.1)  # in which the feeder fills what room there is
            raise KeyboardInterrupt
        return real(queue)

    monkeypatch.setattr(passes.EagerQueue, "_dequeue", interrupted)
    with QueueRunner(numbered, capacity=32, **ORDERED) as runner:
        iterator = iter(runner.dataset())
        while len(came) < BATCHES:
            try:
                came.append(next(iterator))
            except KeyboardInterrupt:
                continue
            time.sleep(0.01)
        assert numbers(came) == list(range(4 * BATCHES))


def test_the_queue_holds_no_more_than_its_capacity_and_says_how_much():
    made = []

    def endless():
        while True:
            made.append(1)
            yield np.zeros(4)

    with QueueRunner(endless, 4, capacity=24, shuffle=False) as runner:
        iterator = iter(runner.dataset())
        for taken in range(1, 31):
            next(iterator)
            assert runner.depth() <= 24
            # Two lie with the worker, one with the feeder, and one is being made.
            assert len(made) <= taken + 24 // 4 + 4
        wait_until(lambda: runner.depth() == 24)


def test_a_loop_that_is_left_while_batches_are_ready_begins_anew():
    with QueueRunner(numbered, n_workers=2, capacity=16, **ORDERED) as runner:
        for epoch in range(3):
            for number, batch in enumerate(runner.dataset()):
                assert numbers([batch]) == list(range(4 * number, 4 * number + 4))
                assert batch["epoch"][0] == epoch
                if number == 9:
                    break
    assert not [t for t in threading.enumerate() if t.name.startswith("labkit")]


def test_a_worker_that_fails_ends_the_loop_with_its_error():
    def fails():
        for _ in range(12):
            yield np.zeros(4)
        raise ValueError("no more of these")

    came = []
    with pytest.raises(WorkerError, match="no more of these"):  # noqa: SIM117
        with QueueRunner(fails, 4, capacity=16, shuffle=False) as runner:
            came.extend(runner.dataset())


def test_ctrl_c_ends_a_loop_that_waits_for_a_batch():
    leave = threading.Event()

    def dries_up():
        for _ in range(6):
            yield np.zeros(4)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        leave.wait(IN_SECONDS)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with QueueRunner(dries_up, 4, capacity=16, shuffle=False) as runner:
            try:
                list(runner.dataset())
            finally:
                leave.set()
    assert time.monotonic() - began < IN_SECONDS


def test_a_signal_handler_may_stop_the_run_while_the_loop_takes():
    def endless():
        while True:
            yield np.zeros(4)

    before = signal.getsignal(signal.SIGALRM)
    try:
        for trial in range(20):
            runner = QueueRunner(endless, 4, capacity=24, shuffle=False)
            signal.signal(signal.SIGALRM, lambda *_, runner=runner: runner.stop())
            iterator = iter(runner.dataset())
            next(iterator)  # a stop ahead of it would end nothing
            with pytest.raises((tf.errors.OpError, WorkerError, StopIteration)):
                signal.setitimer(signal.ITIMER_REAL, 0.05 + 0.0007 * trial)
                while True:
                    next(iterator)
            signal.setitimer(signal.ITIMER_REAL, 0)
            runner.stop()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("locked", ["more", "room"])
def test_who_is_about_to_wait_is_not_forgotten_by_an_end_in_between(locked):
    handover = Handover(1)
    assert not handover.put(lambda: 0)
    assert handover.take(lambda: 0, lambda: 0) == 0
    bell = handover._more if locked == "more" else handover._room_for_more

    class EndsFirst(int):
        def __add__(self, other):
            handover.end(lambda batch: None)
            bell.waiting = 0
            return other

    bell.waiting = EndsFirst()
    if locked == "more":
        assert handover.take(lambda: 1, lambda: "queued") == "queued"
    else:
        handover._ready.append("one")
        assert not handover.put(lambda: "two")


def test_ctrl_c_while_tensorflow_traces_is_not_lost(monkeypatch):
    real = passes._dataset

    def loses_it(*call):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        except KeyboardInterrupt:
            pass
        return real(*call)

    monkeypatch.setattr(passes, "_dataset", loses_it)
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with QueueRunner(lambda: iter([np.zeros(4)] * 9), 4, shuffle=False) as runner:
            list(runner.dataset())


def test_ctrl_c_that_comes_while_a_pass_begins_ends_the_wait_for_its_first_batch(monkeypatch):
    leave = threading.Event()

    class LateQueue(passes.EagerQueue):
        def __init__(self, shape):
            os.kill(os.getpid(), signal.SIGINT)  # the main thread sits in native code
            time.sleep(0.2)
            super().__init__(shape)

    def nothing():
        leave.wait(IN_SECONDS)
        yield np.zeros(4)

    monkeypatch.setattr(passes, "EagerQueue", LateQueue)
    began = time.monotonic()
    spec = Component("x", (), np.float64)
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with QueueRunner(nothing, 4, shuffle=False, spec=spec) as runner:
            try:
                list(runner.dataset())
            finally:
                leave.set()
    assert time.monotonic() - began < IN_SECONDS / 2


# -- the handover alone ---------------------------------------------------------------------------


def test_whoever_puts_waits_for_room_and_goes_on_when_a_quarter_is_free():
    handover, put = Handover(4), []
    with pytest.raises(IndexError):  # nothing is queued: it asks the queue, which has nothing
        handover.end(put.append)
        handover.take(lambda: 0, [].pop)

    handover = Handover(4)
    assert not handover.put(lambda: "queued")
    assert handover.take(lambda: 0, lambda: "queued") == "queued"

    def feed():
        for number in range(9):
            assert handover.put(lambda number=number: number)
            put.append(number)

    feeder = threading.Thread(target=feed)
    feeder.start()
    wait_until(lambda: len(put) == 4)
    assert handover.take(lambda: 1, list) == 0
    wait_until(lambda: len(put) == 5)
    came = [handover.take(lambda: 1, list) for _ in range(8)]
    feeder.join(IN_SECONDS)
    assert came == list(range(1, 9))
    assert not feeder.is_alive()


def test_what_is_ready_goes_into_the_queue_at_the_end_and_who_waits_is_woken():
    handover, queued, came = Handover(8), [], []
    assert not handover.put(lambda: 0)
    assert handover.take(lambda: 0, lambda: 0) == 0
    for number in (1, 2, 3):
        assert handover.put(lambda number=number: number)
    assert handover.take(lambda: 1, list) == 1
    handover.end(queued.append)
    assert queued == [2, 3]
    assert not handover.put(lambda: 4)
    assert handover.take(lambda: 1, lambda: queued.pop(0)) == 2

    handover = Handover(8)
    assert not handover.put(lambda: 0)
    assert handover.take(lambda: 0, lambda: 0) == 0
    waits = threading.Thread(target=lambda: came.append(handover.take(lambda: 1, lambda: "end")))
    waits.start()
    wait_until(lambda: handover._more.waiting)
    handover.end(queued.append)
    waits.join(IN_SECONDS)
    assert came == ["end"]
