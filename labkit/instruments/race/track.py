"""`labkit.race`: starts every contestant anew in a process of its own, interleaved, in rounds."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from labkit.checks import expect, is_integer, is_number
from labkit.engine import cluster
from labkit.engine.interrupts import held_back
from labkit.instruments.race import group, lane
from labkit.instruments.race.entry import CONTESTANTS, Contestant
from labkit.instruments.race.lane import ALONE, CONSTANT, Task
from labkit.instruments.race.table import Results, counted
from labkit.instruments.race.work import Own, Row
from labkit.instruments.race.work import rows as all_rows
from labkit.machine import usable_cores

_SETTLE, _ADAPT, _START = 2.0, 8.0, 0.7  # seconds to warm up; to find a number; a process's start
_IMPORTS = 6.0  # seconds that a process takes to import and to build the model, about
_PATIENCE = 120.0  # seconds beyond what a run should take
_RAY = {"RAY_USAGE_STATS_ENABLED": "0", **cluster.SLOW}
_SHORT = 40  # letters of a folder in which Ray's sockets have names that the system takes


class Heat(NamedTuple):
    """One run that is to come."""

    row: Row
    n: int
    name: str

    def settle(self, seconds: float) -> float:
        """Seconds to warm up in, where `seconds` are counted."""
        entry = CONTESTANTS.get(self.name)
        if entry is None or not entry.own_number:
            started = _START * self.n if entry is not None and entry.processes else 0.0
            return min(_SETTLE, seconds) + started
        return min(_ADAPT, 4 * seconds)

    def takes(self, seconds: float) -> float:
        """Seconds of the run as a whole, about."""
        imports = 1.5 if self.name == ALONE else _IMPORTS
        entry = CONTESTANTS.get(self.name)
        return imports + (entry.before if entry else 0.0) + self.settle(seconds) + seconds + 1.0

    @property
    def place(self) -> str:
        """The row and its number of workers, as the table has it."""
        return f"{self.row.name}, {counted(self.n, 'worker')}"

    @property
    def places(self) -> list[str]:
        """Those that its result is for: what the bound is made of does not depend on `n`."""
        same = self.name in (CONSTANT, ALONE)
        return [self._replace(n=n).place for n in (self.row.workers if same else (self.n,))]


def race(
    iterator: Any = None,
    step: Any = None,
    *,
    rows: Iterable[str] | None = None,
    contestants: Iterable[str] | None = None,
    rounds: int = 3,
    seconds: float = 3.0,
    json: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Results:
    """Runs one generator and one model through every way of feeding that there is on this machine.

    Each run is a process of its own, started anew; the contestants of a row take turns, `rounds`
    times, and what a run has started is ended before the next one begins.

    Args:
        iterator: your iterator factory, as for `QueueRunner`. Default: labkit's own rows.
        step: a training step, called as step(batch) or step(x, y); a compiled Keras model; or the
            seconds per step. It goes to other processes by cloudpickle. Default: labkit's CNN, for
            images `[batch, height, width, channels]` and one-hot labels `[batch, 10]`.
        rows: parts of the names of the rows to run, as "JPEG"; "sleep 50:4" is that with 4 workers
            alone. Default: all.
        contestants: parts of the names of the contestants to run, as "labkit"; a whole name is that
            one alone. Default: all.
        rounds: how often each contestant runs in each row.
        seconds: that are counted in each run, after a warm-up.
        json: a file for the results, written anew after each run.
        resume: go on with what that file has, of a race that was ended: with the same contestants,
            settings and machine; there may be more rows or rounds. A row's round that is not whole
            runs anew, since its runs are compared with each other.
        progress: print how long it will take, and each run.

    Returns:
        the results: print them, or look at `.data`; `.ranked`, `.ratio`, `.save` and `.plot`.

    Raises:
        ValueError: an argument is not as above, nothing bears a name that was given, or the file
            to go on with is of another race.
        TypeError: the iterator or the step cannot be sent to another process.
    """
    expect(is_integer(rounds, 1), "race: rounds must be an integer >= 1", rounds)
    expect(is_number(seconds) and seconds > 0, "race: seconds must be a number > 0", seconds)
    expect(json is not None or not resume, "race: resume needs json, the file to go on with", json)
    with (
        _ended_by_sigterm(),
        tempfile.TemporaryDirectory(prefix="labkit-race-", ignore_cleanup_errors=True) as folder,
    ):
        home = Path(folder)
        chosen = _rows(all_rows(home), rows) if iterator is None else [_own_row(iterator)]
        entered = _picked("contestants", CONTESTANTS, contestants)
        kind = "cnn" if step is None else "keras" if hasattr(step, "train_on_batch") else "other"
        results = Results.of(rounds, seconds)
        if json is not None and resume and Path(json).exists():
            results = results.after(json)
        heats = list(_heats(chosen, entered, kind, results))
        left = [at for number in range(rounds) for at in _left(heats, number, results)]
        if progress:
            print(_announced(left, results, rounds, seconds), flush=True)
        for at, (number, heat) in enumerate(left):
            found = run(heat, step, seconds, home)
            for place in heat.places:
                results.note(place, heat.name, number, found)
            if progress:
                said = f"{at + 1}/{len(left)} {heat.place}: {heat.name}: {_said(found)}"
                print(said, flush=True)
            if json is not None:
                results.save(json)
        results.end()
        if json is not None:
            results.save(json)
        return results


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exception would, where nobody else has a use for it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what it has started is being ended
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _own_row(iterator: Any) -> Row:
    from labkit.sources import as_factory

    factory = as_factory(iterator)
    name = getattr(iterator, "__qualname__", type(iterator).__name__)
    return Row(name, Own(factory), (usable_cores(),))


def _rows(known: list[Row], parts: Iterable[str] | None) -> list[Row]:
    """Those wanted, each with the numbers of workers that are."""
    parts = [parts] if isinstance(parts, str) else None if parts is None else list(parts)
    numbers: dict[str, set[int]] = {row.name: set() for row in known}
    for part in [""] if parts is None else parts:
        name, _, number = part.partition(":") if isinstance(part, str) else (part, "", "")
        for row in _picked("rows", {row.name: row for row in known}, [name]):
            fits = not number or (number.isdecimal() and int(number) in row.workers)
            expect(fits, f"race: {row.name} has {row.workers} workers, not what was named", part)
            numbers[row.name] |= {int(number)} if number else set(row.workers)
    return [
        replace(row, workers=tuple(n for n in row.workers if n in numbers[row.name]))
        for row in known
        if numbers[row.name]
    ]


def _picked(what: str, known: dict[str, Any], parts: Iterable[str] | None) -> list[Any]:
    if parts is None:
        return list(known.values())
    parts = [parts] if isinstance(parts, str) else list(parts)
    wanted: set[str] = set()
    for part in parts:
        low = part.lower() if isinstance(part, str) else None
        whole = {name for name in known if name.lower() == low}
        found = whole or {name for name in known if low is not None and low in name.lower()}
        expect(bool(found), f"race: {what} must be parts of the names {', '.join(known)}", part)
        wanted |= found
    return [known[name] for name in known if name in wanted]


def _heats(
    chosen: list[Row], entered: list[Contestant], step: str, results: Results
) -> Iterator[Heat]:
    for row in chosen:
        for n in row.workers:
            place = Heat(row, n, "").place
            results.enter(place, row.name, n)
            if n == row.workers[0]:
                yield from (Heat(row, n, name) for name in (CONSTANT, ALONE))
            for entry in CONTESTANTS.values():
                reason = entry.left_out(row, n, usable_cores(), step)
                reason = reason if entry in entered else "it was not entered"
                if not reason and (entry.alone or entry.own_number) and n != row.workers[0]:
                    first = Heat(row, row.workers[0], "").place
                    reason = f"runs once, in the row {first}: n is nothing to it"
                results.contestant(place, entry, n, reason)
                if not reason:
                    yield Heat(row, n, entry.name)


def _left(heats: list[Heat], number: int, results: Results) -> Iterator[tuple[int, Heat]]:
    """What is to run in a round. Each begins with another contestant, so that none always follows
    the same one."""
    for place in dict.fromkeys(heat.place for heat in heats):
        those = [heat for heat in heats if heat.place == place]
        if not all(results.has(place, heat.name, number) for heat in those):
            shift = number * max(1, len(those) // 3) % len(those)
            yield from ((number, heat) for heat in those[shift:] + those[:shift])


def _announced(left: list[tuple[int, Heat]], results: Results, rounds: int, seconds: float) -> str:
    took = sum(heat.takes(seconds) for _, heat in left)
    names = {heat.name for _, heat in left} - {CONSTANT, ALONE}
    absent = sorted({r for row in results.data["rows"].values() for r in row["left_out"].values()})
    absent = [reason for reason in absent if reason.endswith("is not installed")]
    return (
        f"labkit.race: {counted(len(results.data['rows']), 'row')}, "
        f"{counted(len(names), 'contestant')}, {counted(rounds, 'round')}: "
        f"{counted(len(left), 'run')}, about "
        + (f"{took:.0f} s." if took < 120 else f"{took / 60:.0f} min.")
        + "".join(f"\nlabkit.race: not run: {reason}." for reason in absent)
    )


def _said(found: dict[str, Any]) -> str:
    return found.get("error") or f"{found['steps_per_second']:.4g} steps/s"


def run(
    heat: Heat, step: Any, seconds: float, home: Path, steps: int | None = None
) -> dict[str, Any]:
    """Runs one contestant in a process of its own; what it found, or {"error": why not}. All that
    it has started is ended, and waited for, when this returns."""
    mark = uuid.uuid4().hex
    task_file, result_file, log = (home / f"{mark}.{end}" for end in ("task", "json", "log"))
    task = Task(heat.name, heat.row, heat.n, step, heat.settle(seconds), seconds, steps)
    try:
        task_file.write_bytes(_pickled(task))
    except Exception as error:
        raise TypeError(
            "race: the iterator and the step are sent to a process of each contestant's own, and "
            f"cannot be pickled ({error}). Open files, and make models, inside of them."
        ) from error
    command = [sys.executable, "-m", lane.__name__, str(task_file), str(result_file)]
    most = heat.takes(seconds) + _PATIENCE
    began = time.monotonic()
    with log.open("wb") as file:
        try:
            lap = subprocess.Popen(
                command, env=_environment(mark, home), stdin=subprocess.DEVNULL, stdout=file,
                stderr=file, start_new_session=True,
            )  # fmt: skip
            lap.wait(most)
            left = 2.0
        except subprocess.TimeoutExpired:
            left = 0.0
        except BaseException:
            with held_back():
                group.end(mark, 0.0)
            raise
        try:
            stubborn = group.end(mark, left)
        finally:
            lap.wait()
    if result_file.exists():
        found = json.loads(result_file.read_text())
    elif not left:
        found = {"error": f"no result within {most:.0f} s, expected one in {most - _PATIENCE:.0f}"}
    else:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        found = {"error": f"its process ended with {lap.returncode}: {''.join(last)[:200]}"}
    found["took"] = round(time.monotonic() - began, 1)
    if stubborn:
        found["left_running"] = stubborn
    return found


def _environment(mark: str, home: Path) -> dict[str, str]:
    path = os.pathsep.join(part for part in sys.path if part)
    # Ray's servers run code for whoever has the token.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    temporary = {"RAY_TMPDIR": str(home)} if len(str(home)) < _SHORT else {}
    own = {group.MARK: mark, "PYTHONPATH": path}
    return {**os.environ, **_RAY, **token, **temporary, **own}


def _pickled(task: Task) -> bytes:
    import cloudpickle

    return cloudpickle.dumps(task)
