"""What people have already, as an iterator factory: data sets of Keras, PyTorch, tf.data, files.

What has an index is split among the workers by it, in an order that all of them know and that is
new in each pass; what has none is run as it is, by one worker. No TensorFlow here: whoever has one
of its data sets has imported it.
"""

import itertools
import os
import secrets
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any

import numpy as np

from labkit.checks import expect, is_integer
from labkit.collate import Loaded, plain, stacked

_HOOKS = ("on_epoch_begin", "on_epoch_end")
_UNSPLIT = (
    "It cannot be split among workers, so one runs it as it is. To change that, give it __len__ "
    "and __getitem__, one sample for an index; or write a factory with the parameters worker and "
    "n_workers that yields a share."
)
_UNSPLIT_TF = (
    "A tf.data.Dataset is not split among workers, so one thread runs it as it is. To change that, "
    "write a factory with the parameters worker and n_workers that shards it before it shuffles: "
    "dataset.shard(n_workers, worker).shuffle(...).batch(...)."
)


def from_files(
    paths: Iterable[Any],
    load: Callable[[Any], Any],
    batch_size: int = 32,
    shuffle: bool = True,
    seed: int | None = None,
) -> "BySample":
    """A source for `QueueRunner` and `diagnose`: batches of what `load` makes of each path.

    Every path is loaded once a pass, by one of the workers; the last batch may be smaller. Where
    `load` raises, `QueueRunner(on_error="skip")` leaves out the whole batch.

    Args:
        paths: of files; or whatever else `load` takes, as `range(len(x))`.
        load: called as `load(path)`, in several threads or processes at a time; returns one
            sample: a tuple or dict (also nested) of arrays, numbers or texts, or one of these,
            without a batch axis and of the same shapes every time. Tensors become arrays.
        batch_size: samples per batch. Default 32.
        shuffle: another order in each pass; False, here or of the runner, keeps that of `paths`.
        seed: of that order. Default: the runner's, if it has one, or else another one each time.

    Returns:
        a source whose `len()` is the number of batches in a pass.

    Raises:
        TypeError: paths is a single path, or load is not callable.
        ValueError: there are no paths, or batch_size is not an integer >= 1.
    """
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise TypeError(
            f"from_files: paths must be a list of paths, got the single path {paths!r}. For the "
            "files of a folder: sorted(pathlib.Path(folder).glob('*'))."
        )
    if not callable(load):
        raise TypeError(
            f"from_files: load must be callable as load(path), got {load!r}. Let it return one "
            "sample."
        )
    what = "from_files: batch_size must be an integer >= 1"
    expect(is_integer(batch_size, 1), what, batch_size)
    names = list(paths)
    what = "from_files: expected at least one path; check the folder and the pattern they come from"
    expect(bool(names), what, names)
    return BySample(Loaded(names, load), batch_size, seed, shuffle, names)


def as_factory(
    source: Any, batch_size: int = 32, seed: int | None = None, shuffle: bool = True
) -> Any:
    """An iterator factory with the parameters worker, n_workers, epoch and start over `source`.

    A factory comes back as it is, and so does what is neither, which the engine refuses. `start`
    is how many of the pass's first batches, of all workers together, are left out.

    Args:
        source: a Keras `PyDataset` (`Sequence`), by batch, each pass in another order as in `fit`;
            any other object with `__len__` and `__getitem__`, by sample; a `tf.data.Dataset`; or
            an iterable of batches that can be iterated over anew.
        batch_size: samples that are collated to a batch, where the source is read by sample.
        seed: of the order; None: another one each time.
        shuffle: False takes what has an index in the order of that.

    Raises:
        TypeError: the source is a path, lies in memory as a list, dict, array or table, or is one
            of PyTorch's that yields samples; with the line to write instead.
    """
    for base in (_class("keras", "utils.PyDataset"), _class("tf_keras", "utils.Sequence")):
        if base is not None and isinstance(source, base):
            own, kept = ([getattr(c, name, None) for name in _HOOKS] for c in (type(source), base))
            hooks = [name for name, a, b in zip(_HOOKS, own, kept, strict=True) if a is not b]
            return ByBatch(source, _seed_of(seed) if shuffle else None, hooks)
    if callable(source):
        return source
    if _is_a(source, "tensorflow", "data.Dataset"):
        return Whole(source, "it is TensorFlow's, and stays in its process", _UNSPLIT_TF)
    _refuse_what_lies_in_memory(source)
    if hasattr(source, "__getitem__"):
        with suppress(TypeError, NotImplementedError):  # some have no length after all
            return BySample(source, batch_size, seed, shuffle, range(len(source)))
    again = hasattr(type(source), "__iter__") and not hasattr(type(source), "__next__")
    return Whole(source, "", _UNSPLIT) if again else source


