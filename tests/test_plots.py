"""Nothing of a figure is cut, and no text lies on another, however long title and labels are."""

import pickle
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from packaging.version import Version

from labkit.instruments import plots
from labkit.instruments.history import Epoch, History
from labkit.instruments.race.picture import picture
from labkit.instruments.report import Row
from labkit.instruments.usage_monitor import Gpu, UsageMonitor
from tests import cheat_sheet, figure_texts
from tests.figure_texts import boxes, cut, overlapping, refuse

LONG = "Starved, the process is 3.9 times less busy and done 4.1 times later; " * 3
MACHINE = {"processor": "AMD EPYC", "cores": 2, "tensorflow": "2.21.0"}
LABELS = ("sleeping, 4 threads", "pure Python, 2 processes", "NumPy augmentation")


def history():
    return History({}, MACHINE, [Epoch(123.4, 250, 100.1, 23.3, 0.5, 1.0) for _ in range(10)])


def monitor(gpus=()):
    watched = UsageMonitor(probes={"queue (samples)": lambda: 0.0, "waiting (%)": lambda: 0.0})
    watched.seconds, watched.cpu = [0.0, 1.0], [10.0, 100.0]
    watched.memory = [1e9, 123.4e9]
    watched.gpu_message = "no NVIDIA driver here"
    watched.gpus = list(gpus)
    watched.probes = {"queue (samples)": [1e6, 2e6], "waiting (%)": [0.0, 100.0]}
    return watched


def gpu(index):
    return Gpu(index, "NVIDIA H100 80GB HBM3", 8e10, [0.0, 100.0], [7e10, 7e10])


def report(name, model_rate):
    rows = [
        Row(kind, n, 9.0 * n, 8.0 * n, 10.0 * n, "the generator", 9.5 * n if n < 4 else None)
        for kind in ("thread", "process")
        for n in (1, 2, 4, 8)
    ]
    best = SimpleNamespace(name=name)
    rates = {"model_rate": model_rate, "serial_rate": 8.0, "speed_up": 12.3}
    return SimpleNamespace(rows=rows, best=best, leave=False, **rates)


CONTESTANTS = ("labkit, 16 processes", "Keras's PyDataset, 16 processes", "a pool of your own")
LARGE = dict(zip(LABELS, (123_456.0, 98.7, 0.0123), strict=True))


def race(title, rows):
    ratios = dict.fromkeys(CONTESTANTS, (0.987, 0.5, 1.2))
    return picture({f"{title[:60]} {row}": ratios for row in range(rows)}, MACHINE, 0.97)


