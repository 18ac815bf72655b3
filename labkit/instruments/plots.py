"""One function a figure: each takes measured results and returns a matplotlib Figure.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Titles are the caller's
finding; the line below a figure names the machine that measured it.
"""

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator

from labkit.machine import describe_machine

MARGIN = 12  # pixels beside a title, at 100 to the inch
WAIT, COMPUTE, BOUND, OTHER = "#E69F00", "#0072B2", "#000000", "#009E73"
_CYCLE = (COMPUTE, WAIT, OTHER, "#CC79A7", "#56B4E9", "#D55E00")


def _figure(width: float = 8, height: float = 3.6, **kwargs: Any) -> tuple[Figure, Any]:
    # Not through pyplot's window manager: nothing stays in memory, nothing is shown twice.
    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    axes = figure.subplots(**kwargs)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_prop_cycle(color=_CYCLE)
        # Of itself Matplotlib leaves room for four letters a tick: -0.075 has six.
        ax.locator_params(axis="x", nbins=max(2, 6 // kwargs.get("ncols", 1)))
    return figure, axes


class _Title(Text):
    def _get_wrap_line_width(self) -> float:
        return super()._get_wrap_line_width() - 2 * MARGIN  # type: ignore[misc]


def _with_texts(figure: Figure, title: str, machine: Mapping[str, Any] | None) -> Figure:
    words: Any = figure.suptitle(title, wrap=True)  # an axes' title wraps at the wrong width
    words.__class__ = _Title
    if machine:
        cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
        parts = machine["processor"], cores, *machine.get("gpus", ())
        text = f"Measured on {', '.join(parts)}, TensorFlow {machine['tensorflow']}"
        figure.supxlabel(text, fontsize=8, color="0.35", x=0.01, ha="left")
    return figure


def _legend(ax: Any, bound: float | None = None, unit: str = "") -> None:
    """The bound as a line, and the legend right of the axes, where it lies on nothing."""
    if bound is not None:
        label = f"bound {bound:.3g} {unit}".rstrip()
        ax.axhline(bound, color=BOUND, linestyle="--", label=label)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _logarithmic(ax: Any) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(lambda value, _: "")
    ax.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))


