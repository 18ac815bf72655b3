"""state_dict and load_state_dict: what is delivered next, is delivered next."""

import dataclasses
import json

import numpy as np
import pytest

from labkit import MnistDataGenerator, QueueRunner, WorkerError, from_files
from labkit.engine import TRIED, state
from labkit.engine.batches import Component
from labkit.engine.messages import Chunk
from labkit.engine.record import Mixed, Record, Run, held
from labkit.quiet import tf
from tests.consumers import v1

FIXED = {"batch_size": 6, "capacity": 60, "min_after_dequeue": 24, "order": "fixed", "seed": 3}


def shares(sizes, made=None, starts=True):
    """A factory of batches of these sizes, whose samples are numbered; `made` gets the number of
    each that it makes."""
    first = np.concatenate([[0], np.cumsum(sizes)])

    def share(worker, n_workers, epoch, start):
        for number in range(start + worker, len(sizes), n_workers):
            if made is not None:
                made.append(number)
            yield np.arange(first[number], first[number + 1]) + 10_000 * epoch

    if starts:

        def factory(worker, n_workers, epoch, start=0):
            return share(worker, n_workers, epoch, start)

    else:

        def factory(worker, n_workers, epoch):
            return share(worker, n_workers, epoch, 0)

    return factory


def passes(factory, count=2, begin=None, stop_after=None, **options):
    """Batches of some passes; and, if it stops after so many of the first, the state there, as JSON
    keeps it."""
    found = []
    with QueueRunner(factory, **{**FIXED, **options}) as runner:
        if begin is not None:
            runner.load_state_dict(json.loads(begin))
            assert runner.state_dict() == json.loads(begin)
        data = runner.dataset()
        for _ in range(count):
            found.append([])
            for batch in data:
                found[-1].append(tf.nest.map_structure(lambda part: part.numpy().tolist(), batch))
                if len(found[-1]) == stop_after:
                    return found[-1], json.dumps(runner.state_dict())
    return found


UNEVEN = [4, 0, 9, 1, 30, 4, 4, 3, 0, 0, 7] * 3


@pytest.mark.parametrize(
    ("sizes", "options", "stops"),
    [
        ([4] * 40, {"n_workers": 3}, (1, 12, -1)),
        ([4] * 40, {"n_workers": 2, "shuffle": False, "min_after_dequeue": None}, (1, -1)),
        (UNEVEN, {"n_workers": 3}, (12, -1)),
        (UNEVEN, {"n_workers": 2, "min_after_dequeue": 5, "batch_size": 7}, (1, 13)),
        (UNEVEN, {"n_workers": 1, "min_after_dequeue": 0, "batch_size": 1}, (93, -1)),
        ([50], {"n_workers": 2}, (1, 4)),
    ],
)
def test_another_runner_delivers_what_would_have_come_next(sizes, options, stops, recwarn):
    whole = passes(shares(sizes), **options)
    for stop in stops:
        stop_after, starts = stop % (len(whole[0]) + 1), stop % 2 == 1  # -1: behind the last
        came, there = passes(shares(sizes), stop_after=stop_after, **options)
        assert came == whole[0][:stop_after]
        assert len(there) < 700
        rest = passes(shares(sizes, starts=starts), begin=there, **options)
        assert rest == [whole[0][stop_after:], whole[1]]


