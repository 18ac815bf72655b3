"""audit: what it counts, and what it says of it, for iterators of known faults."""

import sys
import threading
import time
from functools import partial

import cloudpickle
import numpy as np
import pytest

import labkit
from labkit import MnistDataGenerator, WorkerError
from labkit.engine import TRIED
from labkit.instruments.audit import Audit
from tests.producers import taking_turns

# By value: a worker process that imported this file would import TensorFlow with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def light(worker=0):
    while True:
        yield np.zeros((8, 4), np.float32), np.zeros((8, 1), np.float32)


def test_audit_sees_repeats_and_misses_of_windows_and_none_of_epochs(numbered):
    data = MnistDataGenerator(20, data=numbered)
    windows = labkit.audit(data.train_iterator, n_workers=3)
    assert windows.expected == windows.delivered == 500
    assert windows.repeated == windows.missed > 50
    assert "with replacement" in windows.verdict and windows.verdict in str(windows)
    epochs = labkit.audit(data.epoch_iterator, epochs=2, n_workers=3)
    assert (epochs.delivered, epochs.repeated, epochs.missed) == (1000, 0, 0)
    assert epochs.mixing > 0.8 and not epochs.endless and epochs.told_by == "tag"
    assert "0 repeated, 0 missed" in str(epochs) and "Each sample came once" in epochs.verdict
    passes = labkit.audit(data.passes_iterator, epochs=3, n_workers=3)
    assert (passes.delivered, passes.repeated, passes.missed) == (1500, 0, 0)
    assert passes.endless and "taken for endless" in passes.verdict


def test_audit_of_processes_counts_what_it_counts_of_threads(numbered):
    data = MnistDataGenerator(20, data=numbered)
    of = [labkit.audit(data.train_iterator, workers=kind, n_workers=2) for kind in TRIED]
    assert (of[0].repeated, of[0].missed) == (of[1].repeated, of[1].missed)
    shared = labkit.audit(data.epoch_iterator, workers="process", n_workers=2)
    assert (shared.delivered, shared.repeated, shared.missed) == (500, 0, 0)


def test_audit_takes_a_number_for_workers_as_before_and_shows_the_new_form(numbered):
    data = MnistDataGenerator(20, data=numbered)
    with pytest.warns(DeprecationWarning, match=r"audit\(\.\.\., n_workers=3\)") as warned:
        old = labkit.audit(data.train_iterator, 1, 3)
    assert warned[0].filename == __file__
    new = labkit.audit(data.train_iterator, n_workers=3)
    assert (old.delivered, old.repeated) == (new.delivered, new.repeated)


def test_audit_tells_samples_apart_by_content_or_by_a_tag():
    def each_twice(worker, n_workers):
        for number in range(worker, 100, n_workers):
            yield (np.array([number, number]),)

    by_content = labkit.audit(each_twice, samples=200)
    assert (by_content.delivered, by_content.repeated, by_content.missed) == (200, 100, 100)
    tagged = labkit.audit(each_twice, samples=200, tag=lambda batch: batch[0].numpy())
    assert (tagged.repeated, tagged.missed) == (100, 100)


def test_audit_measures_how_well_batches_are_mixed():
    def in_order(worker):
        for start in range(0, 20_000, 32):
            yield (np.arange(start, start + 32),)

    mixed = labkit.audit(in_order, n_workers=1, samples=20_000, tag=lambda batch: batch[0].numpy())
    # The queue holds 1000 to 2000 of the 20,000, and hands them out at random: a sample stays for
    # as long as that on average, and the spread of its stay is as large, over 20,000 / sqrt(12).
    assert 0.1 < mixed.mixing < 0.5, mixed


def test_audit_of_an_endless_iterator_wants_the_size(monkeypatch):
    monkeypatch.setattr("labkit.instruments.reading._MOST_SAMPLES", 1000)
    with pytest.raises(ValueError, match="no end; give samples="):
        labkit.audit(lambda: light())


# The mistake to find: each process gets a copy, in the same state.
captured = np.random.default_rng(0)


def draws_from_the_captured(worker=0):
    while True:
        yield (captured.random((8, 3)),)


def draws_of_its_own(worker):
    rng = np.random.default_rng([0, worker])
    while True:
        yield (rng.random((8, 3)),)


