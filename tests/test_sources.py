"""What people have already: data sets of Keras, PyTorch, tf.data, files and iterables."""

import collections
import dataclasses
import itertools
import sys
import threading
import types
import warnings

import cloudpickle
import numpy as np
import pytest

import labkit
from labkit import QueueRunner, WorkerError, from_files
from labkit.engine import KINDS
from labkit.engine.trial import chosen_kind
from labkit.instruments import laws
from labkit.quiet import tf
from labkit.sources import as_factory
from tests.consumers import in_dataset, wait_until

SMALL = {"capacity": 64, "min_after_dequeue": 10}
# By value: a worker process that imported this file would import TensorFlow with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
Pair = collections.namedtuple("Pair", "x y")


class Tensor:
    """As one of PyTorch's is: no array, but it makes one."""

    def __init__(self, values):
        self.values, self.ndim = np.asarray(values), np.ndim(values)

    def numpy(self):
        return self.values


class Squares:
    """A map-style data set of `n` samples: (i, [i, i * i])."""

    def __init__(self, n, sample=lambda i: (i, np.array([i, i * i], np.float32))):
        self.n, self.sample = n, sample

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        assert type(index) is int and 0 <= index < self.n
        return self.sample(index)


class Batches(tf.keras.utils.PyDataset):
    """25 numbers in batches of 4, the last of which has 1."""

    def __init__(self):
        super().__init__()
        self.numbers = np.arange(25)

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return [self.numbers[4 * index :][:4], np.ones(4)[: 25 - 4 * index]]


class Shuffled(Batches):
    """Shuffles its samples after each epoch, so that reading on in the meantime would tell."""

    def __init__(self):
        super().__init__()
        self.ends, self.rng = 0, np.random.default_rng(0)

    def on_epoch_end(self):
        self.ends += 1
        self.rng.shuffle(self.numbers)


