"""What a diagnosis found: a sentence, a table, a plot, the cure, and the check of all that."""

import base64
import html
import io
import math
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from labkit import __version__
from labkit.checks import expect, is_number
from labkit.engine import KINDS
from labkit.instruments import keep, laws
from labkit.instruments.keep import About
from labkit.instruments.laws import Demands
from labkit.instruments.measure import Iterators, Model, Watch, together
from labkit.instruments.stages import Stage, in_words
from labkit.machine import describe_machine, onednn_note
from labkit.queue_runner import QueueRunner
from labkit.sources import whole

_WORTH = 0.75  # of the best rate, below which no range makes a smaller number the better one
_ALIKE = 0.92  # of the rate of the faster kind, from which the cheaper one is as good


@dataclass
class Row:
    """One setting: its predicted steps/s; the range that nine of ten measurements are in, if the
    machine stays as it is; what limits it; and what was measured, if it was."""

    workers: str
    n: int
    predicted: float
    low: float
    high: float
    bound_by: str
    measured: float | None = None

    @property
    def outside(self) -> bool:
        """Whether it was measured, and the range does not hold what came."""
        return self.measured is not None and not self.low <= self.measured <= self.high

    @property
    def name(self) -> str:
        kind = KINDS[self.workers]
        return f"{self.n} {kind.plural if self.n > 1 else kind.single or self.workers}"


class Checked(list[Row]):
    """The rows that `Report.check` has measured; the table was printed."""

    def __repr__(self) -> str:
        outside = sum(row.outside for row in self)
        return f"{len(self)} settings measured, {outside} of them outside the predicted range"


def best_of(rows: list[Row]) -> Row:
    """The smallest number of workers whose range overlaps with that of the fastest setting, unless
    it gives up more than a quarter of the rate; of two kinds the cheaper, unless it is slower. None
    for which there is too little memory; the least one, if there is for none."""
    rows = [row for row in rows if row.bound_by != laws.MEMORY] or rows[:1]
    top = max(rows, key=lambda row: row.predicted)
    as_good = [r for r in rows if r.high >= top.low and r.predicted >= _WORTH * top.predicted]
    least = [row for row in as_good if row.n == min(row.n for row in as_good)]
    fastest = max(row.predicted for row in least)
    return next(row for row in least if row.predicted >= _ALIKE * fastest)  # the cheapest first


