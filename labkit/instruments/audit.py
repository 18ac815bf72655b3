"""Does every sample come once an epoch? Watched at the queue's end, where training takes them.

A worker process imports this file with the factory: no TensorFlow here.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from labkit.checks import expect, is_integer
from labkit.engine import KINDS
from labkit.engine.batches import Spec
from labkit.engine.produce import IteratorFactory
from labkit.instruments.keep import paragraphs
from labkit.sources import as_factory

_MOST_SAMPLES = 5_000_000
_TIMEOUT = 60.0  # seconds for a batch
_SILENCE = _TIMEOUT + 1.0  # a worker that is silent for longer has not failed, but ended
_SHARE_IT = (
    "Give the factory the parameters (worker, n_workers) and let each worker yield its own part, "
    "such as range(worker, size, n_workers)."
)

Iterators = Callable[..., Iterable[Any]]
Tag = Callable[[Any], Any]


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

    _repr_html_ = paragraphs


def audit(
    iterator: Any,
    epochs: int = 1,
    workers: str = next(iter(KINDS)),
    samples: int | None = None,
    batch_size: int = 32,
    tag: Tag | None = None,
    n_workers: int = 4,
) -> Audit:
    """Counts which samples of an epoch come twice and which not at all, through a `QueueRunner`.

    A finite iterator is read to its end, and each of its passes is an epoch. It is taken for
    endless if no end has come within `n_workers * samples` samples and one batch more, since that
    is as many as workers deliver that do not share the data set out. An epoch of an endless
    iterator is the next `samples / n_workers` samples of each worker's own stream, as if all
    workers were equally fast: so the counts do not depend on who started first. Where samples
    repeat in that, but not in the next `samples` of the workers' batches in turn, it is those. In
    training, the queue mixes such an epoch with its neighbours.

    Args:
        iterator: an iterator factory or a data set. Methods of `MnistDataGenerator` run on tagged
            copies of its data, so their samples are told apart exactly.
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
    kinds = f"audit: workers must be {' or '.join(map(repr, KINDS))}"
    if is_integer(workers):
        expect(n_workers == 4, kinds, workers)
        warnings.warn(
            f"audit: workers is the kind of worker now. Write audit(..., n_workers={workers}) in "
            f"place of workers={workers}.",
            DeprecationWarning,
            stacklevel=2,
        )
        workers, n_workers = next(iter(KINDS)), int(workers)
    expect(isinstance(workers, str) and workers in KINDS, kinds, workers)
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("n_workers", n_workers)):
        expect(is_integer(value, 1), f"audit: {name} must be an integer >= 1", value)
    fits = samples is None or is_integer(samples, 1)
    expect(fits, "audit: samples must be None or an integer >= 1", samples)
    expect(tag is None or callable(tag), "audit: tag must be None or callable as tag(batch)", tag)
    iterator = as_factory(iterator, batch_size)
    given = IteratorFactory(iterator, n_workers)
    if tag is None:
        iterator, tag, samples = _tagged_mnist(iterator, samples)
    seen = _watch(IteratorFactory(iterator, n_workers), epochs, workers, samples, batch_size, tag)
    return _judge(seen, samples, given, batch_size, tag is not None)


def _tagged_mnist(
    iterator: Iterators, samples: int | None
) -> tuple[Iterators, Tag | None, int | None]:
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


class _Placed(Iterator[Any]):
    """Yields `{"batch": the batch, "place": int64 [rows, 3]}`: of each sample its worker, its
    number in that worker, and that of its batch, from 0."""

    def __init__(self, batches: Iterator[Any], worker: int) -> None:
        self.batches, self.worker, self.rows, self.turn = batches, worker, 0, 0

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
        place = np.full((rows, 3), (self.worker, self.rows, self.turn), np.int64)
        place[:, 1] += np.arange(rows)
        self.rows, self.turn = self.rows + rows, self.turn + 1
        return {"batch": batch, "place": place}


class _Seen(NamedTuple):
    """Passes as they were read, batch by batch, and the epochs that they make. All are int64 with
    a row for each sample: its tag and its place."""

    passes: list[list[np.ndarray]]
    epochs: list[np.ndarray]
    endless: bool = False