class Endless(tf.keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return (np.full(2, index),)


class Again:
    """An iterable of batches that begins anew each time."""

    def __init__(self, batches=lambda: ((np.arange(4) + 4 * i,) for i in range(5))):
        self.batches = batches

    def __iter__(self):
        return self.batches()


def flat(batches):
    return sorted(int(x) for batch in batches for x in np.ravel(batch[0]))


def made(factory, n_workers=1, epoch=0, **start):
    """The batches of all workers, in turn."""
    shares = [list(factory(worker, n_workers, epoch, **start)) for worker in range(n_workers)]
    longest = max(map(len, shares))
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


# -- by sample -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "n"), [("thread", 1), ("thread", 3), ("process", 2)])
def test_a_map_style_data_set_comes_once_a_pass_and_its_length_is_told(workers, n):
    runner = QueueRunner(Squares(103), 10, n, workers, **SMALL)
    with runner:
        data = runner.dataset()
        assert int(data.cardinality()) == 11
        for _ in range(2):
            batches = [(i.numpy(), pairs.numpy()) for i, pairs in data]
            assert flat(batches) == list(range(103))
            assert sorted(len(i) for i, _ in batches) == [3] + 10 * [10]
            assert all(np.array_equal(pairs, np.stack([i, i * i], 1)) for i, pairs in batches)


def test_the_order_is_new_in_each_pass_and_the_same_for_all_workers():
    factory = as_factory(Squares(50), 8, seed=1)
    first, second = (flat_in_order(made(factory, 1, epoch)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != sorted(first)
    assert first == flat_in_order(made(factory, 3, 0)) == flat_in_order(made(factory, 9, 0))
    assert first == flat_in_order(made(as_factory(Squares(50), 8, seed=1)))
    assert first != flat_in_order(made(as_factory(Squares(50), 8, seed=2)))
    assert first != flat_in_order(made(as_factory(Squares(50), 8)))
    assert first[16:] == flat_in_order(made(factory, 3, 0, start=2))


def flat_in_order(batches):
    return [int(x) for batch in batches for x in batch[0]]


@pytest.mark.parametrize(
    ("sample", "first"),
    [
        (lambda i: i, np.array([0, 1])),
        (lambda i: float(i), np.array([0.0, 1.0])),
        (lambda i: np.full(3, i), np.array([[0, 0, 0], [1, 1, 1]])),
        (lambda i: Tensor([i]), np.array([[0], [1]])),
        (lambda i: "a\0" * i, np.array(["", "a\0"], object)),
        (lambda i: {"x": i, "y": {"z": [i, 2]}}, {"x": [0, 1], "y": {"z": [[0, 2], [1, 2]]}}),
        (lambda i: [np.zeros(2), i], (np.zeros((2, 2)), [0, 1])),
        (lambda i: [Tensor([i]), (i,)], ([[0], [1]], ([0, 1],))),
        (lambda i: Pair(i, Tensor(i)), Pair([0, 1], [0, 1])),
    ],
)
def test_samples_of_any_structure_are_collated(sample, first):
    def check(part, expected):
        if isinstance(expected, dict):
            assert part.keys() == expected.keys()
            part, expected = part.values(), expected.values()
        elif isinstance(expected, tuple):
            assert type(part) is type(expected)
        else:
            assert isinstance(part, np.ndarray) and np.array_equal(part, expected)
            return
        for inner, its in zip(part, expected, strict=True):
            check(inner, its)

    (batch,) = from_files([0, 1], sample, shuffle=False)(0, 1, 0)
    check(batch, first)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (np.zeros(2), r"sample 5 as an array of shape \(2,\), expected .*\(3,\) as of sample 0"),
        (None, "sample 5 as None"),
        ("text", "sample 5 as text, expected an array"),
        ({"x": 1}, r"sample 5 as a dict with the keys \['x'\], expected an array"),
        ((1, 2, 3), "sample 5 as a tuple of 3"),
    ],
)
def test_a_sample_unlike_the_others_is_named(odd, words):
    def load(index):
        return odd if index == 5 else np.zeros(3)

    with pytest.raises(WorkerError, match=words):
        in_dataset(QueueRunner(from_files(range(9), load, shuffle=False), 4, **SMALL))
    if not isinstance(odd, dict):
        both = from_files(range(9), lambda i: {"x": (load(i), 0)}, shuffle=False)
        with pytest.raises(WorkerError, match="'x.0' of " + words):
            in_dataset(QueueRunner(both, 4, **SMALL))


def test_what_a_data_set_raises_names_the_sample_and_its_line():
    def load(path):
        raise OSError("damaged")

    with pytest.raises(WorkerError, match=r"raised OSError: damaged") as caught:
        in_dataset(QueueRunner(from_files(["a.png"], load), 4, **SMALL))
    text = str(caught.value)
    assert "in load" in text and "It came of sample 'a.png'" in text and text.count("File") == 1


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_each_file_is_loaded_once_a_pass_and_no_worker_imports_tensorflow(tmp_path, workers):
    for i in range(11):
        np.save(tmp_path / f"{i}.npy", np.full(2, i))

    def load(path):
        in_process = threading.current_thread() is threading.main_thread()
        assert not in_process or "tensorflow" not in sys.modules
        return np.load(path)

    files = from_files(tmp_path.glob("*.npy"), load, batch_size=3)
    with QueueRunner(files, 4, 1, workers, **SMALL) as runner:
        data = runner.dataset()
        # The number of samples is known, though 4 are no whole number of the source's batches.
        assert len(files) == 4 and int(data.cardinality()) == 3
        assert sorted(int(x) for batch in data for x in batch[:, 0]) == list(range(11))


def test_from_files_keeps_the_order_if_asked_and_refuses_what_is_none():
    in_order = from_files(iter("abc"), str.upper, 2, shuffle=False)
    assert [batch.tolist() for batch in in_order(0, 1, 5)] == [["A", "B"], ["C"]]
    with pytest.raises(TypeError, match=r"single path 'folder'.*glob"):
        from_files("folder", np.load)
    with pytest.raises(TypeError, match=r"callable as load\(path\), got None"):
        from_files(["a"], None)
    with pytest.raises(ValueError, match=r"at least one path.*got \[\]"):
        from_files([], np.load)
    with pytest.raises(ValueError, match=r"batch_size.*0"):
        from_files(["a"], np.load, 0)


# -- Keras's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_a_pydataset_that_shuffles_itself_comes_once_a_pass_whatever_was_given_up(n):
    source = Shuffled()
    with QueueRunner(source, 4, n, capacity=8, min_after_dequeue=0) as runner:
        data = runner.dataset()
        for passes in range(6):
            assert flat([x.numpy() for x in batch] for batch in data) == list(range(25))
            next(iter(data))  # a pass that is left early
            assert 2 * passes + 1 <= source.ends <= 2 * passes + 2


def test_batches_of_a_pydataset_come_in_another_order_each_pass():
    factory = as_factory(Batches(), seed=0)
    first, second = (made(factory, 2, epoch) for epoch in (0, 1))
    assert flat(first) == flat(second) == list(range(25))
    assert flat_in_order(first) != flat_in_order(second) != list(range(25))
    assert flat_in_order(made(factory, 1, start=2)) == flat_in_order(made(factory, 1)[2:])


def test_fit_takes_a_pydataset_whose_batches_are_of_different_sizes():
    class Uneven(Batches):
        def __getitem__(self, index):
            return np.ones((index + 1, 1)), np.ones((index + 1, 1))

    model = tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)])
    model.compile(tf.keras.optimizers.SGD(0.0), "mse")
    steps = []
    count = tf.keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: steps.append(step)
    )
    with QueueRunner(Uneven(), 4, 2, **SMALL) as runner:
        model.fit(runner.dataset(), epochs=2, verbose=0, shuffle=False, callbacks=[count])
    assert steps == [*range(7)] * 2