def test_audit_finds_processes_that_draw_the_same_random_numbers():
    alike = labkit.audit(draws_from_the_captured, workers="process", n_workers=3, samples=300)
    assert (alike.delivered, alike.repeated, alike.missed) == (300, 200, 200)
    assert "The workers produce the same samples" in alike.verdict
    assert "give the factory a parameter `rng`" in alike.verdict
    assert (alike.same_batches, alike.batches) == (39, 39) and "39 of 39 batches" in alike.verdict
    cured = labkit.audit(draws_of_its_own, workers="process", n_workers=3, samples=300)
    assert cured.repeated == 0 and "the same samples" not in cured.verdict
    # In threads all draw from one and the same generator.
    shared = labkit.audit(draws_from_the_captured, n_workers=3, samples=300)
    assert shared.repeated == 0 and "the same samples" not in shared.verdict


def augmented(draws):
    """Each worker delivers the same 40 samples with noise on them, and begins at another one."""
    for at in (np.arange(0, 40, 8) + 16 * draws.pop("worker")) % 40:
        rng = draws.get("rng") or np.random.default_rng(at)
        index = np.arange(at, at + 8)
        yield (np.stack([index, index + 0.4 * rng.random(8)], 1),)


def augmented_alike(worker):
    yield from augmented({"worker": worker})


def augmented_apart(worker, rng):
    yield from augmented({"worker": worker, "rng": rng})


def test_audit_finds_augmented_copies_that_are_equal_between_processes():
    given = {"n_workers": 2, "samples": 40, "tag": position}
    alike = labkit.audit(augmented_alike, workers="process", **given)
    assert (alike.repeated, alike.same_batches, alike.batches) == (40, 10, 10)
    assert "10 of 10 batches are equal, to the last bit" in alike.verdict
    assert "such as number 0 of worker 0 and number 3 of worker 1" in alike.verdict
    assert "same samples" not in alike.verdict and "parameter `rng`" in alike.verdict
    apart = labkit.audit(augmented_apart, **given)
    assert (apart.repeated, apart.same_batches, apart.batches) == (40, 0, 10)
    assert "to the last bit" not in apart.verdict


def noisy(numbers):
    """Rows that are changed at random, but still tell their number when rounded."""
    rng = np.random.default_rng()
    for start in range(0, len(numbers), 8):
        part = numbers[start : start + 8]
        yield (part[:, None] + rng.uniform(-0.4, 0.4, (len(part), 2)),)


def position(batch):
    return np.rint(batch[0].numpy()[:, 0])


def noisy_and_not_shared():
    yield from noisy(np.arange(100))


def noisy_and_shared(worker, n_workers):
    yield from noisy(np.arange(100)[worker::n_workers])


def test_audit_counts_what_workers_deliver_that_do_not_share_a_changing_data_set_out():
    for epochs in (1, 2):
        seen = labkit.audit(noisy_and_not_shared, epochs, samples=100)
        assert (seen.expected, seen.delivered) == (100 * epochs, 400 * epochs)
        assert (seen.repeated, seen.missed, seen.told_by) == (300 * epochs, None, "content")
        assert "4 times as many samples as the data set has" in seen.verdict
        assert "do not share it out" in seen.verdict and "(worker, n_workers)" in seen.verdict
        assert "tag=" in seen.verdict and seen.verdict in str(seen)
    tagged = labkit.audit(noisy_and_not_shared, samples=100, tag=position)
    assert (tagged.repeated, tagged.missed, tagged.told_by) == (300, 0, "tag")
    assert "4 times as many" in tagged.verdict and "content" not in tagged.verdict
    unknown = labkit.audit(noisy_and_not_shared)
    assert unknown.expected is None and "(worker, n_workers)" in unknown.verdict
    assert "if each of them read the whole data set" in unknown.verdict


def test_audit_does_not_blame_workers_that_take_turns_at_one_iterator():
    batches = [(np.arange(8 * i, 8 * i + 8),) for i in range(5)]  # no two workers' parts equal
    seen = labkit.audit(taking_turns(batches), n_workers=2)
    assert (seen.delivered, seen.repeated) == (40, 0)
    assert seen.verdict.startswith("No sample came twice") and "n_workers" not in seen.verdict


