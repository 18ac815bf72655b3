"""What makes a generator heavy: waiting that threads share out, Python that they cannot."""

import itertools
import math
import threading
import time

import numpy as np
import pytest

from labkit.data import MnistDataGenerator
from labkit.workloads import busy_python, distort, sleep


@pytest.fixture
def batch():
    images, labels = next(MnistDataGenerator(16).test_iterator())
    return images, labels


def _in_two_threads(work, batch) -> tuple[float, list[float], list[float]]:
    """Seconds until both have done the work once; of each, seconds and processor seconds."""
    took, used = [], []

    def do():
        began, busy = time.perf_counter(), time.thread_time()
        work(*batch)
        took.append(time.perf_counter() - began)
        used.append(time.thread_time() - busy)

    crowd = [threading.Thread(target=do) for _ in range(2)]
    began = time.perf_counter()
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    return time.perf_counter() - began, took, used


def test_threads_share_sleep_out(batch):
    # The best of three: what else the machine does can only add.
    runs = [_in_two_threads(sleep(0.4), batch) for _ in range(3)]
    assert min(both / sum(each) for both, each, _ in runs) < 0.75


def test_threads_cannot_share_python_out(batch):
    # Under one lock the two never run at once, so their processor times add up to no more than the
    # time that went by, however busy the machine is. Shared out, they would add up to twice that.
    both, _, used = _in_two_threads(busy_python(0.2), batch)
    assert sum(used) < 1.1 * both


def test_sleep_waits_and_leaves_the_processor_alone(batch):
    began, used = time.perf_counter(), time.thread_time()
    assert all(out is given for out, given in zip(sleep(0.2)(*batch), batch, strict=True))
    assert time.perf_counter() - began >= 0.2
    assert time.thread_time() - used < 0.1


def test_busy_python_computes_for_the_time_asked_and_leaves_the_batch_alone(batch):
    used = []
    for _ in range(3):
        work = busy_python(0.1)
        began = time.thread_time()
        assert all(out is given for out, given in zip(work(*batch), batch, strict=True))
        used.append(time.thread_time() - began)
    # Its own processor time, which what else the machine does stretches now and then.
    assert any(0.05 < seconds < 0.2 for seconds in used)


def test_busy_python_is_a_count_and_no_deadline(monkeypatch):
    # A deadline would let two threads finish together, as if there were no lock.
    clock = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: next(clock) / 1000)
    # By this clock 50,000 loops take a millisecond.
    assert [busy_python(seconds).loops for seconds in (0.2, 0.1, 0)] == [10_000_000, 5_000_000, 0]


def test_distort_keeps_shape_type_and_range_and_labels(batch):
    images, labels = distort(1.0)(*batch)
    assert images.shape == batch[0].shape and images.dtype == np.float32
    assert images.min() >= 0.0 and images.max() <= 1.0
    assert labels is batch[1]


def test_distort_changes_every_image_and_each_time_differently(batch):
    work, before = distort(1.0), batch[0].copy()
    once, again = work(*batch)[0], work(*batch)[0]
    assert (np.abs(once - batch[0]).max((1, 2, 3)) > 0.1).all()
    assert (np.abs(once - again).max((1, 2, 3)) > 0.1).all()
    assert np.array_equal(batch[0], before), "the images given must stay as they are"


def test_distort_draws_from_the_generator_it_is_given(batch):
    once, again, other = (distort(1.0)(*batch, np.random.default_rng(k))[0] for k in (3, 3, 4))
    assert np.array_equal(once, again) and not np.array_equal(once, other)


def test_distort_of_strength_zero_changes_nothing(batch):
    assert np.array_equal(distort(0)(*batch)[0], batch[0])


def test_distort_moves_the_digit_and_does_not_wash_it_out(batch):
    # The ink stays to a third: 15 % of scale each way changes it by less.
    ink = distort(1.0)(*batch)[0].sum((1, 2, 3)) / batch[0].sum((1, 2, 3))
    assert (ink > 0.5).all() and (ink < 2.0).all()


def test_more_strength_moves_more(batch):
    weak, strong = (np.abs(distort(s)(*batch)[0] - batch[0]).mean() for s in (0.1, 1.0))
    assert strong > 2 * weak > 0


def test_distort_takes_any_height_width_and_channels():
    images = np.random.default_rng(0).random((3, 20, 12, 2), np.float32)
    out, _ = distort(1.0)(images, np.zeros(3))
    assert out.shape == images.shape and np.isfinite(out).all()


@pytest.mark.parametrize("workload", [sleep, busy_python, distort])
@pytest.mark.parametrize("value", [-0.1, "1", None, True, math.nan, math.inf])
def test_a_wrong_amount_is_refused(workload, value):
    with pytest.raises(ValueError, match=f"{workload.__name__}: .* must be a number"):
        workload(value)


def test_a_callable_of_the_users_own_fits_in_the_same_place(numbered):
    calls = []

    def only_zeros(images, labels):
        calls.append(len(images))
        return np.zeros_like(images), labels

    images, _ = next(MnistDataGenerator(32, only_zeros, data=numbered).train_iterator())
    assert calls == [32] and not images.any()
