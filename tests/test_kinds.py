"""A kind of worker is one class and one line: a third kind, made here, does all that the others do.

Its workers have no thread of their own: they run in the feeder's, one batch at a time.
"""

import os
import sys
import threading
import time
import warnings

import cloudpickle
import numpy as np
import pytest

from labkit import QueueRunner, WorkerError
from labkit.engine import KINDS, TRIED, Kind
from labkit.engine.messages import Chunk, Ended, Lost, Skipped
from labkit.engine.pool import Job, Pool
from labkit.engine.produce import IteratorFactory, LeftOut, produce
from labkit.engine.tracebacks import describe
from labkit.quiet import tf
from tests.consumers import in_dataset, in_graph

SMALL = {"capacity": 64, "min_after_dequeue": 8}
# A worker process that had to import this file would import TensorFlow with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class InlinePool(Pool):
    def __init__(self, job):
        super().__init__(job)
        self._passes, self._slots, self._epochs, self._lives = [], [], [], []
        self._something = threading.Event()

    def _start(self, worker, life, begin):
        for its, first in ((self._passes, None), (self._slots, 1), (self._epochs, self.epoch)):
            its[worker : worker + 1] = [first]
        self._lives[worker : worker + 1] = [life]
        self._go_on(worker, begin)

    def _receive(self, seconds):
        ready = [i for i, batches in enumerate(self._passes) if batches and self._slots[i]]
        if not ready:
            self._something.wait(seconds)
        self._something.clear()
        return [self._next(worker) for worker in ready]

    def _next(self, worker):
        at = self._epochs[worker], self._lives[worker]
        try:
            made = next(self._passes[worker], None)
        except Exception as error:
            self._passes[worker] = None
            return Lost(worker, *describe(error), error, life=self._lives[worker])
        if made is None:
            self._passes[worker] = None
            return Ended(worker, *at)
        self._slots[worker] -= 1
        if isinstance(made, LeftOut):
            told = describe(made.error)
            return Skipped(worker, *told, made.error, self._epochs[worker])
        self.spec = self.spec or made.spec
        epoch, life = at
        told = made.arrays, made.seconds, epoch, (), True, None, made.number, life
        return Chunk(worker, *told)

    def _refill(self, worker, slots):
        self._slots[worker] += 1

    def _go_on(self, worker, begin=0):
        self._epochs[worker] = self.epoch
        given = self.spec, True, self.job.skip, begin
        self._passes[worker] = produce(self.factory, worker, self.epoch, *given)

    def _room(self, worker):
        return 1

    def _doing(self, worker):
        return "it runs in the feeder's thread\n"

    def wake(self):
        self._something.set()

    def _end(self, seconds):
        self._passes.clear()
        return []


@pytest.fixture(params=[*TRIED, "inline"])
def workers(request, monkeypatch):
    monkeypatch.setitem(KINDS, "inline", Kind(InlinePool, lambda: 4, "inline workers"))
    return request.param


@pytest.fixture
def consume(workers):
    """One of the two for each kind: what the queue does with a batch depends on none."""
    return in_dataset if workers == "process" else in_graph


def shares(total, chunk):
    def factory(worker, n_workers, epoch):
        for at in range(worker * chunk, total, n_workers * chunk):
            index = np.arange(at, min(at + chunk, total))
            yield index + 1000 * epoch, {"pair": np.stack([index, -index], 1)}

    return factory


def test_each_sample_comes_once_in_its_structure(consume, workers):
    batches = consume(QueueRunner(shares(100, 7), 8, 3, workers, **SMALL))
    assert sorted(i for index, _ in batches for i in index.tolist()) == list(range(100))
    assert all((more["pair"] == np.stack([index, -index], 1)).all() for index, more in batches)


