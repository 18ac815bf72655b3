"""Steady rates of several runs, side by side: without what lay in store, and in turn."""

import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

Rate = Callable[[int], float]  # takes that many steps, returns steps/s


def drain(runner: Any, step: Rate, most: int = 200) -> None:
    """Takes steps until a queue holds what it must keep; gives up after `most`, and where it does
    not become less in more steps than workers have batches ready: there the model is the slower."""
    held = [runner.depth()]
    # A thread has three ready, which at half of the model's rate keep a queue full for six steps.
    many = 10 + 8 * runner.n_workers
    while held[-1] >= runner.min_after_dequeue + runner.batch_size and len(held) <= most:
        if len(held) > many and held[-1] >= held[-1 - many]:
            return
        step(1)
        held.append(runner.depth())


def in_turn(
    runs: Mapping[Any, AbstractContextManager[Rate]], steps: Mapping[Any, int], rounds: int, by: Any
) -> tuple[dict[Any, list[float]], dict[Any, list[float]]]:
    """Steps/s of runs that are open together and take turns of so many `steps`, round by round and
    printed; and beside each of them, those of the run `by`, the mean of before and after."""
    others = [name for name in runs if name != by]
    rates: dict[Any, list[float]] = {name: [] for name in others}
    beside: dict[Any, list[float]] = {name: [] for name in others}
    with ExitStack() as stack:
        opened = {name: stack.enter_context(run) for name, run in runs.items()}
        for name, rate in opened.items():
            rate(min(steps[name], 20))  # the first steps of a session prepare it
        for turn in range(1, rounds + 1):
            before = opened[by](steps[by])
            for name in others:
                rates[name].append(opened[name](steps[name]))
                after = opened[by](steps[by])
                beside[name].append(statistics.mean((before, after)))
                before = after
            told = (f"{name}: {rate[-1]:.3g}" for name, rate in rates.items())
            print(f"round {turn} of {rounds}, steps/s:", ", ".join(told))
    return rates, beside
