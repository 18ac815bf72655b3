"""A batch is delivered as it was when it was yielded, whatever it was made of."""

import gc
import itertools
import sys
import weakref
from typing import NamedTuple

import cloudpickle
import numpy as np
import pytest

from labkit import Component, QueueRunner, WorkerError
from labkit.engine import memory
from labkit.engine.batches import ALONE, Spec
from labkit.engine.produce import IteratorFactory, produce
from labkit.quiet import tf
from tests.consumers import in_dataset

SMALL = {"capacity": 64, "min_after_dequeue": 0}
# A worker process that had to import this file would import TensorFlow with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(params=["thread", "process"])
def workers(request):
    return request.param


def column(batches, part=0):
    return [value for batch in batches for value in np.ravel(batch[part]).tolist()]


# -- a buffer that is used again -----------------------------------------------------------------


def same_array(total):
    x = np.zeros(1, int)
    for k in range(total):
        x[0] = k
        yield (x,)


def a_view_of_it(total):
    buffer = np.zeros(100, int)
    for k in range(total):
        buffer[:] = k
        yield (buffer[k : k + 1],)


def shuffled_in_place(total):
    x, rng = np.arange(total), np.random.default_rng(0)
    for k in range(total):
        x.sort()
        yield (x[k : k + 1],)
        rng.shuffle(x)


def held_in_the_tuple_alone(total):
    batch = (np.zeros(1, int),)
    for k in range(total):
        batch[0][0] = k
        yield batch


def through_a_memoryview(total):
    memory = bytearray(8)
    for k in range(total):
        memory[:] = np.int64(k).tobytes()
        yield (np.frombuffer(memory, np.int64),)


def seen_by_another_view(total):
    whole = np.zeros(1, int)
    view = whole[:]
    del whole
    for k in range(total):
        view.base[0] = k
        yield (view[:],)


REUSED = [
    same_array, a_view_of_it, shuffled_in_place, held_in_the_tuple_alone, through_a_memoryview,
    seen_by_another_view,
]  # fmt: skip


@pytest.mark.parametrize("reuse", REUSED)
def test_a_buffer_that_is_used_again_changes_no_batch(consume, reuse):
    runner = QueueRunner(lambda: reuse(40), 1, 1, **SMALL)
    assert sorted(column(consume(runner))) == list(range(40))


def test_a_buffer_that_is_used_again_changes_no_batch_of_a_process():
    """Of one for all of these ways: it is its start that takes long."""

    def all_of_them():
        for reuse in REUSED:
            yield from reuse(40)

    found = column(in_dataset(QueueRunner(all_of_them, 1, 1, "process", **SMALL)))
    assert sorted(found) == sorted([*range(40)] * len(REUSED))


def test_it_changes_none_in_nested_structures_and_several_threads(consume):
    def factory(worker, n_workers):
        x, y = np.zeros((2, 3)), np.zeros(2, np.int64)
        for k in range(worker, 60, n_workers):
            x[:], y[:] = k, k
            yield {"a": (x, {"b": y}), "c": x[:, 0]}

    batches = consume(QueueRunner(factory, 2, 3, **SMALL))
    found = [int(k) for batch in batches for k in batch["a"][1]["b"]]
    assert sorted(found) == sorted([*range(60)] * 2)
    for batch in batches:
        k = batch["a"][1]["b"]
        assert (batch["a"][0] == k[:, None]).all() and (batch["c"] == k).all()


def test_what_tensors_and_subclasses_show_is_copied_too():
    variable = tf.Variable(np.zeros(1, np.int64))

    class Mine(np.ndarray):
        pass

    def factory():
        mine = np.zeros(1, np.int64).view(Mine)
        for k in range(20):
            variable.assign([k])
            mine[0] = k
            yield variable, mine

    batches = in_dataset(QueueRunner(factory, 1, **SMALL))
    assert sorted(column(batches)) == sorted(column(batches, 1)) == list(range(20))


def produced(factory):
    """The arrays that a thread would hand on."""
    return [made.arrays for made in produce(IteratorFactory(factory, 1), 0, 0, None, True)]