def test_an_epoch_ends_once_after_every_worker_is_done_with_it():
    source, said = Shuffled(), []
    source.on_epoch_begin = lambda: said.append("begin")
    factory = as_factory(source)
    made(factory, 3, 0)
    assert (source.ends, len(said)) == (1, 1)
    shares = [factory(worker, 3, 1) for worker in range(3)]
    assert all(next(share) for share in shares)
    assert (source.ends, len(said)) == (1, 2)
    # Nobody has come to the end: the first who goes on ends it, and the others have no more.
    next(factory(0, 3, 2))
    assert (source.ends, len(said)) == (2, 3)
    assert list(shares[1]) == list(shares[2]) == []
    assert list(factory(1, 3, 1)) == []  # one that comes late to what is over


def test_who_ends_a_pass_that_was_given_up_has_not_ended_the_next():
    source = Shuffled()
    factory = as_factory(source)
    late = factory(0, 2, 0)
    assert len(list(itertools.islice(late, 4))) == 4  # all that it has of the 7
    other = factory(1, 2, 1)
    batches = [next(other)]
    assert list(late) == [] and source.ends == 1
    batches += [*other, *factory(0, 2, 1)]
    assert flat(batches) == list(range(25)) and source.ends == 2


def test_no_epoch_ends_while_a_batch_is_read_for_it():
    may_go_on, said = threading.Event(), []

    class Slow(Batches):
        def __getitem__(self, index):
            said.append("read")
            assert may_go_on.wait(30)
            said.append("done")
            return super().__getitem__(index)

        def on_epoch_end(self):
            said.append("end")

    factory = as_factory(Slow())
    readers = [
        threading.Thread(target=next, args=(factory(worker, 2, epoch),))
        for worker, epoch in ((0, 0), (1, 1))
    ]
    readers[0].start()
    wait_until(lambda: said)
    readers[1].start()
    wait_until(lambda: not factory.passes._open)
    may_go_on.set()
    for reader in readers:
        reader.join(30)
    assert said == ["read", "done", "end", "read", "done"]


@pytest.mark.filterwarnings("ignore:(?s).*(started again|Going on with)")
@pytest.mark.parametrize("on_error", ["restart", "continue"])
def test_whoever_is_lost_in_a_read_does_not_hold_the_next_epoch_back(on_error):
    may_go_on, stood = threading.Event(), []

    class Stands(Shuffled):
        def __getitem__(self, index):
            if index == 3 and not stood:
                stood.append(index)
                may_go_on.wait(30)
            return super().__getitem__(index)

    source = Stands()
    runner = QueueRunner(source, 4, 2, on_error=on_error, timeout=0.6, **SMALL)
    with runner:
        passes = [flat(runner.dataset()) for _ in range(2)]
        assert source.ends >= 1
        may_go_on.set()
        passes.append(flat(runner.dataset()))
    if on_error == "restart":
        assert passes == [list(range(25))] * 3
    else:
        assert 0 < len(passes[1]) < 25


def test_each_run_counts_the_epochs_for_itself():
    source = Shuffled()
    factory = as_factory(source)
    for _ in range(2):
        assert flat(in_dataset(QueueRunner(factory, 4, 2, **SMALL))) == list(range(25))
    assert source.ends == 2


