"""The small picture of `labkit.instruments.live`: a row of panels over the time of the run.

Made of lines and texts alone, in pixels: matplotlib's axes and ticks take several times as long.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.transforms import IdentityTransform

from labkit.instruments.plots import BOUND, COMPUTE, OTHER, WAIT

_POINTS = 300  # of a line: more than that no eye can tell apart
_GPUS = (COMPUTE, WAIT, OTHER, "#CC79A7", "#56B4E9", "#D55E00")
_WIDTH, _HEIGHT = 220, 190  # of a panel with its margins, in pixels
_LEFT, _RIGHT, _BOTTOM, _TOP = 46, 204, 36, 138  # of its axes


class _Panel(NamedTuple):
    title: str
    lines: list[Sequence[float]]
    colours: Sequence[str]
    ticks: list[float]
    top: float
    scale: float = 1.0
    limits: tuple[int, ...] = ()


class Picture:
    """What stands still, texts above all, is drawn once and kept until one of them changes.

    Attributes:
        figure: all of the last picture.
    """

    def __init__(self) -> None:
        self._still: tuple[Any, ...] = ()
        self._moving: list[Artist] = []

    def png(self, sight: Any, text: str, ended: bool) -> bytes:
        """Draws a `Sight`, with a line of text above it; if it has not ended, with room for what
        comes."""
        seconds = sight.usage.seconds
        end = seconds[-1] if ended and seconds else _rounded_up(max([10.0, *seconds[-1:]]))
        panels = _panels(sight)
        still = end, *((panel.title, panel.top) for panel in panels)
        if still != self._still:
            self._still = still
            self._begin(panels, end)
        for artist in self._moving:
            artist.remove()
        self._moving = [_write(self.figure, 6, _HEIGHT - 4, text, va="top", fontsize=9)]
        for number, panel in enumerate(panels):
            self._moving += _lines(self.figure, panel, _WIDTH * number, seconds, end)
        self._canvas.restore_region(self._background)
        for artist in self._moving:
            artist.set_animated(True)  # so that it is not drawn among what stands still
            self.figure.draw_artist(artist)
        picture = io.BytesIO()
        # The least compression: three times as fast, for a fifth more bytes.
        pixels = np.asarray(self._canvas.buffer_rgba())
        imsave(picture, pixels, format="png", pil_kwargs={"compress_level": 1})
        return picture.getvalue()

    def _begin(self, panels: list[_Panel], end: float) -> None:
        size = _WIDTH * len(panels) / 100, _HEIGHT / 100
        self.figure, self._moving = Figure(figsize=size, dpi=100), []
        for number, panel in enumerate(panels):
            _frame(self.figure, panel, _WIDTH * number, end)
        self._canvas = FigureCanvasAgg(self.figure)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self.figure.bbox)


def _frame(figure: Figure, panel: _Panel, x: int, end: float) -> None:
    left, right = x + _LEFT, x + _RIGHT
    _line(figure, [left, left, right], [_TOP, _BOTTOM, _BOTTOM], color=BOUND, linewidth=0.8)
    _write(figure, left, _TOP + 6, panel.title, va="bottom", fontsize=9)
    for tick in panel.ticks:
        y = _height(panel, tick)
        _write(figure, left - 5, y, f"{tick:g}", ha="right", va="center", fontsize=8)
    _write(figure, left, _BOTTOM - 6, "0", ha="center", va="top", fontsize=8)
    # Centred, it would pass the edge of the last panel.
    _write(figure, right, _BOTTOM - 6, _span(end), ha="right", va="top", fontsize=8)
    for limit, style in zip(panel.limits, (":", "--"), strict=False):
        y = _height(panel, limit)
        _line(figure, [left, right], [y, y], color=BOUND, linestyle=style, linewidth=1)


def _lines(
    figure: Figure, panel: _Panel, x: int, seconds: Sequence[float], end: float
) -> list[Artist]:
    lines = []
    for colour, samples in zip(panel.colours, panel.lines, strict=False):
        at, values = _thinned(seconds, samples)
        places = x + _LEFT + (_RIGHT - _LEFT) * at / end
        lines.append(_line(figure, places, _height(panel, values * panel.scale), color=colour))
    return lines


def _height(panel: _Panel, value: Any) -> Any:
    return _BOTTOM + (_TOP - _BOTTOM) * value / panel.top


def _line(figure: Figure, xs: Any, ys: Any, **style: Any) -> Artist:
    return figure.add_artist(Line2D(xs, ys, transform=IdentityTransform(), **style))


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> Artist:
    return figure.text(x, y, text, transform=IdentityTransform(), **style)


def _panels(sight: Any) -> list[_Panel]:
    """What was seen: nothing is drawn of waiting, a queue or a GPU where there was none."""
    usage, percent = sight.usage, [0.0, 50.0, 100.0]
    waiting, queue = usage.probes["waiting"], usage.probes["queue"]
    panels = []
    if not math.isnan(sight.waiting.share):
        panels.append(_Panel("waiting for data (%)", [waiting], [WAIT], percent, 105, 100))
    if sight.limits is not None:
        low, high = sight.limits
        ticks = [0.0, low, high] if 0.15 <= low / high <= 0.85 else [0.0, high]
        panels.append(
            _Panel("queue (samples)", [queue], [OTHER], ticks, 1.05 * high, limits=sight.limits)
        )
    panels.append(_Panel("CPU (%)", [usage.cpu], [COMPUTE], percent, 105))
    if usage.gpus:
        rows = [gpu.utilisation for gpu in usage.gpus]
        colours = [_GPUS[number % len(_GPUS)] for number in range(len(rows))]
        title = "GPU (%)" if len(rows) == 1 else "GPUs (%)"
        panels.append(_Panel(title, rows, colours, percent, 105))
    most = _rounded_up(1e-9 * max([1.0, *usage.memory]))
    ticks = [0.0, most / 2, most]
    panels.append(_Panel("memory (GB)", [usage.memory], [COMPUTE], ticks, 1.05 * most, 1e-9))
    return panels


def _rounded_up(value: float) -> float:
    """To the next of 1, 2, 3, 5 and 10, times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 3, 5, 10) if step * unit >= value * (1 - 1e-9))


def _span(seconds: float) -> str:
    if seconds < 999.5:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _thinned(seconds: Sequence[float], samples: Sequence[float]) -> np.ndarray:
    """Seconds and values `[2, points]`, as means over as many samples as it takes."""
    count = min(len(seconds), len(samples))
    points = np.stack([seconds[:count], samples[:count]], axis=1).astype(float)
    points = points[~np.isnan(points[:, 1])]
    together = max(1, math.ceil(len(points) / _POINTS))
    return points[len(points) % together :].reshape(-1, together, 2).mean(1).T
