"""Every fault: a message in seconds, nothing left behind, and the next run works.

Each runs with one of the two consumers, and under `-m slow` with the other; with both in turn
LABKIT_REPEATS times, if that is set. The 100 repeats are one command,
`python -m tests.soak --faults`, which writes figures/faults_100.json.

The iterators are nested functions, so that they travel to worker processes by value: a worker
that had to import this file would import TensorFlow with it.
"""

import contextlib
import errno
import faulthandler
import gc
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest

from labkit import Component, QueueRunner, WorkerError
from labkit.engine import tf_queue
from labkit.quiet import tf
from tests.consumers import IN_SECONDS, in_dataset, in_graph

v1 = tf.compat.v1
REPEATS = os.environ.get("LABKIT_REPEATS")
SMALL = {"capacity": 64, "min_after_dequeue": 8}
SPEC = (Component("index", (), np.int64), Component("pair", (2,), np.float32))
_HANGS_AFTER = 100.0


def pytest_generate_tests(metafunc):
    once_each = [0, pytest.param(1, marks=pytest.mark.slow)]
    metafunc.parametrize("repeat", range(int(REPEATS)) if REPEATS else once_each)


@pytest.fixture(params=["thread", "process"])
def workers(request):
    return request.param


@pytest.fixture
def consume(request, repeat):
    """In turn: a session's loop, and a loop over dataset(). The test's name draws who is first."""
    name = request.node.name.replace(f"[{repeat}", "[")
    return (in_graph, in_dataset)[(zlib.crc32(name.encode()) + repeat) % 2]


def endless(pause=0.0):
    """An iterator factory that worker processes get by value: batches of zeros, for ever."""

    def batches():
        while True:
            if pause:
                time.sleep(pause)
            yield np.zeros(4, np.int64), np.zeros((4, 2), np.float32)

    return batches


# -- what must be gone afterwards ----------------------------------------------------------------


def what_is_open():
    """Everything that a run could leave behind, by kind."""
    with open("/proc/self/maps") as file:
        segments = sorted(line.split()[0] for line in file if "labkit" in line and "memfd" in line)
    return {
        "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("labkit")),
        "child processes": sorted(child.pid for child in psutil.Process().children(True)),
        # Other programs have their own there.
        "/dev/shm": sorted(f for f in os.listdir("/dev/shm") if f.startswith("labkit")),
        "shared memory": segments,
        "file descriptors": sorted(os.listdir("/proc/self/fd"), key=int)[:-1],
        "wake-up descriptor": wakeup_descriptor(),
        # Each has native threads of its own, which no list of Python's shows.
        "iterators over a dataset": sum(
            isinstance(thing, tf.data.Iterator) for thing in gc.get_objects()
        ),
    }


def wakeup_descriptor():
    descriptor = signal.set_wakeup_fd(-1)
    if descriptor != -1:
        signal.set_wakeup_fd(descriptor)
    return descriptor


@pytest.fixture(scope="module", autouse=True)
def tensorflow_is_warm():
    """What TensorFlow opens once and keeps is no leak of ours."""

    def once():
        yield np.zeros(8, np.int64), np.zeros((8, 2), np.float32)

    for workers in ("thread", "process"):
        in_graph(QueueRunner(once, 8, workers=workers, **SMALL))
        in_dataset(QueueRunner(once, 8, workers=workers, **SMALL))
    # Each test collects garbage, to see what stays.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def real_stderr(request):
    """pytest's capture would keep a dump to itself when the session ends at once."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        descriptor = os.dup(2)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(autouse=True)
def leaves_nothing(request, real_stderr, nothing_left_running, consume):
    """Nothing is left and the next run works; a hang ends the session with every stack shown."""
    faulthandler.dump_traceback_later(_HANGS_AFTER, exit=True, file=real_stderr)
    before_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    before = what_is_open()
    yield
    signal.signal(signal.SIGINT, before_handler)
    _same_as(before)
    chosen = request.node.callspec.params.get("workers", "process")
    # Of threads where there are few repeats: to start a process costs more than most faults.
    the_next_run_works(chosen if REPEATS else "thread", consume)
    _same_as(before)


def _same_as(before):
    deadline = time.monotonic() + 2.0
    while (after := what_is_open()) != before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    left = {kind: (before[kind], now) for kind, now in after.items() if now != before[kind]}
    assert not left, f"left behind (before, after): {left}"


def the_next_run_works(workers, consume):
    def numbers(worker, n_workers):
        for at in range(worker * 8, 48, n_workers * 8):
            index = np.arange(at, at + 8)
            yield index, np.stack([index, -index], 1).astype(np.float32)

    batches = consume(QueueRunner(numbers, 8, 1, workers, **SMALL))
    assert sorted(i for index, _ in batches for i in index.tolist()) == list(range(48))


# -- iterators with a fault in the last worker ---------------------------------------------------


def good_until(fault, last):
    """Each worker delivers batches for ever; the last worker's `last`-th batch is `fault()`."""

    def faulty_iterator(worker, n_workers):
        number = 0
        while True:
            number += 1
            if worker == n_workers - 1 and number == last:
                yield fault()
            elif worker == n_workers - 1 or number > 3:
                time.sleep(0.002)
            yield np.zeros(4, np.int64), np.zeros((4, 2), np.float32)

    return faulty_iterator


