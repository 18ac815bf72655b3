"""How long things live: runners that nobody has, what keeps them, what worker processes leave."""

import gc
import os
import subprocess
import sys
import threading
import time

import cloudpickle
import numpy as np
import psutil
import pytest

from labkit import QueueRunner, WorkerError
from labkit.engine.batches import Spec
from labkit.engine.tf_queue import EagerQueue, Shape
from labkit.quiet import tf
from tests.programs import run_program

SMALL = {"capacity": 64, "min_after_dequeue": 8}
# A worker process that had to import this file would import TensorFlow with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(params=["thread", "process"])
def workers(request):
    return request.param


def endless():
    while True:
        yield np.ones((8, 1), np.float32), np.ones((8, 1), np.float32)


def ten():
    for _ in range(10):
        yield np.ones((8, 1), np.float32), np.ones((8, 1), np.float32)


def what_is_there():
    gc.collect()
    return {
        "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("labkit")),
        "children": sorted(child.pid for child in psutil.Process().children(True)),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def assert_back_to(before, seconds=5.0):
    deadline = time.monotonic() + seconds
    while (now := what_is_there()) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now == before


def test_a_cell_that_is_run_again_and_again_without_with_leaves_nothing(workers):
    def cell():
        runner = QueueRunner(endless, 8, 2, workers, **SMALL)
        for _ in runner.dataset().take(3):
            pass

    cell()
    threads = what_is_there()["threads"]
    while threads:
        time.sleep(0.02)
        threads = what_is_there()["threads"]
    before = what_is_there()
    for _ in range(8 if workers == "thread" else 3):
        cell()
    assert_back_to(before)


def test_a_name_that_is_given_anew_ends_the_workers_of_the_old_one(workers):
    before = what_is_there()
    runner = QueueRunner(endless, 8, 2, workers, **SMALL)
    dataset = runner.dataset()
    next(iter(dataset))
    del runner
    assert next(iter(dataset)) is not None  # the dataset still has it
    del dataset
    assert_back_to(before)


@pytest.fixture
def line():
    model = tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


DERIVED = {
    "itself": lambda dataset: dataset,
    "prefetch": lambda dataset: dataset.prefetch(2),
    "map": lambda dataset: dataset.map(lambda x, y: (x, y)).prefetch(2),
    "iterator": lambda dataset: dataset.take(-1),
}


@pytest.mark.parametrize(
    ("name", "workers"), [*zip(DERIVED, ["thread", "process"] * 2, strict=True)]
)
def test_fit_trains_to_the_end_on_what_only_a_dataset_holds(line, workers, name):
    before = what_is_there()
    seen = []
    count = tf.keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(1))
    line.fit(
        DERIVED[name](QueueRunner(ten, 8, 1, workers, **SMALL).dataset()),
        epochs=2, verbose=0, shuffle=False, callbacks=[count],
    )  # fmt: skip
    gc.collect()
    assert len(seen) == 20
    assert_back_to(before)


def test_an_iterator_alone_keeps_its_runner(workers):
    before = what_is_there()
    iterator = iter(QueueRunner(ten, 8, 1, workers, **SMALL).dataset())
    gc.collect()
    assert len(list(iterator)) == 10
    del iterator
    assert_back_to(before)


def test_two_runners_of_one_spec_share_no_sample():
    """Eager queues with one name would be one queue."""

    def numbered(first):
        def factory():
            for number in range(first, first + 400, 8):
                yield (np.arange(number, number + 8),)

        return factory

    with (
        QueueRunner(numbered(0), 8, **SMALL) as one,
        QueueRunner(numbered(1000), 8, **SMALL) as two,
    ):
        for _ in range(3):
            pairs = list(zip(one.dataset(), two.dataset(), strict=True))
            mine, others = (
                sorted(int(i) for pair in pairs for i in pair[part][0]) for part in (0, 1)
            )
            assert mine == list(range(400)) and others == list(range(1000, 1400))


@pytest.mark.parametrize("seed", [None, 3])
def test_the_queue_of_a_pass_costs_no_memory(seed, request):
    tf.random.set_seed(1)  # or TensorFlow draws no seeds of its own
    request.addfinalizer(lambda: tf.random.set_seed(None))
    shape = Shape(Spec.of((np.zeros(8),)), 8, 64, 8, seed)

    def passes(number):
        for _ in range(number):
            queue = EagerQueue(shape)
            queue.enqueue([np.zeros(8)])
            queue.close(cancel=False)
        del queue
        gc.collect()
        return psutil.Process().memory_info().rss

    def grown():
        before = passes(1)
        return (passes(200) - before) / 200

    passes(200)
    # A kernel that TensorFlow keeps for each would be 37 KB, each time; other noise comes and goes.
    assert any(grown() < 10_000 for _ in range(5))


