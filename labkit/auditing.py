"""Does every sample come once an epoch? Watched at the queue's end, where training takes them.

A worker process imports this file with the factory: no TensorFlow at the top.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from labkit.engine.produce import IteratorFactory

_MOST_SAMPLES = 5_000_000
_TIMEOUT = 60.0  # seconds for a batch
_SILENCE = _TIMEOUT + 1.0  # a worker that is silent for longer has not failed, but ended
_SHARE_IT = (
    "Give the factory the parameters (worker, n_workers) and let each worker yield its own part, "
    "such as range(worker, size, n_workers)."
)
_SEED_IT = (
    "If they draw at random, give the factory a parameter `worker` and seed with "
    "np.random.default_rng([seed, worker])."
)
_TAG_IT = (
    "Samples were told apart by content, and those that are changed at random (noise, "
    "augmentation) all look different: only tag= can tell whether one came twice."
)


def is_count(value: Any) -> bool:
    """Whether it is an integer >= 1, of Python's or NumPy's; True is not."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and int(value) >= 1


def expect(condition: bool, what: str, got: Any) -> None:
    """Raises ValueError unless the condition holds: "diagnose: ... must be ..., got ...\""""
    if not condition:
        raise ValueError(f"{what}, got {got!r}.")


@dataclass
class Audit:
    """What an audit saw, in samples over all epochs.

    Attributes:
        expected: size of the data set times epochs; None if it is not known.
        delivered: samples that came out of the queue.
        repeated: deliveries of a sample beyond its first in an epoch. At least so many where
            contents are changed at random: an epoch cannot have more different samples than the
            data set.
        missed: samples of the data set that an epoch did not deliver; None if unknown, as it is
            where contents are changed at random.
        mixing: spread of a batch's positions in the data set over that of a perfectly mixed
            batch: 1 is perfect, 0 is all neighbours; None if positions are unknown.
        verdict: what that means, in words, with the cure.
        told_by: what samples were told apart by: "content" or "tag".
        endless: whether the iterator was taken for endless, see `audit`.
    """

    expected: int | None
    delivered: int
    repeated: int
    missed: int | None
    mixing: float | None
    verdict: str = ""
    told_by: Literal["content", "tag"] = "content"
    endless: bool = False

    def __str__(self) -> str:
        of = "" if self.expected is None else f" of {self.expected:,} expected"
        give = "samples=" if self.expected is None else "tag="
        missed = f"unknown (give {give})" if self.missed is None else f"{self.missed:,}"
        mixing = "unknown" if self.mixing is None else f"{self.mixing:.2f} of a perfect mix"
        return (
            f"{self.delivered:,} samples delivered{of}: {self.repeated:,} repeated, "
            f"{missed} missed; batches mixed to {mixing}.\n{self.verdict}"
        )


def audit(
    iterator: Callable[..., Iterable[Any]],
    epochs: int = 1,
    workers: Literal["thread", "process"] = "thread",
    samples: int | None = None,
    batch_size: int = 32,
    tag: Callable[[Any], Any] | None = None,
    n_workers: int = 4,
) -> Audit:
    """Counts which samples of an epoch come twice and which not at all, through a `QueueRunner`.

    A finite iterator is read to its end, and each of its passes is an epoch. It is taken for
    endless if no end has come within `n_workers * samples` samples and one batch more, since that
    is as many as workers deliver that do not share the data set out. An epoch of an endless
    iterator is the next `samples / n_workers` samples of each worker's own stream, as if all
    workers were equally fast: so the counts do not depend on who started first. In training, the
    queue mixes such an epoch with its neighbours.

    Args:
        iterator: an iterator factory. Methods of `MnistDataGenerator` run on tagged copies of its
            data, so their samples are told apart exactly.
        epochs: how many to watch.
        workers: "thread" or "process". A number, as this was before, still counts as `n_workers`,
            with a DeprecationWarning.
        samples: size of the data set; needed for endless iterators and to count misses. Default:
            not known, but for methods of `MnistDataGenerator`.
        batch_size: samples per batch.
        tag: takes a batch, as training gets it, and returns an integer for each sample, its
            position in the data set. Default: samples are told apart by their content, which
            cannot work for samples that are changed at random.
        n_workers: how many workers.

    Raises:
        ValueError: an argument is not as above, `tag` returns something else, or the iterator is
            endless and samples is not given.
        TypeError: the iterator is no factory, or cannot be sent to a process.
        WorkerError: the iterator failed; its traceback is in the message.
    """
    if isinstance(workers, (int, np.integer)) and not isinstance(workers, bool):
        expect(n_workers == 4, "audit: workers must be 'thread' or 'process'", workers)
        warnings.warn(
            f"audit: workers is the kind of worker now. Write audit(..., n_workers={workers}) in "
            f"place of workers={workers}.",
            DeprecationWarning,
            stacklevel=2,
        )
        workers, n_workers = "thread", int(workers)
    expect(
        isinstance(workers, str) and workers in ("thread", "process"),
        "audit: workers must be 'thread' or 'process'",
        workers,
    )
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("n_workers", n_workers)):
        expect(is_count(value), f"audit: {name} must be an integer >= 1", value)
    expect(
        samples is None or is_count(samples),
        "audit: samples must be None or an integer >= 1",
        samples,
    )
    expect(tag is None or callable(tag), "audit: tag must be None or callable as tag(batch)", tag)
    shares = IteratorFactory(iterator, n_workers).shards
    if tag is None:
        iterator, tag, samples = _tagged_mnist(iterator, samples)
    seen = _watch(iterator, epochs, workers, n_workers, samples, batch_size, tag)
    return _judge(seen, samples, n_workers, shares, batch_size, tag is not None)


