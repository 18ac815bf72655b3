"""No text of a figure is cut, and none lies on another: the check, for tests and for notebooks.

In a notebook it stands behind `plots.keep`, which every figure goes through, and behind those that
labkit draws for itself (`plots.diagnosis`, `plots.law`). Whoever runs notebooks (pytest, by
conftest.py, and `tests.remake`) sets IPYTHONDIR to a folder of `in_kernels`.
"""

import functools
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_IN_KERNELS = """import importlib.util
_spec = importlib.util.spec_from_file_location("figure_texts", {path!r})
_texts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_texts)
get_ipython().events.register("pre_run_cell", _texts.watch)
del importlib, _spec, _texts
"""


def boxes(figure: Any) -> dict[str, Any]:
    """The box of each text that is drawn, in pixels, by its words."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    renderer = canvas.get_renderer()
    # Ticks beyond the limits of an axis are there, but not drawn.
    drawn = [text for text in texts if text.get_window_extent(renderer).width > 0]
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    ticks = {label for axis in axes for label in axis.get_ticklabels(which="both")}
    shown = {
        label
        for axis in axes
        if axis.axes.axison
        for tick in axis._update_ticks()
        for label in (tick.label1, tick.label2)
    }
    kept = [text for text in drawn if text not in ticks or text in shown]
    return {
        f"{number} {text.get_text()}": text.get_window_extent(renderer)
        for number, text in enumerate(kept)
    }


def cut(figure: Any, found: dict[str, Any]) -> list[str]:
    """The texts that the canvas cuts."""
    width, height = figure.bbox.width, figure.bbox.height
    return [
        words
        for words, box in found.items()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]


def overlapping(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other."""
    texts = list(found.items())
    return [
        (one, other)
        for number, (one, box) in enumerate(texts)
        for other, second in texts[number + 1 :]
        if min(box.x1, second.x1) - max(box.x0, second.x0) > 1
        and min(box.y1, second.y1) - max(box.y0, second.y0) > 1
    ]


def refuse(figure: Any, name: str) -> None:
    """Raises ValueError where a text is cut or lies on another."""
    found = boxes(figure)
    if cuts := cut(figure, found):
        raise ValueError(f"{name}: the canvas cuts {cuts}")
    if pairs := overlapping(found):
        raise ValueError(f"{name}: texts lie on each other: {pairs}")


def watch(*_: Any) -> None:
    """Ahead of each cell: once labkit's plots are there, what they keep or draw is checked."""
    plots = sys.modules.get("labkit.instruments.plots")
    if plots is None or hasattr(plots.keep, "__wrapped__"):
        return

    def checked(function: Any, seen: Any) -> Any:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            result = function(*given, **named)
            refuse(*seen(given, result))
            return result

        return call

    plots.keep = checked(plots.keep, lambda given, _: given[:2])
    plots.diagnosis = checked(plots.diagnosis, lambda _, result: (result, "diagnosis"))
    plots.law = checked(plots.law, lambda _, result: (result, "law"))


def in_kernels(folder: Path) -> Path:
    """Makes `folder` an IPYTHONDIR whose kernels check their figures; returns it."""
    startup = folder / "profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00_figure_texts.py").write_text(_IN_KERNELS.format(path=__file__))
    return folder
