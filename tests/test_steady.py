"""Steady rates: what lies in store is used up first, and runs take turns."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from labkit.instruments.steady import drain, in_turn


def fake(depth, n_workers):
    return SimpleNamespace(depth=depth, min_after_dequeue=128, batch_size=32, n_workers=n_workers)


@pytest.mark.parametrize(
    ("held", "filled", "most", "steps"),
    [
        (256, 0, 100, 4),  # 256, 224, 192, 160, and below 160 it need not go
        (128, 0, 100, 0),
        (256, 16, 100, 7),
        (256, 32, 100, 18),  # the workers keep up: nothing to use up
        (256, 40, 100, 18),
        (256, 24, 5, 5),
        (256, 28, 100, 25),
    ],
)
def test_a_store_is_used_up_unless_the_model_is_the_slower_one(held, filled, most, steps):
    store, taken = [held], []
    runner = fake(lambda: store[0], 1)

    def step(number):
        taken.append(number)
        store[0] += filled - 32

    drain(runner, step, most)
    assert taken == [1] * steps


@pytest.mark.parametrize("n_workers", [1, 4, 16])
def test_what_workers_have_ready_is_used_up_before_a_full_queue_says_anything(n_workers):
    """Else it comes with the steps that count, which are then faster than the workers are."""
    store, ready = [1000], [3 * 32 * n_workers]

    def step(number):
        ready[0] += 19  # samples in the time of a step: 0.6 of what it takes
        put = min(32, ready[0])
        ready[0] -= put
        store[0] += put - 32

    drain(fake(lambda: store[0], n_workers), step, 10_000)
    assert ready == [0] and store[0] < 160


def test_runs_take_turns_with_the_yardstick_between_them(capsys):
    calls, closed = [], []

    @contextmanager
    def run(name, rates):
        rates = iter(rates)
        try:
            yield lambda steps: calls.append((name, steps)) or next(rates)
        finally:
            closed.append(name)

    runs = {"a": run("a", [0, 10, 12]), 4: run(4, [0, 40, 44]), "alone": run("alone", range(9))}
    steps = {"a": 5, 4: 100, "alone": 30}
    rates, beside = in_turn(runs, steps, 2, "alone")
    assert calls[:3] == [("a", 5), (4, 20), ("alone", 20)]  # the first steps do not count
    one_round = [("alone", 30), ("a", 5), ("alone", 30), (4, 100), ("alone", 30)]
    assert calls[3:] == 2 * one_round and closed == ["alone", 4, "a"]
    assert rates == {"a": [10, 12], 4: [40, 44]}
    assert beside == {"a": [1.5, 4.5], 4: [2.5, 5.5]}
    assert "round 2 of 2, steps/s: a: 12, 4: 44" in capsys.readouterr().out


def test_a_run_that_fails_ends_the_others():
    closed = []

    @contextmanager
    def run(name, rate):
        try:
            yield rate
        finally:
            closed.append(name)

    runs = {"a": run("a", lambda steps: 1.0), "b": run("b", lambda steps: 1 / 0)}
    with pytest.raises(ZeroDivisionError):
        in_turn(runs, {"a": 1, "b": 1}, 1, "a")
    assert closed == ["b", "a"]