def test_an_array_that_nobody_else_has_is_not_copied():
    addresses = []

    def made(rows):
        array = np.full((rows, 2), 7.0)
        addresses.append(array.ctypes.data)
        return array

    def inline():
        for _ in range(3):
            yield made(2), {"a": made(4)[2:], "b": (made(4)[::2], made(2).T)}

    kept = [array for arrays in produced(inline) for array in arrays]
    # Views of what nobody has are nobody's as well.
    bases = [array if array.base is None else array.base for array in kept]
    assert [base.ctypes.data for base in bases] == addresses


@pytest.mark.parametrize("reuse", REUSED)
def test_an_array_that_somebody_has_is_copied(reuse):
    arrays = [arrays[0] for arrays in produced(lambda: reuse(5))]
    assert [int(array[0]) for array in arrays] == list(range(5))
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))


def test_reuses_buffers_false_saves_the_copy():
    shared = np.zeros((4, 2))

    def factory():
        yield (shared,)

    job = IteratorFactory(factory, 1)
    (made,) = produce(job, 0, 0, None, copies=False)
    assert np.shares_memory(made.arrays[0], shared)
    (made,) = produce(job, 0, 0, None, copies=True)
    assert not np.shares_memory(made.arrays[0], shared)
    # TensorFlow takes aligned memory as it lies: the copy is the only one.
    assert made.arrays[0].ctypes.data % 64 == 0
    batches = in_dataset(QueueRunner(factory, 4, reuses_buffers=False, **SMALL))
    assert np.array_equal(batches[0][0], shared)


def test_the_count_of_references_tells_one_from_two():
    alone, shared = np.zeros(3), np.zeros(3)
    held = [shared]
    batch = (alone, shared)
    del alone
    (first, second) = Spec.of(batch).take(batch, alone=True)
    assert np.shares_memory(first, batch[0]) and not np.shares_memory(second, held[0])
    assert ALONE >= 1


# -- whose memory is whose ------------------------------------------------------------------------


def test_a_batch_is_gone_when_its_last_user_is_without_the_collector():
    """A cycle would keep dozens of them, each in memory of its own."""
    alive, counts = [], []

    def made():
        array = np.zeros(1000)
        alive.append(weakref.ref(array))
        return array

    def given_away():
        for _ in range(40):
            yield {"a": made(), "b": (np.zeros(1000),)}
            counts.append(sum(ref() is not None for ref in alive))

    gc.disable()
    try:
        for _ in produce(IteratorFactory(given_away, 1), 0, 0, None, True):
            pass
        assert max(counts) <= 2
        with QueueRunner(given_away, 1000, capacity=2000, shuffle=False) as runner:
            assert sum(1 for _ in runner.dataset()) == 40
    finally:
        gc.enable()
    assert len(counts) == 80 and max(counts) <= 15


def large(rows, number, shift):
    """An array at an address that TensorFlow takes as it lies if `shift` is 0."""
    raw = np.empty(8 * rows * 1024 + 128, np.uint8)
    start = -raw.ctypes.data % 64 + shift
    array = raw[start : start + 8 * rows * 1024].view(np.int64).reshape(rows, 1024)
    array[...] = number
    return array


@pytest.mark.parametrize("shift", [0, 16])
def test_a_large_batch_that_tensorflow_would_copy_is_copied_by_its_worker(shift):
    def given_away():
        for number in range(3):
            yield large(256, number, shift), np.array([number] * 256)

    def addresses(aligned):
        found = []
        for made in produce(IteratorFactory(given_away, 1), 0, 0, None, True, aligned=aligned):
            assert np.all(made.arrays[0] == made.number)
            found.append(made.arrays[0].ctypes.data % 64)
        return set(found)

    assert addresses(256) == {0}
    assert addresses(255) == {shift}  # cut or joined, it is copied then


def test_memory_is_used_again_only_when_nobody_has_a_part_of_it():
    rng, held, seen = np.random.default_rng(0), {}, set()
    for number in range(200):
        array = memory.aligned_copy(np.full((300, 1024), number))
        assert array.ctypes.data % 64 == 0
        seen.add(array.ctypes.data)
        held[number] = array[::7, 3:].T if number % 2 else array
        del array
        if len(held) > 6:
            del held[rng.choice(list(held))]
        assert all(np.all(part == key) for key, part in held.items())
    assert len(seen) <= 16
    held.clear()
    assert not memory._warm


