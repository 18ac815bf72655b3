"""Nothing of a figure is cut, and no text lies on another, however long title and labels are."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from labkit.instruments import plots
from labkit.instruments.history import Epoch, History
from labkit.instruments.usage_monitor import Gpu, UsageMonitor
from tests import cheat_sheet

LONG = "Starved, the process is 3.9 times less busy and done 4.1 times later; " * 3
MACHINE = {"processor": "AMD EPYC", "cores": 2, "tensorflow": "2.21.0"}
LABELS = ("sleeping, 4 threads", "pure Python, 2 processes", "NumPy augmentation")


def boxes(figure: Figure) -> dict[str, object]:
    """The box of each text that is drawn, in pixels, by its words."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    renderer = canvas.get_renderer()
    # Ticks beyond the limits of an axis are there, but not drawn.
    drawn = [text for text in texts if text.get_window_extent(renderer).width > 0]
    ticks = {
        label
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for label in axis.get_ticklabels(which="both")
    }
    shown = {
        label
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis._update_ticks()
        for label in (tick.label1, tick.label2)
    }
    kept = [text for text in drawn if text not in ticks or text in shown]
    return {
        f"{number} {text.get_text()}": text.get_window_extent(renderer)
        for number, text in enumerate(kept)
    }


def cut(figure: Figure, found: dict[str, object]) -> list[str]:
    """The texts that the canvas cuts."""
    width, height = figure.bbox.width, figure.bbox.height
    return [
        words
        for words, box in found.items()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]


def overlapping(found: dict[str, object]) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other."""
    texts = list(found.items())
    return [
        (one, other)
        for number, (one, box) in enumerate(texts)
        for other, second in texts[number + 1 :]
        if min(box.x1, second.x1) - max(box.x0, second.x0) > 1
        and min(box.y1, second.y1) - max(box.y0, second.y0) > 1
    ]


def history():
    return History({}, MACHINE, [Epoch(123.4, 250, 100.1, 23.3, 0.5, 1.0) for _ in range(10)])


def monitor(gpus=()):
    watched = UsageMonitor(probes={"in the queue": lambda: 0.0, "waiting (%)": lambda: 0.0})
    watched.seconds, watched.cpu = [0.0, 1.0], [10.0, 100.0]
    watched.memory = [1e9, 123.4e9]
    watched.gpu_message = "no NVIDIA driver here"
    watched.gpus = list(gpus)
    watched.probes = {"in the queue": [1e6, 2e6], "waiting (%)": [0.0, 100.0]}
    return watched


def gpu(index):
    return Gpu(index, "NVIDIA H100 80GB HBM3", 8e10, [0.0, 100.0], [7e10, 7e10])


LARGE = dict(zip(LABELS, (123_456.0, 98.7, 0.0123), strict=True))
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
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
@pytest.mark.parametrize("title", ["Short", LONG], ids=["short", "long"])
def test_no_text_is_cut_and_none_lies_on_another(draw, title):
    figure = draw(title)
    found = boxes(figure)
    assert not cut(figure, found)
    assert not overlapping(found)
    assert title.split()[0] in figure.get_suptitle()


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
    figure.subplots().set_title(LONG)
    figure.text(0.5, 0.5, "one")
    figure.text(0.5, 0.51, "other")
    found = boxes(figure)
    assert [words.split(" ", 1)[1] for words in cut(figure, found)] == [LONG]
    assert [tuple(w.split(" ", 1)[1] for w in pair) for pair in overlapping(found)] == [
        ("one", "other")
    ]


def test_the_cheat_sheet_is_whole_and_black_and_white():
    page = cheat_sheet.page()
    found = boxes(page)
    assert not cut(page, found) and not overlapping(found)
    canvas = FigureCanvasAgg(page)
    canvas.draw()
    red, green, blue, _ = np.moveaxis(np.asarray(canvas.buffer_rgba()).astype(int), -1, 0)
    assert (red == green).all() and (green == blue).all()
    assert all((cheat_sheet.FOLDER / f"cheat_sheet.{kind}").exists() for kind in ("pdf", "png"))
