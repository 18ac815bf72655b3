"""Does every sample come once an epoch? Watched at the queue's end, where training takes them."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from labkit.checks import expect, is_integer
from labkit.engine import KINDS
from labkit.engine.produce import IteratorFactory
from labkit.instruments.keep import paragraphs
from labkit.instruments.reading import Seen, Tag, repeated, watch
from labkit.sources import as_factory

_SHARE_IT = (
    "Give the factory the parameters (worker, n_workers) and let each worker yield its own part, "
    "such as range(worker, size, n_workers)."
)
_DRAW_APART = (
    "If they draw at random, give the factory a parameter `rng` and draw from that: it is a "
    "numpy.random.Generator of each worker's own."
)

Iterators = Callable[..., Iterable[Any]]


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
        batches: that were delivered, as workers yielded them; None where they are not compared:
            all samples are alike, or it is a method of `MnistDataGenerator`, whose work is left
            away here.
        same_batches: of these, those that another worker yielded as well in the same epoch, equal
            to the last bit; or None.
    """

    expected: int | None
    delivered: int
    repeated: int
    missed: int | None
    mixing: float | None
    verdict: str = ""
    told_by: Literal["content", "tag"] = "content"
    endless: bool = False
    batches: int | None = None
    same_batches: int | None = None

    def __str__(self) -> str:
        of = "" if self.expected is None else f" of {self.expected:,} expected"
        give = "samples=" if self.expected is None else "tag="
        missed = f"unknown (give {give})" if self.missed is None else f"{self.missed:,}"
        mixing = "unknown" if self.mixing is None else f"{self.mixing:.2f} of a perfect mix"
        return (
            f"{self.delivered:,} samples delivered{of}: {self.repeated:,} repeated, "
            f"{missed} missed; mixing: {mixing}.\n{self.verdict}"
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
    """Counts which samples of an epoch come twice and which not at all, through a `QueueRunner`,
    and which batches two workers made alike.

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
        workers: "thread", "process" or "ray". A number, as this was before, still counts as
            `n_workers`, with a DeprecationWarning.
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
    whole = iterator
    if tag is None:
        iterator, tag, samples = _tagged_mnist(iterator, samples)
    seen = watch(IteratorFactory(iterator, n_workers), epochs, workers, samples, batch_size, tag)
    found = _judge(seen, samples, given, batch_size, tag is not None)
    if iterator is whole:
        _compare_batches(found, seen)
    return found


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


def _judge(
    seen: Seen, samples: int | None, given: IteratorFactory, batch_size: int, tagged: bool
) -> Audit:
    counts, repeats = list(map(len, seen.epochs)), list(map(repeated, seen.epochs))
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
    found: Audit, seen: Seen, samples: int | None, n_workers: int, unshared: bool, different: int
) -> Iterator[str]:
    """The sentences of the verdict: how many came, whether workers agree, repeats, and doubts."""
    agree = _agreement(seen)
    wrong_count = _about_the_count(found, samples, unshared)
    if wrong_count:
        yield wrong_count
    if agree > 0.9:
        yield (
            f"The workers produce the same samples: their streams agree in {agree:.0%} of the "
            f"places compared. {_DRAW_APART}"
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


def _agreement(seen: Seen) -> float:
    """Of the places in their streams at which two workers were seen, where their samples agree."""
    compared = agree = 0
    # All that was read of an endless iterator: its epochs have each place of a stream but once.
    for tags, _, number, _ in (np.concatenate(read).T[:4] for read in seen.passes):
        if len(np.unique(tags)) < 2:  # all samples are alike: the workers are not to blame
            return 0.0
        _, first, which = np.unique(number, return_index=True, return_inverse=True)
        again = np.ones(len(tags), bool)
        again[first] = False
        compared += int(again.sum())
        agree += int((tags == tags[first][which])[again].sum())
    return agree / compared if compared else 0.0


def _compare_batches(found: Audit, seen: Seen) -> None:
    """Counts the batches that several workers made alike, and says so."""
    batches = same = 0
    example: list[tuple[int, int]] = []
    for rows in seen.epochs:
        _, worker, number, turn, content = rows.T
        if len(np.unique(content)) < 2:
            return
        order = np.lexsort((number, turn, worker))
        batch = np.stack([worker, turn])[:, order]
        begins = np.flatnonzero(np.any(np.diff(batch, prepend=-1) != 0, axis=0))
        makers: dict[bytes, dict[int, int]] = defaultdict(dict)
        counts: Counter[bytes] = Counter()
        for (who, which), part in zip(
            batch[:, begins].T.tolist(), np.split(content[order], begins[1:]), strict=True
        ):
            makers[part.tobytes()].setdefault(who, which)
            counts[part.tobytes()] += 1
        batches += len(begins)
        shared = [part for part, of in makers.items() if len(of) > 1]
        same += sum(counts[part] for part in shared)
        example = example or [pair for part in shared[:1] for pair in makers[part].items()]
    found.batches, found.same_batches = batches, same
    if not example:
        return
    (one, at), (other, also_at) = example[:2]
    cure = "" if _DRAW_APART in found.verdict else f" {_DRAW_APART}"
    found.verdict += (
        f" {same:,} of {batches:,} batches are equal, to the last bit, to one "
        f"that another worker made in the same epoch, such as number {at} of worker {one} and "
        f"number {also_at} of worker {other}, counted from 0.{cure}"
    )
