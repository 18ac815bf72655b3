"""The small picture of `labkit.instruments.live`: a row of panels over the time of the run."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from labkit.instruments.plots import BOUND, COMPUTE, OTHER, WAIT

_POINTS = 300  # of a line: more than that no eye can tell apart
_GPUS = (COMPUTE, WAIT, OTHER, "#CC79A7", "#56B4E9", "#D55E00")


class _Panel(NamedTuple):
    title: str
    lines: list[Sequence[float]]
    colours: Sequence[str]
    top: float
    scale: float = 1.0
    limits: tuple[int, ...] = ()


class Picture:
    """Of what is drawn, only the lines change often. So axes and all that stands at them are drawn
    once and kept, until a limit has to grow: that makes the others ten times as cheap."""

    def __init__(self) -> None:
        self._kept: tuple[Any, ...] = ()

    def png(self, sight: Any, text: str) -> bytes:
        """The picture of a `Sight`, with a line of text above it."""
        seconds = sight.usage.seconds
        panels, end = _panels(sight), _rounded_up(max([10.0, *seconds[-1:]]))
        kept = end, *((panel.title, panel.top) for panel in panels)
        if kept != self._kept:
            self._kept = kept
            self._begin(panels, end)
        self._canvas.restore_region(self._axes_drawn)
        self._text.set_text(text)
        self.figure.draw_artist(self._text)
        for lines, panel in zip(self._lines, panels, strict=True):
            for line, samples in zip(lines, panel.lines, strict=True):
                line.set_data(*_thinned(seconds, samples, panel.scale))
                line.axes.draw_artist(line)
        picture = io.BytesIO()
        # The least compression: three times as fast, for a fifth more bytes.
        pixels = np.asarray(self._canvas.buffer_rgba())
        imsave(picture, pixels, format="png", pil_kwargs={"compress_level": 1})
        return picture.getvalue()

    def _begin(self, panels: list[_Panel], end: float) -> None:
        width = 2.2 * len(panels)
        self.figure = Figure(figsize=(width, 1.9), dpi=100)
        self._canvas = FigureCanvasAgg(self.figure)
        self._text = self.figure.text(0.1 / width, 0.97, "", va="top", fontsize=9, animated=True)
        axes = self.figure.subplots(ncols=len(panels), squeeze=False)[0]
        self.figure.subplots_adjust(0.5 / width, 0.21, 1 - 0.2 / width, 0.74, wspace=0.35)
        self._lines = []
        for ax, panel in zip(axes, panels, strict=True):
            ax.set_title(panel.title, fontsize=9, loc="left")
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=8)
            ax.set(xlim=(0, end), ylim=(0, panel.top), xticks=(0, end))
            ax.set_xticklabels(["0", f"{end:g} s"])
            ax.locator_params("y", nbins=3)
            for limit, style in zip(panel.limits, (":", "--"), strict=False):
                ax.axhline(limit, color=BOUND, linestyle=style, linewidth=1)
            colours = panel.colours[: len(panel.lines)]
            self._lines.append([ax.plot([], [], color=c, animated=True)[0] for c in colours])
        self._canvas.draw()
        self._axes_drawn = self._canvas.copy_from_bbox(self.figure.bbox)


def _panels(sight: Any) -> list[_Panel]:
    """What was seen: nothing is drawn of waiting, a queue or a GPU where there was none."""
    usage = sight.usage
    waiting, queue = usage.probes["waiting"], usage.probes["queue"]
    panels = []
    if not math.isnan(sight.waiting.share):
        panels.append(_Panel("waiting for data (%)", [waiting], [WAIT], 105, 100))
    if sight.limits is not None:
        top = 1.1 * sight.limits[1]
        panels.append(_Panel("queue (samples)", [queue], [OTHER], top, limits=sight.limits))
    panels.append(_Panel("CPU (%)", [usage.cpu], [COMPUTE], 105))
    if usage.gpus:
        rows = [gpu.utilisation for gpu in usage.gpus]
        colours = [_GPUS[number % len(_GPUS)] for number in range(len(rows))]
        panels.append(_Panel("GPU (%)" if len(rows) == 1 else "GPUs (%)", rows, colours, 105))
    most = _rounded_up(1.05e-9 * max([1.0, *usage.memory]))
    panels.append(_Panel("memory (GB)", [usage.memory], [COMPUTE], most, 1e-9))
    return panels


def _rounded_up(value: float) -> float:
    """To the next of 1, 2, 3, 5 and 10, times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 3, 5, 10) if step * unit >= value * (1 - 1e-9))


def _thinned(seconds: Sequence[float], samples: Sequence[float], scale: float) -> np.ndarray:
    """Seconds and values `[2, points]`, as means over as many samples as it takes."""
    points = np.array(list(zip(seconds, samples, strict=False)), float).reshape(-1, 2)
    points = points[~np.isnan(points[:, 1])]
    together = max(1, math.ceil(len(points) / _POINTS))
    points = points[len(points) % together :].reshape(-1, together, 2).mean(1)
    return points.T * [[1.0], [scale]]
