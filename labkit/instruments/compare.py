"""Reports that were saved: read back, and held against each other."""

import html
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from labkit import __version__
from labkit.engine import KINDS
from labkit.instruments.keep import FORMAT, About, members, typed
from labkit.instruments.report import Report

_SAME = "no change beyond the noise"
_DRIFTED = "as the model alone: the machine or the model is another"


def load_report(path: str | Path) -> Report:
    """A report as `Report.save` wrote it: it shows the same, `loaded` is True, and `about` and
    `date` tell where and when it was measured. There is no iterator and no model in it, so
    `runner()` and `check()` raise RuntimeError.

    Raises:
        ValueError: the file is something else, broken, or of a newer labkit.
        OSError: it cannot be read; FileNotFoundError, if it is not there.
    """
    text = Path(path).read_bytes()
    try:
        return _read(json.loads(text, parse_constant=_no_number))
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}".rstrip(".")
        raise ValueError(
            f"load_report: expected a file written by report.save, got {path} ({why})."
        ) from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _read(data: Any) -> Report:
    form = data.get("format") if isinstance(data, dict) else None
    if not isinstance(form, int) or not isinstance(data.get("report"), dict):
        raise ValueError("it has no 'format' number and no 'report'")
    if form != FORMAT:
        cure = "update labkit to read it" if form > FORMAT else "diagnose again"
        raise ValueError(f"its format is {form}, labkit {__version__} has {FORMAT}: {cure}")
    about = typed(About, data.get("about"), "about")
    missing = {"processor", "cores", "tensorflow"} - about.machine.keys()
    if missing:
        raise ValueError(f"about.machine has no {', '.join(sorted(missing))}")
    found = members(Report, data["report"], "report")
    unknown = {row.workers for row in found["rows"]} | found["problems"].keys()
    unknown -= KINDS.keys()
    if unknown:
        raise ValueError(f"labkit {__version__} has no workers of the kind {min(unknown)!r}")
    # It is marked in the table as one of the rows.
    best = found["rows"].index(found["best"])
    rates = [found["model_rate"], found["serial_rate"], found["wall"]]
    rates += [rate for row in found["rows"] for rate in (row.predicted, row.low, row.high)]
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError("its rates and times must be numbers above 0")
    found["best"] = found["rows"][best]
    report = Report(**found, iterator=None, model=None, repeated=None, saved=about)  # type: ignore[arg-type]
    str(report)  # what cannot be shown is found out here
    return report


@dataclass
class Change:
    """Steps/s before and after; `judged`: whether that is more than noise, in words."""

    name: str
    before: float
    after: float
    judged: str

    @property
    def ratio(self) -> float:
        return self.after / self.before


@dataclass(repr=False)
class Comparison:
    """Two reports side by side. Show it in a notebook, or print it.

    Attributes:
        before, after: the reports.
        changes: a `Change` each for the model alone, the serial loop, and what is recommended.
        warning: what differs beside the rates, so that they may not be comparable; "" if nothing.
    """

    before: Report
    after: Report
    changes: list[Change]
    warning: str

    def _cells(self) -> list[tuple[str, ...]]:
        rows = (
            (c.name, f"{c.before:.1f}", f"{c.after:.1f}", f"{c.ratio:.2f}", c.judged)
            for c in self.changes
        )
        return [("steps/s", "before", "after", "ratio", ""), *rows]

    def __str__(self) -> str:
        cells = self._cells()
        width = max(len(name) for name, *_ in cells)
        lines = [
            f"{name:{width}}{before:>10}{after:>10}{ratio:>8}   {judged}".rstrip()
            for name, before, after, ratio, judged in cells
        ]
        said = [f"Before: {self.before.verdict}", f"After: {self.after.verdict}", "", *lines]
        return "\n".join([*said, *([self.warning] if self.warning else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in self._cells()
        )
        said = {"Before": self.before.verdict, "After": self.after.verdict}
        verdicts = "".join(f"<p><b>{name}:</b> {html.escape(v)}</p>" for name, v in said.items())
        warning = f"<p>{html.escape(self.warning)}</p>" if self.warning else ""
        return f"{verdicts}<table>{rows}</table>{warning}"


def compare(before: Report | str | Path, after: Report | str | Path) -> Comparison:
    """What changed from one report to the other, and whether that is more than noise.

    A rate has changed if it did by more than nine of ten differences of two measurements would by
    chance. How wide that is each report knows: of a setting its range, of the model alone and the
    serial loop one as wide as that of a single worker; of two that are independent of one another,
    the squares add up. What has changed as the model alone has may be the machine's drift.

    Args:
        before, after: reports, or the files that `Report.save` wrote.

    Raises:
        TypeError: one is neither.
        ValueError, OSError: a file cannot be read, see `load_report`.
    """
    a, b = _report_of(before), _report_of(after)
    model = math.log(b.model_rate / a.model_rate)
    changes: list[Change] = []
    for (name, *one), (new_name, *other) in zip(_ranges(a), _ranges(b), strict=True):
        (low, rate, high), (new_low, new_rate, new_high) = one, other
        moved = math.log(new_rate / rate)
        # The half-widths of both, so that shifting one by the model's change asks the same again.
        up = moved > 0
        noise = math.hypot(
            math.log(new_rate / new_low if up else new_high / new_rate),
            math.log(high / rate if up else rate / low),
        )
        judged = f"{'faster' if moved > 0 else 'slower'}, beyond the noise"
        if abs(moved) <= noise:
            judged = _SAME
        elif changes and changes[0].judged != _SAME and abs(moved - model) <= noise:
            judged = _DRIFTED
        name = name if name == new_name else f"{name}, then {new_name.partition(': ')[2]}"
        changes.append(Change(name, rate, new_rate, judged))
    return Comparison(a, b, changes, _differences(a, b))


def _report_of(given: Any) -> Report:
    if isinstance(given, str | os.PathLike):
        return load_report(Path(given))
    if isinstance(given, Report):
        return given
    raise TypeError(
        "compare: expected two reports of labkit.diagnose, or the files that report.save wrote, "
        f"got {given!r:.200}."
    )


def _ranges(report: Report) -> list[tuple[Any, ...]]:
    """Names, and steps/s: the least, the predicted, the most."""
    one = report.rows[0]  # a single worker, in nobody's way
    less, more = one.low / one.predicted, one.high / one.predicted
    model, serial, best = report.model_rate, report.serial_rate, report.best
    loop = (less * serial, serial, more * serial)
    advice = ("recommended: your loop", *loop)
    if not report.leave:
        advice = (f"recommended: {best.name}", best.low, best.predicted, best.high)
    return [
        ("the model alone", less * model, model, more * model),
        ("a serial loop", *loop),
        advice,
    ]


def _differences(a: Report, b: Report) -> str:
    one, other = (
        {"labkit": r.about.labkit, "batch_size": r.batch_size, **r.about.machine} for r in (a, b)
    )
    found = [
        f"{name} {one.get(name, 'unknown')}, then {other.get(name, 'unknown')}"
        for name in {**one, **other}
        if one.get(name) != other.get(name)
    ]
    if not found:
        return ""
    return f"Not measured alike, so the change may come of that: {'; '.join(found)}."
