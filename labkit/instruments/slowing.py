"""How much slower a step is while its data are made than while none are."""

import collections
import math
import statistics
from collections.abc import Sequence

_STEPS, _RESTS_AFTER = 24, 8
_LEAST = 8  # calls of several steps each, less noisy than those of one
_AGAIN = 100  # times as many calls lie between


class Slowing:
    """How much slower a call is while batches are made than while none are.

    Producers need cores, and Python's lock, which the step then lacks. So now and then some batches
    are taken ahead, and then trained on, in their order, while none is asked for: the producers
    have filled their buffers and rest. The calls before them and those after them must both be
    slower, so that a machine that is faster for a moment is not taken for producers that rest.

    Attributes:
        seconds: more for a call that has its batches already; 0 while unknown.
        most: calls that may be held for.
        number: of calls that are compared.
        rests_after: calls in which the producers may still fill their buffers.

    Args:
        together: steps a call.
    """

    def __init__(self, together: int = 1) -> None:
        self.seconds, self.most = 0.0, 0
        self.number = max(_LEAST, _STEPS // together)
        self.rests_after = max(2, _RESTS_AFTER // together)
        self._next = 0
        self._begin()

    def _begin(self) -> None:
        self._before: collections.deque[float] = collections.deque(maxlen=self.number)
        self._held: list[float] = []
        self._after: list[float] = []

    def compares(self, done: int) -> bool:
        """Whether it needs the calls from here on, one after the other."""
        return done >= self._next or bool(self._held)

    def calls_to_hold(self, done: int, left: float) -> int:
        """0 for most calls: it costs what making and training at one time would have gained."""
        calls = min(self.number + self.rests_after, self.most)
        ready = len(self._before) == self.number and not self._held
        if not ready or done < self._next or calls < 2 * self.number // 3 or left < calls:
            return 0
        self._next = done + _AGAIN * calls
        return calls

    def note(self, seconds: float, held: bool) -> None:
        """Of a call, without the time to take its batches."""
        if held:
            self._held.append(seconds)
        elif self._held:
            self._after.append(seconds)
        else:
            self._before.append(seconds)
        if len(self._after) == self.number:
            alone = self._held[self.rests_after :]
            if len(alone) > 1:
                self.seconds = max(0.0, min(_more(self._before, alone), _more(self._after, alone)))
            self._begin()


def _more(usual: Sequence[float], alone: Sequence[float]) -> float:
    """By how much the usual median is larger; 0 for what may be chance."""
    more = statistics.median(usual) - statistics.median(alone)
    return more if more > 2 * math.hypot(_error(usual), _error(alone)) else 0.0


def _error(values: Sequence[float]) -> float:
    """The standard error of the median, of a normal distribution with their median deviation."""
    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return 1.2533 * deviation / math.sqrt(len(values))