def _wrapped(labels: Mapping[str, Any]) -> list[str]:
    """Labels below bars, in as many lines as it takes to stay apart beside a legend."""
    width = max(8, 48 // len(labels))
    return [textwrap.fill(label, width, break_long_words=False) for label in labels]


def save(figure: Figure, path: str | Path) -> None:
    """Writes PNG, PDF or SVG by the name's ending."""
    figure.savefig(path)


def timeline(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    steps: int = 30,
    machine: Mapping[str, Any] | None = None,
) -> Figure:
    """The first `steps` steps of each run as bars of waiting and computing along time.

    Args:
        runs: label to (waiting, computing) seconds per step, as in `History.steps`.
    """
    figure, ax = _figure(8, 1.6 + 0.7 * len(runs))
    for row, pairs in enumerate(runs.values()):
        lengths = np.array(pairs[:steps]).ravel() * 1e3
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        parts = ((WAIT, "waiting for data"), (COMPUTE, "computing"))
        for part, (colour, label) in enumerate(parts):
            named = label if row == 0 else None
            ax.barh(row, lengths[part::2], 0.6, starts[part::2], color=colour, label=named)
    ax.set_yticks(range(len(runs)), list(runs))
    ax.invert_yaxis()
    ax.set(xlabel=f"time over {steps} steps (ms)")
    _legend(ax)
    return _with_texts(figure, title, machine)


def epochs(history: Any, title: str | None = None, bound: float | None = None) -> Figure:
    """Seconds per epoch, stacked into waiting and computing.

    Args:
        history: a `History`, or a mapping from label to `History` for runs side by side.
        title: the finding. Default: the median epoch and its share of waiting.
        bound: seconds per epoch that cannot be beaten, drawn as a line.
    """
    runs = history if isinstance(history, Mapping) else {"": history}
    first = next(iter(runs.values()))
    figure, axes = _figure(
        max(6.0, 3.6 * len(runs)), 3.6, ncols=len(runs), sharey=True, squeeze=False
    )
    for ax, (label, run) in zip(axes[0], runs.items(), strict=True):
        numbers = np.arange(1, len(run.epochs) + 1)
        waiting = np.array([epoch.waiting for epoch in run.epochs])
        computing = np.array([epoch.computing for epoch in run.epochs])
        ax.bar(numbers, waiting, color=WAIT, label="waiting for data")
        ax.bar(numbers, computing, bottom=waiting, color=COMPUTE, label="computing")
        if bound is not None:
            ax.axhline(bound, color=BOUND, linestyle="--", label=f"bound {bound:.3g} s")
        ax.set(xlabel="epoch", title=label)
        ax.set_xticks(numbers)
    axes[0, 0].set_ylabel("seconds per epoch")
    _legend(axes[0, -1])
    share = sum(e.waiting for e in first.epochs) / sum(e.seconds for e in first.epochs)
    middle = np.median([e.seconds for e in first.epochs])
    title = title or f"An epoch takes {middle:.3g} s, {share:.0%} of it waiting for data"
    return _with_texts(figure, title, first.machine)


def sweep(
    counts: Sequence[int],
    rates: Mapping[str, Sequence[float]],
    bound: Sequence[float],
    title: str,
    article: Mapping[int, float] | None = None,
    machine: Mapping[str, Any] | None = None,
) -> Figure:
    """Steps/s over the number of workers, on logarithmic axes, with the bound as a line.

    Args:
        counts: numbers of workers.
        rates: label to measured steps/s at each count.
        bound: steps/s that cannot be beaten, at each count.
        article: the article's own points, number of workers to steps/s.
    """
    figure, ax = _figure()
    ax.plot(counts, bound, color=BOUND, linestyle="--", label="bound")
    for (label, values), marker in zip(rates.items(), "osD^v", strict=False):
        ax.plot(counts, values, marker=marker, label=label)
    if article:
        style = {"color": "#D55E00", "markersize": 9, "markeredgewidth": 2}
        points = list(article), list(article.values())
        ax.plot(*points, "x", label="the article, 2018", **style)
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [str(count) for count in counts])
    _logarithmic(ax)
    ax.set(xlabel="workers", ylabel="steps per second")
    _legend(ax)
    return _with_texts(figure, title, machine)


def bars(
    values: Mapping[str, float],
    title: str,
    ylabel: str,
    bound: float | None = None,
    machine: Mapping[str, Any] | None = None,
    unit: str = "",
) -> Figure:
    """One bar for each label, with its value written on it and the bound, in `unit`, as a line."""
    figure, ax = _figure(max(6.0, 1.3 * len(values)), 3.6)
    drawn = ax.bar(_wrapped(values), list(values.values()), color=COMPUTE, width=0.6)
    for text in ax.bar_label(drawn, fmt="%.3g", padding=2):
        text.set_bbox({"color": "white", "pad": 1})  # the bound may run through it
    ax.set(ylabel=ylabel)
    ax.margins(y=0.15)
    _legend(ax, bound, unit)
    return _with_texts(figure, title, machine)


def stacked(
    bars: Mapping[str, Mapping[str, float]],
    title: str,
    ylabel: str,
    bound: float | None = None,
    machine: Mapping[str, Any] | None = None,
    unit: str = "",
) -> Figure:
    """A bar for each label, made of the same named parts. The bound: as in `bars`."""
    figure, ax = _figure(max(6.0, 1.6 * len(bars) + 1.6), 3.6)
    parts = list(next(iter(bars.values())))
    colours = {"waiting for data": WAIT, "between steps": OTHER, "step slowed": "#CC79A7"}
    base = np.zeros(len(bars))
    for part in parts:
        heights = np.array([bar[part] for bar in bars.values()])
        ax.bar(_wrapped(bars), heights, 0.6, base, label=part, color=colours.get(part, COMPUTE))
        base += heights
    ax.set(ylabel=ylabel)
    _legend(ax, bound, unit)
    return _with_texts(figure, title, machine)