@pytest.mark.parametrize("rows", [64, 256, 300])
def test_large_batches_that_are_kept_stay_as_they_were(workers, rows):
    """Chunks that are a batch, a part of one, and more than one."""

    def factory():
        for number in range(24):
            yield (large(rows, number, 16 * (number % 3)),)

    options = {"shuffle": False, "capacity": 1024}
    with QueueRunner(factory, 256, 1, workers, **options) as runner:
        kept = [batch for (batch,) in runner.dataset()]
    numbers = np.repeat(np.arange(24), rows)
    assert sum(map(len, kept)) == len(numbers)
    for begin, batch in zip(range(0, len(numbers), 256), kept, strict=True):
        assert np.array_equal(batch[:, 0], numbers[begin : begin + 256])
        assert np.array_equal(batch[:, -1], numbers[begin : begin + 256])
    kept.clear()


# -- byte order ----------------------------------------------------------------------------------


def test_arrays_of_either_byte_order_come_out_as_they_are(consume, workers):
    kinds = ("f2", "f4", "f8", "i2", "i4", "i8", "u2", "u4", "c8")
    numbers = np.arange(1, 9)

    def factory():
        yield {order + kind: numbers.astype(order + kind) for kind in kinds for order in "><="}

    (batch,) = consume(QueueRunner(factory, 8, 1, workers, **SMALL))
    assert len(batch) == 3 * len(kinds)
    for kind, numbers_of_it in batch.items():
        assert sorted(numbers_of_it.real.tolist()) == numbers.tolist()
        assert numbers_of_it.dtype == np.dtype(kind[1:])


def test_after_one_byte_order_the_other_fits_too(consume, workers):
    def factory():
        for order in "><=>":
            yield np.arange(4).astype(order + "i4"), {"y": np.ones((4, 2)).astype(order + "f8")}

    batches = consume(QueueRunner(factory, 4, 1, workers, **SMALL))
    assert sorted(column(batches)) == sorted([*range(4)] * 4)
    assert all((batch[1]["y"] == 1).all() for batch in batches)


def test_a_given_spec_may_name_either_byte_order(consume):
    spec = (Component("x", (), ">i4"),)
    (batch,) = consume(
        QueueRunner(lambda: iter([(np.arange(4, dtype="<i4"),)]), 4, spec=spec, **SMALL)
    )
    assert sorted(batch[0].tolist()) == [0, 1, 2, 3]
    assert spec[0].dtype == np.int32 and spec[0].dtype.isnative


# -- lists ---------------------------------------------------------------------------------------


def test_text_in_a_list_keeps_its_zeros(consume, workers):
    def factory():
        yield {"b": [b"a\0", b"\0", b"bc\0\0"], "s": ["a\0", "\0", "b"], "n": [1, 2, 3]}
        yield {"b": np.array([b"x", b"y", b"z"]), "s": np.array(["x", "y", "z"]), "n": [4, 5, 6]}

    batches = consume(QueueRunner(factory, 3, 1, workers, **SMALL))
    found = {
        int(n): (b, s)
        for batch in batches
        for b, s, n in zip(batch["b"], batch["s"], batch["n"], strict=True)
    }
    assert [found[n] for n in (1, 2, 3)] == [(b"a\0", b"a\0"), (b"\0", b"\0"), (b"bc\0\0", b"b")]
    assert [found[n] for n in (4, 5, 6)] == [(b"x", b"x"), (b"y", b"y"), (b"z", b"z")]


def test_text_in_nested_lists_keeps_its_zeros():
    pairs = [[b"a\0", b"b"], [b"c", b"d\0"]]
    (batch,) = in_dataset(QueueRunner(lambda: iter([(pairs,)]), 2, **SMALL))
    assert sorted(batch[0].tolist()) == pairs


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: [x, x],
        lambda x: (x, [x, x]),
        lambda x: {"x": [[x], [x]]},
        lambda x: [tf.constant(x), tf.constant(x)],
    ],
)
def test_a_list_of_arrays_is_no_batch(consume, wrong):
    def pairs():
        yield wrong(np.ones((2, 2), np.float32))

    with pytest.raises(
        WorkerError, match=r"(?s)a list of 2 arrays.*Yield a tuple, \(x, y\)"
    ) as caught:
        consume(QueueRunner(pairs, 2, **SMALL))
    assert "yield wrong(np.ones" in str(caught.value)