def error_of(run):
    with pytest.raises(WorkerError) as caught:
        run()
    return caught.value


# -- exceptions and misfits ----------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 10])
def test_exception(workers, consume, at, repeat):
    def broken():
        raise ValueError("broken on purpose")

    runner = QueueRunner(good_until(broken, at), 8, 2, workers, **SMALL)
    error = error_of(lambda: consume(runner))
    assert error.worker == 1
    assert "worker 1 raised ValueError: broken on purpose" in str(error)
    assert 'raise ValueError("broken on purpose")' in str(error)


def test_exception_at_the_very_first_batch_of_all(workers, consume, repeat):
    def broken():
        raise ValueError("broken on purpose")

    error = error_of(lambda: consume(QueueRunner(good_until(broken, 1), 8, 1, workers, **SMALL)))
    assert error.worker == 0 and 'raise ValueError("broken on purpose")' in str(error)


def test_exception_at_the_last_batch(workers, consume, repeat):
    def ends_badly():
        for _ in range(12):
            yield np.zeros(8, np.int64), np.zeros((8, 2), np.float32)
        raise ValueError("broken on purpose")

    error = error_of(lambda: consume(QueueRunner(ends_badly, 8, 1, workers, **SMALL)))
    assert "worker 0 raised ValueError: broken on purpose" in str(error)


def test_wrong_shape(workers, consume, repeat):
    def three_wide():
        return np.zeros(4, np.int64), np.zeros((4, 3), np.float32)

    runner = QueueRunner(good_until(three_wide, 10), 8, 2, workers, **SMALL)
    error = error_of(lambda: consume(runner))
    assert error.worker == 1
    assert "component '1' with shape (4, 3), expected (n, 2)" in str(error)
    assert re.search(r"It was yielded here:\n.*in faulty_iterator\n +yield", str(error))


def test_wrong_dtype(workers, consume, repeat):
    def doubles():
        return np.zeros(4, np.int64), np.zeros((4, 2))

    runner = QueueRunner(good_until(doubles, 10), 8, 2, workers, **SMALL)
    error = error_of(lambda: consume(runner))
    assert error.worker == 1
    assert "component '1' with dtype float64, expected float32" in str(error)


@pytest.mark.parametrize("spec", [None, SPEC], ids=["", "given spec"])
def test_an_iterator_that_ends_at_once(workers, consume, spec, repeat):
    def nothing():
        return iter(())

    error = error_of(lambda: consume(QueueRunner(nothing, 8, 1, workers, spec=spec, **SMALL)))
    assert "ended before its first batch" in str(error)


