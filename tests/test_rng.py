"""Random numbers: a factory's parameters rng and seed, other ones in each worker and pass."""

import functools

import numpy as np
import pytest

import labkit
from labkit import QueueRunner, WorkerError
from labkit.engine import TRIED
from labkit.engine.produce import IteratorFactory
from labkit.instruments.measure import alone, first_batch


def factory_that_draws():
    # Nested, so that a process gets it by value and does not import this file.
    def draws(rng, seed, worker):
        for chunk in range(3):
            own = np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, chunk))
            drawn = np.random.default_rng(own)
            yield rng.random(4), drawn.random(4), np.full(4, worker)

    return draws


def two_passes(workers, **given):
    """All that two workers have drawn, [samples, 2], in a fixed order."""
    given = {"capacity": 8, "order": "fixed", "shuffle": False, **given}
    with QueueRunner(factory_that_draws(), 4, 2, workers, **given) as runner:
        data = runner.dataset()
        batches = [np.stack([a, b], 1) for _ in range(2) for a, b, _ in data]
    return np.concatenate(batches)


pytestmark = pytest.mark.filterwarnings("ignore:.*workers delivered")


@functools.cache
def in_threads():
    return two_passes("thread", seed=5)


@pytest.mark.parametrize("workers", TRIED)
def test_workers_and_passes_draw_apart_and_a_run_with_the_same_seed_the_same(workers):
    numbers = two_passes(workers, seed=5)
    assert numbers.shape == (2 * 2 * 3 * 4, 2) and len(np.unique(numbers)) == numbers.size
    assert (numbers == in_threads()).all()


def test_the_seed_is_the_runners_or_zero_for_a_fixed_order_or_drawn():
    of = {seed: two_passes("thread", seed=seed) for seed in (None, 0, -1)}
    assert (of[None] == of[0]).all()
    assert len(np.unique([of[0], of[-1], in_threads()])) == 3 * of[0].size
    drawn = [two_passes("thread", order="any") for _ in range(2)]
    assert len(np.unique(drawn)) == 2 * drawn[0].size


def test_what_has_a_default_of_its_own_is_left_alone_unless_its_type_says_more():
    def own(seed=7, rng=None, start=3):
        return iter([(seed, rng, start)])

    def typed(seed: np.random.SeedSequence | None = None, rng: "np.random.Generator | None" = None):
        return iter([(seed, rng)])

    def needed(start, seed):
        return iter([(start, seed)])

    assert list(IteratorFactory(own, 2)(1, 0)) == [(7, None, 3)]
    ((seed, rng),) = IteratorFactory(typed, 2, 1)(1, 0)
    assert isinstance(seed, np.random.SeedSequence) and isinstance(rng, np.random.Generator)
    ((start, bound),) = IteratorFactory(functools.partial(needed, seed=4), 2)(1, 0)
    assert (start, bound) == (0, 4)


def test_a_worker_that_begins_later_is_told_where_and_draws_on():
    def shares(worker, n_workers, start, rng):
        return iter([(start, rng.random())])

    def alone(start, rng):
        return iter([(start, rng.random())])

    ((first, before),) = IteratorFactory(shares, 4, 0)(1, 0)
    ((later, after),) = IteratorFactory(shares, 4, 0)(1, 0, done=3)
    assert (first, later) == (0, 12) and before != after
    ((later, after),) = IteratorFactory(alone, 4, 0)(1, 0, done=3)
    assert later == 3


def test_whoever_runs_a_factory_gives_it_what_it_asks_for():
    draws = factory_that_draws()
    assert first_batch(draws)[1].components[0].dtype == np.float64
    assert alone(draws, "process", 1, 0.05).rate > 0
    seen = labkit.audit(draws, n_workers=2)
    assert (seen.delivered, seen.repeated) == (24, 0)


def test_an_end_at_once_tells_that_labkit_filled_it_in():
    def ends(worker, seed):
        return iter(range(0))

    with (
        pytest.raises(WorkerError, match=r"with worker=0, seed=a SeedSequence: if a name"),
        QueueRunner(ends) as runner,
    ):
        list(runner.dataset())
    with pytest.raises(TypeError, match=r"needs key, expected .* start, seed, rng\. Rename"):
        QueueRunner(lambda key: iter(()))
