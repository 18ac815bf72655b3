"""Steady rates of several runs, side by side: without what lay in store, and in turn."""

import statistics
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)
Rate = Callable[[int], float]  # takes that many steps, returns steps/s


def drain(runner: Any, step: Callable[[int], Any], most: int = 100) -> None:
    """Takes steps until a runner's queue holds no more than it must keep; gives up after `most`,
    and where ten steps have not made it less: there the model is the slower one."""
    held = [runner.depth()]
    while held[-1] >= runner.min_after_dequeue + runner.batch_size and len(held) <= most:
        if len(held) > 10 and held[-1] >= held[-11]:
            return
        step(1)
        held.append(runner.depth())


def in_turn(
    runs: Mapping[Name, AbstractContextManager[Rate]],
    steps: Mapping[Name, int],
    rounds: int,
    yardstick: Name,
) -> tuple[dict[Name, list[float]], dict[Name, list[float]]]:
    """Steps/s of runs that are open together and take turns: a machine that gets slower does so
    for all. Prints each round.

    Args:
        runs: by name; each gives the function that takes its steps.
        steps: of one measurement, by name.
        yardstick: the name of the run that is measured between each two of the others.

    Returns:
        by name, without the yardstick: the rates, round by round; and the yardstick's beside each
        of them, the mean of before and after.
    """
    others = [name for name in runs if name != yardstick]
    rates: dict[Name, list[float]] = {name: [] for name in others}
    beside: dict[Name, list[float]] = {name: [] for name in others}
    with ExitStack() as stack:
        opened = {name: stack.enter_context(run) for name, run in runs.items()}
        for name, rate in opened.items():
            rate(min(steps[name], 20))  # the first steps of a session prepare it
        for turn in range(1, rounds + 1):
            before = opened[yardstick](steps[yardstick])
            for name in others:
                rates[name].append(opened[name](steps[name]))
                after = opened[yardstick](steps[yardstick])
                beside[name].append(statistics.mean((before, after)))
                before = after
            told = (f"{name}: {rate[-1]:.3g}" for name, rate in rates.items())
            print(f"round {turn} of {rounds}, steps/s:", ", ".join(told))
    return rates, beside
