"""order="fixed": the same samples in the same order, whatever the timing."""

import os
import time

import numpy as np
import pytest

import labkit
from labkit import MnistDataGenerator, QueueRunner, WorkerError, train
from labkit.engine import TRIED
from labkit.engine.order import Reservoir
from tests.consumers import in_dataset, in_graph

FIXED = {"capacity": 60, "min_after_dequeue": 24, "order": "fixed", "seed": 3}


def uneven(n_batches=30, size=4):
    """A factory that shares out numbered batches, each after a pause that nothing determines."""

    def factory(worker=0, n_workers=1, epoch=0):
        for number in range(worker, n_batches, n_workers):
            time.sleep(os.urandom(1)[0] / 255 * 0.004)
            yield np.arange(size) + size * number + 10_000 * epoch

    return factory


def samples(batches):
    return np.concatenate(batches).tolist()


@pytest.mark.parametrize(("kind", "consume"), [("thread", in_graph), ("process", in_dataset)])
def test_two_runs_are_the_same_to_the_last_batch(kind, consume):
    runs = [consume(QueueRunner(uneven(), 4, 3, kind, **FIXED)) for _ in range(2)]
    assert [batch.tolist() for batch in runs[0]] == [batch.tolist() for batch in runs[1]]
    assert sorted(samples(runs[0])) == list(range(120))
    assert samples(runs[0]) != list(range(120))


def test_a_graph_and_a_dataset_give_the_same_and_another_seed_does_not():
    graph = samples(in_graph(QueueRunner(uneven(), 4, 3, **FIXED)))
    assert samples(in_dataset(QueueRunner(uneven(), 4, 3, **FIXED))) == graph
    assert samples(in_dataset(QueueRunner(uneven(), 4, 3, **{**FIXED, "seed": 4}))) != graph


@pytest.mark.parametrize("kind", TRIED)
def test_what_shards_by_batch_is_the_same_for_every_number_of_workers(kind, numbered, index_of):
    data = MnistDataGenerator(16, data=numbered)
    runs = []
    for n_workers in (1, 2, 4) if kind == "thread" else (1, 3):
        runner = QueueRunner(data.epoch_iterator, 16, n_workers, kind, **FIXED)
        runs.append([index for images, _ in in_dataset(runner) for index in index_of(images)])
    assert all(run == runs[0] for run in runs)
    assert sorted(runs[0]) == list(range(500))


def test_each_pass_has_an_order_of_its_own_and_one_left_early_changes_no_other():
    def passes(*taken):
        with QueueRunner(uneven(), 4, 3, **FIXED) as runner:
            data = runner.dataset()
            return [samples([b.numpy() for b in data.take(count)]) for count in taken]

    whole, left = passes(-1, -1, -1), passes(2, 5, -1)
    places = [[sample % 10_000 for sample in one] for one in whole]
    assert places[0] != places[1] != places[2]
    assert left == [whole[0][:8], whole[1][:20], whole[2]]


@pytest.mark.parametrize(("kind", "n_workers"), [("thread", 1), ("thread", 3), ("process", 3)])
def test_without_shuffling_it_is_the_generators_own_order(kind, n_workers):
    runner = QueueRunner(uneven(), 4, n_workers, kind, order="fixed", shuffle=False)
    assert samples(in_dataset(runner)) == list(range(120))


def test_without_shuffling_one_worker_needs_no_fixed_order(consume):
    assert samples(consume(QueueRunner(uneven(), 4, shuffle=False))) == list(range(120))
    assert sorted(samples(consume(QueueRunner(uneven(), 4, 3, shuffle=False)))) == list(range(120))


def test_who_has_more_goes_on_alone_when_the_others_are_done():
    def factory(worker, n_workers):
        for turn in range((2, 0, 4)[worker]):
            yield np.array([10 * worker + turn])

    runner = QueueRunner(factory, 1, 3, order="fixed", shuffle=False)
    assert samples(in_dataset(runner)) == [0, 20, 1, 21, 22, 23]


def test_what_is_left_out_by_a_lost_worker_is_always_the_same():
    def factory(worker, n_workers):
        for turn in range(3):
            if (worker, turn) == (1, 1):
                raise ValueError("mine")
            yield np.array([10 * worker + turn])

    for _ in range(3):
        runner = QueueRunner(factory, 1, 2, order="fixed", shuffle=False, on_error="continue")
        with pytest.warns(RuntimeWarning, match="mine"):
            assert samples(in_dataset(runner)) == [0, 10, 1, 2]
    with pytest.raises(WorkerError, match="mine") as raised:
        in_dataset(QueueRunner(factory, 1, 2, order="fixed", shuffle=False))
    assert raised.value.worker == 1


@pytest.mark.parametrize(("kind", "timeout"), [("thread", 0.5), ("process", 4)])
def test_who_stalls_at_its_turn_is_named(kind, timeout):
    def factory(worker, n_workers):
        yield np.zeros(1)
        if worker == 1:
            time.sleep(timeout + 1)  # a thread that stays longer would outlive the test
        while True:
            yield np.zeros(1)

    with pytest.raises(WorkerError, match="delivered nothing for") as raised:
        in_dataset(QueueRunner(factory, 1, 2, kind, order="fixed", shuffle=False, timeout=timeout))
    assert raised.value.worker == 1