# -- programs ------------------------------------------------------------------------------------


def test_a_program_that_never_stops_its_runners_ends_quietly_and_workers_print_at_once(tmp_path):
    """And no import of labkit's changes the numerics of such a program."""
    done = run_program(
        """
        import os, time
        import numpy as np

        asked = [os.environ.pop("TF_ENABLE_ONEDNN_OPTS", None)]
        import labkit, labkit.train, labkit.cli
        asked.append(os.environ.get("TF_ENABLE_ONEDNN_OPTS"))
        from labkit import QueueRunner, UsageMonitor, diagnose, model_fn, plots
        asked.append(os.environ.get("TF_ENABLE_ONEDNN_OPTS"))
        from labkit.quiet import tf
        asked.append(os.environ.get("TF_ENABLE_ONEDNN_OPTS"))
        print(asked[1:], flush=True)

        def prints():
            print("first", flush=False)
            yield (np.zeros(8),)
            print("second")
            time.sleep(3600)

        small = {"capacity": 64, "min_after_dequeue": 0}
        runner = QueueRunner(prints, 8, 1, "process", timeout=3, **small)  # a start counts
        try:
            with runner:
                for _ in runner.dataset():
                    print("a batch", flush=True)
        except RuntimeError:
            print("stalled", flush=True)

        def endless(worker):
            while True:
                yield (np.full(8, worker),)

        kept = []
        for workers in ("process", "thread"):
            runner = QueueRunner(endless, 8, 2, workers, capacity=64, min_after_dequeue=8)
            next(iter(runner.dataset()))
            kept.append(runner)
        print("done")
        """,
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == ""
    asked, *lines = done.stdout.splitlines()
    assert asked == "[None, None, None]"
    assert sorted(lines) == ["a batch", "done", "first", "second", "stalled"]
    assert lines[-2:] == ["stalled", "done"] and lines[0] == "first"


# -- processes and their own children ------------------------------------------------------------


def with_a_child(seconds):
    def factory():

        child = subprocess.Popen(["sleep", str(seconds)])
        while True:
            yield (np.full(8, child.pid),)

    return factory


def test_a_killed_worker_is_told_at_once_though_its_child_lives():
    def dies():
        import os
        import signal

        subprocess.Popen(["sleep", "600"], close_fds=False)
        yield (np.zeros(8),)
        os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"killed by signal 9 \(SIGKILL\)"):  # noqa: SIM117
        with QueueRunner(dies, 8, 1, "process", timeout=60, **SMALL) as runner:
            list(runner.dataset())
    assert time.monotonic() - began < 30


def test_what_the_iterator_started_ends_with_its_worker():
    with QueueRunner(with_a_child(600), 8, 2, "process", **SMALL) as runner:
        children = {int(batch[0][0]) for batch in runner.dataset().take(10)}
        assert children and all(psutil.pid_exists(pid) for pid in children)
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        for pid in children
    )


def test_a_worker_that_leaves_by_sys_exit_is_told_with_the_line(workers):
    def leaves():
        import sys

        yield (np.zeros(8),)
        sys.exit(3)

    with pytest.raises(WorkerError, match=r"(?s)raised SystemExit: 3.*sys\.exit\(3\)"):  # noqa: SIM117
        with QueueRunner(leaves, 8, 1, workers, **SMALL) as runner:
            list(runner.dataset())


def test_queues_and_runners_that_are_collected_while_tensorflow_traces_do_no_harm(workers):
    """The collector runs in whatever thread it pleases, also in one that holds a graph's lock."""
    before = what_is_there()

    class Cycle:
        def __init__(self, runner):
            self.runner, self.me = runner, self

    for _ in range(3):
        runner = QueueRunner(endless, 8, 1, workers, **SMALL)
        for _ in runner.dataset().take(2):
            pass
        Cycle(runner)
        del runner
        with tf.Graph().as_default() as graph:
            operations = len(graph.get_operations())
            gc.collect()
            assert len(graph.get_operations()) == operations

        @tf.function
        def traced(x):
            gc.collect()
            return x + 1

        assert int(traced(tf.constant(1))) == 2
    assert_back_to(before)


def test_an_eager_runner_is_stopped_inside_of_a_graph(workers):
    runner = QueueRunner(endless, 8, 1, workers, **SMALL)
    next(iter(runner.dataset()))
    with tf.Graph().as_default() as graph:
        runner.stop()
        assert not graph.get_operations()
