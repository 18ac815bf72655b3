"""What a worker can say, and how the consumer hears of it."""

import html
from dataclasses import dataclass, field
from typing import Any

from labkit.engine.stage import Times


class WorkerError(RuntimeError):
    """What went wrong in a worker; `worker` is its number. The cause, if any, is `__cause__`."""

    worker: int | None = None

    def _repr_html_(self) -> str:
        """Worker and error, and the traceback in its own lines: `repr` has all in one."""
        said, _, text = str(self).partition("\n")
        number = "" if self.worker is None else f" (worker {self.worker})"
        traceback = f"<pre>{html.escape(text.strip())}</pre>" if text.strip() else ""
        return f"<p><b>WorkerError{number}:</b> {html.escape(said)}</p>{traceback}"


@dataclass
class Chunk:
    """Arrays that a worker delivered; give its slots back with `pool.release(chunk)`.

    `arrays` has one array per component, `[rows, ...]`; or, of large samples from a process, one
    sequence of arrays, a sample each, which may be kept. `seconds` is the time that the iterator
    took, `epoch` the pass that the batch belongs to; `last`: nothing of the batch is still to come.
    `stages`: what those of the whole batch took, with its first chunk; None in others, and where
    the pool's job does not ask for them. `number` counts what its worker made in the pass; `life`
    how often that worker had been started again.
    """

    worker: int
    arrays: list[Any]
    seconds: float
    epoch: int
    slots: tuple[int, ...] = ()
    last: bool = True
    stages: Times | None = None
    number: int = 0
    life: int = 0


@dataclass
class Ended:
    """A worker's iterator is exhausted; it waits for the next pass or for the stop."""

    worker: int
    epoch: int
    life: int = 0


@dataclass
class Failed:
    """What went wrong in a worker; `summary` is one line, `text` its traceback if any."""

    worker: int
    summary: str
    text: str = ""
    error: BaseException | None = None
    life: int = field(default=0, kw_only=True)

    def as_error(self, who: str = "labkit") -> WorkerError:
        text = f"{who}: worker {self.worker} {self.summary}"
        text += f"\n\n{self.text}" if self.text else ""
        # Names of files may hold what UTF-8 cannot, and TensorFlow crashes on such a text.
        error = WorkerError(text.encode("utf-8", "backslashreplace").decode())
        error.worker, error.__cause__ = self.worker, self.error
        return error


@dataclass
class Lost(Failed):
    """A worker raised, died or stalled, and delivers nothing any more."""


@dataclass
class Skipped(Failed):
    """One batch, left out: the worker goes on once it is told so by `pool.release(skipped)`."""

    epoch: int = 0
    number: int = 0  # as a chunk has, and the slots
    slots: tuple[int, ...] = ()
    released: bool = False


Message = Chunk | Ended | Lost | Skipped