def taken_in(given: dict[str, Any]) -> dict[str, Any]:
    """QueueRunner's arguments with a factory as `iterator`, and with what its source tells."""
    known = given["order"] == "fixed" or given["shard"] is not None
    seed = given["seed"] or 0 if known else given["seed"]
    factory = as_factory(given["iterator"], given["batch_size"], seed, bool(given["shuffle"]))
    if isinstance(factory, BySample):
        factory = factory.ordered(seed, bool(given["shuffle"]))
    taken = {**given, "iterator": factory}
    if isinstance(factory, BySample) and given["samples"] is None:
        taken["samples"] = len(factory.source) or None
    instead = whole(factory)
    if instead and (given["n_workers"] == "auto" or is_integer(given["n_workers"], 2)):
        taken["n_workers"] = 1
        text = f"QueueRunner: n_workers={given['n_workers']!r} is taken for 1. {instead}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return taken


def whole(factory: Any) -> str:
    """Of a source that only one worker can run, what would change that; "" for all else."""
    return factory._labkit_whole if isinstance(factory, _Source) else ""


class _Source:
    """A source as an iterator factory.

    Attributes:
        source: the user's object.
        _labkit_stays: why it cannot go to another process; "" if it can.
        _labkit_whole: what would let it be split; "" if it is.
    """

    _labkit_whole = ""

    def __init__(self, source: Any, stays: str = "") -> None:
        self.source, self._labkit_stays = source, stays

    @property
    def _labkit_wraps(self) -> Any:
        return self.source  # which is what errors should speak of

    def __getstate__(self) -> dict[str, Any]:
        if self._labkit_stays:
            raise TypeError(self._labkit_stays)
        return self.__dict__


class Whole(_Source):
    """An iterable of batches, from its beginning in each pass, by worker 0; others have none."""

    _labkit_reads_up_to = True

    def __init__(self, source: Any, stays: str, whole: str) -> None:
        super().__init__(source, stays)
        self._labkit_whole = whole

    def __call__(self, worker: int, n_workers: int, epoch: int, start: int = 0) -> Iterator[Any]:
        if worker:
            return iter(())
        batches = getattr(self.source, "as_numpy_iterator", self.source.__iter__)()
        return map(plain, itertools.islice(batches, start, None))


class BySample(_Source):
    """A source with a length and an index, of one sample: each sample once a pass."""

    def __init__(
        self, source: Any, batch_size: int, seed: int | None, shuffle: bool, names: Sequence[Any]
    ) -> None:
        super().__init__(source)
        self.batch_size, self.shuffle, self.names = batch_size, shuffle, names
        self._given, self.seed = seed, _seed_of(seed)

    def ordered(self, seed: int | None, shuffle: bool) -> "BySample":
        """The same with a runner's seed, if it has none of its own, and shuffled if both want."""
        seed = seed if self._given is None else self._given
        return BySample(self.source, self.batch_size, seed, self.shuffle and shuffle, self.names)

    _labkit_rows = property(attrgetter("batch_size"))

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __call__(self, worker: int, n_workers: int, epoch: int, start: int = 0) -> Iterator[Any]:
        n = len(self.source)
        order = _order(self.seed, epoch, n) if self.shuffle else np.arange(n)
        return map(partial(self._batch, order), range(start + worker, len(self), n_workers))

    def _batch(self, order: np.ndarray, number: int) -> Any:
        part = order[number * self.batch_size :][: self.batch_size].tolist()
        return stacked([self._sample(i) for i in part], [self.names[i] for i in part])

    def _sample(self, index: int) -> Any:
        try:
            return plain(self.source[index])
        except Exception as error:
            error.add_note(f"It came of sample {self.names[index]!r}.")
            raise


class ByBatch(_Source):
    """A Keras `PyDataset`, whose index is a batch's; `hooks` are those of `_HOOKS` that it has.

    Each batch comes once a pass; of one without an end, each worker goes on where it was. Batches
    may be of any sizes, so how many samples there are is not known. Keras's own `workers`,
    `use_multiprocessing` and `max_queue_size` count for nothing here.
    """

    def __init__(self, source: Any, seed: int | None, hooks: list[str]) -> None:
        # Copies that shuffle, each its own way, would make samples come twice, or never.
        why = f"its {' and '.join(hooks)} would change each process's copy in its own way"
        cure = "; leave it away if all it does is shuffle, for labkit takes batches in a new order"
        super().__init__(source, f"{why}{cure} each pass" if hooks else "")
        self.seed, self.hooks, self.passes = seed, hooks, _Passes(source)
        self.at: dict[int, int] = {}

    def _labkit_fresh(self) -> "ByBatch":
        return ByBatch(self.source, self.seed, self.hooks)

    def __call__(self, worker: int, n_workers: int, epoch: int, start: int = 0) -> Iterator[Any]:
        return map(plain, self._batches(worker, n_workers, epoch, start))

    def _batches(self, worker: int, n_workers: int, epoch: int, start: int) -> Iterator[Any]:
        self.passes.begin(epoch)
        me = object()
        for index in self._indices(worker, n_workers, epoch, start):
            if not self.passes.enter(epoch, worker, me):
                return  # the pass was given up
            yield self._read(index, worker, me)
        self.passes.end(worker, n_workers, epoch)

    def _indices(self, worker: int, n_workers: int, epoch: int, start: int) -> Iterator[int]:
        n = _batches_of(self.source)
        if n is not None:
            order = np.arange(n) if self.seed is None else _order(self.seed, epoch, n)
            yield from order[start + worker :: n_workers].tolist()
            return
        first = start + worker if start else self.at.get(worker, worker)
        for index in itertools.count(first, n_workers):
            self.at[worker] = index + n_workers
            yield index

    def _read(self, index: int, worker: int, me: object) -> Any:
        try:
            return self.source[index]
        finally:
            self.passes.leave(worker, me)

    def _labkit_late(self, worker: int) -> None:
        self.passes.leave(worker)


