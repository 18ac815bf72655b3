"""Processes as workers: any factory, light interpreters, shared memory."""

import errno
import gc
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from labkit import MnistDataGenerator, QueueRunner, WorkerError
from labkit.engine import ring
from labkit.engine.batches import Component
from labkit.engine.processes import ProcessPool
from labkit.quiet import tf
from labkit.workloads import busy_python
from tests.consumers import IN_SECONDS, in_dataset, in_graph
from tests.programs import run_program

SMALL = {"capacity": 64, "min_after_dequeue": 0}


def values(batches):
    return sorted(float(x) for batch in batches for x in np.ravel(batch[0]))


def test_a_lambda_a_closure_and_a_class_of_this_function_travel():
    offset = 5

    def closure():
        yield (np.arange(4) + offset,)

    class Local:
        def __init__(self):
            self.offset = offset

        def batches(self):
            yield (np.arange(4) + self.offset,)

    for factory in (closure, lambda: iter([(np.arange(4) + offset,)]), Local().batches):
        got = in_dataset(QueueRunner(factory, 4, 1, "process", **SMALL))
        assert values(got) == [5, 6, 7, 8]


@pytest.mark.filterwarnings("ignore:(?s).*started again")
@pytest.mark.parametrize("fails", ["first", "restart"])
def test_where_no_more_processes_can_be_had_the_others_end(monkeypatch, fails):
    """`nothing_left_running` looks for them. A descriptor that is closed twice may be another's."""

    def batches(worker):
        yield (np.arange(4),)
        if worker:
            raise ValueError("mine")
        while True:
            yield (np.arange(4),)

    started, start = [], subprocess.Popen

    def few(*args, **more):
        if len(started) == 2:
            raise BlockingIOError(errno.EAGAIN, "no more processes")
        started.append(start(*args, **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", few)
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    n, spec = (3, (Component("x", (), np.int64),)) if fails == "first" else (2, None)
    given = {"on_error": "restart", "spec": spec, **SMALL}
    options = QueueRunner(batches, 4, n, "process", **given)._options
    if fails == "first":
        with pytest.raises(OSError, match="no more processes"):
            options.feeder(n, None, 0)
    else:
        feeder = options.feeder(n, None, 0)
        try:
            feeder.feed(Endless(), 0, time.monotonic())
            feeder._thread.join(IN_SECONDS)
        finally:
            feeder.stop()
        with pytest.raises(
            WorkerError, match=r"mine(?s:.*)could not be started in its place.*no m"
        ):
            feeder.raise_if_failed()
    assert [process.returncode is None for process in started] == [False, False]
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= before


class Endless:
    """A queue that takes whatever comes."""

    def enqueue(self, arrays):
        return True

    def size(self):
        return 0

    def close(self, cancel):
        pass


NOTEBOOK_CELL = """
import numpy as np
import labkit

scale = 3

class Mine:
    def batches(self, worker, n_workers):
        for number in range(worker, 8, n_workers):
            yield (np.full(2, number * scale),)

small = {"capacity": 64, "min_after_dequeue": 0}
with labkit.QueueRunner(Mine().batches, 2, 2, "process", **small) as runner:
    print(sorted(int(x) for (batch,) in runner.dataset() for x in batch))
"""
EXPECTED = str(sorted(3 * (number // 2) for number in range(16)))


@pytest.mark.slow  # of its own program and a child; test_lifetime has a program without a guard
def test_a_class_of_the_main_script_travels_without_a_main_guard_and_in_a_child_too(tmp_path):
    """Like a notebook: the script has no `if __name__ == "__main__"` and must not run again, but
    by a child of multiprocessing, which runs it before its target."""
    main = """
if __name__ == "__main__":
    import multiprocessing

    child = multiprocessing.get_context("spawn").Process(target=print, args=["the child's target"])
    child.start()
    child.join()
"""
    done = run_program(NOTEBOOK_CELL + main, tmp_path)
    assert done.stdout.splitlines() == [EXPECTED, EXPECTED, "the child's target"], done.stderr


@pytest.mark.parametrize("where", ["attribute", "closure", "global"])
def test_what_cannot_be_pickled_is_named(where):
    lock = threading.Lock()

    class Holder:
        def __init__(self):
            self.connection = lock

        def batches(self):
            yield (np.zeros(4),)

    def closure():
        with lock:
            yield (np.zeros(4),)

    if where == "global":
        space = {"the_lock": lock, "np": np}
        exec("def batches():\n    with the_lock:\n        yield (np.zeros(4),)", space)
        factory, name = space["batches"], "the_lock"
    else:
        factory, name = {
            "attribute": (Holder().batches, "connection"),
            "closure": (closure, "lock"),
        }[where]
    with pytest.raises(TypeError, match=rf"\.{name}' \(lock\) cannot be pickled") as caught:
        QueueRunner(factory, 4, 1, "process", **SMALL).dataset()
    assert "workers='thread'" in str(caught.value)


@pytest.mark.parametrize("make", ["dataset", "model", "variable"])
def test_tensorflows_things_in_a_process_are_met_with_a_sentence(make):
    thing = {
        "dataset": lambda: tf.data.Dataset.range(4).batch(2),
        "model": lambda: tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)]),
        "variable": lambda: tf.Variable(1.0),
    }[make]()

    def factory():
        yield (thing,)

    name = rf"factory\.thing' \({type(thing).__name__}\)"
    words = rf"{name} cannot be pickled \(it is TensorFlow's.*inside the factory"
    with pytest.raises(TypeError, match=words):
        QueueRunner(factory, 4, 1, "process", **SMALL).dataset()


def test_workers_import_no_tensorflow_and_one_thread_of_blas(small_mnist):
    data = MnistDataGenerator(4, busy_python(0.0), data=small_mnist)

    def modules():
        next(data.train_iterator())
        yield (np.array([",".join(sorted(sys.modules)).encode()]),)

    ((names,),) = in_dataset(QueueRunner(modules, 1, 1, "process", **SMALL))
    loaded = names[0].decode().split(",")
    assert "labkit.data" in loaded and "labkit.workloads" in loaded
    heavy = ("tensorflow", "keras", "torch", "ray", "psutil", "importlib.metadata")
    assert not [name for name in loaded if name in heavy or name.split(".")[0] in heavy]


def test_workers_share_the_cores_with_the_step_and_leave_ctrl_c_to_it():
    """Where Linux shares its cores out by session, one of its own would weigh as much as all of the
    step's threads; in its group the terminal's Ctrl-C would reach it."""

    def place(worker, n_workers):
        yield (np.array([[os.getsid(0), os.getpgid(0), os.getpid()]]),)

    for (rows,) in in_dataset(QueueRunner(place, 1, 2, "process", **SMALL)):
        session, group, worker = rows[0].tolist()
        assert session == os.getsid(0) and group == worker != os.getpgid(0)


def test_a_worker_that_asks_the_terminal_is_told_of_and_one_that_writes_to_it_goes_on(tmp_path):
    """It is in the background, where a terminal stops whoever reads, or writes under `tostop`."""
    program = """
import os, pty, sys
from termios import TCSANOW, TOSTOP, tcgetattr, tcsetattr

ours, theirs = pty.openpty()
mode = tcgetattr(theirs)
mode[3] |= TOSTOP
tcsetattr(theirs, TCSANOW, mode)
if os.fork():
    os.close(theirs)
    said = b""
    try:
        while more := os.read(ours, 1000):
            said += more
    except OSError:  # its end
        pass
    sys.stdout.write(said.decode())
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
os.setsid()
for descriptor in (1, 2):
    os.dup2(theirs, descriptor)
os.close(os.open(os.ttyname(theirs), os.O_RDWR))  # its terminal from now on

import numpy as np
from labkit import QueueRunner, WorkerError

def batches():
    print("it writes", flush=True)
    yield (np.zeros(4),)
    with open("/dev/tty", "rb", 0) as terminal:
        terminal.read(1)

try:
    with QueueRunner(batches, 4, 1, "process", capacity=4, min_after_dequeue=0) as runner:
        print("got", sum(1 for _ in runner.dataset()))
except WorkerError as error:
    print("told:", str(error).splitlines()[0], flush=True)
    raise SystemExit(3)
"""
    ended = run_program(program, tmp_path)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    assert "it writes" in ended.stdout and "OSError" in ended.stdout.partition("told:")[2]


def test_workers_share_the_data_sets_memory():
    """Each of the workers reads all of 200 MB; their own (private) memory hardly grows."""
    data = np.ones(200 << 20, np.uint8)

    def reader(worker, n_workers):
        for _ in range(3):
            yield (np.full(4, int(data.sum())),)
        status = Path("/proc/self/status").read_text()
        yield (np.full(4, 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])),)

    got = values(in_dataset(QueueRunner(reader, 4, 2, "process", **SMALL)))
    own = [number for number in got if number != data.nbytes]
    assert len(got) == 2 * 4 * 4 and len(own) == 2 * 4
    assert max(own) < data.nbytes / 2