@dataclass
class Report:
    """The diagnosis. Show it in a notebook, or print it.

    Attributes:
        nature: what the generator does: "waits", "holds Python's lock", "computes without holding
            Python's lock", "uses all cores", "costs next to nothing", "makes threads take turns"
            (it waits, under a lock of its own or for what serves one at a time), "makes workers
            take turns" (processes, too); "computes" where threads were not considered; "cannot be
            split among workers".
        rows: predicted steps/s for each kind and number of workers.
        best: the recommended row, see `best_of`.
        leave: no workers are worth it, the recommendation is to leave your loop as it is; `best` is
            then what `runner()` and `check()` would take nevertheless.
        model_rate, serial_rate: steps/s of the model alone, and of generator and model in turn.
        wall: seconds of a batch in a serial loop.
        demands: what a batch and a step cost, for each kind; no measurement contradicts them.
        seconds: what the diagnosis took.
        stages: what each `labkit.stage` takes of a batch in one worker of the recommended kind,
            the slowest first; see `labkit.instruments.stages.Stage`.
        ready_rate: steps/s of the recommended setting on batches that were ready.
        headroom: how many times as fast as recommended that is; of a loop that is left as it is,
            the model alone.
        waiting: the share of its time for which the model waits in a serial loop, 0 to 1.
        date: when it was made, ISO 8601.
        loaded: whether it was read from a file, by `labkit.load_report`.
        about: the machine, versions, and what else it tells; see `labkit.instruments.keep.About`.
    """

    nature: str
    rows: list[Row]
    best: Row
    demands: dict[str, Demands]
    model_rate: float
    serial_rate: float
    wall: float
    seconds: float
    iterator: Iterators = field(repr=False)
    model: Model = field(repr=False)
    repeated: Any = field(repr=False)
    batch_size: int = 0
    problems: dict[str, str] = field(default_factory=dict, repr=False)
    outside: str = field(default="", repr=False)
    stages: list[Stage] = field(default_factory=list)
    ready_rate: float = 0.0
    date: str = field(
        default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"),
        repr=False,
    )
    saved: About | None = field(default=None, repr=False)  # of one that was loaded

    @property
    def loaded(self) -> bool:
        return self.saved is not None

    @property
    def about(self) -> About:
        if self.saved is not None:
            return self.saved
        taken = None if self.model.puts_back else self.model.taken
        note, unsplit = onednn_note() or "", whole(self.iterator)
        return About(__version__, describe_machine(), note, unsplit, taken)

    @property
    def verdict(self) -> str:
        """What bounds the training, and by how much."""
        best = self.best
        said = laws.verdict(
            self.nature, best.name, best.predicted, best.bound_by,
            self.model_rate, self.serial_rate, self.wall,
        )  # fmt: skip
        for kind, why in self.problems.items():
            first_line = why.split("\n")[0]
            said += f" {KINDS[kind].plural.capitalize()} could not be tried: {first_line}"
        unsplit = self.about.unsplit
        return f"{said} {unsplit}" if unsplit else said

    @property
    def waiting(self) -> float:
        return max(0.0, 1 - self.serial_rate / self.model_rate)

    @property
    def speed_up(self) -> float:
        """Predicted rate of `best` over that of the plain serial loop."""
        return self.best.predicted / self.serial_rate

    @property
    def leave(self) -> bool:
        return laws.leaves(self.best.predicted, self.model_rate, self.serial_rate)

    @property
    def headroom(self) -> float:
        if self.leave:
            return self.model_rate / self.serial_rate
        return self.ready_rate / self.best.predicted

    def runner(self, **options: Any) -> QueueRunner:
        """A `QueueRunner` as recommended; `options` go to its constructor and win. Raises
        RuntimeError if the report was loaded from a file."""
        self._expect_live("runner")
        chosen = {"batch_size": self.batch_size, "n_workers": self.best.n}
        return QueueRunner(self.iterator, **{**chosen, "workers": self.best.workers, **options})

    def check(self, seconds: float = 4.0) -> list[Row]:
        """Runs the recommended setting and the nearest number of each kind beside it, prints the
        table, and returns their rows with `measured` set.

        Where one is outside its range, the model is run alone once more, and `notes` says why that
        may be. The model gets its state back afterwards, or `restore` is called, as for `diagnose`.

        Raises:
            RuntimeError: the report was loaded from a file.
            ValueError: seconds, for each setting, is not above 0.
            WorkerError: the iterator failed.
        """
        self._expect_live("check")
        expect_seconds("check", seconds)
        others = sorted(
            (r for r in self.rows if r is not self.best and r.bound_by != laws.MEMORY),
            key=lambda row: (row.workers == self.best.workers, -abs(math.log(row.n / self.best.n))),
        )
        # The last of each kind wins, which is the nearest in number.
        picked = Checked([self.best, *{row.workers: row for row in others}.values()])
        with self.model.kept():
            for row in picked:
                row.measured = self._measure(row, seconds)
            now = 0.0
            if any(row.outside for row in picked):
                now = 1 / self.model.run(self.repeated, Watch(min(seconds, 1.0)))[0]
        self.take_in(picked, now)
        print(self.table())
        return picked

    def _expect_live(self, what: str) -> None:
        if self.loaded:
            best = f"n_workers={self.best.n}, workers={self.best.workers!r}"
            raise RuntimeError(
                f"Report.{what}: expected a report that diagnose has just made, got one that was "
                "loaded from a file, where there is no iterator and no model. Call labkit.diagnose("
                "iterator, model) again, or take what it recommends: labkit.QueueRunner(iterator, "
                f"batch_size={self.batch_size}, {best})."
            )

    def _measure(self, row: Row, seconds: float) -> float:
        return together(self.iterator, self.model, row.workers, row.n, self.batch_size, seconds)

    def take_in(self, rows: list[Row], now: float) -> None:
        """Withdraws what the measured rows contradict, and says why one may be outside its range;
        `now`: steps/s of the model alone, measured with them."""
        then = self.model_rate
        seen = {(row.workers, row.n): row.measured for row in rows if row.measured is not None}
        self.demands = laws.corrected(self.demands, seen)
        self.model_rate = max([self.model_rate, *seen.values()])
        for row in self.rows:
            reached = row.measured or row.predicted
            row.bound_by = laws.limit(row.n, self.demands[row.workers], reached)
        outside = [row.name for row in rows if row.outside]
        self.outside = _why(", ".join(outside), then, now) if outside else ""

    def plot(self) -> Any:
        """Predicted steps/s over the number of workers, with what was measured as points."""
        from labkit.instruments import plots

        return plots.diagnosis(self, self.about.machine)

    def save(self, path: str | Path) -> None:
        """Writes JSON, which `labkit.load_report` and `labkit.compare` read: the file whole or not
        at all, in a folder that is there. Raises OSError."""
        keep.write("Report.save", path, keep.as_json(self))

    def to_html(self, path: str | Path) -> None:
        """Writes one HTML page with the plot in it, which opens anywhere, offline; as `save`."""
        keep.write("Report.to_html", path, keep.page(self))

    @property
    def notes(self) -> list[str]:
        """What else there is to know: that a callable step was really taken, how often, if nothing
        puts that right; the headroom; which stage to make faster; the memory that workers take;
        that oneDNN is off; why a measured value may be outside its range."""
        said, about = [], self.about
        if about.taken is not None:
            said.append(
                f"Your step was really taken, {about.taken:,} times, and has trained whatever "
                "it trains. Give diagnose(..., restore=) a function that puts that back."
            )
        if self.leave:
            said.append(laws.headroom("your loop", self.headroom, self.model_rate))
        elif self.ready_rate:
            said.append(laws.headroom(self.best.name, self.headroom, self.ready_rate))
        one = {kind: KINDS[kind].single or kind for kind in self.demands}
        most = {one[row.workers]: row.n for row in self.rows}  # the last of each kind
        memory = laws.memory({one[kind]: need for kind, need in self.demands.items()}, most)
        more = (in_words(self.stages), memory, about.onednn, self.outside)
        return said + [note for note in more if note]

    def _cells(self) -> list[tuple[str, ...]]:
        """The table: workers, n, predicted, range, measured, bound by, remark."""
        lines: list[tuple[str, ...]] = []
        advice = "<- recommended: leave your loop" if self.leave else ""
        lines.append(("your loop", "1", f"{self.serial_rate:.1f}", "", "", "", advice))
        for row in self.rows:
            remarks = [
                *(["outside its range"] if row.outside else []),
                *(["<- recommended"] if row is self.best and not self.leave else []),
            ]
            measured = "" if row.measured is None else f"{row.measured:.1f}"
            lines.append((
                row.workers, str(row.n), f"{row.predicted:.1f}", f"{row.low:.0f} to {row.high:.0f}",
                measured, row.bound_by, ", ".join(remarks),
            ))  # fmt: skip
        return lines

    def table(self) -> str:
        """Each setting in a line, with its range of 90 % and what limits it; then the notes."""
        head = ("workers", "n", "steps/s predicted", "90 % range", "measured", "bound by", "")
        lines = [
            f"{kind:10}{n:>3}{rate:>19}{span:>14}{measured:>11}   {by:18}{remark}".rstrip()
            for kind, n, rate, span, measured, by, remark in [head, *self._cells()]
        ]
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return f"{self.verdict}\n\n{self.table()}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr{' style=font-weight:bold' if 'recommended' in cells[-1] else ''}>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + "</tr>"
            for cells in self._cells()
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        picture = io.BytesIO()
        self.plot().savefig(picture, format="png")
        image = base64.b64encode(picture.getvalue()).decode()
        return (
            f"<p><b>{html.escape(self.verdict)}</b></p>{notes}<table><tr><th>workers</th><th>n</th>"
            "<th>steps/s predicted</th><th>90 % range</th><th>measured</th><th>bound by</th>"
            f'<th></th></tr>{rows}</table><img style="max-width:100%" '
            f'src="data:image/png;base64,{image}">'
        )


def expect_seconds(who: str, seconds: Any) -> None:
    expect(is_number(seconds) and seconds > 0, f"{who}: seconds must be a number > 0", seconds)


def _why(outside: str, then: float, now: float) -> str:
    """Why measured values may be outside their ranges; steps/s of the model alone, then and now."""
    why = (
        "so that is not the reason. The generator's cost may have changed (files that are cached "
        "by now, other samples), other programs may run, or it is the one in ten: diagnose again, "
        "with more seconds."
    )
    if abs(now / then - 1) > 0.1:
        why = f"so the machine has become {'faster' if now > then else 'slower'}: diagnose again."
    return (
        f"Outside its range: {outside}. A range holds nine of ten measurements while the machine "
        f"stays as it was. The model alone made {then:.1f} steps/s in the diagnosis and makes "
        f"{now:.1f} now, {why}"
    )