def test_a_list_of_arrays_is_none_later_either(workers):
    def pairs():
        yield (np.ones((2, 2)),)
        yield ([np.ones(2), np.ones(2)],)

    with pytest.raises(WorkerError, match=r"(?s)a list of 2 arrays.*It was yielded here"):
        in_dataset(QueueRunner(pairs, 2, 1, workers, **SMALL))


def test_a_list_of_numbers_is_an_array(consume):
    (batch,) = consume(QueueRunner(lambda: iter([([1, 2], [[1.0, 2.0], [3.0, 4.0]])]), 2, **SMALL))
    assert sorted(batch[0].tolist()) == [1, 2] and batch[1].shape == (2, 2)


@pytest.mark.parametrize("make", [np.asarray, tf.constant])
def test_an_array_in_place_of_an_iterator_is_refused(consume, make):
    rows = make(np.ones((6, 4, 2), np.float32))
    with pytest.raises(WorkerError, match=r"array of shape \(6, 4, 2\), whose rows would be taken"):
        consume(QueueRunner(lambda: rows, 4, **SMALL))


def test_a_list_of_batches_is_an_iterable_of_them(consume):
    batches = consume(QueueRunner(lambda: np.split(np.arange(12), 3), 4, **SMALL))
    assert sorted(i for batch in batches for i in np.ravel(batch).tolist()) == list(range(12))


# -- the same numbers in every worker ------------------------------------------------------------


def test_workers_that_begin_with_the_same_batch_are_warned_about_once(workers):
    rng = np.random.default_rng(0)

    def noise():
        for _ in range(20):
            yield (rng.normal(size=(4, 3)),)

    def fixed():
        own = np.random.default_rng(0)
        for _ in range(20):
            yield (own.normal(size=(4, 3)),)

    factory = noise if workers == "process" else fixed
    with pytest.warns(RuntimeWarning, match=r"equal to the last bit.*parameter rng") as said:
        in_dataset(QueueRunner(factory, 4, 3, workers, **SMALL))
    assert len([w for w in said if "equal to the last bit" in str(w.message)]) == 1


def test_workers_that_begin_apart_or_share_are_not(workers, recwarn):
    def apart(worker):
        own = np.random.default_rng([0, worker])
        for _ in range(10):
            yield (own.normal(size=(4, 3)),)

    def shares(worker, n_workers):
        for _ in range(10):
            yield (np.zeros((4, 3)),)

    def one():
        for _ in range(10):
            yield (np.zeros((4, 3)),)

    for factory, n in ((apart, 3), (shares, 3), (one, 1)):
        in_dataset(QueueRunner(factory, 4, n, workers, **SMALL))
    assert not [w for w in recwarn if "equal to the last bit" in str(w.message)]


# -- what no tensor can hold ---------------------------------------------------------------------


class _Sparse:
    def toarray(self):
        return np.zeros((4, 2))