def grouped(
    groups: Mapping[str, Mapping[str, float]],
    title: str,
    ylabel: str,
    bound: float | None = None,
    machine: Mapping[str, Any] | None = None,
    unit: str = "",
) -> Figure:
    """Bars side by side in each group; every group has the same ones. The bound: as in `bars`."""
    figure, ax = _figure()
    names = list(next(iter(groups.values())))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        at = np.arange(len(groups)) + (place - (len(names) - 1) / 2) * width
        drawn = ax.bar(at, [group[name] for group in groups.values()], width, label=name)
        for text in ax.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8):
            text.set_bbox({"color": "white", "pad": 0.5})  # the bound may run through it
    ax.set_xticks(range(len(groups)), _wrapped(groups))
    ax.set(ylabel=ylabel)
    ax.margins(y=0.15)
    _legend(ax, bound, unit)
    return _with_texts(figure, title, machine)


def series(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    ylabel: str,
    bounds: Mapping[str, float] | None = None,
    xlabel: str = "time (s)",
    machine: Mapping[str, Any] | None = None,
) -> Figure:
    """Lines over time: label to (x, y). `bounds` are drawn as dashed lines with their labels."""
    figure, ax = _figure()
    for label, (x, y) in lines.items():
        ax.plot(x, y, label=label)
    for (label, value), style in zip((bounds or {}).items(), ("--", ":", "-."), strict=False):
        ax.axhline(value, color=BOUND, linestyle=style, linewidth=1, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_ylim(bottom=0)
    _legend(ax)
    return _with_texts(figure, title, machine)


def usage(monitors: Any, title: str = "", machine: Mapping[str, Any] | None = None) -> Figure:
    """What the machine did during each run, side by side: CPU, GPUs, memory, and the probes.

    Args:
        monitors: a `UsageMonitor` that has finished, or a mapping from label to one for runs side
            by side. Without a GPU its panel says so.
    """
    monitors = monitors if isinstance(monitors, Mapping) else {"": monitors}
    probes = list(next(iter(monitors.values())).probes)
    # A panel that has nothing to show takes little room.
    heights = [1, 1 if any(m.gpus for m in monitors.values()) else 0.25, 0.7, *(1 for _ in probes)]
    size = {"nrows": len(heights), "ncols": len(monitors), "height_ratios": heights}
    figure, axes = _figure(
        8, 1.0 + 1.3 * sum(heights), sharex="col", sharey="row", squeeze=False, **size
    )
    for column, (label, monitor) in zip(axes.T, monitors.items(), strict=True):
        column[0].set_title(label)
        column[0].plot(monitor.seconds, monitor.cpu)
        for gpu in monitor.gpus:
            name = f"GPU {gpu.index}" if machine else f"GPU {gpu.index} {gpu.name}"
            (line,) = column[1].plot(monitor.seconds, gpu.utilisation, label=name)
            memory = 100 * np.array(gpu.memory_used) / gpu.memory_total
            column[1].plot(monitor.seconds, memory, ":", color=line.get_color(), label="its memory")
        if monitor.gpus:  # above the panel, as the lines can be anywhere in it
            place = {"loc": "lower left", "bbox_to_anchor": (0, 0.95), "ncols": 2, "borderpad": 0}
            column[1].legend(frameon=False, fontsize=8, **place)
        else:
            place = {"ha": "center", "va": "center", "transform": column[1].transAxes}
            column[1].text(0.5, 0.5, monitor.gpu_message, **place)
        column[2].plot(monitor.seconds, np.array(monitor.memory) / 1e9, color=COMPUTE)
        for ax, name in zip(column[3:], probes, strict=True):
            ax.plot(monitor.seconds, monitor.probes[name], color=OTHER)
        column[-1].set_xlabel("time (s)")
    seen = heights[1] == 1
    names = ("CPU (% of\nall cores)", "GPU (%)" if seen else "GPU", "memory\n(GB)", *probes)
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name)
        ax.set_ylim(bottom=0)
    for ax in axes[:2, 0]:  # of the whole row
        ax.set_ylim(0, 105)
    axes[1, 0].set_yticks([0, 50, 100] if seen else [])
    if not seen:
        axes[1, 0].yaxis.label.set(rotation=0, ha="right", va="center")
    axes[2, 0].set_ylim(top=1.2 * axes[2, 0].get_ylim()[1])
    figure.align_ylabels()
    return _with_texts(figure, title, machine)


