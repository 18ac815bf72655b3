"""workers="auto": which kind the trial finds, and that the run behind it is whole."""

import threading
import time

import numpy as np
import pytest

from labkit import QueueRunner
from labkit.engine import trial
from labkit.engine.trial import chosen_kind
from labkit.sources import as_factory

SMALL = {"capacity": 16, "min_after_dequeue": 0}


def rates(monkeypatch, cores=2, **known):
    """Makes the trial find these batches/s, on so many cores; an exception is raised."""

    def rate(iterator, kind, n, copies):
        found = known[f"{kind}{n}"]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(trial, "_rate", rate)
    monkeypatch.setattr(trial, "usable_cores", lambda: cores)


@pytest.mark.parametrize(
    ("known", "kind", "why"),
    [
        ({"thread1": 10, "thread2": 19}, "thread", "two make 1.9 times the batches of one"),
        ({"thread1": 10, "thread2": 9, "process2": 18}, "process", "processes make 18 batches/s"),
        ({"thread1": 10, "thread2": 9, "process2": 10}, "thread", "two threads 9"),
        ({"thread1": 10, "thread2": 9, "process2": 0}, "thread", "two processes make 0"),
        ({"thread1": 10, "thread2": 9, "process2": TypeError("a lock")}, "thread", "had: a lock"),
        ({"thread1": 0}, "thread", "no 4 batches came within 3 s"),
    ],
)
def test_the_kind_that_makes_more_is_taken(monkeypatch, known, kind, why):
    rates(monkeypatch, **known)
    found = chosen_kind(lambda: iter(()))
    assert found.kind == kind and why in found.why


@pytest.mark.parametrize(
    ("cores", "known", "kind", "why"),
    [
        (6, {"thread6": 55}, "thread", "6 make 5.5 times the batches of one"),
        (
            64,
            {"thread8": 22, "process8": 70},
            "process",
            "8 processes make 70 batches/s, 8 threads",
        ),
        (64, {"thread8": 22, "process8": 24}, "thread", "8 processes make 24 batches/s, 8 threads"),
        (64, {"thread8": 15, "process8": 21}, "thread", "8 threads 15"),  # and two of them 19
        (64, {"thread8": 0}, "thread", "two make 1.9 times the batches of one"),
        (1, {}, "thread", "two make 1.9 times the batches of one"),
    ],
)
def test_threads_that_help_as_two_but_not_as_many_as_the_cores_are_compared_with_processes(
    monkeypatch, cores, known, kind, why
):
    rates(monkeypatch, cores, thread1=10, thread2=19, **known)
    found = chosen_kind(lambda: iter(()))
    assert found.kind == kind and why in found.why


@pytest.mark.parametrize(("n_workers", "most"), [(3, None), ("auto", 3)])
def test_no_more_are_tried_than_may_run(monkeypatch, capsys, n_workers, most):
    rates(monkeypatch, 64, thread1=10, thread2=19, thread3=28)

    def factory(worker, n_workers):
        for i in range(worker, 12, n_workers):
            yield (np.full(4, i),)

    with QueueRunner(factory, 4, n_workers, "auto", max_workers=most, **SMALL) as runner:
        assert sum(1 for _ in runner.dataset()) == 12
    assert "threads: 3 make 2.8 times" in capsys.readouterr().out


_ONE_AT_A_TIME = threading.Lock()  # of the threads of a process, as Python's is


def locked_half_of_the_time():
    while True:
        with _ONE_AT_A_TIME:
            time.sleep(0.02)
        time.sleep(0.02)
        yield (np.zeros(1),)


def test_threads_that_take_turns_for_a_part_of_their_work_are_found(monkeypatch):
    monkeypatch.setattr(trial, "usable_cores", lambda: 4)
    monkeypatch.setattr(trial, "_PATIENCE", 30.0)  # processes start slowly on a busy machine
    found = chosen_kind(locked_half_of_the_time)
    assert found.kind == "process" and "4 threads" in found.why


def test_what_cannot_be_split_or_stays_is_not_tried():
    class Again:
        def __iter__(self):
            raise AssertionError("it was run")

    found = chosen_kind(as_factory(Again()))
    assert found.kind == "thread" and "cannot be split" in found.why


def test_threads_that_wait_help_and_nothing_hangs():
    def waits():
        while True:
            time.sleep(0.01)
            yield (np.zeros(1),)

    def ends():
        yield (np.zeros(1),)

    def fails():
        raise OSError("no such disk")
        yield

    before = threading.active_count()
    assert chosen_kind(waits).kind == "thread"
    assert trial._rate(ends, "thread", 2, True) > 0  # pass after pass
    assert trial._rate(fails, "thread", 1, True) == 0
    assert trial._rate(lambda: iter(()), "thread", 1, True) == 0
    until = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_each_sample_comes_once_whatever_was_found(monkeypatch, capsys, kind):
    rates(monkeypatch, thread1=10, thread2=9, process2=18 if kind == "process" else 1)

    def factory(worker, n_workers, epoch):
        for i in range(worker, 12, n_workers):
            yield (np.arange(4) + 4 * i,)

    with QueueRunner(factory, 4, 2, "auto", **SMALL) as runner:
        for _ in range(2):
            numbers = sorted(int(x) for (batch,) in runner.dataset() for x in batch)
            assert numbers == list(range(48))
        assert runner.workers == kind
    said = capsys.readouterr().out
    assert said.count("workers='auto'") == 1 and f"workers='auto': {kind}" in said
    with pytest.raises(ValueError, match="'thread' or 'process' or 'ray' or 'auto', got 'any'"):
        QueueRunner(factory, workers="any")


def test_a_trial_of_what_computes_ends_with_a_kind_and_a_whole_pass(capsys):
    def factory(worker, n_workers):
        for i in range(worker, 40, n_workers):
            yield (np.full(2, sum(j % 7 for j in range(20_000)) * 0 + i),)

    with QueueRunner(factory, 2, 2, "auto", **SMALL) as runner:
        numbers = sorted(int(x) for (batch,) in runner.dataset() for x in batch)
        assert numbers == sorted([*range(40)] * 2)
        assert "two processes make" in capsys.readouterr().out or runner.workers == "thread"