def _watch(
    made: IteratorFactory,
    epochs: int,
    workers: str,
    samples: int | None,
    batch_size: int,
    tag: Tag | None,
) -> _Seen:
    from labkit.queue_runner import QueueRunner

    def placed(worker: int, n_workers: int, epoch: int) -> _Placed:
        return _Placed(made(worker, epoch), worker)

    placed.__dict__["_labkit_wraps"] = made.factory
    n = made.n_workers
    most = _MOST_SAMPLES if samples is None else n * samples + batch_size
    share = ((samples or 0) - 1 - np.arange(n)) // n + 1  # as of range(samples)[worker::n]
    options: dict[str, Any] = {"workers": workers, "capacity": 1000 + max(1000, batch_size)}
    with QueueRunner(placed, batch_size, n, **options, timeout=_TIMEOUT) as runner:
        dataset = runner.dataset()
        first, ended = _read(iter(dataset), tag, most, epochs * share)
        if not ended and samples is None:
            raise ValueError("audit: the iterator has no end; give samples=, the epoch's size.")
        if not ended:
            return _Seen([first], _epochs_of_streams(np.concatenate(first), epochs, share), True)
        # Longer than `most` if the first pass was.
        most = max(most, 2 * sum(map(len, first)))
        passes = [first, *(_read(iter(dataset), tag, most, 0 * share)[0] for _ in range(1, epochs))]
        return _Seen(passes, list(map(np.concatenate, passes)))


