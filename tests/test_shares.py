"""QueueRunner(shard=(rank, world)): several trainers, one data set, equally many steps."""

import collections
import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from labkit import QueueRunner, WorkerError, from_files
from labkit.engine.heard import Heard
from labkit.engine.messages import Chunk
from labkit.engine.shares import EvenQueue, Share
from labkit.quiet import tf
from tests.benchmarks import resume
from tests.consumers import in_graph

SMALL = {"batch_size": 6, "capacity": 60, "min_after_dequeue": 24}


def strided(size, rows):
    """A factory of `size` numbered samples in batches of `rows`, the last one smaller."""

    def factory(worker, n_workers, epoch, start=0):
        for number in range(start + worker, -(-size // rows), n_workers):
            yield np.arange(rows * number, min(size, rows * (number + 1)), dtype=np.int64)

    return factory


def of_ranks(source, world, passes=1, **options):
    """Of each trainer, the samples of each batch of each pass."""
    found = []
    for rank in range(world):
        with QueueRunner(source, **{**SMALL, **options}, shard=(rank, world)) as runner:
            data = runner.dataset()
            found.append([[firsts(batch) for batch in data] for _ in range(passes)])
    return found


def firsts(batch):
    return np.asarray(batch).reshape(len(batch), -1)[:, 0].tolist()


def check(found, size, pads, batch_size=6):
    """Equally many whole batches for all; each sample once, at most or at the least."""
    assert len({len(its) for ranks in found for its in ranks}) == 1
    for passes in zip(*found, strict=True):
        assert {len(batch) for batches in passes for batch in batches} == {batch_size}
        parts = [[sample for batch in batches for sample in batch] for batches in passes]
        every = [sample for part in parts for sample in set(part)]
        assert len(every) == len(set(every))  # what one has no other has
        if pads:
            assert sorted(every) == list(range(size))
        else:
            assert len(every) == len(parts) * len(parts[0])


@pytest.mark.parametrize("uneven", ["drop", "pad"])
@pytest.mark.parametrize(
    ("size", "rows", "world", "options"),
    [
        (101, 4, 3, {"n_workers": 2, "order": "fixed"}),
        (64, 32, 2, {"batch_size": 7, "shuffle": False, "min_after_dequeue": 0}),
    ],
)
def test_all_trainers_take_equally_many_steps(size, rows, world, uneven, options):
    given = {**options, "uneven": uneven, "samples": size}
    found = of_ranks(strided(size, rows), world, 2, **given)
    check(found, size, uneven == "pad", options.get("batch_size", 6))
    # Not a whole batch more than need be is cut or made up.
    shares = Share(0, world, options.get("n_workers", 1), size, 6, False).sizes(rows)
    assert sum(shares) == size
    steps, batch_size = len(found[0][0]), options.get("batch_size", 6)
    assert steps == (
        -(-max(shares) // batch_size) if uneven == "pad" else min(shares) // batch_size
    )


class Sink:
    """A queue that keeps what comes."""

    def __init__(self):
        self.came = []

    def enqueue(self, arrays):
        self.came += arrays[0].tolist()
        return True

    def close(self, cancel):
        assert not cancel


def what_comes(share, rows, draws):
    """A trainer's batches as they may come: of each worker in turn, of several in any order, now
    and then in two parts."""
    left = []
    for worker in range(share.n_workers):
        first, all_of_them = share.rank * share.n_workers + worker, share.n_workers * share.world
        batches = range(first, -(-share.samples // rows), all_of_them)
        left.append([])
        for number, batch in enumerate(batches):
            samples = np.arange(rows * batch, min(rows * (batch + 1), share.samples))
            at = draws.integers(len(samples)) if draws.random() < 0.3 else 0
            for part in filter(len, (samples[:at], samples[at:])):
                told = {"number": number, "last": part[-1] == samples[-1]}
                left[-1].append(Chunk(worker, [part], 0.0, 0, **told))
    while left := [its for its in left if its]:
        yield left[draws.integers(len(left))].pop(0)


def delivered(share, rows, draws, losses):
    """What a trainer's queue gets in a pass, and whether all of its batches came."""
    heard, sink = (
        Heard(SimpleNamespace(epoch=0, n_workers=1, factory=SimpleNamespace(shards=1))),
        Sink(),
    )
    queue, gone = EvenQueue(sink, share, heard, 0), set()
    for chunk in what_comes(share, rows, draws):
        if chunk.last and draws.random() < losses:
            gone |= {chunk.worker} if losses > 0.2 else {(chunk.worker, chunk.number)}
        if gone & {chunk.worker, (chunk.worker, chunk.number)}:
            heard.lacking = True
            continue
        heard.note(chunk)
        queue.enqueue(chunk.arrays)
        heard.samples += len(chunk.arrays[0])
    queue.close(cancel=False)
    return sink.came


def test_no_trainer_takes_a_step_more_than_another_whatever_comes():
    """Each works on its own. If nothing was lost, either all of them go on, or none."""
    draws, ends = np.random.default_rng(0), collections.Counter()
    for case in range(1200):
        size, rows, world, n, batch_size = draws.integers(1, (60, 30, 5, 4, 9)).tolist()
        losses, pads = (0, 0, 0.1, 0.3)[case % 4], case % 8 < 4
        parts, errors = [], []
        for rank in range(world):
            share = Share(rank, world, n, size, batch_size, pads)
            try:
                parts.append(delivered(share, rows, draws, losses))
            except WorkerError as error:
                errors.append(str(error))
        steps = share.count(rows)
        assert all("smaller batches" in error for error in errors)
        if not steps:  # for one of them there is not enough
            assert errors
        elif losses or errors:
            assert {len(part) for part in parts} <= {steps * batch_size}
            assert losses or not parts
        else:
            batches = [np.reshape(part, (steps, batch_size)).tolist() for part in parts]
            check([[its] for its in batches], size, pads, batch_size)
        ends[bool(losses), bool(steps), bool(errors), bool(parts)] += 1
    assert ends[False, True, False, True] > 200  # all go on
    assert 0 < ends[False, True, True, False] < 50  # nobody could, though there was enough
    assert ends[True, True, False, True] > 100


def test_a_trainer_that_has_only_the_last_batch_takes_as_many_steps():
    """And one whose only batch is more than it may take, of which a process sends parts."""

    def factory(worker, n_workers, epoch, start=0):
        for number in range(start + worker, 2, n_workers):
            if number and not tries:
                tries.append(worker)
                raise ValueError("mine")
            yield np.arange(8 * number, min(10, 8 * (number + 1)))

    tries, small = [], {"batch_size": 2, "samples": 10}
    with pytest.warns(RuntimeWarning, match="started again"):
        check(of_ranks(factory, 2, 2, on_error="restart", **small), 10, False, 2)

    def large(worker, n_workers):
        yield np.repeat(np.arange(36 * worker, 36 + 6 * worker)[:, None], 1 << 15, 1)

    check(of_ranks(large, 2, samples=42, workers="process", on_error="continue"), 42, False)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_data_set_that_is_split_by_index(kind):
    """Its order is the same for all trainers, though no seed is given; and large samples."""
    source = from_files(range(52), lambda index: np.full(1 << 15, index), 5)
    with QueueRunner(source, **SMALL, shard=(0, 2), uneven="pad") as runner:
        assert int(runner.dataset().cardinality()) == -(-27 // 6)  # of 6 and 5 batches
    given = {"workers": kind, "n_workers": 2 if kind == "thread" else 1, "uneven": "pad"}
    found = of_ranks(source, 2, 2 if kind == "thread" else 1, **given)
    check(found, 52, pads=True)
    graph = in_graph(QueueRunner(source, **SMALL, shard=(1, 2), **given))
    again = {sample for batch in graph for sample in firsts(batch)}
    assert again == {sample for batch in found[1][0] for sample in batch}


def test_what_is_left_out_is_made_up():
    def factory(worker, n_workers, epoch, start=0):
        for number in range(start + worker, 20, n_workers):
            if number in (4, 5):
                raise ValueError("mine")
            yield 6 * number + np.arange(6)

    with pytest.warns(RuntimeWarning, match="mine"):
        first, second = of_ranks(factory, 2, samples=120, on_error="skip")
    assert len(first[0]) == len(second[0]) == 10
    both = {sample for batch in first[0] + second[0] for sample in batch}
    assert both == set(range(120)) - set(range(24, 36))


def test_a_trainer_goes_on_with_its_own_part():
    given = {**SMALL, "n_workers": 2, "samples": 205, "shard": (1, 2)}
    begin, came = None, []
    for stop_after in (4, 9, 100):  # of 16; behind 13 all has come, and waits to be mixed
        with QueueRunner(strided(205, 5), **given) as runner:
            runner.state_dict() if begin is None else runner.load_state_dict(begin)
            for number, batch in enumerate(runner.dataset(), 1):
                came.append(firsts(batch))
                if number == stop_after:
                    break
            begin = json.loads(json.dumps(runner.state_dict()))
    other = of_ranks(strided(205, 5), 2, n_workers=2, samples=205)[0]
    check([other, [came]], 205, pads=False)
    with pytest.raises(ValueError, match=r"shard was \[1, 2\], and is \[0, 2\]"):
        QueueRunner(strided(205, 5), **{**given, "shard": (0, 2)}).load_state_dict(begin)
    with pytest.raises(ValueError, match="expected uneven='drop' or 'endless', got 'pad'"):
        QueueRunner(strided(205, 5), **given, uneven="pad").state_dict()


def contiguous(worker, n_workers):
    share = np.array_split(np.arange(100), n_workers)[worker]
    yield from np.array_split(share, max(1, len(share) // 5))


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        (contiguous, {"samples": 90}, r"got 50 samples of a pass, expected 45 of 90 .*i \+ n_w"),
        (strided(40, 5), {"uneven": "endless"}, "the iterator ended, expected no end"),
        (strided(40, 20), {"samples": 40, "batch_size": 30}, r"have \[20, 20\].*at least 30 each"),
    ],
)
def test_what_would_let_the_others_wait_is_an_error(source, options, says):
    with pytest.raises(WorkerError, match=says):
        of_ranks(source, 2, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shard": (2, 2)}, r"shard must be \(rank, world\).*got \(2, 2\)"),
        ({"shard": None, "uneven": "pad"}, "uneven must be left away without shard, got 'pad'"),
        ({"shard": 1}, r"shard must be \(rank, world\).*got 1"),
        ({"n_workers": "auto"}, "n_workers must be a number for shard, got 'auto'"),
        ({"uneven": "both"}, "uneven must be one of .*, got 'both'"),
        ({"samples": None}, "shard needs samples=, of a pass of all trainers"),
        ({"uneven": "endless"}, "shard needs samples=.*without an end, got .40, 'endless'."),
        ({"iterator": lambda: iter(())}, r"with the parameters worker and n_workers, got \[\]"),
        ({"iterator": [(1, 2)].__class__}, "with the parameters worker and n_workers"),
        ({"iterator": tf.data.Dataset.range(3).batch(1)}, "data set that can be split, got .A tf"),
    ],
)
def test_what_cannot_be_shared_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        QueueRunner(**{"iterator": strided(40, 5), "samples": 40, "shard": (0, 2), **options})


@pytest.mark.slow
def test_two_devices_share_each_batch_of_a_fit(tmp_path):
    """MirroredStrategy, in one process: no shard, each sample once an epoch. It takes a pass to see
    what batches look like, of which it trains on nothing."""
    resume.run(tmp_path, "both")
    parts = [json.loads(part) for parts in resume.steps_of(tmp_path).values() for part in parts]
    epochs, samples = np.divmod(np.concatenate(parts), 1000)
    found = {epoch: sorted(samples[epochs == epoch]) for epoch in epochs}
    assert list(found.values()) == [list(range(4 * resume.CHUNKS))] * resume.EPOCHS


TRAINER = """
import json, os, sys
import numpy as np
rank = int(sys.argv[1])
cluster, task = {"worker": sys.argv[2:]}, {"type": "worker", "index": rank}
os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import labkit
from tests.test_shares import SMALL, strided

shared = {**SMALL, "n_workers": 2, "samples": 107, "shard": (rank, 2), "uneven": "UNEVEN"}
with strategy.scope():
    weight = tf.Variable(0.0)

@tf.function
def step(batch):
    def each(batch):
        gradient = tf.reduce_mean(tf.cast(batch, tf.float32)) * weight + 1.0
        total = tf.distribute.get_replica_context().all_reduce("sum", gradient)
        weight.assign_sub(0.1 * total)
    strategy.run(each, [batch])

seen = []
with labkit.QueueRunner(strided(107, 5), **shared) as runner:
    data = strategy.distribute_datasets_from_function(lambda context: runner.dataset())
    for _ in range(2):
        seen.append([])
        for batch in data:
            step(batch)
            [own] = strategy.experimental_local_results(batch)
            seen[-1].append(own.numpy().tolist())
print("seen", json.dumps([seen, float(strategy.experimental_local_results(weight)[0].numpy())]))
"""


@pytest.mark.slow
def test_two_processes_of_a_multi_worker_strategy():
    """The trainer with more batches would wait in its all-reduce for ever."""
    free = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    hosts = [f"127.0.0.1:{server.getsockname()[1]}" for server in free]
    for server in free:
        server.close()
    text = TRAINER.replace("UNEVEN", "pad")
    trainers = [
        subprocess.Popen(
            [sys.executable, "-c", text, str(rank), *hosts],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [trainer.communicate(timeout=300) for trainer in trainers]
    finally:
        for trainer in trainers:
            trainer.kill()
    assert [trainer.returncode for trainer in trainers] == [0, 0], said[0][1] + said[1][1]
    lines = [out[out.index("seen") + 5 :] for out, _ in said]
    (first, weight), (second, same) = map(json.loads, lines)
    check([first, second], 107, pads=True)
    assert weight == same != 0.0