@pytest.mark.parametrize(
    ("consume", "options"),
    [(in_graph, {"shuffle": False}), (in_dataset, {"min_after_dequeue": 0})],
)
def test_batches_that_wait_in_the_queue_are_not_written_over(consume, options):
    """A process writes into its ring again, which has room for far fewer than the queue."""

    def factory():
        for number in range(100):
            yield np.full((8, 1024), number, np.float32)

    class Waits(list):
        def append(self, batch):
            super().append(batch)
            if len(self) == 1:
                deadline = time.monotonic() + 20
                while runner.samples < 8 * 90 and time.monotonic() < deadline:
                    time.sleep(0.01)

    runner = QueueRunner(factory, 8, 1, "process", capacity=800, order="fixed", **options)
    batches = consume(runner, seen=Waits())
    assert [np.unique(batch).tolist() for batch in batches] == [[number] for number in range(100)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_large_samples_and_text_are_mixed_as_small_ones_are(shuffle):
    """Large ones are lent by a process, in parts of a batch that depend on how much room it has."""
    chosen = FIXED if shuffle else {"order": "fixed", "shuffle": False, "capacity": 60}

    def numbers(kind, more):
        def factory(worker, n_workers):
            for number in range(worker, 12, n_workers):
                rows = 8 * number + np.arange(8)
                yield {"row": rows, "more": more(rows)}

        batches = in_dataset(QueueRunner(factory, 8, 2, kind, **chosen))
        for batch in batches:
            assert np.array_equal(batch["more"], more(batch["row"]))
        return samples([batch["row"] for batch in batches])

    def large(rows):
        return np.repeat(rows, 1 << 15).reshape(-1, 1 << 15).astype(np.int64)

    def text(rows):
        return np.array([b"x" * int(row) for row in rows], object)

    found = [numbers(kind, more) for kind in TRIED for more in (large, text)]
    assert found[0] == found[1] == found[2] == found[3]
    assert (found[0] == list(range(96))) == (not shuffle)


@pytest.mark.parametrize("pools", [(1, 1)])
def test_two_trainings_have_the_same_losses_step_by_step(pools, small_mnist):
    runs = [
        train(n_workers=3, epochs=2, steps=15, delay=0.001, order="fixed", seed=7, pools=pools,
              capacity=200, min_after_dequeue=100, progress=False, validate=False)
        for _ in range(2)
    ]  # fmt: skip
    assert [e.train_loss for e in runs[0].epochs] == [e.train_loss for e in runs[1].epochs]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": "sorted"}, "order must be 'any' or 'fixed', got 'sorted'"),
        ({"shuffle": 1}, "shuffle must be True or False, got 1"),
        ({"order": "fixed", "n_workers": "auto"}, "a number for order='fixed'.*got 'auto'"),
        ({"shuffle": False, "min_after_dequeue": 5}, "0 or left away for shuffle=False, got 5"),
        ({"seed": "a"}, "seed must be None or an integer, got 'a'"),
    ],
)
def test_what_cannot_be_had_together_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        QueueRunner(uneven(), **options)


@pytest.mark.parametrize(("kind", "loaded"), [("thread", False), ("process", True)])
def test_a_data_set_with_an_index_has_a_fixed_order_too(kind, loaded):
    """With no seed as well: then it is that of seed 0, whatever the number of workers."""

    class Squares:  # here, or a process would import this file and TensorFlow
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return np.int64(index)

    def run(n_workers, **options):
        source = labkit.from_files(range(40), np.int64, 4) if loaded else Squares()
        runner = QueueRunner(source, 4, n_workers, kind, order="fixed", **options)
        return samples(in_dataset(runner))

    sizes = {"capacity": 20, "min_after_dequeue": 8}
    assert run(1, **sizes) == run(2, **sizes) != run(2, seed=1, **sizes)
    assert run(2, shuffle=False) == list(range(40))


# -- the reservoir --------------------------------------------------------------------------------


def mixed(reservoir, batches):
    came = [reservoir.mix(arrays, last) for arrays, last in batches]
    came.append(reservoir.rest())
    return [sample for arrays in came if arrays for sample in np.asarray(arrays[0]).tolist()]


def test_a_sample_comes_out_once_and_never_before_its_place():
    batches = [([np.arange(first, first + 10)], True) for first in range(0, 200, 10)]
    out = mixed(Reservoir(30, 0, 0), batches)
    assert sorted(out) == list(range(200))
    # When the k-th comes out, 30 behind it have come in, and what else its batch brought.
    assert all(sample < place + 30 + 10 for place, sample in enumerate(out))
    assert max(np.array(out) - np.arange(200)) > 20  # and it does reach that far


def test_a_batch_larger_than_the_reservoir_is_mixed_in_turns():
    out = mixed(Reservoir(4, 0, 0), [([np.arange(50)], True)])
    assert sorted(out) == list(range(50)) and out != list(range(50))


def test_parts_make_the_same_as_the_whole_and_lent_samples_as_arrays():
    whole = mixed(Reservoir(8, 1, 2), [([np.arange(9)], True), ([np.arange(9, 16)], True)])
    parts = [([np.arange(2)], False), ([np.arange(2, 9)], True), ([np.arange(9, 16)], True)]
    assert mixed(Reservoir(8, 1, 2), parts) == whole
    lent = [([tuple(array)], last) for (array,), last in parts]
    assert mixed(Reservoir(8, 1, 2), lent) == whole
    assert mixed(Reservoir(8, 1, 3), parts) != whole


def test_text_that_is_longer_in_a_later_batch_is_kept_whole():
    out = mixed(Reservoir(2, 0, 0), [([np.array(["a", "b"])], True), ([np.array(["ccc"])], True)])
    assert sorted(out) == ["a", "b", "ccc"]


def test_a_reservoir_that_nothing_came_to_gives_nothing():
    assert Reservoir(5, 0, 0).rest() == []