def test_audit_does_not_reassure_by_content_alone():
    by_content = labkit.audit(noisy_and_shared, samples=100)
    assert (by_content.delivered, by_content.repeated, by_content.missed) == (100, 0, 0)
    assert "do not share" not in by_content.verdict and "tag=" in by_content.verdict
    tagged = labkit.audit(noisy_and_shared, samples=100, tag=position)
    assert (tagged.repeated, tagged.missed) == (0, 0)
    assert tagged.verdict == "Each sample came once in an epoch."


def test_audit_says_that_samples_are_lacking():
    def without_the_last(worker, n_workers):
        yield from noisy(np.arange(90)[worker::n_workers])

    seen = labkit.audit(without_the_last, samples=100, tag=position)
    assert (seen.delivered, seen.repeated, seen.missed) == (90, 0, 10)
    assert seen.verdict.startswith("10 samples too few")


def test_audit_of_an_endless_iterator_does_not_depend_on_who_is_fast():
    def passes(worker, n_workers):
        while True:
            for (rows,) in noisy(np.arange(100)[worker::n_workers]):
                time.sleep(0.002 * worker)
                yield (rows,)

    seen = labkit.audit(passes, 2, n_workers=3, samples=100, tag=position)
    assert (seen.delivered, seen.repeated, seen.missed, seen.endless) == (200, 0, 0, True)


def test_audit_ends_where_one_worker_of_an_endless_iterator_has_none(monkeypatch):
    monkeypatch.setattr("labkit.instruments.reading._SILENCE", 0.5)

    def one_is_empty(worker):
        while worker != 1:
            yield (np.arange(8),)

    seen = labkit.audit(one_is_empty, n_workers=2, samples=16)
    assert isinstance(seen, Audit) and seen.delivered == 8


def test_audit_of_a_test_set_tells_its_samples_apart(numbered):
    data = MnistDataGenerator(20, data=numbered)
    seen = labkit.audit(data.test_iterator, n_workers=2)
    assert (seen.expected, seen.delivered, seen.repeated, seen.missed) == (130, 260, 130, 0)
    assert "2 times as many" in seen.verdict


def test_audit_tells_texts_apart():
    def texts(worker, n_workers):
        for number in range(worker, 40, n_workers):
            yield np.array([f"text {number}"]), np.array([[f"label {number % 2}"]])

    seen = labkit.audit(texts, samples=40)
    assert (seen.delivered, seen.repeated, seen.missed) == (40, 0, 0)


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("samples", -1),
        ("samples", 2.5),
        ("epochs", 0),
        ("batch_size", "32"),
        ("n_workers", "auto"),
        ("n_workers", True),
        ("tag", "x"),
        ("workers", "fibre"),
        ("workers", None),
    ],
)
def test_a_wrong_argument_of_audit_is_named(argument, wrong):
    with pytest.raises(ValueError, match=rf"^audit: {argument} must be ") as error:
        labkit.audit(light, **{argument: wrong})
    assert f"got {wrong!r}." in str(error.value)


@pytest.mark.parametrize("tag", [lambda batch: [1], lambda batch: batch[0].numpy()[:, 0] + 0.5])
def test_audit_wants_an_integer_of_each_sample_from_tag(tag):
    with pytest.raises(ValueError, match="audit: tag must return an integer for each of the"):
        labkit.audit(noisy_and_shared, samples=100, tag=tag)


def fails():
    yield (np.zeros(8),)
    raise OSError("no disk")


def locked():
    with LOCK:
        yield (np.zeros(8),)


LOCK = threading.Lock()
WRONG = {
    "no function": (TypeError, None, {}),
    "another parameter": (TypeError, lambda worker_id: iter(()), {}),
    "it fails": (WorkerError, fails, {}),
    "it ends": (WorkerError, lambda: iter(()), {}),
    "it cannot travel": (TypeError, locked, {"workers": "process"}),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    "call",
    [labkit.audit, partial(labkit.diagnose, model=1e-3, seconds=0.5, progress=False)],
    ids=["audit", "diagnose"],
)
def test_an_error_does_not_name_a_function_that_the_user_has_not_called(call, name):
    kind, factory, options = WRONG[name]
    with pytest.raises(kind, match=r"^(labkit|audit|diagnose): "):
        call(factory, **options)
