"""What a race found: kept as JSON, shown as tables."""

import contextlib
import json
import math
import statistics
from datetime import datetime
from pathlib import Path
from typing import Any

from labkit import __version__
from labkit.instruments.keep import write
from labkit.instruments.race.entry import Contestant
from labkit.instruments.race.lane import ALONE, CONSTANT
from labkit.machine import describe_machine

FORMAT, TIE = 1, 0.97
UNTUNED = ("labkit auto", "labkit as diagnosed")
_HEAD = (
    "| contestant | steps/s | of the best (spread) | of the bound | CPU s/step | memory MB "
    "| first batch s | lines | setting |\n|---|---|---|---|---|---|---|---|---|"
)


def _median(values: list[float]) -> float:
    return float(statistics.median(values))


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _expect_the_same(what: str, was: Any, now: Any) -> None:
    if was != now:
        raise ValueError(
            f"race: expected to go on with the same race, but {what} was {was!r} and is {now!r}. "
            "Begin anew, with another file."
        )


class Results:
    """The results of `labkit.race`.

    Attributes:
        data: all of it, as it is saved: `rows`, by name, each with the `rounds` of each contestant
            and of what the bound is made of, and with who was `left_out`, and why.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    @staticmethod
    def of(rounds: int, seconds: float) -> "Results":
        machine = {**describe_machine(), "labkit": __version__}
        date = datetime.now().astimezone().isoformat(timespec="seconds")
        return Results(
            {"format": FORMAT, "machine": machine, "date": date, "rounds": rounds,
             "seconds": seconds, "complete": False, "contestants": {}, "rows": {}}
        )  # fmt: skip

    @staticmethod
    def load(path: str | Path) -> "Results":
        """Those that `save` wrote. Raises ValueError where the file is something else."""
        data = None
        with contextlib.suppress(ValueError):
            data = json.loads(Path(path).read_text())
        if not isinstance(data, dict) or data.get("format") != FORMAT or "rows" not in data:
            raise ValueError(f"race: expected a file that labkit.race wrote, got {path}.")
        return Results(data)

    def after(self, path: str | Path) -> "Results":
        """Those of a file, to go on with as these would have begun. Raises ValueError where what is
        the same for a whole race differs."""
        old, new = Results.load(path), self.data
        _expect_the_same("seconds", old.data["seconds"], new["seconds"])
        before, now = old.data["machine"], new["machine"]
        for name in {**before, **now}:
            _expect_the_same(name, before.get(name, "not there"), now.get(name, "not there"))
        rounds = max(new["rounds"], old.data["rounds"])
        dates = [*old.data.get("resumed", []), new["date"]]
        return Results({**old.data, "rounds": rounds, "resumed": dates, "complete": False})

    def save(self, path: str | Path) -> None:
        """Writes them as JSON."""
        write("race", path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")

    # ---------------------------------------------------------------- while it runs

    def enter(self, place: str, row: str, n: int) -> None:
        new = {"row": row, "workers": n, "rounds": {}, "left_out": {}}
        self.data["rows"].setdefault(place, new)

    def contestant(self, place: str, entry: Contestant, n: int, reason: str) -> None:
        """Raises ValueError where that is not so in the race that this one goes on with."""
        if not entry.missing():
            told = {
                "setting": entry.setting, "version": entry.version, "lines": entry.lines,
                "own_number": entry.own_number, "alone": entry.alone, "in_fit": entry.in_fit,
            }  # fmt: skip
            before = self.data["contestants"].setdefault(entry.name, told)
            for what, now in told.items():
                _expect_the_same(f"{entry.name}'s {what}", before.get(what), now)
        row, name, now = self.data["rows"][place], entry.name, reason or "to run"
        was = "to run" if name in row["rounds"] else row["left_out"].get(name, now)
        _expect_the_same(f"in {place}, {name}", was, now)
        if reason:
            row["left_out"][name] = reason
        else:
            row["rounds"].setdefault(name, [])

    def note(self, place: str, name: str, number: int, found: dict[str, Any]) -> None:
        runs = self.data["rows"][place]["rounds"].setdefault(name, [])
        runs[:] = [run for run in runs if run["round"] != number]  # of a round that was not whole
        runs.append({"round": number, **found})

    def has(self, place: str, name: str, number: int) -> bool:
        runs = self.data["rows"][place]["rounds"].get(name, [])
        return any(run["round"] == number for run in runs)

    def end(self) -> None:
        """Notes whether every round of every row has run."""
        numbers, rows = range(self.data["rounds"]), self.data["rows"]
        names = [(place, name) for place in rows for name in rows[place]["rounds"]]
        self.data["complete"] = all(self.has(*at, number) for at in names for number in numbers)

    # ---------------------------------------------------------------- what it says

    def rates(self, place: str, name: str) -> dict[int, float]:
        """Steps/s of a contestant in a row, by round; rounds that failed are not there."""
        runs = self.data["rows"][place]["rounds"].get(name, [])
        return {r["round"]: r["steps_per_second"] for r in runs if "error" not in r}

    def column(self, place: str, name: str, what: str) -> float | None:
        """The median over the rounds; None where there is nothing."""
        runs = self.data["rows"][place]["rounds"].get(name, [])
        values = [r[what] for r in runs if r.get(what) is not None]
        return _median(values) if values else None

    def ranked(self, place: str) -> list[str]:
        """The contestants that ran in a row, the fastest first."""
        names = [n for n in self.data["rows"][place]["rounds"] if n not in (CONSTANT, ALONE)]
        names = [n for n in names if self.rates(place, n)]
        return sorted(names, key=lambda n: -_median(list(self.rates(place, n).values())))

    def ratio(self, place: str, name: str, other: str) -> tuple[float, float, float]:
        """The median of the ratios of a round each, their least and their most; NaN for none."""
        mine, theirs = self.rates(place, name), self.rates(place, other)
        pairs = [mine[r] / theirs[r] for r in mine if theirs.get(r)]
        return (_median(pairs), min(pairs), max(pairs)) if pairs else (float("nan"),) * 3

    def is_tie(self, place: str, name: str, other: str) -> bool:
        """Within 3 %, or the spread of the rounds holds both outcomes."""
        middle, low, high = self.ratio(place, name, other)
        return TIE <= middle <= 1 / TIE or (low < 1 < high)

    def bound(self, place: str, name: str) -> float | None:
        """Steps/s that nobody exceeds: min(1 / step, n / wall, cores / (cpu + step's cpu)), with
        the wall and processor seconds of a batch alone. Who chooses n has no second term, and who
        has no workers makes batch and step in turn. Asymptotic bounds: Denning and Buzen, "The
        Operational Analysis of Queueing Network Models", 1978."""
        rate, alone = (self.column(place, part, "steps_per_second") for part in (CONSTANT, ALONE))
        used, cpu = (self.column(place, part, "cpu_seconds_per_step") for part in (CONSTANT, ALONE))
        if not rate or not alone or used is None or cpu is None:
            return None
        entry = self.data["contestants"][name]
        cores = self.data["machine"]["cores"] / max(used + cpu, 1e-9)
        if entry["alone"] and not entry["version"]:
            return min(1 / (1 / rate + 1 / alone), cores)
        n = 1 if entry["alone"] else self.data["rows"][place]["workers"]
        return min([rate, cores] + [n * alone] * (not entry["own_number"]))

    def untuned(self, place: str) -> str:
        """How the best of labkit's that nobody has tuned stands in a row."""
        ranked = self.ranked(place)
        ours = [name for name in ranked if name in UNTUNED]
        if not ours:
            return ""
        rivals = [name for name in ranked if not name.startswith("labkit")]
        if not rivals:
            return ""
        middle, low, high = self.ratio(place, ours[0], rivals[0])
        tie = " (a tie)" if self.is_tie(place, ours[0], rivals[0]) else ""
        return f"{ours[0]} / {rivals[0]}: {middle:.2f}, {low:.2f} to {high:.2f}{tie}"

    def table(self, place: str) -> str:
        """A row's contestants, the fastest first, in Markdown."""
        row, ranked = self.data["rows"][place], self.ranked(place)
        # In files of before there was shuffle=False for all rows.
        mixes = "labkit mixes samples, the others do not"
        mixing = mixes if row.get("mixed_by_labkit") else "nobody mixes samples"
        lines = [f"### {place}", "", mixing, "", _HEAD]
        for name in ranked:
            # Who chooses the number of workers is no measure for who was told it.
            own = self.data["contestants"][name]["own_number"]
            group = [n for n in ranked if self.data["contestants"][n]["own_number"] == own]
            lines.append(self._line(place, name, group[0]))
        for name, runs in row["rounds"].items():
            errors = [run["error"] for run in runs if "error" in run]
            if errors:
                lines.append(f"| {name} | failed {len(errors)} of {len(runs)}: {errors[0]} |||||||")
        for why in dict.fromkeys(row["left_out"].values()):
            names = ", ".join(name for name, its in row["left_out"].items() if its == why)
            lines.append(f"| {names} | not run: {why} ||||||||")
        ready = self.column(place, CONSTANT, "steps_per_second")
        lines += ["", f"Ready batches over and over: {ready:.4g} steps/s." if ready else ""]
        untuned = self.untuned(place)
        return "\n".join([*lines, *([f"Untuned labkit: {untuned}."] if untuned else []), ""])

    def _line(self, place: str, name: str, best: str) -> str:
        entry, bound = self.data["contestants"][name], self.bound(place, name)
        rate = _median(list(self.rates(place, name).values()))
        middle, low, high = self.ratio(place, name, best)
        standing = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        standing += ", a tie" if name != best and self.is_tie(place, name, best) else ""
        cpu, memory = (
            self.column(place, name, what) for what in ("cpu_seconds_per_step", "memory")
        )
        first = self.column(place, name, "first_batch")
        kind = " of those that choose n" if entry["own_number"] else ""
        cells = [
            name, f"{rate:.4g}", standing if name != best else f"**first**{kind}",
            f"{rate / bound:.2f}" if bound else "", f"{cpu:.4f}" if cpu is not None else "",
            f"{memory / 1e6:.0f}" if memory else "", f"{first:.2f}" if first is not None else "",
            str(entry["lines"]), f"{entry['setting']}; {entry['version'] or 'labkit'}",
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"

    def __str__(self) -> str:
        machine = self.data["machine"]
        state = "" if self.data["complete"] else " Not complete."
        state += "".join(f" Gone on with {date}." for date in self.data.get("resumed", ()))
        head = (
            f"Race of {self.data['date']} on {machine['processor']}, {machine['cores']} cores, "
            f"TensorFlow {machine['tensorflow']}; {counted(self.data['rounds'], 'round')} of "
            f"{self.data['seconds']:g} s, medians; memory: PSS of all processes, the most of three "
            f"looks.{state}\n"
        )
        return "\n".join([head, *map(self.table, self.data["rows"])])

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return str(self)

    def plot(self) -> Any:
        """A matplotlib figure: each contestant's steps/s as a share of the best, row by row."""
        from labkit.instruments.race.picture import picture

        shares = {}
        for place in self.data["rows"]:
            ranked = self.ranked(place)
            if ranked:
                ratios = {n: self.ratio(place, n, ranked[0]) for n in ranked}
                # By what is drawn; NaN, of no round that both have run, at the end.
                order = sorted(ratios, key=lambda n: (math.isnan(ratios[n][0]), -ratios[n][0]))
                shares[place] = {n: ratios[n] for n in order}
        return picture(shares, self.data["machine"], TIE)