def test_passes_begin_afresh_and_end(workers):
    with QueueRunner(shares(100, 7), 8, 3, workers, **SMALL) as runner:
        data = runner.dataset()
        for epoch in range(4):
            taken = data.take(3) if epoch % 2 else data
            index = sorted(int(i) for part, _ in taken for i in part)
            assert len(index) == (24 if epoch % 2 else 100)
            assert {i // 1000 for i in index} == {epoch}


def test_an_exception_comes_with_its_cause_and_traceback(consume, workers):
    def breaks(worker):
        yield (np.full(8, worker),)
        if worker:
            raise LookupError("no such file")
        yield (np.full(8, worker),)

    with pytest.raises(WorkerError) as caught:
        consume(QueueRunner(breaks, 8, 2, workers, **SMALL))
    assert caught.value.worker == 1
    assert isinstance(caught.value.__cause__, LookupError)
    assert caught.value.__cause__.args == ("no such file",)
    assert 'raise LookupError("no such file")' in str(caught.value)
    assert "labkit/engine" not in str(caught.value)


def test_a_cause_that_cannot_travel_is_told_by_type_and_text(consume, workers):
    class StubbornError(Exception):
        def __reduce__(self):
            raise TypeError("not me")

    def breaks():
        yield (np.zeros(8),)
        raise StubbornError("stays at home")

    with pytest.raises(WorkerError, match="raised StubbornError: stays at home") as caught:
        consume(QueueRunner(breaks, 8, 1, workers, **SMALL))
    assert "StubbornError: stays at home" in repr(caught.value.__cause__) or isinstance(
        caught.value.__cause__, StubbornError
    )


def test_an_error_of_a_class_of_the_users_own_keeps_its_class_and_attributes(workers):
    class DamagedError(Exception):
        def __init__(self, path):
            super().__init__(f"{path} is damaged")
            self.path = path

        def __reduce__(self):
            return type(self), (self.path,)

    def breaks():
        yield (np.zeros(8),)
        raise DamagedError("images/17.png")

    with (
        pytest.raises(WorkerError) as caught,
        QueueRunner(breaks, 8, 1, workers, **SMALL) as runner,
    ):
        list(runner.dataset())
    assert type(caught.value.__cause__).__name__ == "DamagedError"
    assert caught.value.__cause__.path == "images/17.png"


def test_a_misfit_and_an_end_at_once_are_named(consume, workers):
    def misfit():
        yield (np.zeros((4, 2)),)
        yield (np.zeros((4, 3)),)

    with pytest.raises(WorkerError, match=r"shape \(4, 3\), expected \(n, 2\)"):
        consume(QueueRunner(misfit, 4, 1, workers, **SMALL))
    with pytest.raises(WorkerError, match="ended before its first batch"):
        consume(QueueRunner(lambda: iter(()), 4, 2, workers, **SMALL))


def test_an_object_with_an_index_is_walked_to_its_length(consume, workers):
    class Slices:
        def __init__(self):
            self.index = np.arange(30)

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return (self.index[8 * i : 8 * i + 8],)

    for factory in (Slices, lambda: iter(Slices())):
        batches = consume(QueueRunner(factory, 8, 1, workers, **SMALL))
        assert sorted(i for (index,) in batches for i in index.tolist()) == list(range(30))


def test_empty_batches_may_come_in_between_but_not_for_ever(workers):
    class Endless:
        def __getitem__(self, i):
            return (np.arange(30)[8 * i : 8 * i + 8],)

    def gaps():
        for index in np.arange(30):
            yield (np.arange(0),)
            yield (np.array([index]),)

    def endless():
        yield from gaps()
        while True:
            yield (np.arange(0),)

    batches = in_dataset(QueueRunner(gaps, 8, 1, workers, **SMALL))
    assert sorted(i for (index,) in batches for i in index.tolist()) == list(range(30))
    for factory, line in ((endless, "in endless"), (lambda: iter(Endless()), "in <lambda>")):
        with pytest.raises(WorkerError, match=r"10,000 empty batches in a row") as caught:
            in_dataset(QueueRunner(factory, 8, 1, workers, **SMALL))
        assert line in str(caught.value) and "test_kinds.py" in str(caught.value)


@pytest.mark.parametrize("text", [[], ["a"]])
def test_who_makes_only_empty_batches_is_late(workers, text):
    def slow():
        while True:
            time.sleep(0.02)
            yield (np.array(text)[:0],)

    with (
        pytest.raises(WorkerError, match=r"delivered nothing for 0\.5 s"),
        QueueRunner(slow, 8, 1, workers, timeout=0.5, **SMALL) as runner,
    ):
        list(runner.dataset())


def test_continue_goes_on_without_the_lost_worker(workers):
    def factory(worker, n_workers):
        if worker == 1:
            raise OSError("no disk")
        yield from shares(40, 4)(0, 1, 0)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runner = QueueRunner(factory, 8, 2, workers, on_error="continue", **SMALL)
        with runner:
            index = sorted(int(i) for part, _ in runner.dataset() for i in part)
    assert index == list(range(40))
    assert len([w for w in said if "Going on with the other" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:(?s).*started again")
@pytest.mark.parametrize("later", [True, False], ids=["start", "from the beginning"])
def test_a_lost_worker_is_started_again_and_each_sample_comes_once(workers, later, tmp_path):
    marks = str(tmp_path)

    def fails_at(at, times):
        """Marks in a folder, since no other memory outlives a worker process."""
        mark = f"{marks}/{at}-{len(os.listdir(marks))}"
        if sum(name.startswith(f"{at}-") for name in os.listdir(marks)) < times:
            open(mark, "w").close()
            raise OSError(f"no disk at {at}")

    def batches(worker, n_workers, epoch, start):
        for at in range(start + worker, 40, n_workers):
            fails_at(f"{epoch}.{at}", {9: 2, 22: 1}.get(at, 0))
            yield (np.arange(at * 4, at * 4 + 4),)

    def whole(worker, n_workers, epoch):
        yield from batches(worker, n_workers, epoch, 0)

    settings = {"on_error": "restart", "max_restarts": 4, **SMALL}
    with QueueRunner(batches if later else whole, 8, 2, workers, **settings) as runner:
        for _ in range(2):
            assert sorted(int(i) for (part,) in runner.dataset() for i in part) == list(range(160))
    settings["max_restarts"] = 1
    with pytest.raises(WorkerError, match="invalid literal"):
        in_dataset(QueueRunner(lambda: map(int, "x"), 8, 1, workers, **settings))


def test_a_stalled_worker_is_started_again(workers, tmp_path):
    if workers == "inline":
        pytest.skip("it stands in the thread that would find out")
    # A process's start counts, and takes longer on a busy machine.
    timeout, mark = 0.8 if workers == "thread" else 3.0, str(tmp_path / "stood")

    def batches(start):
        for at in range(start, 6):
            if at == 3 and not os.path.exists(mark):
                open(mark, "w").close()
                time.sleep(timeout + 1.0)
            yield (np.arange(at * 8, at * 8 + 8),)

    settings = {"on_error": "restart", "timeout": timeout, "max_restarts": 1, **SMALL}
    told = rf"delivered nothing for {timeout:g} s(?s:.*)started again, 1 of 1"
    with pytest.warns(RuntimeWarning, match=told):
        got = in_dataset(QueueRunner(batches, 8, 1, workers, **settings))
    assert sorted(int(i) for (index,) in got for i in index) == list(range(48))


class Told(InlinePool):
    """Its one worker says what the test wants, and notes what it is asked for."""

    def __init__(self, timeout=None):
        factory = IteratorFactory(lambda: iter(()), 1)
        super().__init__(Job(factory, timeout=timeout, restarts=1))
        self.says, self.looks, self.refilled, self.starts = [], 0, 0, []
        self.set_active(1)

    def _start(self, worker, life, begin):
        self.starts.append((life, begin))
        if life and len(self.starts) > 2:
            raise OSError("no more processes")
        super()._start(worker, life, begin)

    def _receive(self, seconds):
        self.looks += 1
        said, self.says = self.says, []
        return said

    def _refill(self, worker, slots):
        self.refilled += 1


def chunk(number, life, *samples):
    return Chunk(0, [np.array(samples)], 0.0, 0, number=number, life=life)


def test_what_a_dead_life_still_says_is_dropped():
    """An actor may answer, a thread wake up, after another one has taken its place."""
    pool = Told()
    pool.says = [chunk(0, 0, 1, 2), Lost(0, "is gone")]
    first = pool.get(0)
    with pytest.warns(RuntimeWarning, match="is gone(?s:.*)started again, 1 of 1"):
        assert pool.get(0) is None
    assert pool.starts == [(0, 0), (1, 0)]
    pool.says = [chunk(1, 0, 3, 4), Ended(0, 0), Lost(0, "is gone"), chunk(0, 1, 1, 2)]
    assert pool.get(0) is None  # and what came of the new one had come before
    pool.says = [chunk(1, 1, 3, 4), Ended(0, 0, 1)]
    again = pool.get(0)
    assert (again.life, again.number) == (1, 1) and isinstance(pool.get(0), Ended)
    # Nor are slots given back that the new one never had.
    assert pool.refilled == 1
    pool.release(first)
    assert pool.refilled == 1
    pool.release(again)
    assert pool.refilled == 2
    pool.stop()


@pytest.mark.filterwarnings("ignore:(?s).*started again")
def test_one_that_cannot_be_started_again_or_is_not_to_be_is_lost():
    pool = Told()
    pool.starts.append("that there are two already")
    pool.says = [Lost(0, "is gone", "where it was")]
    lost = pool.get(0)
    said = "is gone(?s:.*)where it was\nAnother one could not be started in its place: no more p"
    with pytest.raises(WorkerError, match=said):
        raise lost.as_error()
    pool.stop()
    pool = Told()
    pool.begin_stop()
    pool.says = [Lost(0, "is gone")]
    assert isinstance(pool.get(0), Lost) and pool.starts == [(0, 0)]
    pool.stop()


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_nobody_asks_for_more_while_there_is_enough(timeout):
    pool = Told(timeout)
    pool.says = [chunk(number, 0, number) for number in range(50)]
    assert [pool.get(0).number for _ in range(50)] == list(range(50))
    assert pool.looks < 25  # but now and then, for those who are late
    pool.stop()


@pytest.mark.filterwarnings("ignore:(?s).*left out")
def test_a_bad_batch_is_left_out(workers):
    def factory(worker, n_workers):
        def batch(number):
            if number == 3:
                raise OSError("no disk")
            return (np.full((4, 2) if number == 5 else 4, number),)

        return map(batch, range(worker, 8, n_workers))

    runner = QueueRunner(factory, 4, 2, workers, on_error="skip", **SMALL)
    batches = in_dataset(runner)
    assert sorted({int(i) for (index,) in batches for i in index}) == [0, 1, 2, 4, 6, 7]
    assert runner.skipped == 2


def test_auto_starts_more_where_they_are_needed(workers, capsys):
    runner = QueueRunner(shares(400, 4), 8, "auto", workers, max_workers=3, **SMALL)
    with runner:
        assert sorted(int(i) for part, _ in runner.dataset() for i in part) == list(range(400))


def test_a_runner_is_stopped_while_its_queue_is_full(workers):
    def endless():
        while True:
            yield (np.zeros(8),)

    runner = QueueRunner(endless, 8, 2, workers, **SMALL)
    next(iter(runner.dataset()))
    runner.stop()
    runner.stop()
    assert runner.depth() == 0


def test_the_list_of_kinds_is_named_where_a_wrong_one_is_refused(workers):
    with pytest.raises(ValueError, match=r"'thread' or 'process'.*got 'actor'"):
        QueueRunner(shares(8, 8), 8, 1, "actor")


def test_tensors_of_the_third_kind_feed_keras(workers):
    def points():
        for _ in range(6):
            yield np.ones((8, 1), np.float32), np.ones((8, 1), np.float32)

    model = tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with QueueRunner(points, 8, 1, workers, **SMALL) as runner:
        history = model.fit(runner.dataset(), epochs=2, verbose=0, shuffle=False)
    assert len(history.history["loss"]) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_error_whose_text_is_no_text_is_told_all_the_same(consume, workers):
    def no_utf8():
        yield (np.zeros(8),)
        raise ValueError(f"caf{chr(0xDCE9)}.png is damaged")

    with pytest.raises(WorkerError, match=r"caf\\udce9\.png is damaged"):
        consume(QueueRunner(no_utf8, 8, 1, workers, **SMALL))

    class SilentError(Exception):
        def __str__(self):
            return self.never_set

    def no_text():
        yield (np.zeros(8),)
        raise SilentError

    with pytest.raises(WorkerError, match="raised SilentError, whose text raises AttributeError"):
        consume(QueueRunner(no_text, 8, 1, workers, **SMALL))