def _epochs_of_streams(rows: np.ndarray, epochs: int, share: np.ndarray) -> list[np.ndarray]:
    _, worker, number, turn = rows.T
    of = np.where(share[worker] > 0, number // np.maximum(share[worker], 1), epochs)
    by_share = [rows[of == epoch] for epoch in range(epochs)]
    samples = int(share.sum())
    # Whole batches may be what is shared out.
    dealt = rows[np.lexsort((number, worker, turn))]
    by_turn = [dealt[samples * epoch :][:samples] for epoch in range(epochs)]
    better = any(map(_repeated, by_share)) and not any(map(_repeated, by_turn))
    return by_turn if better and len(dealt) >= samples * epochs else by_share


def _repeated(rows: np.ndarray) -> int:
    return len(rows) - len(np.unique(rows[:, 0]))


def _read(
    batches: Iterator[Any], tag: Tag | None, most: int, due: np.ndarray
) -> tuple[list[np.ndarray], bool]:
    """Reads to the end, or to `most` samples and the first `due[worker]` of each worker's stream.

    Returns the rows of each batch as `_Seen` has them, and whether the end came.
    """
    read: list[np.ndarray] = []
    count, heard = 0, time.monotonic()
    came, furthest = np.zeros_like(due), np.zeros_like(due)
    while count < most or bool(np.any(came < due)):
        if (item := next(batches, None)) is None:
            return read, True
        place = np.asarray(item["place"])
        tags = _content(item["batch"]) if tag is None else _tags(tag, item["batch"], len(place))
        read.append(np.column_stack([tags, place]))
        count += len(tags)
        worker, number, _ = place.T
        wanted = number < due[worker]
        if wanted.any():
            heard = time.monotonic()
            came += np.bincount(worker[wanted], minlength=len(due))
        np.maximum.at(furthest, worker, number + 1)
        if count >= most and time.monotonic() - heard > _SILENCE:
            # A worker whose iterator has ended, while others go on, owes no more.
            due = np.minimum(due, furthest)
    return read, False


def _tags(tag: Tag, batch: Any, rows: int) -> np.ndarray:
    tags = np.asarray(tag(batch))
    whole = tags.dtype.kind in "iub" or (tags.dtype.kind == "f" and bool(np.all(tags % 1 == 0)))
    if tags.size != rows or not whole:
        raise ValueError(
            f"audit: tag must return an integer for each of the batch's {rows} samples, got "
            f"{tags.dtype} of shape {tags.shape}."
        )
    return tags.ravel().astype(np.int64)


def _content(batch: Any) -> np.ndarray:
    # The bytes of an array of objects are addresses, not the content of its texts.
    columns = [
        list(map(repr, part.tolist())) if part.dtype == object else [row.tobytes() for row in part]
        for part in Spec.of(batch).flatten(batch)
    ]
    return np.array([hash(row) for row in zip(*columns, strict=True)], np.int64)


def _judge(
    seen: _Seen, samples: int | None, given: IteratorFactory, batch_size: int, tagged: bool
) -> Audit:
    counts, repeats = list(map(len, seen.epochs)), list(map(_repeated, seen.epochs))
    different = [count - more for count, more in zip(counts, repeats, strict=True)]
    found = Audit(None, sum(counts), sum(repeats), None, None, endless=seen.endless)
    found.told_by = "tag" if tagged else "content"
    each = np.bincount(seen.epochs[0][:, 1], minlength=given.n_workers)
    # Those that take turns at one iterator have unequal parts of it.
    unshared = bool(each.min() == each.max()) and not given.shards
    if samples is not None:
        found.expected = samples * len(counts)
        if tagged or max(different) <= samples:
            found.missed = sum(max(0, samples - n) for n in different)
        else:
            found.repeated = sum(max(r, n - samples) for r, n in zip(repeats, counts, strict=True))
        batches = [batch for read in seen.passes for batch in read if len(batch) == batch_size]
        perfect = samples / np.sqrt(12) * np.sqrt(1 - 1 / batch_size)
        if tagged and batches and perfect:
            found.mixing = float(np.mean([np.std(batch[:, 0]) for batch in batches]) / perfect)
        unshared = bool(each.min() > 0.9 * samples)  # all, or most of it
    unshared &= not seen.endless and given.n_workers > 1
    most = max(different)
    found.verdict = " ".join(_verdict(found, seen, samples, given.n_workers, unshared, most))
    return found


def _verdict(
    found: Audit, seen: _Seen, samples: int | None, n_workers: int, unshared: bool, different: int
) -> Iterator[str]:
    """The sentences of the verdict: how many came, whether workers agree, repeats, and doubts."""
    agree = _agreement(seen)
    wrong_count = _about_the_count(found, samples, unshared)
    if wrong_count:
        yield wrong_count
    if agree > 0.9:
        yield (
            f"The workers produce the same samples: their streams agree in {agree:.0%} of the "
            "places compared. If they draw at random, give the factory a parameter `worker` and "
            "seed with np.random.default_rng([seed, worker])."
        )
        if not wrong_count:
            yield f"If they read one data set: {_SHARE_IT}"
    elif unshared and samples is None:
        yield (
            f"All {n_workers} workers delivered as many samples: if each of them read the whole "
            f"data set, it came {n_workers} times. {_SHARE_IT}"
        )
    elif found.repeated and not wrong_count:
        missed = f" while {found.missed:,} samples are missed" if found.missed else ""
        yield (
            f"{found.repeated:,} deliveries repeat a sample{missed}, as where samples are drawn "
            "with replacement or the shares of the workers overlap. Go through the data set once "
            "an epoch, in a shuffled order that all workers know, each worker through its own part."
        )
    by_content = found.told_by == "content"
    if samples is not None and different > samples:
        yield (
            f"There are more different {'contents' if by_content else 'tags'} in an epoch "
            f"({different:,}) than samples ({samples:,})."
        )
    clean = not found.repeated and not found.missed
    if clean and not wrong_count and not unshared:
        what = "No sample came twice" if samples is None else "Each sample came once"
        yield f"{what} in an epoch{', as far as contents tell' if by_content else ''}."
    if by_content and (clean or (samples is not None and found.missed is None)):
        yield (
            "Samples were told apart by content, and those that are changed at random (noise, "
            "augmentation) all look different: only tag= can tell whether one came twice."
        )
    if found.endless:
        yield (
            f"No end came within {sum(map(len, seen.passes[0])):,} samples: the iterator is taken "
            f"for endless, and an epoch of it is {samples:,} samples, as many from each worker."
        )


def _about_the_count(found: Audit, samples: int | None, unshared: bool) -> str:
    if found.expected is None or found.endless or found.delivered == found.expected:
        return ""
    more, times = found.delivered - found.expected, found.delivered / found.expected
    if more < 0:
        return (
            f"{-more:,} samples too few: an epoch ends before the data set does. Check that the "
            "shares of the workers cover it, and that no smaller last batch is dropped."
        )
    many = f"{times:.3g} times as many samples as"
    more_than = many if times >= 1.5 else f"{more:,} samples more than"
    cure = (
        f": the workers do not share it out. {_SHARE_IT}"
        if unshared
        else ". Check whether the shares of the workers overlap, and whether "
        f"samples={samples:,} is the size of the data set."
    )
    return f"{more_than} the data set has{cure}"


def _agreement(seen: _Seen) -> float:
    """Of the places in their streams at which two workers were seen, where their samples agree."""
    compared = agree = 0
    # All that was read of an endless iterator: its epochs have each place of a stream but once.
    for tags, _, number, _ in (np.concatenate(read).T for read in seen.passes):
        if len(np.unique(tags)) < 2:  # all samples are alike: the workers are not to blame
            return 0.0
        _, first, which = np.unique(number, return_index=True, return_inverse=True)
        again = np.ones(len(tags), bool)
        again[first] = False
        compared += int(again.sum())
        agree += int((tags == tags[first][which])[again].sum())
    return agree / compared if compared else 0.0
