"""SIGINT belongs to the process: one ear in it, which every run may ask."""

import contextlib
import os
import signal
import threading
import time

import numpy as np
import pytest

from labkit import QueueRunner, WorkerError
from labkit.engine.interrupts import _Ear

SMALL = {"capacity": 64, "min_after_dequeue": 8}


@pytest.fixture(autouse=True)
def python_handles_sigint():
    # A shell's background job starts with the signal ignored; a test that sends it must not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    assert signal.set_wakeup_fd(-1) == -1, "the ear must give its descriptor back"


def interrupt_myself():
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_every_listener_hears_and_the_last_one_gives_the_descriptor_back():
    listens = _Ear()
    began = time.monotonic()
    listens.open()
    listens.open()
    assert listens.came_since(began) is None
    interrupt_myself()
    assert listens.came_since(began) is not None
    assert listens.came_since(began) is not None  # nobody hears it in another's place
    assert listens.came_since(time.monotonic()) is None
    listens.close()
    now = time.monotonic()
    interrupt_myself()
    assert listens.came_since(now) is not None  # also after the first one has closed
    listens.close()
    assert signal.set_wakeup_fd(-1) == -1


def test_a_descriptor_of_the_programs_own_stays():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    listens = _Ear()
    listens.open()
    listens.close()
    assert signal.set_wakeup_fd(-1) == writer
    os.close(reader)
    os.close(writer)


def test_what_another_thread_closes_the_main_thread_gives_back():
    listens = _Ear()
    listens.open()
    closes = threading.Thread(target=listens.close)
    closes.start()
    closes.join()
    listens.tidy()
    assert signal.set_wakeup_fd(-1) == -1


def flows():
    while True:
        time.sleep(0.001)
        yield (np.zeros(4),)


class Drops:
    """Takes batches of a runner for ever; the KeyboardInterrupt of its third one gets lost."""

    def __init__(self, runner):
        for number, _ in enumerate(runner.dataset()):
            time.sleep(0.01)
            if number == 3:
                interrupt_myself()


@pytest.mark.parametrize("first", ["stays", "closes"])
def test_a_second_runner_hears_ctrl_c(first):
    with QueueRunner(flows, 8, **SMALL) as other:
        next(iter(other.dataset()))
        second = QueueRunner(flows, 8, **SMALL)
        second.dataset()
        if first == "closes":
            other.stop()
        with pytest.raises(WorkerError, match="dropped the KeyboardInterrupt"), second:
            Drops(second)


def test_an_interrupt_of_an_earlier_pass_does_not_end_the_next():
    with QueueRunner(flows, 8, **SMALL) as runner:
        data = runner.dataset()
        next(iter(data))
        interrupt_myself()  # the consumer learned of it, and goes on
        began = time.monotonic()
        for _ in data:
            if time.monotonic() - began > 2.5:
                break
    assert runner.error is None