UNFIT = {
    "numbers as objects": (np.array([1, 2.5, 3, 4], object), r"type int.*\.astype\('float32'\)"),
    "ragged": (np.array([np.zeros(2), np.zeros(3)], object), r"type ndarray.*Pad them"),
    "ragged list": ([[1, 2], [3]], r"one shape.*Pad its rows"),
    "None": (np.array(["a", None], object), r"NoneType.*Fill in"),
    "dates": (np.array(["2026-01-01"], "datetime64[D]"), r"datetime64.*\.astype\('int64'\)"),
    "long floats": (np.ones(4, np.longdouble), r"Convert it: \.astype\('float64'\)"),
    "records": (np.zeros(4, [("a", int), ("b", float)]), r"dict of arrays: a, b"),
    "sparse": (_Sparse(), r"sparse _Sparse.*\.toarray\(\)"),
    "masked": (np.ma.array([1.0, 2.0], mask=[0, 1]), r"1 masked values.*\.filled\(value\)"),
    "a set": ({1.5}, r"set \{1\.5\}, expected an array"),
    "mixed keys": ({1: np.zeros(2), "a": np.zeros(2)}, r"keys of one type"),
    "a number": (1.5, r"float 1\.5, expected an array"),
    "a text": ("abc", r"'abc', expected an array"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_elements_that_no_tensor_can_hold_are_named_with_the_cure(name):
    leaf, said = UNFIT[name]

    def factory():
        yield {"x": leaf}

    with pytest.raises(WorkerError, match=f"(?s)delivered .*x.*{said}.*yielded here"):
        in_dataset(QueueRunner(factory, 2, **SMALL))


@pytest.mark.parametrize("name", ["ragged", "ragged list", "None", "dates", "sparse"])
def test_they_are_named_later_too(name):
    leaf, said = UNFIT[name]

    def factory():
        yield {"x": np.zeros(4)}
        yield {"x": leaf}

    with pytest.raises(WorkerError, match=f"(?s)delivered .*x.*{said}.*yielded here"):
        in_dataset(QueueRunner(factory, 2, **SMALL))


def test_an_empty_batch_and_an_open_shape_are_refused():
    with pytest.raises(WorkerError, match=r"tuple \(\), expected at least one array"):
        in_dataset(QueueRunner(lambda: iter([()]), 2, **SMALL))
    with pytest.raises(ValueError, match=r"Component: shape must be integers.*\(None, 3\)"):
        Component("x", (None, 3), np.float32)


class Pair(NamedTuple):
    image: np.ndarray
    label: np.ndarray


def test_namedtuples_come_back_as_namedtuples(consume, workers):
    def factory():
        yield Pair(np.ones((4, 2)), np.arange(4)), {"more": Pair(np.zeros(4), np.zeros(4))}

    (batch,) = consume(QueueRunner(factory, 4, 1, workers, **SMALL))
    assert sorted(batch[0].label.tolist()) == [0, 1, 2, 3] and batch[0].image.shape == (4, 2)
    assert batch[1]["more"].image.shape == (4,)


# -- arguments -----------------------------------------------------------------------------------


def test_queue_sizes_follow_the_batch_size_unless_given():
    def sizes(*arguments, **given):
        runner = QueueRunner(lambda: iter(()), *arguments, **given)
        return runner.capacity, runner.min_after_dequeue

    assert sizes() == sizes(250) == (2000, 1000)
    assert sizes(1024) == (8192, 4096)
    assert sizes(32, min_after_dequeue=1990) == (2990, 1990)
    assert sizes(32, capacity=1100) == (1100, 1000)


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 2)), (np.zeros(4), np.zeros(4)), [np.zeros(4), np.zeros(4)]]
)
def test_arrays_in_place_of_a_factory_are_refused_with_the_line_to_write(wrong):
    with pytest.raises(TypeError, match=r"from_files\(range\(len\(x\)\), lambda i: \(x\[i\], y"):
        QueueRunner(wrong)


def test_a_parameter_that_nobody_fills_is_named_with_those_that_exist():
    def factory(worker_id, n_workers, path="data"):
        yield (np.zeros(4),)

    with pytest.raises(TypeError, match=r"needs worker_id.*n_workers, epoch, start, seed"):
        QueueRunner(factory)


def test_a_runner_is_iterated_over_and_says_what_keras_takes():
    def factory():
        yield (np.arange(8),)

    runner = QueueRunner(factory, 4, **SMALL)
    with runner:
        assert sorted(int(i) for (part,) in runner for i in part) == list(range(8))
    model = tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"take its \.dataset\(\)"):
        model.fit(runner)


def test_a_masked_array_with_nothing_masked_and_text_of_any_length_go_through(consume, workers):
    def factory():
        text = np.array(["a", "longer"], dtype=np.dtypes.StringDType())
        yield np.ma.array([1.0, 2.0], mask=[0, 0]), text

    (batch,) = consume(QueueRunner(factory, 2, 1, workers, **SMALL))
    assert sorted(batch[0].tolist()) == [1, 2] and sorted(batch[1].tolist()) == [b"a", b"longer"]
