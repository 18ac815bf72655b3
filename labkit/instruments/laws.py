"""What workers can bring, predicted from what a batch and a step cost, and said in words.

The prediction is the operational laws of queueing (P. J. Denning, J. P. Buzen, "The operational
analysis of queueing network models", 1978): no rate can exceed any of its asymptotic bounds. Where
workers and training step get into each other's way the laws are too hopeful, so each kind of
worker is also run together with the model, in a few numbers, and that corrects them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass
class Demands:
    """What a batch and a step cost, in seconds: the whole input of the prediction.

    Attributes:
        wall: of the generator, per batch, alone in one worker.
        cpu: processor seconds of the generator per batch.
        lock: seconds per batch during which no second worker of this kind can go on: the inverse
            of the best rate that several reached. For threads that is chiefly Python's lock.
        step: of the model, per step, on a repeated batch.
        step_cpu: processor seconds of the model per step.
        cores: that this process may use.
    """

    wall: float
    cpu: float
    lock: float
    step: float
    step_cpu: float
    cores: int


def bounds(n: int, demands: Demands) -> dict[str, float]:
    """Steps/s that n workers cannot exceed, by what sets each bound; the least of them governs."""
    d = demands
    return {
        "the generator": n / d.wall,
        "Python's lock": 1 / d.lock if n > 1 and d.lock > 0 else np.inf,
        "the cores": d.cores / max(d.cpu + d.step_cpu, 1e-9),
        "the model": 1 / d.step,
    }


def counts(limit: int) -> list[int]:
    """Numbers of workers to predict: the powers of two up to the limit, and the limit; 2 at least,
    since the second worker shows what sharing costs."""
    most = max(2, limit)
    return sorted({*(2**k for k in range(most.bit_length())), most})


def _ceiling(n: int, need: Demands) -> float:
    return min(value for name, value in bounds(n, need).items() if name != "the generator")


def _contended(n: int, need: Demands) -> bool:
    """Whether more than the generator's own time may decide with n workers."""
    return n / need.wall > 0.7 * _ceiling(n, need)


def to_try(numbers: list[int], need: Demands) -> list[int]:
    """The settings that are worth running together with the model: the first and the last in which
    workers only wait, and those in which they get into each other's way, up to four times as many
    as the law finds useful: more bring no news."""
    free = [n for n in numbers if not _contended(n, need)]
    useful = next((n for n in numbers if n / need.wall >= _ceiling(n, need)), numbers[-1])
    most = 4 * max(2, useful)
    return sorted({1, *free[-1:], *(n for n in numbers if n not in free and n <= most)})


def predict(
    numbers: list[int], need: Demands, measured: dict[int, float], margin: float, shares_lock: bool
) -> Iterator[tuple[int, float, float, float, str]]:
    """The law for every number of workers, corrected by the rates that were measured together.

    Yields number, steps/s, the least and the most that are likely, and what sets the bound.
    """
    law = {n: min(bounds(n, need).values()) for n in numbers}
    factors = {n: rate / law[n] for n, rate in measured.items()}
    crowded = [n for n in factors if n > 1 and _contended(n, need)]
    free = [n for n in factors if n not in crowded]
    for n in numbers:
        known = crowded if n > 1 and _contended(n, need) else free
        factor = float(np.interp(np.log2(n), np.log2(known), [factors[k] for k in known]))
        by = min(bounds(n, need), key=lambda name: bounds(n, need)[name])
        in_the_way = by == "the generator" and n > 1 and factor < 0.85 * factors[1]
        # Workers that have a lock each wait for each other as well: for cores.
        if in_the_way or by == "Python's lock":
            by = "Python's lock" if shares_lock else "the cores"
        rate = law[n] * factor
        yield n, rate, rate * max(0.0, 1 - margin), rate * (1 + margin), by


def nature(busy: float, sharing: float | None, apart: float | None) -> str:
    """What the generator does: `busy` cores alone; the gain of a second worker that shares Python's
    lock, and of one that does not; None where not measured."""
    if busy < 0.5 and (sharing is None or sharing > 1.4):
        return "waits"
    if busy > 1.4 or ((sharing or 1.0) < 1.4 and (apart or 2.0) < 1.3):
        return "uses all cores"
    if sharing is None:
        return "computes"
    return "holds the GIL" if sharing < 1.4 else "computes outside the GIL"


def verdict(
    nature: str, setting: str, rate: float, bound_by: str, model: float, serial: float, wall: float
) -> str:
    """One sentence: what bounds the training, and by how much. `rate`, `model` and `serial`, in
    steps/s, are of the setting, of the model alone and of a serial loop; `wall` as in Demands."""
    gain = rate / serial
    if serial > 0.95 * model or gain < 1.05:
        return (
            f"Model-bound: the model takes {model:.1f} steps/s, and the generator, which {nature}, "
            f"keeps up with {1 / wall:.0f} batches/s. Speed-up to be had: none, the model is the "
            "bottleneck."
        )
    left = ""
    if rate < 0.9 * model:
        left = f" Then {bound_by} will be the limit, at {rate / model:.0%} of the model's own rate."
    return (
        f"Input-bound: the model could take {model:.1f} steps/s, but with this generator, "
        f"which {nature}, a serial loop makes {serial:.1f} ({model / serial:.1f}x less). "
        f"{setting}: about {rate:.1f} steps/s, {gain:.1f}x faster.{left}"
    )
