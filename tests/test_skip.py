"""on_error="skip": a bad batch is left out, counted and told, and the others come as ever."""

import functools
import warnings

import numpy as np
import pytest

from labkit import QueueRunner, WorkerError, from_files
from labkit.engine import KINDS, TRIED
from labkit.engine.messages import Skipped
from labkit.engine.pool import Job
from labkit.engine.produce import IteratorFactory
from labkit.quiet import tf
from tests.consumers import in_dataset, in_graph

SMALL = {"capacity": 64, "min_after_dequeue": 8, "on_error": "skip"}
BAD = {0, 5, 11}  # batch 7 has another shape


@pytest.fixture(params=TRIED)
def workers(request):
    return request.param


def by_object(total, bad):
    """Shares of `total` batches of 4 by an object that goes on after an exception."""

    class Share:
        def __init__(self, worker, n_workers):
            self.at, self.step = worker - n_workers, n_workers

        def __iter__(self):
            return self

        def __next__(self):
            self.at += self.step
            if self.at >= total:
                raise StopIteration
            if self.at in bad:
                raise OSError(f"file {self.at} is damaged")
            return (np.full((4, 2) if self.at == 7 else 4, self.at),)

    return lambda worker, n_workers: Share(worker, n_workers)


def by_generator(total, bad):
    """The same by a generator, which is over once it raised."""

    def share(worker, n_workers, start=0):
        for at in range(start + worker, total, n_workers):
            if at in bad:
                raise OSError(f"file {at} is damaged")
            yield (np.full((4, 2) if at == 7 else 4, at),)

    return share


