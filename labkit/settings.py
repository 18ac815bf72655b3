"""What `labkit.train` and its command take: checked, filled in, and as JSON gives it back."""

from pathlib import Path
from typing import Any

import numpy as np

from labkit.checks import expect, is_folder_to_write, is_integer, is_number
from labkit.engine import KINDS
from labkit.engine.options import queue_sizes

PIPELINES = ("feed_dict", "queue", "constant")


def plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def check_settings(settings: dict[str, Any]) -> None:
    """Fills in the sizes of the queue. Raises ValueError, which names it, for an argument of
    `train` that is out of range."""

    def check(name: str, fits: bool, what: str) -> None:
        expect(fits, f"train: {name} must be {what}", settings[name])

    several = settings["n_workers"] == "auto" or is_integer(settings["n_workers"], 1)
    check("n_workers", several, "'auto' or an integer >= 1")
    for name in ("epochs", "steps", "batch_size"):
        check(name, is_integer(settings[name], 1), "an integer >= 1")
    check("pipeline", settings["pipeline"] in PIPELINES, f"one of {PIPELINES}")
    check("workers", settings["workers"] in KINDS, " or ".join(map(repr, KINDS)))
    settings["order"] = settings["order"] or ("fixed" if settings["checkpoint"] else "any")
    check("order", settings["order"] in ("any", "fixed"), "'any' or 'fixed'")
    every = settings["save_every"]
    check("save_every", every is None or is_integer(every, 1), "None or an integer >= 1")
    if settings["checkpoint"]:
        check("pipeline", settings["pipeline"] == "queue", "'queue' for a checkpoint")
    in_turn = settings["order"] == "any" or settings["n_workers"] != "auto"
    check("n_workers", in_turn, "a number for order='fixed', since workers take turns")
    check("seed", is_integer(settings["seed"], 0, 2**31 - 1), "an integer from 0 to 2**31 - 1")
    for name in ("delay", "learning_rate"):
        check(name, is_number(settings[name]), "a number >= 0")
    given = (settings[name] for name in ("batch_size", "capacity", "min_after_dequeue"))
    settings["capacity"], settings["min_after_dequeue"] = queue_sizes(*given)
    least = settings["min_after_dequeue"] + settings["batch_size"]
    enough = settings["min_after_dequeue"] >= 0 and settings["capacity"] >= least
    check("capacity", enough, f"at least min_after_dequeue + batch_size = {least}")
    for name in ("log_dir", "checkpoint"):  # made here, so the last of the checks
        folder = settings[name]
        check(name, not folder or is_folder_to_write(folder), "a folder that can be written to")
