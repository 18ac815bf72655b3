"""Batches that are left out, as on_error="skip" wants: told, counted, and too many are an error."""

import warnings

from labkit.engine.messages import Chunk, Skipped, WorkerError

_LEAST, _SHARE = 10, 0.01


class Skips:
    """Counts the batches that were left out.

    Attributes:
        count: since the start.
        here: in this pass.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self.count = self.here = self._came = 0
        self._last: Skipped | None = None

    def delivered(self, chunk: Chunk) -> None:
        self._came += chunk.last

    def note(self, skipped: Skipped) -> None:
        """Warns of the first. Raises WorkerError where it is one too many."""
        first, self._last = self._last is None, skipped
        self.count += 1
        self.here += 1
        came = self.here + self._came
        most = max(_LEAST, int(_SHARE * came)) if self._most is None else self._most
        if self.here > most:
            raise self.error(f", expected at most {most} of a pass (max_skipped)")
        if first:
            warnings.warn(
                f"{skipped.as_error()}\nIts batch is left out, since on_error='skip'. Further "
                "ones are only counted: runner.skipped.",
                RuntimeWarning,
                stacklevel=1,
            )

    def report(self) -> None:
        """Tells how many a pass lacks, once."""
        if self.here:
            text = f"labkit: {self._so_many()} were left out of a pass, since on_error='skip'."
            warnings.warn(text, RuntimeWarning, stacklevel=1)
        self.here = self._came = 0

    def error(self, expected: str = "") -> WorkerError:
        """Of the last one, with how many there were."""
        assert self._last is not None
        who = f"labkit: {self._so_many()} had to be left out{expected}. The last"
        return self._last.as_error(who)

    def _so_many(self) -> str:
        return f"{self.here:,} of {self.here + self._came:,} batches"