def _tagged_mnist(
    iterator: Callable[..., Iterable[Any]], samples: int | None
) -> tuple[Callable[..., Iterable[Any]], Callable[[Any], Any] | None, int | None]:
    """The method on a copy whose images spell their number, without the work; else as given."""
    from labkit.data import Mnist, MnistDataGenerator

    owner = getattr(iterator, "__self__", None)
    if type(owner) is not MnistDataGenerator:
        return iterator, None, samples

    def spelled(count: int) -> np.ndarray:
        return np.arange(count, dtype="<u4").view(np.uint8).reshape(count, 2, 2)

    def tag(batch: Any) -> np.ndarray:
        pixels = np.rint(batch[0].numpy() * 255).astype(np.uint8).reshape(-1, 4)
        return pixels.view("<u4").ravel()

    name, data = getattr(iterator, "__name__", ""), owner.data
    if samples is None:
        samples = len(data.x_test if name == "test_iterator" else data.x_train)
    tagged = Mnist(spelled(len(data.x_train)), data.y_train, spelled(len(data.x_test)), data.y_test)
    copy = MnistDataGenerator(owner.batch_size, None, owner.seed, tagged)
    return getattr(copy, name), tag, samples


class _Placed:
    """A factory whose batches also tell each sample's worker and its number in that worker."""

    def __init__(self, iterator: Callable[..., Iterable[Any]]) -> None:
        self.iterator = iterator
        # An error about what cannot be pickled begins with this name.
        self.__qualname__ = getattr(iterator, "__qualname__", type(iterator).__name__)

    def __call__(self, worker: int, n_workers: int, epoch: int) -> "_PlacedIterator":
        return _PlacedIterator(IteratorFactory(self.iterator, n_workers)(worker, epoch), worker)


class _PlacedIterator(Iterator[Any]):
    """Yields `{"batch": the batch, "place": int64 [rows, 2]}`: worker, and count from 0."""

    def __init__(self, batches: Iterator[Any], worker: int) -> None:
        self.batches, self.worker, self.count = batches, worker, 0

    @property
    def gi_frame(self) -> Any:
        """The user's, so that an error shows the line that yielded a misfit batch."""
        return getattr(self.batches, "gi_frame", None)

    def __next__(self) -> Any:
        batch = leaf = next(self.batches)
        while isinstance(leaf, (dict, tuple)) and leaf:
            leaf = next(iter(leaf.values())) if isinstance(leaf, dict) else leaf[0]
        # A leaf that has no rows is the spec's to refuse, in its own words.
        rows = (np.shape(leaf) or (1,))[0]
        place = np.full((rows, 2), self.worker, np.int64)
        place[:, 1] = np.arange(self.count, self.count + rows)
        self.count += rows
        return {"batch": batch, "place": place}


class _Read(NamedTuple):
    """Samples in the order in which they came: int64 tags `[n]` and places `[n, 2]`, and batches'
    sizes `[batches]`."""

    tags: np.ndarray
    places: np.ndarray
    sizes: list[int]


class _Seen(NamedTuple):
    """Epochs, one after the other, and all that was read of an endless iterator."""

    epochs: list[_Read]
    all_of_endless: _Read | None