class _Passes:
    """Tells a `PyDataset` where a pass begins and ends, once, while no thread reads from it.

    Threads come to the next pass one by one, and may still be reading for one that was given up.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._gate = threading.Lock()  # held by whoever opens or closes a pass
        self._changed = threading.Condition()
        self._newest, self._open = -1, False
        self._reading: dict[int, object] = {}  # which iterator of a worker, which may be its second
        self._ended: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Passes, (self._source,)

    def begin(self, epoch: int) -> None:
        """Opens the pass unless it was opened, or a later one, and closes the one before."""
        with self._gate:
            if epoch <= self._newest:
                return
            with self._changed:
                left_open, self._open = self._open, False
                self._changed.wait_for(lambda: not self._reading)
            self._newest, self._ended = epoch, set()
            try:
                if left_open:
                    self._source.on_epoch_end()
                if hasattr(self._source, "on_epoch_begin"):  # Keras's older versions have none
                    self._source.on_epoch_begin()
            finally:
                self._open = True  # to those workers that go on without this one

    def enter(self, epoch: int, worker: int, reader: object) -> bool:
        """Whether a batch may be read for this pass; `leave` says that it was."""
        with self._changed:
            if wanted := self._open and epoch == self._newest:
                self._reading[worker] = reader
            return wanted

    def leave(self, worker: int, reader: object = None) -> None:
        """Nobody waits any more for this reader; or for any of the worker, which is lost."""
        with self._changed:
            if reader in (None, self._reading.get(worker)):
                self._reading.pop(worker, None)
            self._changed.notify_all()

    def end(self, worker: int, n_workers: int, epoch: int) -> None:
        """The last worker that comes to its end closes the pass."""
        with self._gate:
            if not self._open or epoch != self._newest:
                return
            self._ended.add(worker)
            if len(self._ended) == n_workers:
                self._open = False
                self._source.on_epoch_end()


# ---------------------------------------------------------------- what a source is


def _class(module: str, path: str) -> Any:
    """A class of a module; None where nobody has imported that."""
    with suppress(AttributeError, KeyError):
        return attrgetter(path)(sys.modules[module])
    return None


def _is_a(source: Any, module: str, path: str) -> bool:
    kind = _class(module, path)
    return kind is not None and isinstance(source, kind)


def _batches_of(source: Any) -> int | None:
    """The length of a `PyDataset`; None of one that has no end."""
    try:
        n = source.num_batches if hasattr(source, "num_batches") else len(source)
    except NotImplementedError:
        return None
    return None if n is None else int(n)


def _refuse_what_lies_in_memory(source: Any) -> None:
    """Raises TypeError with the line that makes a source of it."""
    parts = [*itertools.islice(source, 4)] if isinstance(source, (list, tuple)) else []
    arrays = [part for part in parts if hasattr(part, "ndim")]
    if isinstance(source, (str, bytes, os.PathLike)):
        line = "labkit.from_files(sorted(glob.glob(path)), load), where load(path) makes a sample"
    elif parts and isinstance(parts[0], (str, os.PathLike)):
        line = "labkit.from_files(paths, load), where load(path) makes a sample"
    elif hasattr(source, "iloc"):
        line = "labkit.from_files(range(len(table)), lambda i: table.iloc[i].to_dict())"
    elif isinstance(source, dict):
        line = (
            f"labkit.from_files(range(len(data[{next(iter(source), 'x')!r}])), lambda i: "
            "{name: column[i] for name, column in data.items()})"
        )
    elif hasattr(source, "ndim") or (arrays and len(parts) < 4):
        line = "labkit.from_files(range(len(x)), lambda i: (x[i], y[i])), of arrays x and y"
    elif isinstance(source, (list, tuple, set, frozenset, deque)):
        line = (
            "labkit.from_files(data, lambda sample: sample), if it has samples in it; or "
            "lambda: iter(data), if it has batches"
        )
    elif _is_a(source, "torch", "utils.data.IterableDataset"):
        line = "torch.utils.data.DataLoader(dataset, batch_size=32), since it yields samples"
    else:
        return
    raise TypeError(
        "labkit: iterator must be a function that returns a new iterator, or a data set with an "
        f"index or of batches, got {type(source).__name__}. Write: {line}."
    )


def _seed_of(seed: Any) -> int:
    # What is no number is refused where it is used.
    return int(seed) % (1 << 64) if is_integer(seed) else secrets.randbits(64)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    # Cached, because many threads that each shuffle under one lock start late.
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order