def keep(figure: Figure, name: str, data: Mapping[str, Any]) -> None:
    """Writes `name`.png and the data behind it, `name`.json, into the folder that the environment
    variable LABKIT_SAVE_FIGURES names; without it, does nothing, so that a run leaves no files."""
    folder = os.environ.get("LABKIT_SAVE_FIGURES")
    if folder:
        save(figure, Path(folder) / f"{name}.png")
        text = json.dumps({"machine": describe_machine(), **data}, indent=1, default=float)
        (Path(folder) / f"{name}.json").write_text(text + "\n")


def diagnosis(report: Any, machine: Mapping[str, Any] | None = None) -> Figure:
    """Predicted steps/s of a `Report` over workers, its range, and measured points. Logarithmic
    where the model's own rate is so far off that it would flatten all else."""
    figure, ax = _figure()
    kinds = dict.fromkeys(row.workers for row in report.rows)
    colours = (COMPUTE, OTHER, "#CC79A7", "#56B4E9")
    for kind, colour, marker in zip(kinds, colours, "os^D", strict=False):
        rows = [row for row in report.rows if row.workers == kind]
        counts = [row.n for row in rows]
        low, high = [row.low for row in rows], [row.high for row in rows]
        ax.fill_between(counts, low, high, color=colour, alpha=0.2)
        predicted = [row.predicted for row in rows]
        style = {"marker": marker, "markerfacecolor": "white"}
        ax.plot(counts, predicted, color=colour, label=f"{kind}, predicted, 90 %", **style)
        if seen := {row.n: row.measured for row in rows if row.measured is not None}:
            points = {"color": "#D55E00", "markersize": 9, "markeredgecolor": BOUND, "zorder": 3}
            label = f"{kind}, measured"
            ax.plot(list(seen), list(seen.values()), marker, label=label, **points)
    ax.axhline(report.model_rate, color=BOUND, linestyle="--", label="the model alone")
    ax.axhline(report.serial_rate, color=BOUND, linestyle=":", label="your loop")
    ax.set_xscale("log", base=2)
    ticks = sorted({row.n for row in report.rows})
    ax.set_xticks(ticks, [str(n) for n in ticks])
    if report.model_rate > 3 * max(row.predicted for row in report.rows):
        _logarithmic(ax)
    else:
        ax.set_ylim(bottom=0)
    title = f"{report.best.name}: about {report.speed_up:.1f}x the serial loop"
    if report.leave:
        title = f"Leave your loop: {title[0].lower()}{title[1:]}"
    ax.set(xlabel="workers", ylabel="steps per second")
    _legend(ax)
    return _with_texts(figure, title, machine)


def _per_second(rate: float) -> str:
    return f"{rate:,.0f} steps/s" if rate >= 100 else f"{rate:.3g} steps/s"


def law(
    n: int, bounds_of: Mapping[str, Sequence[float]], machine: Mapping[str, Any] | None = None
) -> Figure:
    """Steps/s that the laws allow 1, 2, 3 ... workers: each bound, the least of them, and n's.

    Args:
        bounds_of: name to steps/s at each number of workers; infinite where there is no such bound.
    """
    figure, ax = _figure()
    counts = np.arange(1, 1 + len(next(iter(bounds_of.values()))))
    least = np.min(list(bounds_of.values()), axis=0)
    for (name, rates), style in zip(bounds_of.items(), ("-.", ":", "--", (0, (1, 3)), (0, (5, 5))),
                                    strict=False):  # fmt: skip
        if np.isfinite(rates).any():
            label = f"{name}: {_per_second(rates[n - 1])}"  # its line may lie far above the picture
            ax.plot(counts, rates, color="0.5", linestyle=style, linewidth=1, label=label)
    ax.plot(counts, least, color=COMPUTE, linewidth=3, label="the least of them")
    ax.plot(n, least[n - 1], "o", color="#D55E00", markersize=10)
    ax.set(xlabel="workers", ylabel="steps per second", ylim=(0, 1.3 * least.max()))
    _legend(ax)
    limit = min(bounds_of, key=lambda name: bounds_of[name][n - 1])
    title = f"{n} worker{'s' * (n > 1)}: at most {_per_second(least[n - 1])}, set by {limit}"
    return _with_texts(figure, title, machine)