def test_an_endless_pydataset_goes_on_where_it_was():
    factory = as_factory(Endless())
    for epoch, expected in ((0, [0, 2, 4]), (1, [6, 8, 10])):
        assert flat_in_order(itertools.islice(factory(0, 2, epoch), 3))[::2] == expected
        assert flat_in_order(itertools.islice(factory(1, 2, epoch), 1))[::2] == [2 * epoch + 1]


def test_a_pydataset_that_changes_between_epochs_is_not_copied_into_processes():
    for kind in ("process", "ray"):
        said = rf"workers='{kind}' needs.*got Shuffled: its on_epoch_end would.*'thread'"
        with pytest.raises(ValueError, match=said):
            QueueRunner(Shuffled(), workers=kind)
    # By way of a factory, which is asked only as it travels.
    factory = as_factory(Shuffled())
    runner = QueueRunner(
        lambda worker, n_workers, epoch: factory(worker, n_workers, epoch), 4, 1, "process"
    )
    with pytest.raises(TypeError, match=r"its on_epoch_end would change"), runner:
        runner.dataset()


@pytest.mark.slow
def test_one_that_does_not_is():
    # Its worker imports Keras with it, which takes long on a busy machine.
    runner = QueueRunner(Batches(), 4, 1, "process", timeout=None, **SMALL)
    assert flat(in_dataset(runner)) == list(range(25))


# -- what cannot be split ------------------------------------------------------------------------


def test_a_tf_dataset_is_run_as_it_is_by_one_worker(recwarn):
    data = tf.data.Dataset.range(25).map(lambda i: {"i": i, "text": tf.strings.as_string(i)})
    with QueueRunner(data.batch(4), 4, **SMALL) as runner:
        for _ in range(2):
            batches = [(b["i"].numpy(), b["text"].numpy()) for b in runner.dataset()]
            assert flat(batches) == list(range(25))
            assert all(str(i).encode() == t for b in batches for i, t in zip(*b, strict=True))
    assert not [w for w in recwarn if "labkit" in str(w.message)]
    with pytest.raises(ValueError, match=r"TensorFlow's, and stays in its process.*'thread'"):
        QueueRunner(data, workers="process")


@pytest.mark.parametrize("n", ["auto", 3])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        (tf.data.Dataset.range(20).batch(4).map(lambda i: (i,)), r"dataset\.shard"),
        (Again(), r"__len__ and __getitem__"),
    ],
)
def test_what_cannot_be_split_is_run_by_one_and_the_cure_told(source, words, n):
    with pytest.warns(RuntimeWarning, match=rf"n_workers={n!r} is taken for 1\. .*{words}"):
        runner = QueueRunner(source, 4, n, **SMALL)
    assert runner.n_workers == 1 and runner.iterator is source
    assert flat(in_dataset(runner)) == list(range(20))


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_an_iterable_begins_anew_in_each_pass(workers):
    source = Again()
    with QueueRunner(source, 4, 1, workers, **SMALL) as runner, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert flat([x.numpy() for x in batch] for batch in runner.dataset()) == list(range(20))
    assert [batch[0][0] for batch in as_factory(source)(0, 1, 0, start=3)] == [12, 16]


def test_a_loader_of_tensors_in_lists_gives_tuples_of_arrays():
    """As PyTorch's DataLoader."""
    loader = Again(lambda: ([Tensor([[1.0], [2.0]]), Tensor([i, i])] for i in range(3)))
    batches = in_dataset(QueueRunner(loader, 2, **SMALL))
    assert sorted(int(y) for _, labels in batches for y in labels) == [0, 0, 1, 1, 2, 2]
    assert batches[0][0].shape == (2, 1)


# -- what is no source ---------------------------------------------------------------------------


class Table:
    """As a pandas DataFrame."""

    ndim = 2

    @property
    def iloc(self):
        return [types.SimpleNamespace(to_dict=lambda i=i: {"x": i, "y": -i}) for i in range(6)]

    def __len__(self):
        return 6


X = np.arange(6)
DATA = {"x": X, "y": -X}


