"""How much slower a step is while its data are made than while none are."""

import math
import statistics
from dataclasses import dataclass

_STEPS, _LEAST = 16, 4  # to compare, and calls of which there have to be so many
# Ahead of them, a few; and where the cores rest meanwhile, as many as take 0.15 s to wake them up.
_WARM, _MOST_WARM, _WARM_SECONDS, _PART = 8, 80, 0.15, 6
_WAITED = 0.03  # of the time: more than that is no chance, and has data that are made meanwhile
_SKIP = 2  # times as many as were held: they have what was stored meanwhile
_KEPT = 25  # comparisons, of those that came last
_ENOUGH = 2  # comparisons, to know how much is chance
# Times the seconds that one cost pass until the next: for so many, then for so many in all.
_OFTEN, _FIRST, _SOMETIMES, _SOME, _SELDOM = 4, 3, 40, 8, 200


@dataclass
class _Calls:
    calls: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    passed: float = 0.0  # seconds of others

    def add(self, calls: int, seconds: float, waited: float = 0.0) -> None:
        self.calls += calls
        self.seconds += calls * seconds
        self.waited += waited

    @property
    def mean(self) -> float:
        return self.seconds / self.calls


class Slowing:
    """How much slower a call is while batches are made than while none are.

    Producers need cores, and Python's lock, which the step then lacks. So now and then some batches
    are taken ahead, and then trained on, in their order, while none is asked for: the producers
    have filled their buffers and rest. These calls stand between calls before them and after them,
    so that a machine which gets faster or slower is not taken for producers that rest.

    Args:
        together: steps a call.
    """

    def __init__(self, together: int = 1) -> None:
        self._together = together
        self._neighbours = max(_LEAST, _STEPS // together)
        self._least_warm = max(1, _WARM // together)
        self._differences: list[float] = []  # to the mean of both neighbours
        self._least = math.inf  # difference to one of them
        self._before, self._alone = _Calls(), _Calls()
        self._usual = _Calls()  # since the last that were held
        self._all = _Calls()  # but those
        self._spent, self._warming, self._skip, self._useless = 0.0, 0, 0, False

    @property
    def known(self) -> bool:
        return bool(self._differences)

    @property
    def compares(self) -> bool:
        """Whether it has to hear of each call at once: too few came since others were held."""
        return self._skip > 0 or (self._alone.calls > 0 and self._usual.calls < self._neighbours)

    @property
    def in_a_row(self) -> int:
        """Calls that came one after the other, if those are enough to compare others with."""
        enough = not self.compares and self._usual.calls >= self._neighbours
        return self._usual.calls if enough else 0

    @property
    def seconds(self) -> float:
        """More for a call that has not its batches already; 0 while unknown. Where calls wait, the
        median of the comparisons, which errs to both sides. Where they do not, that could take
        chance for a loss: of one comparison it is the least that a neighbour says; of more their
        median, shrunk by what may be chance as in James and Stein's estimator (its positive part),
        which tells small from none without cutting off what is large."""
        if not self.known:
            return 0.0
        more = statistics.median(self._differences)
        if self._all.waited > _WAITED * (self._all.waited + self._all.seconds):
            return max(0.0, more)
        if len(self._differences) < _ENOUGH:
            return max(0.0, self._least)
        # The standard error of a median is 1.25 times that of a mean.
        error = 1.25 * statistics.stdev(self._differences) / math.sqrt(len(self._differences))
        return max(0.0, more - error * error / more) if more > 0 else 0.0

    def calls_to_hold(self, left: float) -> int:
        """0 for most calls: it costs what making and training at one time would have gained."""
        if self._useless or self._usual.calls < self._neighbours:
            return 0
        compared = len(self._differences)
        times = _OFTEN if compared < _FIRST else _SOMETIMES if compared < _SOME else _SELDOM
        # Of those that are left, all, those that are skipped after them, and some to compare with.
        most = (left - self._neighbours) / (1 + _SKIP) - self._neighbours
        passed = self._usual.seconds + self._usual.passed
        if most < self._least_warm or passed < times * self._spent:
            return 0
        return int(min(most, self._warm(left))) + self._neighbours

    def _warm(self, left: float) -> int:
        usual, slow = self._usual, self.seconds
        if self._together == 1 and usual.waited + slow * usual.calls < _WAITED * usual.seconds:
            return self._least_warm
        wanted = _WARM_SECONDS / max(usual.mean - slow, 1e-9)
        most = min(_MOST_WARM / self._together, left / _PART)
        return max(self._least_warm, int(min(most, wanted)))

    def hold(self, calls: int, seconds: float) -> None:
        """So many calls, fewer than asked for if their batches are large, have them now, after
        some seconds."""
        self._warming = max(self._least_warm, calls - self._neighbours)
        self._before, self._alone, self._usual = self._usual, _Calls(), _Calls()
        self._spent, self._skip = seconds, _SKIP * calls
        self._useless = calls <= self._least_warm

    def begin_epoch(self) -> None:
        self._skip = 0

    def note_held(self, seconds: float) -> None:
        """Of a call whose batches were taken ahead, without the time that took."""
        if self._warming:
            self._warming -= 1
        else:
            self._alone.add(1, seconds)

    def skips(self) -> bool:
        """Whether a call that was not held has what was stored meanwhile, so that it tells nothing;
        asked once a call."""
        skip = self._skip > 0
        self._skip -= skip
        return skip

    def note(self, seconds: float, calls: int = 1, waited: float = 0.0) -> None:
        """Of each of some others, without the time to take their batches; which they all waited."""
        self._usual.add(calls, seconds, waited)
        self._all.add(calls, seconds, waited)
        if self._alone.calls and self._usual.calls >= self._neighbours:
            self._compare()

    def pass_by(self, seconds: float) -> None:
        """Some seconds of calls of which nothing is known: those before them are no neighbours."""
        usual = self._usual
        self._usual = _Calls(passed=usual.seconds + usual.passed + seconds)

    def _compare(self) -> None:
        before, alone, after = self._before.mean, self._alone.mean, self._usual.mean
        self._least = min(self._least, before - alone, after - alone)
        self._differences = [*self._differences[1 - _KEPT :], (before + after) / 2 - alone]
        self._alone = _Calls()