FIGURES = {
    "timeline": lambda title: plots.timeline(
        {label: [(0.1, 0.05)] * 30 for label in LABELS}, title, machine=MACHINE
    ),
    "epochs": lambda title: plots.epochs(history(), title, bound=12_345.6),
    "epochs side by side": lambda title: plots.epochs(
        {label: history() for label in LABELS}, title, bound=12_345.6
    ),
    "sweep": lambda title: plots.sweep(
        (1, 2, 4, 8, 16, 32),
        {label: np.geomspace(10, 1e5, 6) for label in LABELS},
        [1e5] * 6,
        title,
        article={1: 18.13, 4: 69.64},
        machine=MACHINE,
    ),
    "bars": lambda title: plots.bars(LARGE, title, "steps per second", 1e5, MACHINE, "steps/s"),
    "stacked": lambda title: plots.stacked(
        {label: {"computing, alone": 1e3, "waiting for data": 2e4} for label in LABELS},
        title,
        "ms per step",
        1e4,
        MACHINE,
        "ms",
    ),
    "grouped": lambda title: plots.grouped(
        {label: dict.fromkeys(LABELS, 1.5) for label in LABELS},
        title,
        "steps/s, relative to 1 thread",
        1.0,
        MACHINE,
        "x",
    ),
    "series": lambda title: plots.series(
        {label: ([0, 1, 2], [0, 1e6, 2e6]) for label in LABELS},
        title,
        "samples in the queue",
        {"capacity": 2e6, "min_after_dequeue": 1e6},
        machine=MACHINE,
    ),
    "usage": lambda title: plots.usage({"starved": monitor(), "fed": monitor()}, title, MACHINE),
    "usage of GPUs": lambda title: plots.usage(monitor([gpu(0), gpu(1)]), title, MACHINE),
    "diagnosis": lambda title: plots.diagnosis(report(title, 20.0), MACHINE),
    "diagnosis of a fast model": lambda title: plots.diagnosis(report(title, 123_456.0), MACHINE),
    "race": lambda title: race(title, 3),
    "race of many rows": lambda title: race(title, 15),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
@pytest.mark.parametrize("title", ["Short", LONG], ids=["short", "long"])
def test_no_text_is_cut_and_none_lies_on_another(draw, title):
    figure = draw(title)
    found = boxes(figure)
    assert not cut(figure, found)
    assert not overlapping(found)
    assert title.split()[0] in "".join(found)


def test_ticks_stay_apart_whatever_their_range():
    for end in np.geomspace(0.1, 0.2, 16):  # among them those of which -0.100, -0.075 ... was seen
        lines = {label: ([-end, end], [1, 2]) for label in ("short", "labkit raises WorkerError")}
        figure = plots.series(lines, "Short", "each stroke: a batch", machine=MACHINE)
        figure.axes[0].set(xlim=(-end, end))
        figure.axes[0].set_yticks([1, 2], ["twenty lines", "labkit"])
        assert not overlapping(boxes(figure))
        assert len(figure.axes[0].get_xticks()) > 2


def test_a_title_keeps_a_margin_however_long_it_is():
    for n in range(1, 13):
        figure = Figure(figsize=(8, 3.6))
        (box,) = boxes(plots._with_texts(figure, n * "Of the rate ", None)).values()
        assert box.x0 >= plots.MARGIN - 1 and box.x1 <= figure.bbox.width - plots.MARGIN + 1, n
    assert pickle.loads(pickle.dumps(figure)).get_suptitle() == n * "Of the rate "


@pytest.mark.parametrize("draw", (plots.bars, plots.stacked, plots.grouped))
@pytest.mark.parametrize("unit, said", [("", "bound 1e+05"), ("steps/s", "bound 1e+05 steps/s")])
def test_a_bound_has_its_unit(draw, unit, said):
    values = {"one": 2.0} if draw is plots.bars else {"one": {"part": 2.0}}
    (ax,) = draw(values, "Title", "steps per second", 1e5, unit=unit).axes
    assert said in [text.get_text() for text in ax.get_legend().get_texts()]
    (ax,) = draw(values, "Title", "steps per second").axes
    assert "bound" not in str(ax.get_legend() and ax.get_legend().get_texts())


def test_the_check_finds_a_title_that_is_cut_and_texts_on_each_other():
    figure = Figure(figsize=(6, 3.6))
    figure.subplots(subplot_kw={"yticks": []}).set_title(LONG)
    figure.text(0.5, 0.5, "one")
    figure.text(0.5, 0.51, "other")
    found = boxes(figure)
    assert [words.split(" ", 1)[1] for words in cut(figure, found)] == [LONG]
    assert [tuple(w.split(" ", 1)[1] for w in pair) for pair in overlapping(found)] == [
        ("one", "other")
    ]


# Titles as notebooks once had them, with what they stood over.
OLD_TITLES = {
    "nb01_epochs": (
        "An epoch takes 2.97 s, 10 times what the model needs: it is busy 15% of it",
        lambda title: plots.epochs(History({}, {}, history().epochs[:4]), title, 0.308),
    ),
    "nb02_free": (
        "Free generator: 1.04 times the steps of feed_dict; slow one: 4.0 times",
        lambda title: plots.bars(
            {"feed_dict": 346, "queue, 1 thread": 365, "compute-only": 381}, title, "", 381
        ),
    ),
    "nb02_mixing": (
        "min_after_dequeue = 1000 spreads a batch 5.7% as wide as a full shuffle, 4000 21%",
        lambda title: plots.series({"samples held / ideal": ([32, 4000], [0.4, 21])}, title, "%"),
    ),
    "nb03_validation": (
        '"Validation" of 100% is 88% on digits that the model has not seen',
        lambda title: plots.bars({"training samples": 1, "the test set": 0.875}, title, "accuracy"),
    ),
    "nb04_losses": (
        "Python-bound producers make the step itself 1.4 times as long; its waiting is 2%",
        lambda title: plots.stacked(
            {case: {"computing, alone": 6.1} for case in ("starved", "fed", "slow loop", "Python")},
            title, "ms per step", 6.11,
        ),
    ),
    "nb06_until_told": (
        "From the fault to the message: 1.6 s at most."
        " The twenty lines were silent in 3 of 4 cases",
        lambda title: plots.bars({"raises": 0.03, "dies": 0.01, "stalls": 1.56}, title, "s", 3.0),
    ),
}  # fmt: skip


def test_the_check_refuses_six_titles_as_they_were_once_drawn(monkeypatch):
    def unwrapped(figure, title, machine):
        if title.startswith("An epoch"):
            figure.suptitle(title)
        else:
            figure.axes[0].set_title(title)
        return figure

    for title, draw in OLD_TITLES.values():
        refuse(draw(title), "as it is now")
    monkeypatch.setattr(plots, "_with_texts", unwrapped)
    for name, (title, draw) in OLD_TITLES.items():
        if name == "nb03_validation" and Version(matplotlib.__version__) < Version("3.11"):
            continue  # its axes are a little wider there, and the title just fits
        with pytest.raises(ValueError, match=rf"^{name}: the canvas cuts \['\d+ .{{9}}") as refused:
            refuse(draw(title), name)
        assert title[-20:] in str(refused.value)


@pytest.mark.parametrize(("x", "said"), [(0.9, "cuts"), (0.5, "on each other")])
def test_in_a_notebook_a_figure_with_a_fault_is_refused(x, said, monkeypatch):
    for name in ("keep", "diagnosis", "law"):
        monkeypatch.setattr(plots, name, getattr(plots, name))  # undone at the end
    figure_texts.watch()
    figure_texts.watch()  # ahead of each cell, but once is enough
    figure = plots.bars({"one": 2.0}, "Short", "steps per second")
    plots.keep(figure, "fine", {})
    figure.text(x, 0.5, "a text of some length")
    figure.text(0.5, 0.51, "another")
    with pytest.raises(ValueError, match=f"nb00_wrong: .*{said}"):
        plots.keep(figure, "nb00_wrong", {})
    report_with_a_long_name = report(LONG.replace(" ", "_"), 20.0)
    with pytest.raises(ValueError, match="diagnosis: the canvas cuts"):
        plots.diagnosis(report_with_a_long_name)


def test_the_cheat_sheet_is_whole_and_black_and_white():
    page = cheat_sheet.page()
    found = boxes(page)
    assert not cut(page, found) and not overlapping(found)
    assert max(box.x1 for box in found.values()) <= cheat_sheet.RIGHT * page.bbox.width
    canvas = FigureCanvasAgg(page)
    canvas.draw()
    red, green, blue, _ = np.moveaxis(np.asarray(canvas.buffer_rgba()).astype(int), -1, 0)
    assert (red == green).all() and (green == blue).all()
    assert all((cheat_sheet.FOLDER / f"cheat_sheet.{kind}").exists() for kind in ("pdf", "png"))