def taken(runner, consume=in_dataset):
    """Batch numbers in their order, and what was said of those that were left out."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        batches = consume(runner)
    words = [str(w.message) for w in said if "left out" in str(w.message)]
    return [int(i) for (index,) in batches for i in index], words


@functools.cache
def of_one_thread():
    return taken(QueueRunner(by_object(30, BAD), 4, **SMALL, order="fixed", seed=3))[0]


@pytest.mark.parametrize(
    ("made", "workers", "consume"),
    [
        (by_object, "thread", in_graph),
        (by_object, "process", in_dataset),
        (by_generator, "thread", in_dataset),
        (by_generator, "process", in_graph),
    ],
)
def test_a_bad_batch_is_left_out_counted_and_told_and_uses_its_turn(made, workers, consume):
    fixed = {"order": "fixed", "seed": 3, "samples": 120}
    runner = QueueRunner(made(30, BAD), 4, 2, workers, **SMALL, **fixed)
    index, (first, number) = taken(runner, consume)
    assert sorted(index) == sorted(4 * [i for i in range(30) if i not in {*BAD, 7}])
    assert index == of_one_thread() != sorted(index)
    assert "OSError: file 0" in first and 'raise OSError(f"file {' in first
    assert "labkit/engine" not in first
    assert number.startswith("labkit: 4 of 30 batches were left out of a pass")
    assert runner.skipped == 4


QUIET = pytest.mark.filterwarnings("ignore:(?s).*left out")


@QUIET
def test_too_many_are_an_error_that_says_how_many(workers):
    factory = by_object(30, {7, *range(10, 30)})
    for given, most in (({}, 10), ({"max_skipped": 2}, 2)):
        with pytest.raises(WorkerError, match=rf"^labkit: {most + 1} of \d+ batches had") as error:
            in_dataset(QueueRunner(factory, 4, 2, workers, **SMALL, **given))
        assert f"at most {most} of a pass (max_skipped). The last: worker " in str(error.value)
        assert "raise OSError" in str(error.value) and error.value.worker in (0, 1)
        assert isinstance(error.value.__cause__, OSError)


class Broken:
    asked = 0

    def __iter__(self):
        return self

    def __next__(self):
        Broken.asked += 1
        raise OSError("no disk")


@QUIET
def test_who_fails_for_ever_or_at_all_is_no_endless_loop():
    def other(worker):
        return Broken() if worker else iter([(np.zeros(4),)] * 3)

    Broken.asked = 0
    # In a fixed order worker 1 waits for its turn with the first of its own.
    for factory, order in ((Broken, "any"), (other, "fixed")):
        with pytest.raises(WorkerError, match=r"11 of \d+ batches had to be left out"):
            in_dataset(QueueRunner(factory, 4, 2, order=order, **SMALL))
    assert Broken.asked < 60
    with pytest.raises(WorkerError, match=r"4 of 4 batches had to be left out, and none is left"):
        in_dataset(QueueRunner(by_object(4, range(4)), 4, 1, **SMALL))


def test_who_waits_to_be_heard_of_makes_nothing_more_and_is_not_late(workers):
    def raises(number):
        raise OSError(number)

    job = Job(IteratorFactory(lambda: map(raises, range(100)), 1), timeout=60, skip=True)
    pool = KINDS[workers].pool(job)
    try:
        pool.set_active(1)
        came = [pool.get(30)]
        while came[-1] is not None:
            came.append(pool.get(0.2))
        assert {type(message) for message in came[:-1]} == {Skipped} and len(came) < 5
        pool._states[0].since -= 100
        assert pool.get(0.2) is None
        for skipped in came[:-1]:
            pool.release(skipped)
        assert pool.get(30).summary == f"raised OSError: {len(came) - 1}"
    finally:
        pool.stop()


@QUIET
def test_what_cannot_go_on_ends_and_says_why(workers):
    def generator():
        yield (np.zeros(4),)
        raise OSError("file 1 is damaged")

    def raises(error):
        raise error

    over = [lambda: map(tuple, generator()), generator]
    for factory in over[: 1 + (workers == "thread")]:
        with pytest.raises(WorkerError, match="worker 0 raised OSError: file 1") as error:
            in_dataset(QueueRunner(factory, 4, 1, workers, **SMALL))
        assert "a generator that raised is over" in str(error.value)
        assert "a parameter start" in str(error.value) and "in generator" in str(error.value)
    ends = {
        "SystemExit": lambda: map(raises, [SystemExit(3)]),
        "MemoryError": lambda: map(raises, [MemoryError()]),
        "LookupError": lambda: raises(LookupError("no folder")),
    }
    for what, factory in list(ends.items())[: 1 + 2 * (workers == "thread")]:
        with pytest.raises(WorkerError, match=f"^labkit: worker 0 raised {what}"):
            in_dataset(QueueRunner(factory, 4, 1, workers, **SMALL))


def test_each_pass_has_its_own_limit_and_a_length_that_is_not_known():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runner = QueueRunner(by_object(12, BAD), 4, 1, **SMALL, max_skipped=4, samples=48)
        with runner:
            data = runner.dataset()
            assert int(data.cardinality()) == -2  # Keras would wait for what was left out
            for passes in (1, 2, 3):
                assert sum(len(index) for (index,) in data) == 32
                assert runner.skipped == 4 * passes
    assert sum("Traceback" in str(w.message) for w in said) == 1
    assert sum("4 of 12 batches were left out" in str(w.message) for w in said) == 3


@QUIET
def test_a_pass_that_is_short_by_something_else_is_an_error():
    for total in (30, 40):  # the second has more than was told
        runner = QueueRunner(by_object(total, set()), 4, 1, **SMALL, samples=120)
        if total == 30:
            assert len(in_dataset(runner)) == 29
            continue
        with pytest.raises(WorkerError, match="delivered 156 samples, expected 120"):
            in_dataset(runner)


def test_a_source_by_sample_leaves_out_the_batch_of_a_damaged_file(workers):
    def load(number):
        if number == 13:
            raise ValueError("not an image")
        return np.float32(number)

    files = from_files(range(40), load, 4, shuffle=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        batches = in_dataset(QueueRunner(files, 4, 2, workers, **SMALL))
    assert "not an image" in str(said[0].message)
    assert "It came of sample 13" in str(said[0].message)
    index = sorted(int(i) for batch in batches for i in batch)
    assert index == [i for i in range(40) if i not in (12, 13, 14, 15)]


@QUIET
def test_data_sets_of_batches_go_on_after_a_bad_one():
    class Frames(tf.keras.utils.PyDataset):
        ended = 0

        def __len__(self):
            return 12

        def __getitem__(self, number):
            if number == 5:
                raise OSError("file 5 is damaged")
            return (np.full(4, number),)

        def on_epoch_end(self):
            self.ended += 1

    frames = Frames()
    runner = QueueRunner(frames, 4, 2, **SMALL)
    with runner:
        for _ in range(2):
            index = sorted(int(i) for (part,) in runner.dataset() for i in part)
            assert index == sorted(4 * [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])
    assert runner.skipped == frames.ended == 2

    class Reads:
        def __iter__(self):
            yield from map(frames.__getitem__, range(12))

    with pytest.raises(WorkerError, match=r"file 5 is damaged(?s:.*)generator that raised is over"):
        in_dataset(QueueRunner(Reads(), 4, 1, **SMALL))


@pytest.mark.parametrize("more", [{"max_skipped": -1}, {"on_error": "raise", "max_skipped": 3}])
def test_a_limit_that_is_none_is_refused(more):
    with pytest.raises(ValueError, match=r"QueueRunner: max_skipped must be None, or an integer"):
        QueueRunner(by_object(3, ()), **{**SMALL, **more})