def test_a_worker_may_write_into_its_data_and_changes_only_its_own():
    data = np.zeros(1 << 20, np.uint8)

    def writer(worker, n_workers):
        data[:4] += worker + 1
        yield (data[:4].copy(),)

    got = in_dataset(QueueRunner(writer, 4, 2, "process", **SMALL))
    assert values(got) == [1.0] * 4 + [2.0] * 4
    assert not data.any()


def test_batches_larger_than_the_first_and_smaller_ones_arrive_whole():
    def uneven():
        for start, size in ((0, 3), (3, 10), (13, 1), (14, 25)):
            yield np.arange(start, start + size), np.ones((size, 300, 300), np.float32)

    batches = in_dataset(QueueRunner(uneven, 5, 1, "process", **SMALL))
    assert values(batches) == list(range(39))
    assert all(batch[1].all() for batch in batches)


def test_text_and_dicts_travel():
    def words():
        yield {"word": np.array(["a", "bb", "ccc"]), "length": np.array([1, 2, 3])}

    (batch,) = in_dataset(QueueRunner(words, 3, 1, "process", **SMALL))
    found = {word.decode(): int(n) for word, n in zip(batch["word"], batch["length"], strict=True)}
    assert found == {"a": 1, "bb": 2, "ccc": 3}


