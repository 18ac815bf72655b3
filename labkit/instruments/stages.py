"""What each `labkit.stage` takes of a batch, and where to begin to make the generator faster."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from labkit.engine.stage import Times


@dataclass(frozen=True)
class Stage:
    """A stage of a batch as the generator yields it, in one worker alone.

    Attributes:
        name: as given to `labkit.stage`.
        seconds: of a batch, on average, without those of stages within this one.
        share: of the batch's time.
        spread: standard deviation of a batch's seconds.
        count: times that a batch enters it, on average.
    """

    name: str
    seconds: float
    share: float
    spread: float
    count: float


def stages_of(batches: Sequence[Times], seconds: float) -> list[Stage]:
    """Of each batch's times, and the seconds of all of them together; the slowest stage first."""
    found = []
    for name in {name for batch in batches for name in batch}:
        took, counts = zip(*(batch.get(name, (0.0, 0)) for batch in batches), strict=True)
        share = sum(took) / max(seconds, 1e-9)
        found.append(Stage(name, fmean(took), share, pstdev(took), fmean(counts)))
    return sorted(found, key=lambda stage: (-stage.seconds, stage.name))


def in_words(stages: Sequence[Stage]) -> str:
    """Which one to make faster first, and what the others take; "" where there are none."""
    if not stages:
        return ""
    first, *others = map(_one, stages)
    outside = max(0.0, 1 - sum(stage.share for stage in stages))
    then = "; ".join([*others, f"outside of stages {outside:.0%}"])
    return f"In a batch of the generator make faster first: {first}; then {then}."


def _one(stage: Stage) -> str:
    often = "" if 0.99 < stage.count < 1.01 else f", {stage.count:.2g} times"
    took = f"{_ms(stage.seconds)} ms, sd {_ms(stage.spread)}{often}"
    return f"{stage.name} {stage.share:.0%} ({took})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.2g}"