def _watch(
    iterator: Callable[..., Iterable[Any]],
    epochs: int,
    workers: Literal["thread", "process"],
    n_workers: int,
    samples: int | None,
    batch_size: int,
    tag: Callable[[Any], Any] | None,
) -> _Seen:
    from labkit.queue_runner import QueueRunner

    most = _MOST_SAMPLES if samples is None else n_workers * samples + batch_size
    share = _shares(samples or 0, n_workers)
    with QueueRunner(
        _Placed(iterator),
        batch_size,
        n_workers,
        workers,
        capacity=1000 + max(1000, batch_size),
        timeout=_TIMEOUT,
    ) as runner:
        dataset = runner.dataset()
        first, ended = _read(iter(dataset), tag, most, epochs * share)
        if not ended and samples is None:
            raise ValueError("audit: the iterator has no end; give samples=, the epoch's size.")
        if not ended:
            return _Seen(_epochs_of_streams(first, epochs, share), first)
        # Longer than `most` if the first pass was.
        most = max(most, 2 * len(first.tags))
        others = [_read(iter(dataset), tag, most, 0 * share)[0] for _ in range(epochs - 1)]
        return _Seen([first, *others], None)


def _shares(samples: int, n_workers: int) -> np.ndarray:
    """Sizes of range(samples)[worker::n_workers], int64 `[n_workers]`."""
    return (samples - 1 - np.arange(n_workers)) // n_workers + 1


def _epochs_of_streams(read: _Read, epochs: int, share: np.ndarray) -> list[_Read]:
    worker, number = read.places.T
    in_epoch = number // np.maximum(share[worker], 1)
    picked = [(in_epoch == epoch) & (share[worker] > 0) for epoch in range(epochs)]
    return [_Read(read.tags[mask], read.places[mask], []) for mask in picked]


def _read(
    batches: Iterator[Any], tag: Callable[[Any], Any] | None, most: int, due: np.ndarray
) -> tuple[_Read, bool]:
    """Reads to the end, or to `most` samples and the first `due[worker]` of each worker's stream.

    Returns what was read, and whether the end came.
    """
    read = [_Read(np.empty(0, np.int64), np.empty((0, 2), np.int64), [])]
    count, heard = 0, time.monotonic()
    came, furthest = np.zeros_like(due), np.zeros_like(due)
    while count < most or bool(np.any(came < due)):
        item = next(batches, None)
        if item is None:
            return _joined(read), True
        places = np.asarray(item["place"])
        tags = _content(item["batch"]) if tag is None else _tags(tag, item["batch"], len(places))
        read.append(_Read(tags, places, [len(tags)]))
        count += len(tags)
        worker, number = places.T
        wanted = number < due[worker]
        if wanted.any():
            heard = time.monotonic()
            came += np.bincount(worker[wanted], minlength=len(due))
        np.maximum.at(furthest, worker, number + 1)
        if count >= most and time.monotonic() - heard > _SILENCE:
            # A worker whose iterator has ended, while others go on, owes no more.
            due = np.minimum(due, furthest)
    return _joined(read), False


def _joined(read: list[_Read]) -> _Read:
    tags, places, sizes = zip(*read, strict=True)
    return _Read(np.concatenate(tags), np.concatenate(places), [n for some in sizes for n in some])


def _tags(tag: Callable[[Any], Any], batch: Any, rows: int) -> np.ndarray:
    tags = np.asarray(tag(batch))
    whole = tags.dtype.kind in "iub" or (tags.dtype.kind == "f" and bool(np.all(tags % 1 == 0)))
    if tags.size != rows or not whole:
        raise ValueError(
            f"audit: tag must return an integer for each of the batch's {rows} samples, got "
            f"{tags.dtype} of shape {tags.shape}."
        )
    return tags.ravel().astype(np.int64)


def _content(batch: Any) -> np.ndarray:
    from labkit.quiet import tf

    parts = [np.asarray(part) for part in tf.nest.flatten(batch)]
    # The bytes of an array of objects are addresses, not the content of its texts.
    columns = [
        list(map(repr, part.tolist())) if part.dtype == object else [row.tobytes() for row in part]
        for part in parts
    ]
    return np.array([hash(row) for row in zip(*columns, strict=True)], np.int64)


def _judge(
    seen: _Seen,
    samples: int | None,
    n_workers: int,
    shares: bool,
    batch_size: int,
    tagged: bool,
) -> Audit:
    counts = [len(epoch.tags) for epoch in seen.epochs]
    different = [len(np.unique(epoch.tags)) for epoch in seen.epochs]
    repeats = [count - n for count, n in zip(counts, different, strict=True)]
    expected = missed = None
    if samples is not None:
        expected = samples * len(counts)
        if tagged or max(different) <= samples:
            missed = sum(max(0, samples - n) for n in different)
        else:
            repeats = [max(r, n - samples) for r, n in zip(repeats, counts, strict=True)]
    found = Audit(
        expected, sum(counts), sum(repeats), missed,
        _mixing(seen, samples, batch_size) if tagged else None,
        told_by="tag" if tagged else "content", endless=seen.all_of_endless is not None,
    )  # fmt: skip
    found.verdict = " ".join(_verdict(found, seen, samples, n_workers, shares, max(different)))
    return found