def test_only_what_lay_in_the_reservoir_is_made_again():
    sizes, made = [4] * 400, []
    whole = passes(shares(sizes), 1, n_workers=3)[0]
    _, there = passes(shares(sizes), stop_after=200, n_workers=3)
    assert passes(shares(sizes, made), 1, begin=there, n_workers=3)[0] == whole[200:]
    left = {sample // 4 for batch in whole[200:] for sample in batch}
    assert len(left) < 250  # of 400
    assert sorted(made) == sorted(left)


def mnist_rows(batch):
    return np.asarray(batch[0]).reshape(len(batch[0]), -1)[:, :2].tolist()


def test_from_threads_in_a_dataset_to_processes_in_a_graph(numbered):
    """And from there to threads again; the batches are numbered through all passes over the data,
    of which there are 17 to three workers."""
    data = MnistDataGenerator(30, data=numbered)
    options = {**FIXED, "iterator": data.passes_iterator, "n_workers": 3}
    found = []
    with QueueRunner(**options) as runner:
        for batch in runner.dataset().take(60):
            found.append(mnist_rows(batch))
    found, expected = found[:15], found
    with QueueRunner(**options) as runner:
        for _ in runner.dataset().take(15):
            pass
        there = runner.state_dict()
    with tf.Graph().as_default():
        runner = QueueRunner(**options, workers="process")
        runner.load_state_dict(there)
        inputs = runner.get_inputs()
        with v1.Session() as sess:
            with runner.start(sess):
                found += [mnist_rows(sess.run(inputs)) for _ in range(15)]
            there = runner.state_dict()  # of a runner that has ended
    with QueueRunner(**options) as runner:
        runner.load_state_dict(there)
        found += [mnist_rows(batch) for batch in runner.dataset().take(30)]
    assert found == expected


@pytest.mark.parametrize("kind", TRIED)
def test_large_samples_text_and_files_go_on_too(kind):
    def large(index):  # lent by a process, in parts of a batch
        return np.full(1 << 15, index, np.int64)

    def text(index):
        return "x" * int(index)

    for load in (large, text):
        source = from_files(range(30), load, 5)
        whole = passes(source, workers=kind, n_workers=2, capacity=40)
        _, there = passes(source, stop_after=2, workers=kind, n_workers=2, capacity=40)
        rest = passes(source, begin=there, workers=kind, n_workers=2, capacity=40)
        assert rest == [whole[0][2:], whole[1]]


# -- any order -------------------------------------------------------------------------------------

ANY = {"batch_size": 6, "capacity": 60, "min_after_dequeue": 24, "order": "any"}


def hurried(size, pause=0.002):
    """Workers that take different times, so that they deliver in an order of that run's own."""

    def factory(worker, n_workers, epoch, start=0):
        import random
        import time

        for number in range(start + worker, size, n_workers):
            time.sleep(random.random() * pause)
            yield 4 * number + np.arange(4) + 10_000 * epoch

    return factory


def each_once(batches, epoch, size):
    samples = sorted(sample for batch in batches for sample in batch)
    return samples == (np.arange(4 * size) + 10_000 * epoch).tolist()


@pytest.mark.parametrize("kind", TRIED)
def test_in_any_order_each_sample_comes_once_whenever_it_was_stopped(kind):
    """Twice in the same pass, and then in a graph."""
    options = {**ANY, "n_workers": 3 if kind == "thread" else 2}
    begin, came = None, []
    for stop_after in (1, 50):
        with QueueRunner(hurried(100), workers=kind, **options) as runner:
            runner.state_dict() if begin is None else runner.load_state_dict(begin)
            for number, batch in enumerate(runner.dataset().prefetch(3), 1):
                came.append(batch.numpy().tolist())
                if number == stop_after:
                    break
            begin = json.loads(text := json.dumps(runner.state_dict(used=len(came))))
            assert len(text) < 1500
    with tf.Graph().as_default():
        runner = QueueRunner(hurried(100), **options)
        runner.load_state_dict(begin)
        inputs = runner.get_inputs()
        with v1.Session() as sess, runner.start(sess):
            came += [sess.run(inputs).tolist() for _ in range(67 - 51)]
            with pytest.raises(tf.errors.OutOfRangeError):
                sess.run(inputs)
            begin = runner.state_dict()
    assert each_once(came, 0, 100)
    assert came != sorted(came)
    with QueueRunner(hurried(100), **options) as runner:
        runner.load_state_dict(begin)
        data = runner.dataset()
        assert [*data] == []  # what was left of the pass
        assert each_once([batch.numpy().tolist() for batch in data], 1, 100)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (from_files(range(300), int, 5), {"n_workers": 3}),
        (from_files(range(300), int, 5), {"shuffle": False, "min_after_dequeue": 0}),
        (lambda: iter(np.arange(300).reshape(-1, 5)), {}),
        (from_files(range(300), int, 5), {"n_workers": "auto", "max_workers": 4}),
        (from_files(range(300), lambda i: np.full(1 << 15, i), 5),
         {"workers": "process", "n_workers": 2}),  # in parts of a batch
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:QueueRunner. .* chunks are made again")
def test_any_source_goes_on_in_any_order(source, options, capsys):
    begin, came = None, []
    for stop_after in (20, 100):
        with QueueRunner(source, **{**ANY, **options}) as runner:
            runner.state_dict() if begin is None else runner.load_state_dict(begin)
            for number, batch in enumerate(runner.dataset(), 1):
                came += batch.numpy().reshape(len(batch), -1)[:, 0].tolist()
                if number == stop_after:
                    break
            begin = runner.state_dict()
    assert sorted(came) == list(range(300))
    assert (begin["pass"], begin["batches"]) in ((0, 50), (1, 0))


def test_what_is_packed_is_read_again():
    rng = np.random.default_rng(0)
    record, made = Record(0, Mixed.none(4), 1000, 10**9), [0] * 4
    for worker in rng.integers(4, size=3000).tolist():
        record.note(Chunk(worker, [np.zeros(32)], 0.0, 0, number=made[worker]))
        made[worker] += 1
    mixed = record.up_to(90_000)
    text = json.dumps(mixed.as_list())
    assert Mixed.of_list(json.loads(text)) == mixed
    assert len(text) < 4000


# -- a factory that cannot begin later -------------------------------------------------------------


class Batches:
    """What only one worker can run, from its beginning."""

    def __iter__(self):
        return iter(np.arange(200).reshape(50, 4))


def test_a_factory_that_cannot_begin_later_is_told_so_once(monkeypatch):
    monkeypatch.setattr(state, "_told", False)
    whole = passes(Batches(), 1)[0]
    _, there = passes(Batches(), stop_after=10)
    with pytest.warns(RuntimeWarning, match="chunks are made again.*parameter start") as told:
        assert passes(Batches(), 1, begin=there)[0] == whole[10:]
        assert passes(Batches(), 1, begin=there)[0] == whole[10:]
    assert len([w for w in told if "made again" in str(w.message)]) == 1


def test_a_stream_that_runs_on_is_drawn_again(monkeypatch):
    monkeypatch.setattr(state, "_told", False)

    def factory(rng, start=0):
        for _ in range(start, 50):
            yield rng.random(4)

    whole = passes(factory)
    _, there = passes(factory, stop_after=20)
    with pytest.warns(RuntimeWarning, match="draws from a running rng"):
        assert passes(factory, begin=there) == [whole[0][20:], whole[1]]


def test_what_was_left_out_is_left_out_again():
    def factory(worker, n_workers, epoch, start=0):
        for number in range(start + worker, 60, n_workers):
            if number % 7 == 3:
                raise ValueError("mine")
            yield 4 * number + np.arange(4)

    options = {"on_error": "skip", "n_workers": 2}
    with pytest.warns(RuntimeWarning, match="mine"):
        whole = passes(factory, **options)
        _, there = passes(factory, stop_after=15, **options)
        assert passes(factory, begin=there, **options) == [whole[0][15:], whole[1]]


def test_what_was_taken_ahead_is_delivered_again_if_it_was_not_used():
    whole = passes(shares([4] * 40), 1, n_workers=2)[0]
    with QueueRunner(shares([4] * 40), **FIXED, n_workers=2) as runner:
        for used, _ in enumerate(runner.dataset().prefetch(4), 1):
            if used == 8:
                break
        there = json.dumps(runner.state_dict(used=8))
        with pytest.raises(ValueError, match=r"used must be from 0 to .*, got 100"):
            runner.state_dict(used=100)
    assert passes(shares([4] * 40), 1, begin=there, n_workers=2)[0] == whole[8:]


def test_the_length_that_a_pass_has_is_not_that_of_its_rest():
    options = {"samples": 160, "n_workers": 2}
    whole = passes(shares([4] * 40), **options)
    _, there = passes(shares([4] * 40), stop_after=20, **options)
    assert passes(shares([4] * 40), begin=there, **options) == [whole[0][20:], whole[1]]
    with QueueRunner(shares([4] * 40), **FIXED, **options) as runner:
        data = runner.dataset()  # of a known length, before the state is loaded
        runner.load_state_dict(json.loads(there))
        found = [[batch.numpy().tolist() for batch in data] for _ in range(2)]
        assert int(data.cardinality()) == 27
    assert found == [whole[0][20:], whole[1]]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 4}, "seed was 3, and is 4"),
        ({"n_workers": 3}, "n_workers was 2, and is 3"),
        ({"batch_size": 7}, "batch_size was 6, and is 7"),
        ({"min_after_dequeue": 20}, "min_after_dequeue was 24, and is 20"),
        ({"iterator": np.arange}, "factory was .*shares.*factory.*, and is 'numpy.arange'"),
        ({"order": "any"}, "order was 'fixed', and is 'any'"),
    ],
)
def test_a_state_of_another_runner_is_refused_with_what_differs(changed, says):
    options = {**FIXED, "n_workers": 2, "iterator": shares([4] * 40)}
    there = QueueRunner(**options).state_dict()
    if "iterator" in changed:
        changed = {"iterator": lambda: iter(())}
        says = "factory was .*shares.*factory.*, and is .*<lambda>"
    with pytest.raises(ValueError, match=says):
        QueueRunner(**{**options, **changed}).load_state_dict(there)


