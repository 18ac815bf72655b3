"""How much slower a step is while its data are made than while none are."""

import math
import statistics

_STEPS, _WARM = 16, 4  # to train on; before them, to be as warm as the others
_LEAST = 4  # calls on either side
_KEPT = 25  # comparisons, of those that came last
_ENOUGH = 3  # comparisons, to know how much is chance
_OFTEN, _SELDOM = 4, 50  # times the seconds that one cost pass until the next
_ERRORS = 2.0


class Slowing:
    """How much slower a call is while batches are made than while none are.

    Producers need cores, and Python's lock, which the step then lacks. So now and then some batches
    are taken ahead, and then trained on, in their order, while none is asked for: the producers
    have filled their buffers and rest. These calls stand between calls before them and after them,
    so that a machine which gets faster or slower is not taken for producers that rest.

    Attributes:
        number: of calls to hold for. As many after them count for nothing: they have what was
            stored meanwhile.

    Args:
        together: steps a call.
    """

    def __init__(self, together: int = 1) -> None:
        self._warm = max(1, _WARM // together)
        self.number = self._warm + max(2, _STEPS // together)
        self._neighbours = max(_LEAST, _STEPS // together)
        self._differences: list[float] = []  # to the mean of both neighbours
        self._least = math.inf  # difference to one of them
        self._before: list[float] = []
        self._alone: list[float] = []
        self._usual: list[float] = []  # since the last that were held
        self._spent, self._warming, self._skip, self._useless = 0.0, 0, 0, False

    @property
    def known(self) -> bool:
        return bool(self._differences)

    @property
    def seconds(self) -> float:
        """More for a call that has not its batches already; 0 while unknown, and for what may be
        chance. Of one or two comparisons it is the least that a neighbour says."""
        if len(self._differences) < _ENOUGH:
            return max(0.0, self._least) if self.known else 0.0
        more = statistics.median(self._differences)
        # The standard error of a median is 1.25 times that of a mean.
        error = 1.25 * statistics.stdev(self._differences) / math.sqrt(len(self._differences))
        return more if more > _ERRORS * error else 0.0

    def calls_to_hold(self, left: float) -> int:
        """0 for most calls: it costs what making and training at one time would have gained."""
        if self._useless or left < 2 * self.number or len(self._usual) < self._neighbours:
            return 0
        times = _OFTEN if len(self._differences) < _ENOUGH else _SELDOM
        return self.number if sum(self._usual) >= times * self._spent else 0

    def hold(self, calls: int, seconds: float) -> None:
        """So many calls, fewer than asked for if their batches are large, have them now, after
        some seconds."""
        self._before, self._alone, self._usual = self._usual, [], []
        self._spent, self._warming, self._skip = seconds, self._warm, calls
        self._useless = calls <= self._warm

    def begin_epoch(self) -> None:
        self._skip = 0

    def note(self, seconds: float | None, held: bool) -> bool:
        """Of a call, without the time to take its batches; None where it was not measured.

        Returns: whether the call is one like any other, which had no batches stored for it.
        """
        if held and self._warming:
            self._warming -= 1
        elif held and seconds is not None:
            self._alone.append(seconds)
        elif self._skip and not held:
            self._skip -= 1
        elif not held:
            if seconds is not None:
                self._usual.append(seconds)
                if self._alone and len(self._usual) == self._neighbours:
                    self._compare()
            return True
        return False

    def _compare(self) -> None:
        before, alone, after = map(statistics.fmean, (self._before, self._alone, self._usual))
        self._least = min(self._least, before - alone, after - alone)
        self._differences = [*self._differences[1 - _KEPT :], (before + after) / 2 - alone]
        self._alone = []