# -- death and silence ---------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_named_with_its_signal(consume, repeat, tmp_path):
    killed_at = tmp_path / "killed_at"

    def killed():
        import signal

        killed_at.write_text(repr(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    last = random.choice([1, 2, 10, 30])
    error = error_of(
        lambda: consume(QueueRunner(good_until(killed, last), 8, 2, "process", **SMALL))
    )
    assert time.time() - float(killed_at.read_text()) < IN_SECONDS
    assert error.worker == 1
    assert "worker 1 was killed by signal 9 (SIGKILL)" in str(error)


@pytest.mark.parametrize("stands_still", [0.0, 0.1])
def test_a_worker_that_is_killed_from_outside_while_it_waits(stands_still, repeat):
    """For the full queue and for the empty one: the consumer stands still, or waits for data."""

    runner, others = QueueRunner(endless(), 8, 2, "process", **SMALL), psutil.Process().children()
    with pytest.raises(WorkerError, match=r"worker [01] was killed by signal 9 \(SIGKILL\)"):  # noqa: SIM117
        with tf.Graph().as_default():
            inputs = runner.get_inputs()
            with v1.Session() as sess, runner.start(sess):
                sess.run(inputs)
                time.sleep(stands_still)
                mine = [c for c in psutil.Process().children() if c not in others]
                random.choice(mine).kill()
                began = time.monotonic()
                with pytest.raises(tf.errors.OutOfRangeError):
                    while True:
                        sess.run(inputs)
                assert time.monotonic() - began < IN_SECONDS


def test_a_stall_is_shown_with_the_line_that_it_stands_at(workers, consume, repeat):
    seconds, timeout = (1.2, 0.5) if workers == "thread" else (3600.0, 3.0)

    def stalled():
        time.sleep(seconds)  # where it stands
        return np.zeros(4, np.int64), np.zeros((4, 2), np.float32)

    runner = QueueRunner(good_until(stalled, 5), 8, 2, workers, timeout=timeout, **SMALL)
    # Worker 0 ends up in its own sleeps of 2 ms, far below the timeout.
    error = error_of(lambda: consume(runner))
    assert error.worker == 1
    assert f"worker 1 has delivered nothing for {timeout:g} s" in str(error)
    assert "time.sleep(seconds)  # where it stands" in str(error)
    assert "labkit/engine" not in str(error)


def test_a_consumer_that_pauses_makes_no_worker_late(workers, consume, repeat):
    # A process's start counts, and takes longer on a busy machine.
    timeout = 0.8 if workers == "thread" else 3.0

    class Pauses(list):
        def append(self, batch):
            super().append(batch)
            if len(self) == 20:
                time.sleep(timeout + 0.8)

    runner = QueueRunner(endless(), 8, 3, workers, timeout=timeout, **SMALL)
    assert len(consume(runner, steps=60, seen=Pauses())) == 60


def test_a_worker_process_that_is_suspended(repeat):
    def suspended():
        import signal

        os.kill(os.getpid(), signal.SIGSTOP)

    runner = QueueRunner(good_until(suspended, 5), 8, 2, "process", timeout=3.0, **SMALL)
    error = error_of(lambda: in_graph(runner))
    assert error.worker == 1 and "did not answer" in str(error)


@pytest.mark.parametrize("fault", ["exception", "stall", "killed"])
def test_continue_goes_on_with_the_others_and_says_so_once(workers, fault, repeat):
    if fault == "killed" and workers == "thread":
        pytest.skip("a thread cannot be killed")
    # A process's start counts, and takes longer on a busy machine.
    seconds, timeout = (1.5, 0.4) if workers == "thread" else (3600.0, 2.0)

    def factory(worker, n_workers):
        import signal

        for number in range(150):
            if worker > 0 and number == 3:
                if fault == "exception":
                    raise ValueError("broken on purpose")
                if fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(seconds)
                return
            time.sleep(0.01)
            yield np.full(4, worker), np.zeros((4, 2), np.float32)

    given = timeout if fault == "stall" else 60.0
    runner = QueueRunner(factory, 4, 3, workers, on_error="continue", timeout=given, **SMALL)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        batches = in_graph(runner)
    assert sum((index == 0).sum() for index, _ in batches) == 600
    assert sum((index != 0).sum() for index, _ in batches) == 24
    assert len([w for w in said if "Going on with the other" in str(w.message)]) == 1


# -- leaving and stopping ------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["full", "empty"])
def test_the_consumer_leaves_early(workers, consume, state, repeat):
    pause = 0.0 if state == "full" else 0.05

    runner = QueueRunner(endless(pause), 8, 2, workers, **SMALL)
    assert len(consume(runner, steps=random.randint(1, 3))) > 0
    runner.stop()


@pytest.mark.parametrize("fault", ["the consumer leaves", "exception", "killed"])
def test_large_samples_leave_no_shared_memory(consume, fault, repeat):
    """The queue holds them where the workers put them; also that must be given back."""

    def wide(worker):
        for number in itertools.count():
            if worker == 1 and number == 20 and fault == "exception":
                raise LookupError("no more")
            if worker == 1 and number == 20 and fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            yield (np.zeros((8, 100_000), np.float32),)

    runner = QueueRunner(wide, 8, 2, "process", **SMALL)
    steps = 30 if fault == "the consumer leaves" else None
    with contextlib.nullcontext() if steps else pytest.raises(WorkerError, match="worker 1"):
        consume(runner, steps=steps)


def test_the_consumers_own_error_passes_through(workers, consume, repeat):
    class Seen(list):
        def append(self, batch):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume(QueueRunner(endless(), 8, 2, workers, **SMALL), seen=Seen())


def stop_from_elsewhere(runner, after):
    """Stops the runner from another thread after some seconds; the list gets the stop's own."""
    took = []

    def stop():
        time.sleep(after)
        began = time.monotonic()
        runner.stop()
        took.append(time.monotonic() - began)

    thread = threading.Thread(target=stop)
    thread.start()
    return thread, took


def test_stop_while_starting(workers, consume, repeat):
    runner = QueueRunner(endless(0.005), 8, 4, workers, **SMALL)
    thread, took = stop_from_elsewhere(runner, random.uniform(0.0, 0.3))
    # It either ran to its end or says that it was stopped; in no case does it hang.
    try:
        consume(runner, steps=10)
    except (WorkerError, tf.errors.OpError) as error:
        assert "stopped" in str(error) or "closed" in str(error) or "cancelled" in str(error)
    thread.join()
    assert took[0] < IN_SECONDS
    runner.stop()


def test_stop_while_the_first_batch_is_awaited(workers, consume, repeat):
    seconds = 1.0 if workers == "thread" else 3600.0

    def slow():
        time.sleep(seconds)
        yield np.zeros(4, np.int64), np.zeros((4, 2), np.float32)

    runner = QueueRunner(slow, 8, 1, workers, **SMALL)
    thread, took = stop_from_elsewhere(runner, 0.3)
    began = time.monotonic()
    with pytest.raises(WorkerError, match="stopped"):
        consume(runner)
    thread.join()
    assert time.monotonic() - began < IN_SECONDS and took[0] < IN_SECONDS


def test_stop_at_once_after_start(workers, repeat):
    """While the feeder is still starting the other workers."""

    runner = QueueRunner(endless(), 8, 4, workers, **SMALL)
    with tf.Graph().as_default():
        runner.get_inputs()
        with v1.Session() as sess:
            runner.start(sess)
            time.sleep(random.choice([0.0, 0.001, 0.005, 0.02]))
            runner.stop()


def test_stop_twice_and_from_two_threads(workers, consume, repeat):
    runner = QueueRunner(endless(), 8, 2, workers, **SMALL)
    runner.stop()
    seen = []

    class Stops(list):
        def append(self, batch):
            seen.append(batch)
            threads = [stop_from_elsewhere(runner, 0)[0] for _ in range(2)]
            runner.stop()
            for thread in threads:
                thread.join()

    with contextlib.suppress(tf.errors.CancelledError):
        consume(runner, seen=Stops())
    runner.stop()
    assert seen


# -- interrupts ----------------------------------------------------------------------------------


def interrupt_after(seconds):
    """Ctrl-C, by a signal to this process."""

    def interrupt():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


def test_an_interrupt_at_any_moment(workers, consume, repeat):
    # Made here, and left to this line's thread: it may come before, during and after the start.
    # Once in some hundred times TensorFlow drops the exception, and the runner has to tell.
    with pytest.raises((KeyboardInterrupt, WorkerError)) as caught:
        interrupt_after(random.uniform(0.0, 0.5))
        consume(QueueRunner(endless(0.001), 8, 3, workers, **SMALL))
    assert caught.type is KeyboardInterrupt or "dropped the KeyboardInterrupt" in str(caught.value)


class Drops(list):
    """Batches of a consumer in which a KeyboardInterrupt gets lost, as TensorFlow's C++ does it."""

    def append(self, batch):
        super().append(batch)
        time.sleep(0.01)  # slower than the workers, so that the queue stays full
        if len(self) == 3:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)


def test_an_interrupt_that_gets_lost_while_data_flow(workers, consume, repeat):
    began = time.monotonic()
    with pytest.raises(WorkerError, match="dropped the KeyboardInterrupt"):
        consume(QueueRunner(endless(0.001), 8, 2, workers, **SMALL), seen=Drops())
    assert time.monotonic() - began < IN_SECONDS


@pytest.mark.parametrize("step", ["inputs", "attach"])
def test_an_interrupt_while_the_graph_is_built_is_not_lost(workers, step, monkeypatch, repeat):
    """TensorFlow would drop it, or turn it into a TypeError, or leave the graph locked."""

    really = getattr(tf_queue.GraphQueue, step)

    def interrupted(*given):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return really(*given)

    monkeypatch.setattr(tf_queue.GraphQueue, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_graph(QueueRunner(endless(), 8, 2, workers, **SMALL), steps=10)


def test_a_handler_of_the_programs_own_decides_about_an_interrupt(workers, consume, repeat):
    """It goes on to the last of its batches, also after the second in which an interrupt that the
    consumer did not learn of would end it."""
    came = []

    def until_told():
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            time.sleep(0.01)
            yield np.zeros(4, np.int64), np.zeros((4, 2), np.float32)
        yield np.ones(4, np.int64), np.zeros((4, 2), np.float32)

    signal.signal(signal.SIGINT, lambda *_: came.append("interrupt"))
    sender = interrupt_after(0.3)
    batches = consume(QueueRunner(until_told, 8, 1, workers, **SMALL))
    sender.join()
    assert sum(int(index.sum()) for index, _ in batches) == 4
    assert came == ["interrupt"]


def test_an_interrupt_that_leaves_the_graph_locked(workers, repeat):
    """As one does that hits `run` where it holds the graph's lock: every other `run` then waits."""

    class Locks(list):
        def append(self, batch):
            v1.get_default_graph()._group_lock._ready.acquire()
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_graph(QueueRunner(endless(0.001), 8, 2, workers, **SMALL), seen=Locks())
    assert time.monotonic() - began < IN_SECONDS


@pytest.mark.parametrize(
    ("workers", "consume"),
    [("thread", in_graph), ("process", in_graph), ("process", in_dataset)],
    ids=["thread-graph", "process-graph", "process-eager"],
)
def test_an_interrupt_while_blocked_on_an_empty_queue(workers, consume, repeat):
    """Python's handler cannot run inside sess.run, so that the runner has to end the wait."""
    seconds = 1.6 if workers == "thread" else 3600.0

    def dries_up():
        for _ in range(4):
            yield np.zeros(4, np.int64), np.zeros((4, 2), np.float32)
        time.sleep(seconds)

    sender = interrupt_after(0.6)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        consume(QueueRunner(dries_up, 8, 1, workers, **SMALL))
    sender.join()
    assert time.monotonic() - began < IN_SECONDS


PROGRAM = """
import sys, time
import numpy as np
from labkit import QueueRunner
from labkit.quiet import tf
v1 = tf.compat.v1
workers, pause = sys.argv[1], float(sys.argv[2])

def endless():
    while True:
        yield np.zeros(8, np.int64), np.zeros((8, 2), np.float32)
        time.sleep(pause)

print("ready", flush=True)
runner = QueueRunner(endless, 8, 2, workers, capacity=64, min_after_dequeue=8)
with tf.Graph().as_default():
    inputs = runner.get_inputs()
    with v1.Session() as sess, runner.start(sess):
        while True:
            sess.run(inputs)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


def test_a_program_ends_on_ctrl_c(program, repeat):
    """In turn: processes and threads; data that flow, and a wait on an empty queue."""
    workers, pause = ("process", "thread")[repeat % 2], (1.0, 0.001)[repeat // 2 % 2]
    running = subprocess.Popen(
        [sys.executable, str(program), workers, str(pause)],
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
            "PYTHONFAULTHANDLER": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout.readline() == "ready\n"
    time.sleep(random.uniform(0.0, 1.2))
    family = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGINT)
    try:
        _, errors = running.communicate(timeout=IN_SECONDS)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGABRT)
        late = f"it still ran {IN_SECONDS} s after the interrupt:\n"
        pytest.fail(late + running.communicate()[1])
    assert "KeyboardInterrupt" in errors
    assert running.returncode in (-signal.SIGINT, 1)
    _, alive = psutil.wait_procs(family, timeout=3)
    assert not alive


# -- too little shared memory --------------------------------------------------------------------


@pytest.fixture(params=["memfd", "/dev/shm"])
def little_memory(request, monkeypatch):
    """Room for 100 kB of shared memory and no more."""
    reserve = os.posix_fallocate

    def limited(descriptor, offset, size):
        if size > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    if request.param == "/dev/shm":
        monkeypatch.delattr(os, "memfd_create")


def test_shared_memory_too_small_for_the_ring(consume, little_memory, repeat):
    def wide():
        while True:
            yield np.zeros(4, np.int64), np.zeros((4, 20_000), np.float32)

    with pytest.raises(MemoryError, match="worker 0's ring") as caught:
        consume(QueueRunner(wide, 8, 1, "process", **SMALL))
    _numbers_fit(str(caught.value), 3 * 4 * 20_000 * 4)


def test_shared_memory_too_small_for_the_data_set(consume, little_memory, repeat):
    data = np.zeros(1_000_000, np.uint8)

    def holds_data():
        while True:
            yield data[:4].astype(np.int64), np.zeros((4, 2), np.float32)

    with pytest.raises(MemoryError, match="arrays that the factory uses") as caught:
        consume(QueueRunner(holds_data, 8, 1, "process", **SMALL))
    _numbers_fit(str(caught.value), data.nbytes)


def _numbers_fit(text, at_least):
    needed, free = map(float, re.findall(r"([0-9.]+) MB", text))
    # The free number comes from the system; only the reserving is imitated.
    assert at_least / 1e6 <= needed + 0.1 <= 20 and free > 0
    assert "--shm-size" in text and "workers='thread'" in text
