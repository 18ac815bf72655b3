"""What comes out of a `QueueRunner`, sample by sample: of which worker, and at which place in its
stream.

A worker process imports this file with the factory: no TensorFlow here.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from labkit.engine.batches import Spec
from labkit.engine.produce import IteratorFactory

_MOST_SAMPLES = 5_000_000
_TIMEOUT = 60.0  # seconds for a batch
_SILENCE = _TIMEOUT + 1.0  # a worker that is silent for longer has not failed, but ended

Tag = Callable[[Any], Any]


class Placed(Iterator[Any]):
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


class Seen(NamedTuple):
    """Passes as they were read, batch by batch, and the epochs that they make. All are int64 with
    a row for each sample: its tag, its place, and a digest of its content."""

    passes: list[list[np.ndarray]]
    epochs: list[np.ndarray]
    endless: bool = False


def watch(
    made: IteratorFactory,
    epochs: int,
    workers: str,
    samples: int | None,
    batch_size: int,
    tag: Tag | None,
) -> Seen:
    from labkit.queue_runner import QueueRunner

    def placed(worker: int, n_workers: int, epoch: int) -> Placed:
        return Placed(made(worker, epoch), worker)

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
            return Seen([first], _epochs_of_streams(np.concatenate(first), epochs, share), True)
        # Longer than `most` if the first pass was.
        most = max(most, 2 * sum(map(len, first)))
        passes = [first, *(_read(iter(dataset), tag, most, 0 * share)[0] for _ in range(1, epochs))]
        return Seen(passes, list(map(np.concatenate, passes)))


def _epochs_of_streams(rows: np.ndarray, epochs: int, share: np.ndarray) -> list[np.ndarray]:
    _, worker, number, turn, _ = rows.T
    of = np.where(share[worker] > 0, number // np.maximum(share[worker], 1), epochs)
    by_share = [rows[of == epoch] for epoch in range(epochs)]
    samples = int(share.sum())
    # Whole batches may be what is shared out.
    dealt = rows[np.lexsort((number, worker, turn))]
    by_turn = [dealt[samples * epoch :][:samples] for epoch in range(epochs)]
    better = any(map(repeated, by_share)) and not any(map(repeated, by_turn))
    return by_turn if better and len(dealt) >= samples * epochs else by_share


def repeated(rows: np.ndarray) -> int:
    return len(rows) - len(np.unique(rows[:, 0]))


def _read(
    batches: Iterator[Any], tag: Tag | None, most: int, due: np.ndarray
) -> tuple[list[np.ndarray], bool]:
    """Reads to the end, or to `most` samples and the first `due[worker]` of each worker's stream.

    Returns the rows of each batch as `Seen` has them, and whether the end came.
    """
    read: list[np.ndarray] = []
    count, heard = 0, time.monotonic()
    came, furthest = np.zeros_like(due), np.zeros_like(due)
    while count < most or bool(np.any(came < due)):
        if (item := next(batches, None)) is None:
            return read, True
        place = np.asarray(item["place"])
        content = _content(item["batch"])
        tags = content if tag is None else _tags(tag, item["batch"], len(place))
        read.append(np.column_stack([tags, place, content]))
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