def _mixing(seen: _Seen, samples: int | None, batch_size: int) -> float | None:
    if samples is None:
        return None
    read = seen.epochs if seen.all_of_endless is None else [seen.all_of_endless]
    spreads = [
        float(np.std(batch))
        for part in read
        for batch in np.split(part.tags, np.cumsum(part.sizes)[:-1])
        if len(batch) == batch_size
    ]
    perfect = samples / np.sqrt(12) * np.sqrt(1 - 1 / batch_size)
    return float(np.mean(spreads) / perfect) if spreads and perfect else None


def _verdict(
    found: Audit, seen: _Seen, samples: int | None, n_workers: int, shares: bool, different: int
) -> Iterator[str]:
    """The sentences of the verdict: how many came, whether workers agree, repeats, and doubts."""
    same = _agreement(seen)
    unshared = _unshared(seen, samples, n_workers, shares)
    counts = _about_the_count(found, samples, unshared)
    yield from counts
    if same > 0.9:
        yield (
            "The workers produce the same samples: their streams agree in "
            f"{same:.0%} of the places compared. {_SEED_IT}"
        )
        if not counts:
            yield f"If they read one data set: {_SHARE_IT}"
    elif unshared and samples is None:
        yield (
            f"Each of the {n_workers} workers delivered a whole iterator: if that is a finite data "
            f"set, every sample came {n_workers} times. {_SHARE_IT}"
        )
    elif found.repeated and not counts:
        yield _about_repeats(found)
    if samples is not None and different > samples:
        what = "contents" if found.told_by == "content" else "tags"
        yield (
            f"There are more different {what} in an epoch ({different:,}) than samples "
            f"({samples:,})."
        )
    clean = not found.repeated and not found.missed
    if clean and not counts and not unshared:
        what = "No sample came twice" if samples is None else "Each sample came once"
        yield f"{what} in an epoch{'' if found.told_by == 'tag' else ', as far as contents tell'}."
    unknown = samples is not None and found.missed is None
    if found.told_by == "content" and (clean or unknown):
        yield _TAG_IT
    if seen.all_of_endless is not None:
        yield (
            f"No end came within {len(seen.all_of_endless.tags):,} samples: the iterator is taken "
            f"for endless, and an epoch of it is {samples:,} samples, as many from each worker."
        )


def _about_the_count(found: Audit, samples: int | None, unshared: bool) -> list[str]:
    if found.expected is None or found.endless or found.delivered == found.expected:
        return []
    more = found.delivered - found.expected
    if more < 0:
        return [
            f"{-more:,} samples too few: an epoch ends before the data set does. Check that the "
            "shares of the workers cover it, and that no smaller last batch is dropped."
        ]
    times = found.delivered / found.expected
    text = (
        f"{times:.3g} times as many samples as the data set has"
        if times >= 1.5
        else f"{more:,} samples more than the data set has"
    )
    if unshared:
        return [f"{text}: the workers do not share it out. {_SHARE_IT}"]
    return [
        f"{text}. Check whether the shares of the workers overlap, and whether samples={samples:,} "
        "is the size of the data set."
    ]


def _about_repeats(found: Audit) -> str:
    counts = f"{found.repeated:,} deliveries repeat a sample"
    if found.missed:
        counts += f" while {found.missed:,} samples are missed"
    return (
        f"{counts}, as where samples are drawn with replacement or the shares of the workers "
        "overlap. Go through the data set once an epoch, in a shuffled order that all workers "
        "know, each worker through its own part."
    )


def _agreement(seen: _Seen) -> float:
    """Of the places in their streams at which two workers were seen, where their samples agree."""
    compared = agree = 0
    for part in seen.epochs if seen.all_of_endless is None else [seen.all_of_endless]:
        _, first, which = np.unique(part.places[:, 1], return_index=True, return_inverse=True)
        again = np.ones(len(part.tags), bool)
        again[first] = False
        compared += int(again.sum())
        agree += int((part.tags == part.tags[first][which])[again].sum())
        if len(np.unique(part.tags)) < 2:  # all samples are alike: the workers are not to blame
            return 0.0
    return agree / compared if compared else 0.0


def _unshared(seen: _Seen, samples: int | None, n_workers: int, shares: bool) -> bool:
    """Whether each worker delivered the whole of a finite data set, or most of it."""
    if seen.all_of_endless is not None or n_workers == 1:
        return False
    if samples is None:
        return not shares
    each = np.bincount(seen.epochs[0].places[:, 0], minlength=n_workers)
    return bool(each.min() > 0.9 * samples)