@pytest.mark.parametrize(
    ("source", "line", "names"),
    [
        (X, "labkit.from_files(range(len(x)), lambda i: (x[i], y[i]))", {"x": X, "y": -X}),
        ((X, -X), "labkit.from_files(range(len(x)), lambda i: (x[i], y[i]))", {"x": X, "y": -X}),
        (
            DATA,
            "labkit.from_files(range(len(data['x'])), "
            "lambda i: {name: column[i] for name, column in data.items()})",
            {"data": DATA},
        ),
        (
            Table(),
            "labkit.from_files(range(len(table)), lambda i: table.iloc[i].to_dict())",
            {"table": Table()},
        ),
        (list(X), "labkit.from_files(data, lambda sample: sample)", {"data": list(X)}),
        (
            [*DATA.values()] * 3,
            "lambda: iter(data)",
            {"data": [(part,) for part in np.split(X, 3)]},
        ),
        ({1, 2}, "labkit.from_files(data, lambda sample: sample)", {"data": set(range(6))}),
        (["a", "b"], "labkit.from_files(paths, load)", {"paths": list("012345"), "load": int}),
        (
            "*.png",
            "labkit.from_files(sorted(glob.glob(path)), load)",
            {"path": "*.png", "load": int, "glob": types.SimpleNamespace(glob=lambda _: "012345")},
        ),
    ],
)
def test_what_lies_in_memory_is_refused_with_a_line_that_works(source, line, names):
    with pytest.raises(TypeError, match="iterator must be a function") as caught:
        QueueRunner(source)
    assert line in str(caught.value)
    source = eval(line, {"labkit": labkit, **names})
    firsts = [tf.nest.flatten(batch)[0] for batch in in_dataset(QueueRunner(source, 2, **SMALL))]
    assert sorted(np.concatenate(firsts).tolist()) == list(range(6))


def test_iterators_and_objects_without_a_length_are_refused_as_ever():
    class NoLength:
        def __getitem__(self, index):
            return index

    for source in (iter([]), (i for i in ()), NoLength(), None):
        with pytest.raises(TypeError, match="without calling it"):
            QueueRunner(source)


def test_pytorchs_iterable_of_samples_is_told_to_be_loaded(monkeypatch):
    class IterableDataset(Again):
        pass

    data = types.SimpleNamespace(IterableDataset=IterableDataset)
    monkeypatch.setitem(
        sys.modules, "torch", types.SimpleNamespace(utils=types.SimpleNamespace(data=data))
    )
    with pytest.raises(TypeError, match=r"torch\.utils\.data\.DataLoader\(dataset"):
        QueueRunner(IterableDataset())


# -- the instruments -----------------------------------------------------------------------------


def test_diagnose_takes_data_sets_and_says_what_would_make_one_splittable(monkeypatch):
    few = dataclasses.replace(KINDS["thread"], limit=lambda: 2)
    monkeypatch.setitem(KINDS, "thread", few)
    monkeypatch.setattr("labkit.instruments.diagnosis._ROUNDS", 1)
    monkeypatch.setattr(laws, "_A_CORE", 1)
    quick = {"seconds": 0.01, "progress": False, "workers": "thread"}
    one = labkit.diagnose(Again(), 0.001, **quick)
    assert one.nature == "cannot be split among workers" and [row.n for row in one.rows] == [1]
    assert "give it __len__ and __getitem__" in one.verdict
    split = labkit.diagnose(Squares(50), 0.001, batch_size=16, **quick)
    assert split.batch_size == 16 and len(split.rows) > 1 and "__len__" not in split.verdict
    with split.runner(min_after_dequeue=0, n_workers=2) as runner:
        assert flat([x.numpy() for x in batch] for batch in runner.dataset()) == list(range(50))


@pytest.mark.parametrize("source", [Squares(20), Again()])
def test_audit_takes_data_sets(source):
    audit = labkit.audit(source, samples=20, batch_size=8, n_workers=3)
    assert (audit.delivered, audit.repeated, audit.missed) == (20, 0, 0)


class Booked:
    """A factory of the user's, with names of its own."""

    stays, whole = 3, "house"

    def __call__(self):
        return iter([(np.zeros(4),)] * 3)


def test_what_a_factory_of_the_users_calls_its_own_means_nothing_to_labkit():
    for workers in KINDS:
        QueueRunner(Booked(), 4, 1, workers)
    assert chosen_kind(Booked()).why not in ("3", "house")
