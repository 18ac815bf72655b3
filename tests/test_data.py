"""MNIST and its generator: the right digits, each as often as promised, and no TensorFlow."""

import subprocess
import sys
from functools import partial
from itertools import islice

import numpy as np
import pytest

from labkit import QueueRunner
from labkit.data import Mnist, MnistDataGenerator, load_mnist
from labkit.workloads import distort


def test_all_the_real_digits_are_there():
    mnist = load_mnist()
    assert [array.shape for array in mnist] == [
        (60_000, 28, 28),
        (60_000,),
        (10_000, 28, 28),
        (10_000,),
    ]
    assert {array.dtype for array in mnist} == {np.dtype(np.uint8)}
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.y_train).tolist() == counts
    assert round(float(mnist.x_train.mean()), 3) == 33.318
    # The published test set's own class counts: it is no part of the training set.
    test_counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.y_test).tolist() == test_counts


def test_the_cached_arrays_cannot_be_spoiled_by_one_caller():
    with pytest.raises(ValueError, match="read-only"):
        load_mnist().x_train[0] = 0


@pytest.mark.parametrize("name", ["train", "epoch", "passes", "test"])
def test_every_iterator_yields_scaled_images_and_one_hot_labels(name):
    data = MnistDataGenerator(64)
    images, labels = next(getattr(data, f"{name}_iterator")())
    assert images.shape == (64, 28, 28, 1) and labels.shape == (64, 10)
    assert images.dtype == labels.dtype == np.float32
    # 255 must become 1, and 64 digits have both ink and paper.
    assert images.min() == 0.0 and images.max() == 1.0
    assert (labels.sum(1) == 1).all() and set(np.unique(labels)) == {0.0, 1.0}


@pytest.mark.parametrize("name", ["train", "epoch", "test"])
def test_images_keep_their_labels(name, numbered, index_of):
    data = MnistDataGenerator(32, data=numbered)
    for images, labels in islice(getattr(data, f"{name}_iterator")(), 5):
        # numbered's label is its index modulo 10, and test images start at 10,000.
        assert labels.argmax(1).tolist() == [index % 10 for index in index_of(images)]


def test_train_iterator_cuts_contiguous_windows_at_random_places(numbered, index_of):
    batches = islice(MnistDataGenerator(32, data=numbered).train_iterator(), 300)
    starts = []
    for images, _ in batches:
        indices = index_of(images)
        assert indices == list(range(indices[0], indices[0] + 32))
        starts.append(indices[0])
    assert max(starts) <= 500 - 32
    # 300 draws from 469 starts: all over the range, and with about 220 different ones.
    assert len(set(starts)) > 100 and min(starts) < 60 and max(starts) > 400


def test_a_window_can_be_the_whole_training_set(numbered, index_of):
    images, _ = next(MnistDataGenerator(500, data=numbered).train_iterator())
    assert index_of(images) == list(range(500))


@pytest.mark.parametrize("n_workers", [1, 3, 7, 20])
def test_an_epoch_has_every_sample_once_over_all_workers(numbered, index_of, n_workers):
    data = MnistDataGenerator(32, data=numbered)
    shares = [
        [index_of(images) for images, _ in data.epoch_iterator(worker, n_workers)]
        for worker in range(n_workers)
    ]
    # Sorted and whole: disjoint and complete in one.
    batches = [batch for share in shares for batch in share]
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    # However many share it, the epoch is made of the same 16 batches, and one may be smaller.
    assert sorted(map(len, batches)) == [20] + [32] * 15


def test_an_epoch_is_shuffled_and_another_epoch_differently(numbered, index_of):
    data = MnistDataGenerator(32, data=numbered)
    orders = [
        [i for images, _ in data.epoch_iterator(epoch=e) for i in index_of(images)] for e in (0, 1)
    ]
    assert orders[0] != orders[1]
    # In random order, neighbours are 167 apart on average; in the stored order, 1.
    assert all(np.abs(np.diff(order)).mean() > 100 for order in orders)


