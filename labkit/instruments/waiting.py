"""Steps of training, how much of them was waiting for data, and what that means."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# "Not", "moderately" and "highly input-bound" as in the input-pipeline analyzer of TensorFlow's
# profiler: https://www.tensorflow.org/guide/profiler#input_pipeline_analyzer
MODERATE, HIGH = 0.05, 0.20


@dataclass
class Waiting:
    """Steps of training, and how much of them was waiting for data.

    Attributes:
        steps: how many.
        seconds: that they took, from end to end.
        waited: seconds of `measured` spent waiting for data.
        measured: seconds of the calls, each of `steps_per_execution` steps, that were measured or
            that those stand for: on a GPU one of ten is, or one in 0.1 s.
        calls: that were measured, or stood for.
        slow: seconds of each call by which those who make the data slow the step itself; of several
            steps a call, with the waiting for them.
    """

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    measured: float = 0.0
    calls: int = 0
    slow: float = 0.0

    @property
    def share(self) -> float:
        """What the data cost, 0 to 1: waiting, and slower steps. NaN while nothing was measured."""
        lost = self.waited + self.slow * self.calls
        return min(1.0, max(0.0, lost / self.measured)) if self.measured else math.nan

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.seconds else math.nan

    def add(
        self, steps: int, seconds: float, waited: float | None, measured: float, calls: int = 1
    ) -> None:
        """`waited` is None for steps that were counted but not measured."""
        self.steps += steps
        self.seconds += seconds
        if waited is not None:
            self.waited += waited
            self.measured += measured
            self.calls += calls

    def __str__(self) -> str:
        if not self.measured:
            return "too few steps to tell, without the first, which compiles"
        line = (
            f"{self.seconds:.1f} s, {_rate(self.steps_per_second)} steps/s, "
            f"{self.share:.0%} waiting for data"
        )
        if self.share < MODERATE:
            return line
        slowed = self.slow * self.calls / self.measured
        if self.waited and slowed >= MODERATE:  # of several steps a call they are not told apart
            line += f" ({slowed:.0%} as steps that making them slows down)"
        # Who waits for all but a hundredth of the time has no rate that could be told from noise.
        most = self.steps_per_second / max(1 - self.share, 0.01)
        return f"{line}; {_rate(most)} steps/s without waiting"


everything = Waiting()  # of this process, by whatever it was measured


class Counted(Waiting):
    """Steps that count in `everything`, too."""

    def add(
        self, steps: int, seconds: float, waited: float | None, measured: float, calls: int = 1
    ) -> None:
        super().add(steps, seconds, waited, measured, calls)
        # With what is known by now of slower steps, which counts for the share as well.
        lost = None if waited is None else waited + self.slow * calls
        everything.add(steps, seconds, lost, measured, calls)


class RecentWaiting:
    """A probe for `UsageMonitor`: the share of waiting, 0 to 1, of all that was measured in this
    process since its last call; NaN where no step has ended."""

    def __init__(self) -> None:
        self._began = self._seen = everything.waited, everything.measured

    def __call__(self) -> float:
        then, self._seen = self._seen, (everything.waited, everything.measured)
        return _share(then, self._seen)

    @property
    def share(self) -> float:
        """Of all that it has seen."""
        return _share(self._began, self._seen)


def _share(then: tuple[float, float], now: tuple[float, float]) -> float:
    waited, measured = now[0] - then[0], now[1] - then[1]
    return min(1.0, max(0.0, waited / measured)) if measured > 0 else math.nan


def verdict(share: float, next_step: str) -> str:
    """A line on a share of waiting: how bad it is by the profiler's limits; another: what to do."""
    if math.isnan(share):
        return "no verdict: too few steps were seen, without the first, which compiles"
    if share < MODERATE:
        return f"not input-bound ({share:.0%} waiting, under {MODERATE:.0%}): the data keep up"
    degree = "highly" if share > HIGH else "moderately"
    limits = f"over {HIGH:.0%}" if share > HIGH else f"{MODERATE:.0%} to {HIGH:.0%}"
    return f"{degree} input-bound ({share:.0%} waiting, {limits}).\nNext: {next_step}"


NEXT_STEP = "labkit.diagnose(factory, model) tells the cure"


def total(epochs: Iterable[Waiting]) -> Waiting:
    """Several epochs as one."""
    result = Waiting()
    slowed = 0.0
    for one in epochs:
        result.add(one.steps, one.seconds, one.waited, one.measured, one.calls)
        slowed += one.slow * one.calls
    result.slow = slowed / max(1, result.calls)
    return result


def _rate(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