@pytest.mark.parametrize(
    ("consume", "workers", "lent"),
    [
        (in_dataset, 1, "all"),
        (in_graph, 2, "all"),
        (in_graph, 1, "few"),
        (in_dataset, 2, "few"),
        (in_graph, 1, "none"),
        (in_dataset, 2, "none"),
    ],
)
def test_large_samples_arrive_once_and_whole(consume, monkeypatch, workers, lent):
    """They stay in shared memory until they are dequeued; none may be overwritten before."""
    sample = (4, 128, 128)
    size = 4 * int(np.prod(sample)) + 64
    monkeypatch.setattr(ring, "_LENT_BYTES", {"all": 1 << 29, "few": 9 * size, "none": 0}[lent])

    def uneven(worker, n_workers):
        total = 0
        for rows in (10, 3, 1, 45, 8, 33, *[10] * 10):
            numbers = np.arange(total, total + rows) * n_workers + worker
            total += rows
            yield numbers, np.ones((rows, *sample), np.float32) * numbers[:, None, None, None]

    got = consume(QueueRunner(uneven, 7, workers, "process", capacity=64, min_after_dequeue=20))
    assert values(got) == list(range(200 * workers))
    for numbers, images in got:
        flat = images.reshape(len(numbers), -1)
        assert (flat.min(axis=1) == numbers).all() and (flat.max(axis=1) == numbers).all()


def test_large_samples_kept_by_the_consumer_stay_as_they_are():
    """A consumer that stops taking batches leaves the places with the queue, and nothing hangs."""

    def endless():
        for number in itertools.count():
            yield (np.full((4, 128, 512), number, np.float32),)

    with QueueRunner(endless, 4, 2, "process", capacity=32, min_after_dequeue=4) as runner:
        batches = iter(runner.dataset())
        kept = [next(batches)[0] for _ in range(30)]
        before = [batch.numpy().copy() for batch in kept]
        for _ in range(60):
            next(batches)
        assert all((batch.numpy() == copy).all() for batch, copy in zip(kept, before, strict=True))


def test_a_stop_from_elsewhere_waits_until_get_inputs_has_started_its_workers(monkeypatch):
    begun, start = threading.Event(), ProcessPool._start

    def slow_start(pool, worker, *given):
        if worker == 2:
            begun.set()
            time.sleep(0.3)
        start(pool, worker, *given)

    monkeypatch.setattr(ProcessPool, "_start", slow_start)

    def endless():
        while True:
            yield (np.zeros(4),)

    runner = QueueRunner(endless, 4, 4, "process", **SMALL)
    descriptors = len(os.listdir("/proc/self/fd"))
    stopper = threading.Thread(target=lambda: begun.wait(10) and runner.stop())
    stopper.start()
    with tf.Graph().as_default():
        runner.get_inputs()
    stopper.join()
    assert begun.is_set() and len(os.listdir("/proc/self/fd")) == descriptors


def test_a_file_that_hides_one_of_pythons_modules_is_shown_by_the_workers_last_words(
    consume, monkeypatch, tmp_path
):
    (tmp_path / "queue.py").write_text("raise OSError('not the queue you know')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WorkerError, match=r"(?s)exit status 1 before it .*rename it") as caught:
        consume(QueueRunner(lambda: iter([(np.zeros(8),)]), 8, workers="process", **SMALL))
    assert str(tmp_path / "queue.py") in str(caught.value)
    assert "OSError: not the queue you know" in str(caught.value)


def test_what_a_worker_writes_to_stderr_appears_from_its_first_moment_on(
    monkeypatch, tmp_path, capfd
):
    (tmp_path / "bisect.py").write_text(
        "import sys\nfrom _bisect import *\nbisect = bisect_right\n"
        "print('early', file=sys.stderr)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def factory():
        import sys

        print("late", file=sys.stderr)
        yield (np.zeros(8),)

    assert len(in_dataset(QueueRunner(factory, 8, workers="process", **SMALL))) == 1
    assert [w for w in capfd.readouterr().err.split() if w in ("early", "late")] == [
        "early",
        "late",
    ]