def test_the_last_batch_of_an_epoch_is_what_is_left(numbered):
    sizes = [len(labels) for _, labels in MnistDataGenerator(32, data=numbered).epoch_iterator()]
    assert sizes == [32] * 15 + [20]


def test_passes_iterator_makes_one_epoch_after_the_other(numbered, index_of):
    passes = MnistDataGenerator(100, data=numbered).passes_iterator()
    rounds = [[i for images, _ in islice(passes, 5) for i in index_of(images)] for _ in range(3)]
    assert all(sorted(one) == list(range(500)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def indices(iterator, count, index_of):
    return [index_of(images) for images, _ in islice(iterator, count)]


def test_the_orders_are_numpys_own_for_seed_and_epoch(numbered, index_of):
    # What these seeds gave before iterators knew of epochs, in plain NumPy.
    data = MnistDataGenerator(100, seed=7, data=numbered)
    for epoch in (0, 3):
        order = np.random.default_rng([7, epoch]).permutation(500).reshape(5, 100).tolist()
        assert indices(data.epoch_iterator(epoch=epoch), 5, index_of) == order
        assert indices(islice(data.passes_iterator(), epoch * 5, None), 5, index_of) == order
    rng = np.random.default_rng([7, 2])
    starts = [int(rng.integers(401)) for _ in range(20)]
    assert [i[0] for i in indices(data.train_iterator(2), 20, index_of)] == starts


@pytest.mark.parametrize("name", ["train_iterator", "epoch_iterator", "passes_iterator"])
def test_a_fresh_epoch_has_other_batches_and_the_same_one_the_same(numbered, index_of, name):
    def start(**which):
        data = MnistDataGenerator(32, seed=7, data=numbered)
        return indices(getattr(data, name)(**which), 10, index_of)

    share = {"worker": 1} if name == "train_iterator" else {"worker": 1, "n_workers": 2}
    assert start(**share, epoch=0) == start(**share)
    first, second, third = (start(**share, epoch=epoch) for epoch in (0, 1, 2))
    assert first != second != third != first
    assert second == start(**share, epoch=1)


def test_no_pass_of_any_epoch_repeats_an_order(numbered, index_of):
    data = MnistDataGenerator(500, seed=3, data=numbered)
    orders = [
        tuple(order)
        for epoch in range(8)
        for order in indices(data.passes_iterator(epoch=epoch), 8, index_of)
    ]
    assert len(set(orders)) == 64


def test_a_second_loop_over_a_runners_dataset_goes_on_with_other_batches(numbered, index_of):
    data = MnistDataGenerator(50, data=numbered)
    queue = {"capacity": 50, "min_after_dequeue": 0}
    # The queue holds no more than the pass's first batch, so its shuffling changes no set.
    with QueueRunner(data.passes_iterator, 50, **queue) as runner:
        seen = [
            {i for images, _ in runner.dataset().take(1) for i in index_of(images.numpy())}
            for _ in range(3)
        ]
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("n_workers", [1, 2, 4])
@pytest.mark.parametrize("epoch", [0, 1])
def test_passes_are_the_same_batches_in_turn_whatever_the_number_of_workers(
    numbered, index_of, n_workers, epoch
):
    # 16 batches a pass by 1, 2, 4; and 5 a pass, which 2 and 4 do not divide.
    for size in (32, 100):
        data = MnistDataGenerator(size, data=numbered)
        alone = indices(data.passes_iterator(epoch=epoch), 24, index_of)
        shares = [data.passes_iterator(i, n_workers, epoch) for i in range(n_workers)]
        assert [index_of(next(shares[k % n_workers])[0]) for k in range(24)] == alone


@pytest.mark.parametrize("batch_size", [32, 130, 400])
def test_test_iterator_is_the_test_set_in_order(numbered, index_of, batch_size):
    batches = list(MnistDataGenerator(batch_size, data=numbered).test_iterator())
    indices = [i for images, _ in batches for i in index_of(images)]
    assert indices == list(range(10_000, 10_130))
    assert {len(labels) for _, labels in batches[:-1]} <= {batch_size}


def test_test_iterator_yields_the_real_test_digits():
    mnist = load_mnist()
    batches = list(MnistDataGenerator(3000).test_iterator())
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert [len(batch[0]) for batch in batches] == [3000, 3000, 3000, 1000]
    assert np.array_equal(np.rint(images[..., 0] * 255), mnist.x_test)
    assert np.array_equal(labels.argmax(1), mnist.y_test)


def _first(iterator):
    return np.concatenate([images for images, _ in islice(iterator, 3)])


@pytest.mark.parametrize("name", ["train_iterator", "epoch_iterator", "passes_iterator"])
def test_the_seed_fixes_the_order(numbered, name):
    def start(seed):
        return _first(getattr(MnistDataGenerator(32, seed=seed, data=numbered), name)())

    assert np.array_equal(start(5), start(5))
    assert not np.array_equal(start(5), start(6))


def test_workers_have_streams_of_their_own(numbered):
    data = MnistDataGenerator(32, data=numbered)
    streams = [_first(data.train_iterator(worker)) for worker in range(4)]
    for i in range(4):
        assert np.array_equal(streams[i], _first(data.train_iterator(i)))
        assert not any(np.array_equal(streams[i], streams[j]) for j in range(i))


def test_work_is_done_on_training_batches_only(numbered):
    def invert(images, labels):
        return 1 - images, labels

    data = MnistDataGenerator(500, invert, data=numbered)
    plain = MnistDataGenerator(500, data=numbered)
    assert np.array_equal(next(data.epoch_iterator())[0], 1 - next(plain.epoch_iterator())[0])
    assert np.array_equal(next(data.train_iterator())[0], 1 - next(plain.train_iterator())[0])
    assert np.array_equal(next(data.test_iterator())[0], next(plain.test_iterator())[0])


def digits(count):
    mnist = load_mnist()
    return Mnist(mnist.x_train[:count], mnist.y_train[:count], *mnist[2:])


def drawn(images, labels, rng):
    return images + rng.random(images.shape, np.float32), labels


@pytest.mark.parametrize("work", [distort(1.0), drawn], ids=["distort", "a function"])
@pytest.mark.parametrize("n_workers", [1, 2, 4])
def test_work_that_draws_gives_the_same_samples_whatever_the_number_of_workers(work, n_workers):
    data = MnistDataGenerator(20, work, seed=5, data=digits(90))

    def in_turn(name, n, count, epoch):
        # One worker's whole share after the other's: what is drawn must not depend on whose turn
        # it was before.
        shares = [list(islice(getattr(data, name)(i, n, epoch), count)) for i in range(n)]
        return [shares[k % n][k // n] for k in range(count)]

    for name, count, epoch in [
        ("passes_iterator", 13, 0),
        ("passes_iterator", 13, 2),
        ("epoch_iterator", 5, 1),
    ]:
        alone, shared = in_turn(name, 1, count, epoch), in_turn(name, n_workers, count, epoch)
        for ours, theirs in zip(alone, shared, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["train_iterator", "epoch_iterator", "passes_iterator"])
def test_each_batch_draws_from_a_stream_of_its_own(numbered, name):
    draws = []

    def keep(images, labels, rng):
        draws.append(rng.integers(2**62))
        return images, labels

    iterator = getattr(MnistDataGenerator(100, keep, seed=5, data=numbered), name)
    for epoch in (0, 1):
        list(islice(iterator(epoch=epoch), 5))
    once = list(draws)
    for epoch in (0, 1):
        list(islice(iterator(epoch=epoch), 5))
    assert len(set(once)) == 10 and draws == once + once
    if name == "train_iterator":
        list(islice(iterator(worker=1), 5))
        assert len(set(draws)) == 15
    # Not the stream that made the order, from its start.
    orders = {np.random.default_rng([5, k]).integers(2**62) for k in range(5)}
    assert not orders & set(draws)


def test_a_pass_and_the_epoch_of_its_number_draw_alike(numbered):
    data = MnistDataGenerator(100, drawn, data=numbered)
    third_pass = islice(data.passes_iterator(), 10, 15)
    for a, b in zip(third_pass, data.epoch_iterator(epoch=2), strict=True):
        assert np.array_equal(a[0], b[0])


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_a_repeated_run_gives_the_same_samples_through_a_queue(workers):
    def run(n_workers):
        data = MnistDataGenerator(25, distort(1.0), seed=5, data=digits(500))
        with QueueRunner(
            data.epoch_iterator, 25, n_workers, workers, capacity=100, min_after_dequeue=25
        ) as runner:
            return sorted(image.tobytes() for x, _ in runner.dataset() for image in x.numpy())

    samples = run(1)
    assert len(set(samples)) == 500
    assert run(2) == samples and run(3) == samples


def test_an_rng_that_the_user_has_bound_is_left_alone(numbered):
    theirs = np.random.default_rng(9)

    def work(images, labels, rng):
        assert rng is theirs
        return images, labels

    next(MnistDataGenerator(5, partial(work, rng=theirs), data=numbered).train_iterator())


def test_samples_stay_uint8_in_memory():
    data = MnistDataGenerator(32)
    next(data.train_iterator())
    assert data.data.x_train.dtype == np.uint8 and data.data.x_train.nbytes == 60_000 * 784


@pytest.mark.parametrize("batch_size", [0, -1, 501, 2.0, "32", None, True])
def test_a_wrong_batch_size_is_refused(numbered, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        MnistDataGenerator(batch_size, data=numbered)


def test_work_that_cannot_be_called_is_refused(numbered):
    with pytest.raises(ValueError, match=r"work must be callable.*0\.05"):
        MnistDataGenerator(32, work=0.05, data=numbered)


@pytest.mark.parametrize("part", ["y_train", "y_test"])
def test_images_without_labels_are_refused(numbered, part):
    short = numbered._replace(**{part: numbered.y_train[:100]})
    with pytest.raises(ValueError, match=r"got \d+ images and 100 labels"):
        MnistDataGenerator(32, data=short)


@pytest.mark.parametrize("name", ["epoch_iterator", "passes_iterator"])
@pytest.mark.parametrize(("worker", "n_workers"), [(1, 1), (-1, 2), (0, 0)])
def test_a_share_that_does_not_exist_is_refused(numbered, name, worker, n_workers):
    with pytest.raises(ValueError, match=f"{name}: worker must be"):
        next(getattr(MnistDataGenerator(32, data=numbered), name)(worker, n_workers))


@pytest.mark.parametrize("seed", [-1, 1.5, "a"])
def test_a_seed_that_fixes_nothing_is_refused_at_once(numbered, seed):
    # Not at the first batch, where it would surface as a worker's error.
    with pytest.raises(ValueError, match="seed"):
        MnistDataGenerator(32, seed=seed, data=numbered)


def test_data_may_be_a_plain_tuple(numbered, index_of):
    images, _ = next(MnistDataGenerator(10, data=tuple(numbered)).test_iterator())
    assert index_of(images) == list(range(10_000, 10_010))
    assert isinstance(MnistDataGenerator(10, data=tuple(numbered)).data, Mnist)


def test_neither_labkit_nor_its_data_side_imports_tensorflow():
    # In a process of its own: this one has TensorFlow already.
    program = (
        "import sys, labkit, labkit.data, labkit.workloads, labkit.engine.child\n"
        "labkit.MnistDataGenerator, labkit.sleep, labkit.WorkerError\n"
        "next(labkit.MnistDataGenerator(2).train_iterator())\n"
        "print(sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)