def test_what_is_no_state_of_this_version_is_refused():
    runner = QueueRunner(shares([4]), **FIXED)
    there = runner.state_dict()
    for wrong, says in (
        ({}, "expected what state_dict.. returned"),
        ("x", "expected what state_dict.. returned, got str 'x'"),
        ({**there, "format": 2}, "format 2, expected 1: it is of another version"),
        ({**there, "mixed": None}, "the state is damaged"),
    ):
        with pytest.raises(ValueError, match=says):
            runner.load_state_dict(wrong)
    with QueueRunner(shares([4]), spec=Component("x", (), np.int64)) as late:
        late.dataset()
        for call in (late.state_dict, lambda: late.load_state_dict(there)):
            with pytest.raises(ValueError, match=r"call state_dict.. once ahead of dataset"):
                call()
    there = json.loads(passes(shares([4] * 40), stop_after=3)[1])
    with tf.Graph().as_default(), pytest.raises(ValueError, match=r"n_workers must be 1.*got 2"):
        runner = QueueRunner(shares([4] * 40), **FIXED, spec=Component("x", (), np.int64))
        runner.load_state_dict(there)
        runner.get_inputs()
        with v1.Session() as sess, runner.start(sess, 2):
            pass


def broken(how):
    def factory(worker, n_workers, epoch, start=0):
        for _ in range(start + worker, 40, n_workers):
            if start and how == "raises":
                raise OSError("gone")
            if start and how == "ends":
                return
            yield np.zeros(3 if start and how == "differs" else 4)

    return factory


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "raised OSError: gone"),
        ("ends", "ended before chunk .*expected that as when the state was taken"),
        ("differs", "has 3 samples, expected 4, as when the state was taken"),
    ],
)
def test_what_cannot_be_made_again_is_named(how, says):
    _, there = passes(broken(""), stop_after=10, n_workers=2)
    with pytest.raises(WorkerError, match=says):
        passes(broken(how), begin=there, n_workers=2)


# -- the record ------------------------------------------------------------------------------------


def noted(record, sizes):
    for number, rows in enumerate(sizes):
        record.note(Chunk(0, [np.zeros(rows)], 0.0, 0, number=number))


def test_uneven_chunks_are_forgotten_when_nobody_can_ask_for_them_any_more():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 20_000).tolist()
    record, whole = (Record(0, Mixed.none(1), 10, ahead) for ahead in (100, 1 << 40))
    noted(record, sizes)
    noted(whole, sizes)
    assert record.up_to(sum(sizes) - 60) == whole.up_to(sum(sizes) - 60)
    assert len(record._runs) < 2048 < len(whole._runs)
    with pytest.raises(RuntimeError, match="sample 5 of the pass is too long ago"):
        record.up_to(5)
    assert whole.up_to(5).chunks < 10


def test_a_state_that_lacks_chunks_of_the_reservoir_is_refused():
    whole = Record(0, Mixed.none(1), 10, 100)
    noted(whole, [3] * 50)
    mixed = dataclasses.replace(whole.up_to(100), runs=(Run(0, 35, 3, 1),))
    with pytest.raises(ValueError, match="too few of its last chunks"):
        held(mixed, 10, 0, 0)
